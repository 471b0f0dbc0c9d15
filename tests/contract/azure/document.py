"""The calls of Azure's chat-completion walk-through, first to last, as one script for the official SDK.

Run in an environment of its own, in a folder that holds `download-dataset.py`. Each block says on the way
what it found; the last line is JSON for whoever drives it. What the published notebook has and the document
leaves out (a name and a size for the cluster, making it when there is none) stands between the marks.
"""

import ast
import json
import os
import random
import sys
import time

from azure.ai.ml import Input, MLClient
from azure.ai.ml.constants import AssetTypes
from azure.ai.ml.dsl import pipeline
from azure.ai.ml.entities import (
    AmlCompute,
    ManagedOnlineDeployment,
    ManagedOnlineEndpoint,
    Model,
    OnlineRequestSettings,
    ProbeSettings,
)
from azure.identity import DefaultAzureCredential, InteractiveBrowserCredential

clock = {"start": time.perf_counter()}


def lap(name):
    clock[name] = time.perf_counter()


# 1. Who asks, and of what workspace and registry.
try:
    credential = DefaultAzureCredential()
    credential.get_token("https://management.azure.com/.default")
except Exception:
    credential = InteractiveBrowserCredential()
try:
    workspace = MLClient.from_config(credential=credential)
except Exception:
    workspace = MLClient(
        credential,
        subscription_id="<SUBSCRIPTION_ID>",
        resource_group_name="<RESOURCE_GROUP>",
        workspace_name="<WORKSPACE_NAME>",
    )
registry = MLClient(credential, registry_name="azureml")
experiment_name = "chat_completion_Phi-3-mini-4k-instruct"
timestamp = str(int(time.time()))

# 2. The base model.
model_name = "Phi-3-mini-4k-instruct"
base = registry.models.get(model_name, label="latest")
print(f"base model {base.name}, version {base.version}, id {base.id}")

# 3. The compute: the model's list, the cluster, its checks, its GPUs.
if "finetune_compute_allow_list" in base.tags:
    allowed = ast.literal_eval(base.tags["finetune_compute_allow_list"])
else:
    allowed = None
# --- the notebook's lines that the document leaves out
compute_cluster = "gpu-cluster-big"
compute_cluster_size = "Standard_NC24ads_A100_v4"
try:
    compute = workspace.compute.get(compute_cluster)
    print("the cluster is there already")
except Exception:
    compute = AmlCompute(
        name=compute_cluster,
        size=compute_cluster_size,
        tier="Dedicated",
        max_instances=2,
    )
    workspace.compute.begin_create_or_update(compute).wait()
# ---
compute = workspace.compute.get(compute_cluster)
if compute.provisioning_state.lower() == "failed":
    raise ValueError(f"provisioning of {compute_cluster} failed")
if allowed is not None:
    if compute.size.lower() not in [size.lower() for size in allowed]:
        raise ValueError(f"{compute.size} is not in the list of the model")
elif compute.size.lower() in ["standard_nc6", "standard_nc12", "standard_nc24", "standard_nc24r"]:
    raise ValueError(f"{compute.size} is denied")
sizes = {size.name.lower(): size.gpus for size in workspace.compute.list_sizes()}
if compute.size.lower() not in sizes:
    raise ValueError(f"{compute.size} is not among {sorted(sizes)}")
gpus_per_node = sizes[compute.size.lower()]
print(f"GPUs of {compute.size}: {gpus_per_node}")

# 4. The data.
lap("prepared")
if os.system(
    f'"{sys.executable}" ./download-dataset.py --dataset HuggingFaceH4/ultrachat_200k '
    "--download_dir ultrachat_200k_dataset --dataset_split_pc 5"
):
    raise Exception("the dataset was not downloaded")

# 5. Parameters, the pipeline, its name.
lap("data")
training = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "learning_rate": 5e-6,
    "lr_scheduler_type": "cosine",
}
optimization = {"apply_lora": "true", "apply_deepspeed": "true", "deepspeed_stage": 2}
finetune_parameters = {**training, **optimization}
if "model_specific_defaults" in base.tags:
    print("Warning! Model specific defaults exist. The defaults could be overridden.")
    finetune_parameters.update(ast.literal_eval(base.tags["model_specific_defaults"]))
print(f"parameters: {finetune_parameters}")


def display_name():
    def given(name, default):
        return finetune_parameters.get(name, default)

    batch = (
        int(given("per_device_train_batch_size", 1))
        * int(given("gradient_accumulation_steps", 1))
        * int(gpus_per_node)
        * int(given("num_nodes_finetune", 1))
    )
    parts = [
        model_name,
        "ultrachat",
        f"bs{batch}",
        given("lr_scheduler_type", "linear"),
        f"ds{given('deepspeed_stage', '2')}" if given("apply_deepspeed", "false") == "true" else "nods",
        "lora" if given("apply_lora", "false") == "true" else "nolora",
    ]
    tail = f"-save_limit{given('save_total_limit', -1)}-seqlen{given('max_seq_length', -1)}"
    return "-".join(parts) + tail


component = registry.components.get(name="chat_completion_pipeline", label="latest")


@pipeline(name=display_name())
def create_pipeline():
    chat_completion_pipeline = component(
        mlflow_model_path=base.id,
        compute_model_import=compute_cluster,
        compute_preprocess=compute_cluster,
        compute_finetune=compute_cluster,
        compute_model_evaluation=compute_cluster,
        train_file_path=Input(type="uri_file", path="./ultrachat_200k_dataset/train_sft.jsonl"),
        test_file_path=Input(type="uri_file", path="./ultrachat_200k_dataset/test_sft.jsonl"),
        number_of_gpu_to_use_finetuning=gpus_per_node,
        **finetune_parameters,
    )
    return {"trained_model": chat_completion_pipeline.outputs.mlflow_model_folder}


pipeline_object = create_pipeline()
pipeline_object.settings.force_rerun = True
pipeline_object.settings.continue_on_step_failure = False
job = workspace.jobs.create_or_update(pipeline_object, experiment_name=experiment_name)
lap("submitted")
workspace.jobs.stream(job.name)
lap("trained")

# 6. The model.
print("outputs:", workspace.jobs.get(job.name).outputs)
registered = workspace.models.create_or_update(
    Model(
        path=f"azureml://jobs/{job.name}/outputs/trained_model",
        type=AssetTypes.MLFLOW_MODEL,
        name=(model_name + "-ultrachat-200k").replace("/", "-"),
        version=timestamp,
        description=model_name + " fine tuned model for ultrachat 200k chat-completion",
    )
)
print("registered:", registered)

# 7. Endpoint, deployment, traffic.
endpoint_name = "ultrachat-completion-" + timestamp
endpoint = ManagedOnlineEndpoint(
    name=endpoint_name,
    description=f"Online endpoint for {registered.name}, fine tuned model for ultrachat-200k-chat-completion",
    auth_mode="key",
)
workspace.begin_create_or_update(endpoint).wait()
instance_type = "Standard_NC6s_v3"
if instance_type not in ast.literal_eval(base.tags.get("inference_compute_allow_list", "[]")):
    print(f"{instance_type} is not in the model's list")
lap("endpoint")
workspace.online_deployments.begin_create_or_update(
    ManagedOnlineDeployment(
        name="demo",
        endpoint_name=endpoint_name,
        model=registered.id,
        instance_type=instance_type,
        instance_count=1,
        liveness_probe=ProbeSettings(initial_delay=600),
        request_settings=OnlineRequestSettings(request_timeout_ms=90000),
    )
).wait()
lap("deployed")
endpoint.traffic = {"demo": 100}
workspace.begin_create_or_update(endpoint).result()

# 8. A question out of the test data, to the deployment.
with open("./ultrachat_200k_dataset/test_gen.jsonl", encoding="utf-8") as file:
    row = random.choice([json.loads(line) for line in file])
request = {
    "input_data": {
        "input_string": [row["messages"]],
        "parameters": {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "max_new_tokens": 20},
    },
    "params": {},
}
with open("./ultrachat_200k_dataset/sample_score.json", "w", encoding="utf-8") as file:
    json.dump(request, file)
response = workspace.online_endpoints.invoke(
    endpoint_name=endpoint_name,
    deployment_name="demo",
    request_file="./ultrachat_200k_dataset/sample_score.json",
)
lap("invoked")
print("raw response:\n", response, "\n")

# 9. Nothing is left.
workspace.online_endpoints.begin_delete(name=endpoint_name).wait()
lap("deleted")

print(
    "\n"
    + json.dumps(
        {
            "job": job.name,
            "display_name": job.display_name,
            "model": {"name": registered.name, "version": registered.version, "id": registered.id},
            "base": base.id,
            "gpus": gpus_per_node,
            "endpoint": endpoint_name,
            "traffic": endpoint.traffic,
            "response": json.loads(response),
            "laps": {name: at - clock["start"] for name, at in clock.items()},
        }
    )
)
