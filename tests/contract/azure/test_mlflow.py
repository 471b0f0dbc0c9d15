"""MLflow over the listener: with the plugin that the document installs, and without it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.contract.azure.sdk import ROOT, AzureWorld
from tests.contract.azure.wire import WORKSPACE, Wire
from tests.loop.world import wait_for

PLUGIN = ROOT / ".azure" / "mlflow"
API = f"/mlflow/v2.0{WORKSPACE}/api/2.0/mlflow"

SCRIPT = """
import json, os
import mlflow
from azure.ai.ml import MLClient
from azure.identity import DefaultAzureCredential

ml = MLClient(DefaultAzureCredential(), "00000000-0000-0000-0000-000000000000", "tuneloop", "local")
uri = ml.workspaces.get("local").mlflow_tracking_uri
told = {{"uri": uri}}

def read(uri):
    mlflow.set_tracking_uri(uri)
    run = mlflow.get_run("{job}")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment(run.info.experiment_id)
    runs = client.search_runs([run.info.experiment_id], "attributes.run_name LIKE 'finetune %'")
    tuned = next(one for one in runs if client.get_metric_history(one.info.run_id, "loss"))
    parent = tuned.data.tags["mlflow.parentRunId"]
    of_parent = client.search_runs([run.info.experiment_id], f"tags.mlflow.parentRunId = '{{parent}}'")
    return {{
        "run_id": run.info.run_id, "status": run.info.status, "experiment": experiment.name,
        "parent": parent, "of_parent": mlflow.get_run(parent).info.run_id,
        "losses": [point.value for point in client.get_metric_history(tuned.info.run_id, "loss")],
        "children": sorted(one.info.run_name for one in of_parent),
    }}

told["plugin"] = read(uri)
os.environ["MLFLOW_TRACKING_TOKEN"] = os.environ["PLAIN_TOKEN"]
told["plain"] = read(uri.replace("azureml://", "https://").replace("/v1.0/", "/v2.0/"))

mlflow.set_tracking_uri(uri)
mlflow.set_experiment("by-script")
with mlflow.start_run(run_name="own") as run:
    mlflow.log_param("colour", "red")
    for step in range(3):
        mlflow.log_metric("score", step / 2, step=step)
    mlflow.log_dict({{"a": 1}}, "notes/a.json")
client = mlflow.MlflowClient()
found = mlflow.search_runs(experiment_names=["by-script"], output_format="list")
told["own"] = {{
    "history": [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "score")],
    "names": [one.info.run_name for one in found],
    "status": found[0].info.status,
    "files": [one.path for one in client.list_artifacts(run.info.run_id, "notes")],
}}
client.log_metric("{job}", "judged_by_people", 4.5)
told["added"] = mlflow.get_run("{job}").data.metrics["judged_by_people"]
try:
    mlflow.get_run("nobody")
except mlflow.exceptions.MlflowException as error:
    told["missing"] = error.error_code
print("TOLD" + json.dumps(told))
"""


@pytest.fixture(scope="module")
def wire(azure: AzureWorld) -> Iterator[Wire]:
    with Wire(azure) as opened:
        yield opened


def test_mlflow_reads_and_writes_runs_by_the_names_of_their_jobs(
    azure: AzureWorld, wire: Wire, completed: str
) -> None:
    if not PLUGIN.is_dir():
        pytest.skip("azureml-mlflow is not there: make .azure/.installed")
    wait_for(lambda: wire.get(f"{API}/runs/get?run_id={completed}").status_code == 200, "the run in MLflow")
    ran = azure.run_script(SCRIPT.format(job=completed), PYTHONPATH=str(PLUGIN), PLAIN_TOKEN=wire.token)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout.rpartition("TOLD")[2])
    # With the plugin the SDK makes v2.0 of what we said.
    assert told["uri"] == f"azureml://{azure.url.removeprefix('https://')}/mlflow/v2.0{WORKSPACE}"
    plugin = told["plugin"]
    assert plugin == told["plain"]
    experiment = azure.client.job(completed)["experiment"]
    assert (plugin["run_id"], plugin["status"], plugin["experiment"]) == (completed, "FINISHED", experiment)
    assert plugin["parent"] == plugin["of_parent"]
    assert plugin["parent"] in [job["name"] for job in azure.client.jobs()]
    assert any(name.startswith("finetune") for name in plugin["children"])
    assert len(plugin["losses"]) >= 2
    assert all(loss > 0 for loss in plugin["losses"])
    own = told["own"]
    assert own["history"] == [[0, 0.0], [1, 0.5], [2, 1.0]]
    assert (own["names"], own["status"], own["files"]) == (["own"], "FINISHED", ["notes/a.json"])
    assert (told["added"], told["missing"]) == (4.5, "RESOURCE_DOES_NOT_EXIST")


def test_without_a_token_of_ours_mlflow_is_not_asked(wire: Wire, azure: AzureWorld) -> None:
    before = [one for one in azure.client.status()["services"] if one["name"] == "mlflow"]
    answer = wire.api.get(f"{API}/experiments/search", headers={"authorization": "Bearer nobody"})
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "InvalidAuthenticationToken"
    after = [one for one in azure.client.status()["services"] if one["name"] == "mlflow"]
    assert after == before


def test_the_helper_behind_it_answers_nobody_else(wire: Wire, azure: AzureWorld) -> None:
    assert wire.get(f"{API}/experiments/search?max_results=1").status_code == 200
    (service,) = [one for one in azure.client.status()["services"] if one["name"] == "mlflow"]
    plain = wire.api.get(
        f"http://127.0.0.1:{service['port']}/api/2.0/mlflow/experiments/search?max_results=1"
    )
    assert plain.status_code == 401
    spec = azure.service_folder("mlflow") / "mlflow.json"
    assert spec.stat().st_mode & 0o077 == 0
