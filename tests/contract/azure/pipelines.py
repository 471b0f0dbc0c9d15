"""Pipeline jobs as scripts make them: the component's call, by the SDK and by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.contract.azure.sdk import BASE, Said, Sdk

COMPONENT = "azureml://registries/azureml/components/chat_completion_pipeline/versions/0.0.82"
MODEL = f"azureml://registries/azureml/models/{BASE}/labels/latest"

_SUBMIT = """
component = registry.components.get(name="chat_completion_pipeline", label="latest")
base = registry.models.get({base!r}, label="latest")

@dsl.pipeline(name={name!r})
def create():
    node = component(
        mlflow_model_path=base.id,
        train_file_path=Input(type="uri_file", path={train!r}),
        test_file_path=Input(type="uri_file", path="./test.jsonl"),
        **{inputs!r},
    )
    return {{"trained_model": node.outputs.mlflow_model_folder}}

job = create()
job.tags = {tags!r}
job.settings.force_rerun = {force_rerun!r}
job.settings.continue_on_step_failure = {go_on!r}
result = ml.jobs.create_or_update(job, experiment_name={experiment!r}).name
"""


@dataclass(frozen=True)
class Streamed:
    name: str
    printed: str


def try_to_submit(
    sdk: Sdk,
    name: str,
    *,
    train: str = "./train.jsonl",
    tags: dict[str, str] | None = None,
    experiment: str = "contract",
    force_rerun: bool = False,
    go_on: bool = False,
    **inputs: Any,
) -> Said:
    """`name` is what the pipeline is called; the result is the job's name, which the SDK makes up."""
    given = {
        "apply_lora": "true",
        "lora_r": 4,
        "learning_rate": 1e-2,
        "evaluation_strategy": "epoch",
        **inputs,
    }
    return sdk.run(
        _SUBMIT.format(
            base=BASE,
            name=name,
            train=train,
            inputs=given,
            tags=tags or {},
            force_rerun=force_rerun,
            go_on=go_on,
            experiment=experiment,
        )
    )


def submit(sdk: Sdk, name: str, **options: Any) -> str:
    return str(try_to_submit(sdk, name, **options).ok())


def request(train: str, *, properties: dict[str, Any] | None = None, **inputs: Any) -> dict[str, Any]:
    """The body of a PUT. `train` is the address of a file; inputs that are no mappings are literals."""
    given: dict[str, Any] = {
        "mlflow_model_path": {"job_input_type": "mlflow_model", "uri": MODEL},
        "train_file_path": {"job_input_type": "uri_file", "uri": train},
        "apply_lora": "true",
        **inputs,
    }
    node = {
        "name": "tune",
        "type": "pipeline",
        "componentId": COMPONENT,
        "inputs": {
            name: one if isinstance(one, dict) else {"job_input_type": "literal", "value": one}
            for name, one in given.items()
        },
        "outputs": {"mlflow_model_folder": {"value": "${{parent.outputs.trained_model}}", "type": "literal"}},
    }
    return {
        "properties": {
            "jobType": "Pipeline",
            "experimentName": "contract",
            "outputs": {"trained_model": {"jobOutputType": "mlflow_model"}},
            "settings": {"_source": "DSL"},
            "jobs": {"tune": node},
            **(properties or {}),
        }
    }
