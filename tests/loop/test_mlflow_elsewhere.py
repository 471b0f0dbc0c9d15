"""The loop with an MLflow server elsewhere, which is killed in the middle and comes back."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.loop.elsewhere import Elsewhere
from tests.loop.world import SHORT, LoopWorld, wait_for
from tests.mlflow_server import MlflowServerProcess
from tuneloop import daemon
from tuneloop.adapters.files import LocalFiles
from tuneloop.adapters.mlflow import open_server
from tuneloop.adapters.sql import SqlStore
from tuneloop.core.digest import of_path
from tuneloop.core.types import ModelRecord
from tuneloop.daemon import SystemClock
from tuneloop.workspace.tracking import rebuild

PASSWORD = "s3cret-of-mlflow"
SLOW = {"finetune.num_train_epochs": "12"}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[Elsewhere]:
    folder = tmp_path_factory.mktemp("elsewhere")
    mlflow = MlflowServerProcess(folder / "elsewhere")
    try:
        mlflow.start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", mlflow.uri)
            patch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
            patch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
            world = LoopWorld(folder / "world", model_folder)
            yield Elsewhere(mlflow, world)
            world.take_down()
    finally:
        mlflow.kill()


@pytest.fixture(scope="module")
def job(elsewhere: Elsewhere) -> str:
    """It ran while MLflow was killed with whatever it was doing, and was away for a while."""
    world, mlflow = elsewhere.world, elsewhere.mlflow
    name = world.submit(SHORT, **SLOW)
    folder = world.wait_until_training(name)
    wait_for(lambda: len(elsewhere.runs(name)) > 2, "MLflow to show some of it")
    world.identity(folder)
    mlflow.kill()
    ended = world.wait_until_ended(name)
    assert ended["state"] == "completed", ended["error"]
    wait_for(lambda: elsewhere.status()["problems"], "the tracker to say that nobody answers")
    return name


def test_a_job_completes_while_mlflow_is_away_and_status_tells_the_lag(
    elsewhere: Elsewhere, job: str
) -> None:
    told = elsewhere.status()
    assert told["tracking_uri"] == elsewhere.mlflow.uri
    assert told["lag_bytes"] > 0
    assert told["problems"] == [f"MLflow: {elsewhere.mlflow.uri} does not answer: Connection refused."]


def test_when_mlflow_is_back_everything_is_there_once(elsewhere: Elsewhere, job: str) -> None:
    elsewhere.mlflow.start()
    runs = elsewhere.wait_until_carried(job)
    world = elsewhere.world
    attempts = {
        f"{job}/{step['name']}/{number}"
        for step in world.client.job(job)["steps"]
        for number in range(1, step["attempts"] + 1)
    }
    assert runs.keys() == {"job", *attempts}
    parent = runs["job"]
    assert {runs[key].data.tags["mlflow.parentRunId"] for key in attempts} == {parent.info.run_id}
    assert parent.data.params["finetune.num_train_epochs"] == SLOW["finetune.num_train_epochs"]
    used = {one.dataset.name.split(":")[0] for one in parent.inputs.dataset_inputs}
    assert used == {"train", "test"}
    assert elsewhere.curve(runs[f"{job}/finetune/1"]) == pytest.approx(world.losses(job))


def test_a_registered_models_bytes_arrive_and_load_with_plain_mlflow(elsewhere: Elsewhere, job: str) -> None:
    world = elsewhere.world
    world.client.register(job, "trained_model", name="tiny", version="spring", tags={"team": "blue"})
    model = wait_for(
        lambda: (found := world.client.model("tiny", "spring")).mlflow_version and found, "the registry"
    )
    source = elsewhere.client().get_model_version("tiny", str(model.mlflow_version)).source
    assert source.startswith("mlflow-artifacts:/")
    there = elsewhere.mlflow.artifacts / source.removeprefix("mlflow-artifacts:/")
    assert of_path(there)[0] == model.artifact
    program = (
        "import sys, mlflow; sys.modules['tuneloop'] = None\n"
        f"model = mlflow.pyfunc.load_model('models:/tiny/{model.mlflow_version}')\n"
        "print(model.predict({'messages': [{'role': 'user', 'content': 'Hi'}]})[0]['object'])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "MLFLOW_TRACKING_URI": elsewhere.mlflow.uri},
        capture_output=True,
        text=True,
        cwd=world.folder,
    )
    assert ran.stdout.strip().endswith("chat.completion"), ran.stderr


def test_models_are_rebuilt_from_the_tags_there(elsewhere: Elsewhere, job: str, tmp_path: Path) -> None:
    known = elsewhere.world.client.model("tiny", "spring")
    store = SqlStore.open(tmp_path / "tuneloop.db")
    told = rebuild(store, open_server(elsewhere.mlflow.uri, tmp_path / "artifacts"), SystemClock())
    assert told == [f"model tiny:spring: restored from MLflow's version {known.mlflow_version}."]
    restored = store.get(ModelRecord, "tiny:spring")
    for field in ("artifact", "tags", "lineage", "metrics", "template_digest", "mlflow_version"):
        assert getattr(restored, field) == getattr(known, field)


def test_mlflows_credentials_reach_the_tracker_alone_and_stand_in_no_file(
    elsewhere: Elsewhere, job: str
) -> None:
    world = elsewhere.world
    world.client.create_endpoint("doc-endpoint")
    owners = wait_for(lambda: {"tracker", "router"} <= _kinds(world) and _kinds(world), "the router")
    knowing = {
        process.environ()["TUNELOOP_OWNER"].split("/")[1]
        for process in _processes_of(world)
        if PASSWORD in process.environ().values()
    }
    assert (knowing, owners) == ({"tracker"}, {"tracker", "router"})
    world.client.delete_endpoint("doc-endpoint")
    assert [path for path in world.home.rglob("*") if PASSWORD.encode() in _content(path)] == []


def _content(path: Path) -> bytes:
    with contextlib.suppress(FileNotFoundError, IsADirectoryError):
        return path.read_bytes()
    return b""


def _kinds(world: LoopWorld) -> set[str]:
    return {owner.split("/")[0] for owner in world.processes()}


def _processes_of(world: LoopWorld) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if process.environ().get("TUNELOOP_OWNER", "").startswith(world.home_id()):
                yield process
        except psutil.Error:
            continue


def test_a_deleted_model_leaves_the_registry_and_its_bytes_go(elsewhere: Elsewhere, job: str) -> None:
    world = elsewhere.world
    known = world.client.model("tiny", "spring")
    source = elsewhere.client().get_model_version("tiny", str(known.mlflow_version)).source
    there = elsewhere.mlflow.artifacts / source.removeprefix("mlflow-artifacts:/")
    world.client.delete_model("tiny", "spring")
    wait_for(lambda: not elsewhere.client().search_registered_models(), "the model to go")
    assert not there.exists()
    assert of_path(LocalFiles(world.home).artifact_path(known.artifact))[0] == known.artifact


def test_a_server_started_with_another_mlflow_carries_everything_there(
    elsewhere: Elsewhere, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    world = elsewhere.world
    world.client.register(job, "trained_model", name="moved")
    wait_for(lambda: world.client.model("moved").mlflow_version, "the registry elsewhere")
    world.client.shutdown("server")
    wait_for(lambda: not world.processes() or _kinds(world) == {"tracker"}, "the tracker alone to go on")
    wait_for(lambda: not daemon.is_locked(world.home), "the server to end")
    monkeypatch.setenv("TUNELOOP_MLFLOW_TRACKING_URI", "home")
    world.restart_server()
    assert elsewhere.status()["tracking_uri"].startswith("sqlite:///")
    wait_for(lambda: (world.home / "mlflow" / "mlflow.db").exists(), "the database in the home")
    client = MlflowClient(f"sqlite:///{world.home}/mlflow/mlflow.db")
    wait_for(lambda: client.search_registered_models(), "the model in the home's MLflow")
    found = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert {"job"} < {run.data.tags.get("tuneloop.attempt", "job") for run in found}
    assert {run.info.status for run in found} == {"FINISHED"}
