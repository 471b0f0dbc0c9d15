"""The whole loop through real processes, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import httpx
import pytest

from tests.loop.world import RECIPE, SHORT, SLOW, LoopWorld, wait_for
from tuneloop import daemon


@pytest.fixture(scope="module")
def job(shared_world: LoopWorld) -> str:
    name = shared_world.submit()
    ended = shared_world.wait_until_ended(name)
    assert ended["state"] == "completed", ended["error"]
    return name


def test_every_step_succeeded_and_every_output_is_there(shared_world: LoopWorld, job: str) -> None:
    view = shared_world.client.job(job)
    assert [step["name"] for step in view["steps"]] == [
        "model_import",
        "preprocess",
        "finetune",
        "export",
        "evaluate",
    ]
    assert {step["state"] for step in view["steps"]} == {"succeeded"}
    assert all(output["digest"] for output in view["outputs"].values())
    files = {found["path"] for found in shared_world.client.output_files(job, "trained_model")}
    assert {"MLmodel", "tuneloop.json"} <= files


def test_the_model_learned_and_the_evaluation_says_so(shared_world: LoopWorld, job: str) -> None:
    metrics = shared_world.step(job, "evaluate")["metrics"]
    assert metrics["tuned_loss"] < metrics["base_loss"]


def test_a_second_job_reuses_every_step(shared_world: LoopWorld, job: str) -> None:
    again = shared_world.submit()
    assert shared_world.wait_until_ended(again)["state"] == "completed"
    steps = shared_world.client.job(again)["steps"]
    reused = {step["name"]: step["reused_from"] for step in steps if step["state"] == "reused"}
    assert reused.keys() >= {"preprocess", "finetune", "export", "evaluate"}
    assert reused["finetune"] == f"{job}/finetune/1"


def test_a_changed_parameter_runs_only_what_depends_on_it(shared_world: LoopWorld, job: str) -> None:
    again = shared_world.submit(**{"evaluate.max_new_tokens": 4})
    assert shared_world.wait_until_ended(again)["state"] == "completed"
    states = {step["name"]: step["state"] for step in shared_world.client.job(again)["steps"]}
    assert states["finetune"] == states["export"] == "reused"
    assert states["evaluate"] == "succeeded"


def test_a_step_can_be_repeated_by_hand_from_its_folder(shared_world: LoopWorld, job: str) -> None:
    original = shared_world.home / "jobs" / job / "preprocess" / "1"
    folder = shared_world.folder / "by-hand"
    folder.mkdir()
    (folder / "step.json").write_text((original / "step.json").read_text())
    subprocess.run([sys.executable, "-m", "tuneloop.steps", str(folder)], check=True, capture_output=True)
    first = json.loads((original / "result.json").read_text())
    second = json.loads((folder / "result.json").read_text())
    assert first["outputs"] == second["outputs"]
    owned = subprocess.run([sys.executable, "-m", "tuneloop.steps", str(folder)], capture_output=True)
    assert owned.returncode == 3


def test_a_registered_model_loads_in_mlflow_without_tuneloop(shared_world: LoopWorld, job: str) -> None:
    model = shared_world.client.register(
        job, "trained_model", name="tiny", version="2026-11", description="d", tags={"team": "a"}
    )
    assert model.lineage.job == job
    assert model.lineage.base_model == "Tiny-Chat:1"
    assert set(model.lineage.datasets) >= {"train", "test"}
    assert model.template_digest
    registered = wait_for(
        lambda: (found := shared_world.client.model("tiny", "2026-11")).mlflow_version and found, "MLflow"
    )
    program = (
        "import sys, mlflow; sys.modules['tuneloop'] = None\n"
        f"mlflow.set_tracking_uri('sqlite:///{shared_world.home}/mlflow/mlflow.db')\n"
        f"model = mlflow.pyfunc.load_model('models:/tiny/{registered.mlflow_version}')\n"
        "print(model.predict({'messages': [{'role': 'user', 'content': 'Hi'}]})[0]['object'])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=shared_world.folder
    )
    assert ran.stdout.strip().endswith("chat.completion"), ran.stderr


def test_mlflow_holds_a_run_per_job_and_a_nested_one_per_attempt(shared_world: LoopWorld, job: str) -> None:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{shared_world.home}/mlflow/mlflow.db")

    def finished() -> object:
        experiment = client.get_experiment_by_name("tests")
        if experiment is None:
            return None
        found = client.search_runs([experiment.experiment_id], f"tags.`tuneloop.job` = '{job}'")
        parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
        return parents and parents[0].info.status == "FINISHED" and (experiment, parents[0])

    experiment, parent = wait_for(finished, "the tracker")  # type: ignore[misc]
    children = client.search_runs(
        [experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    assert len(children) == 5
    assert parent.data.params["finetune.learning_rate"] == "0.01"
    assert parent.data.metrics["evaluate.tuned_loss"] == pytest.approx(
        shared_world.step(job, "evaluate")["metrics"]["tuned_loss"]
    )
    assert {found.dataset.digest for found in parent.inputs.dataset_inputs}


def test_the_documents_request_is_answered_by_key_and_deployment(shared_world: LoopWorld, job: str) -> None:
    client = shared_world.client
    client.register(job, "trained_model", name="served")
    client.create_endpoint("doc-endpoint")
    client.create_deployment("doc-endpoint", "demo", "served:1", replicas=1)
    client.create_deployment("doc-endpoint", "base", "base:Tiny-Chat")
    client.set_traffic("doc-endpoint", {"demo": 100})
    for name in ("demo", "base"):
        wait_for(lambda name=name: client.deployment("doc-endpoint", name)["state"] == "ready", name)
    uri = str(client.endpoint("doc-endpoint")["scoring_uri"])
    key = client.keys("doc-endpoint")["primary"]
    messages = [{"role": "user", "content": "What is colour 1?"}]
    body = {
        "input_data": {
            "input_string": [messages],
            "parameters": {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "max_new_tokens": 5},
        },
        "params": {},
    }
    headers = {"authorization": f"Bearer {key}", "azureml-model-deployment": "base"}
    answer = httpx.post(uri, json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.headers["azureml-model-deployment"] == "base"
    assert httpx.post(uri, json=body, headers={"authorization": "Bearer wrong"}).status_code == 401
    flat = {"input_data": {"input_string": messages, "parameters": {"max_new_tokens": 5}}}
    assert httpx.post(uri, json=flat, headers=headers, timeout=60).status_code == 200
    client.delete_endpoint("doc-endpoint")
    wait_for(lambda: client.endpoints() == [], "the endpoint to go")
    wait_for(lambda: len(shared_world.processes()) == 1, "only the tracker to be left")


def test_cancel_in_the_middle_of_training_leaves_no_process(shared_world: LoopWorld, job: str) -> None:
    slow = shared_world.submit(**SLOW, force_rerun=True)
    shared_world.wait_until_training(slow)
    queued = shared_world.submit(**SLOW, **{"finetune.seed": 7})
    shared_world.client.cancel(queued)
    shared_world.client.cancel(slow)
    for name in (queued, slow):
        assert shared_world.wait_until_ended(name)["state"] == "canceled"
    wait_for(lambda: all("tracker" in owner for owner in shared_world.processes()), "processes to go")


def test_a_failing_step_tells_why_with_file_and_line(shared_world: LoopWorld, job: str) -> None:
    long = "x " * 2000
    rows = shared_world.folder / "long.jsonl"
    messages = [{"role": "user", "content": long}, {"role": "assistant", "content": "y"}]
    rows.write_text(json.dumps({"messages": messages}) + "\n")
    recipe = RECIPE.replace("train: train.jsonl", "train: long.jsonl")
    ended = shared_world.wait_until_ended(shared_world.submit(recipe))
    assert ended["state"] == "failed"
    assert "long.jsonl" in ended["error"]["message"]
    assert "line 1" in ended["error"]["message"]
    states = {step["name"]: step["state"] for step in ended["steps"]}
    assert states["model_import"] in {"reused", "succeeded"}
    assert states["preprocess"] == "failed"
    assert {states[name] for name in ("finetune", "export", "evaluate")} == {"skipped"}


def test_many_callers_at_once_start_one_server_and_each_job_runs_once(
    tmp_path_factory: pytest.TempPathFactory, model_folder: object
) -> None:
    world = LoopWorld(tmp_path_factory.mktemp("race") / "a home with ümlaut", model_folder)  # type: ignore[arg-type]
    world.take_down()
    servers: list[int] = []
    threads = [
        threading.Thread(target=lambda: servers.append(daemon.ensure(world.settings).pid)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(servers)) == 1
    world.restart_server()
    names = [world.submit(SHORT, **{"finetune.seed": seed}) for seed in (1, 1, 2)]
    for name in names:
        assert world.wait_until_ended(name)["state"] == "completed"
        for step in world.client.job(name)["steps"]:
            assert step["attempts"] <= 1
    world.take_down()
    assert world.processes() == []


def test_down_keeps_the_job_and_the_next_server_goes_on_with_it(world: LoopWorld) -> None:
    name = world.submit(SHORT, **SLOW)
    world.wait_until_training(name)
    world.take_down()
    assert world.processes() == []
    world.restart_server()
    assert world.wait_until_ended(name)["state"] == "completed"
    assert world.step(name, "finetune")["attempts"] == 2
