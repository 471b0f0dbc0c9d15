"""MLflow over the gateway: the two ids of a job's run, and where a workspace's MLflow is."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fakes import FakeStore
from tuneloop.core.errors import Unavailable
from tuneloop.core.settings import Settings
from tuneloop.core.states import ServiceState
from tuneloop.core.types import ErrorInfo, Job, JobRecord, ServiceRecord, TrackingRecord
from tuneloop.server.azure import tracking
from tuneloop.server.azure.bodies import Body
from tuneloop.server.azure.errors import Refusal
from tuneloop.server.azure.gateway import Gateway
from tuneloop.server.azure.routing import Request

NOW = datetime(2026, 1, 1, tzinfo=UTC)
RUN = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def store() -> FakeStore:
    filled = FakeStore()
    job = Job(name="calm_fox", display_name="", experiment="e", steps=(), outputs={})
    filled.insert(JobRecord(created_at=NOW, job=job))
    filled.insert(TrackingRecord(created_at=NOW, subject="job/calm_fox", run_id=RUN))
    filled.insert(TrackingRecord(created_at=NOW, subject="job/calm_fox @ https://elsewhere", run_id="other"))
    return filled


def gateway_of(store: FakeStore, uri: str = "") -> Gateway:
    settings = Settings(home=Path("/home"), mlflow_tracking_uri=uri)
    parts: Any = SimpleNamespace(store=store, settings=settings, wake=lambda: None)
    unused: Any = None
    return Gateway(parts, "https://127.0.0.1:8443", Path("/"), b"", unused, "")


def names(store: FakeStore) -> Any:
    return tracking._Names(gateway_of(store))


def test_a_jobs_name_becomes_the_id_of_its_run_wherever_an_id_stands(store: FakeStore) -> None:
    asked = {"run_id": "calm_fox", "run_ids": ["calm_fox", "x"], "tags": [{"key": "a", "value": "calm_fox"}]}
    found = names(store).translated(asked, names(store).inward)
    assert found == {"run_id": RUN, "run_ids": [RUN, "x"], "tags": [{"key": "a", "value": "calm_fox"}]}
    assert names(store).inward("run_id", "nobody") == "nobody"
    assert names(store).inward("run_id", RUN) == RUN


def test_what_comes_back_has_the_jobs_name(store: FakeStore) -> None:
    answer = {
        "run": {
            "info": {"run_id": RUN, "run_uuid": RUN, "artifact_uri": f"file:///x/{RUN}"},
            "data": {"tags": [{"key": "mlflow.parentRunId", "value": RUN}, {"key": "b", "value": RUN}]},
        }
    }
    found = names(store).translated(answer, names(store).outward)["run"]
    assert found["info"] == {"run_id": "calm_fox", "run_uuid": "calm_fox", "artifact_uri": f"file:///x/{RUN}"}
    assert found["data"]["tags"] == [
        {"key": "mlflow.parentRunId", "value": "calm_fox"},
        {"key": "b", "value": RUN},
    ]


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("tags.mlflow.parentRunId = 'calm_fox'", f"tags.mlflow.parentRunId = '{RUN}'"),
        ('tags.`mlflow.parentRunId`="calm_fox"', f'tags.`mlflow.parentRunId`="{RUN}"'),
        ("tags.mlflow.rootRunId='calm_fox'", f"tags.mlflow.parentRunId='{RUN}'"),
        (
            "run_id = 'calm_fox' and metrics.a > 1",
            f"run_id = '{RUN}' and metrics.a > 1",
        ),
        ("tags.mlflow.parentRunId = 'nobody'", "tags.mlflow.parentRunId = 'nobody'"),
        ("tags.colour = 'calm_fox'", "tags.colour = 'calm_fox'"),
    ],
)
def test_filters_by_a_job_find_its_runs(store: FakeStore, asked: str, meant: str) -> None:
    assert names(store).inward("filter", asked) == meant


def test_a_workspace_that_writes_elsewhere_says_where_and_answers_for_nobody(store: FakeStore) -> None:
    inside = gateway_of(store)
    assert (
        tracking.tracking_uri(inside, "/subscriptions/s")
        == "azureml://127.0.0.1:8443/mlflow/v1.0/subscriptions/s"
    )
    outside = gateway_of(store, "https://user:secret@mlflow.example")
    address = tracking.tracking_uri(outside, "/subscriptions/s")
    assert address == "https://mlflow.example"
    unused: Any = None
    with pytest.raises(Refusal) as refused:
        tracking._forwarded(outside, Request(unused, {"rest": "2.0/mlflow/runs/get"}, {}, Body({}), None))
    assert (refused.value.status, "https://mlflow.example" in refused.value.message) == (400, True)
    assert store.find(ServiceRecord, "mlflow") is None


def test_asking_is_written_down_once_in_a_while(store: FakeStore) -> None:
    gateway = gateway_of(store)
    first = tracking._ask_for(gateway)
    assert (first.state, first.asked_at is not None) == (ServiceState.STOPPED, True)
    assert tracking._ask_for(gateway).version == first.version
    store.update(first.model_copy(update={"asked_at": NOW}))
    assert tracking._ask_for(gateway).version > first.version


def test_a_helper_that_does_not_start_is_told_with_its_reason(
    store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "START_SECONDS", 0.1)
    with pytest.raises(Unavailable, match="did not start within"):
        tracking._asked(gateway_of(store), "GET", "/api/2.0/mlflow/runs/get", None)
    failed = store.get(ServiceRecord, "mlflow")
    error = ErrorInfo(code="unavailable", message="the database is locked")
    store.update(failed.model_copy(update={"error": error}))
    with pytest.raises(Unavailable, match="the database is locked"):
        tracking._asked(gateway_of(store), "GET", "/api/2.0/mlflow/runs/get", None)
