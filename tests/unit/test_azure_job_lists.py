"""Lists of jobs: pages, archived ones, filters."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

from tests.unit.test_azure_submission import made_gateway
from tuneloop.adapters.sql import SqlStore
from tuneloop.core.states import JobState
from tuneloop.core.types import Job, JobOutput, JobRecord, Step
from tuneloop.server.azure.gateway import Gateway
from tuneloop.server.azure.jobs import operations
from tuneloop.server.azure.jobs.facts import Facts
from tuneloop.workspace.jobs import Jobs


@pytest.fixture
def gateway(tmp_path: Path) -> Gateway:
    return made_gateway(tmp_path)


def insert(gateway: Gateway, name: str, state: JobState = JobState.COMPLETED, **tags: str) -> None:
    job = Job(
        name=name,
        display_name=name.upper(),
        experiment="tests",
        steps=(Step(name="export", kind="export", outputs={"mlflow_model": "mlflow_model"}),),
        outputs={"trained_model": JobOutput(step="export", output="mlflow_model")},
        recipe="long\n" * 100,
        tags=tags,
    )
    record = JobRecord(created_at=gateway.parts.started_at, job=job, state=state)
    gateway.parts.store.insert(record)


def listed(gateway: Gateway, **query: str) -> dict[str, Any]:
    request = SimpleNamespace(
        query={name.lower(): value for name, value in query.items()},
        workspace_id="/subscriptions/s/workspaces/w",
        http=SimpleNamespace(query_params=query),
    )
    body: dict[str, Any] = operations.list_jobs(gateway, request).body  # type: ignore[arg-type, union-attr]
    return body


def names(gateway: Gateway, **query: str) -> list[str]:
    return [one["name"] for one in listed(gateway, **query)["value"]]


def test_pages_follow_each_other_until_every_job_was_listed_once(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "PAGE", 10)
    for number in range(25):
        insert(gateway, f"job_{number}")
    found, query, pages = [], {"listViewType": "All"}, 0
    while True:
        page = listed(gateway, **query)
        found += [one["name"] for one in page["value"]]
        pages += 1
        if "nextLink" not in page:
            break
        assert page["nextLink"].startswith(f"{gateway.base_url}/subscriptions/s/workspaces/w/jobs?")
        query = dict(parse_qsl(urlsplit(page["nextLink"]).query))
        assert query["listViewType"] == "All"
    assert found == [f"job_{number}" for number in range(24, -1, -1)]
    assert pages == 3


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        ("", ["live"]),
        ("ActiveOnly", ["live"]),
        ("ListViewType.ACTIVE_ONLY", ["live"]),
        ("ArchivedOnly", ["put_away"]),
        ("archivedonly", ["put_away"]),
        ("All", ["live", "put_away"]),
    ],
)
def test_archived_jobs_are_listed_when_they_are_asked_for(
    gateway: Gateway, view: str, expected: list[str]
) -> None:
    insert(gateway, "put_away")
    insert(gateway, "live")
    Facts("put_away", is_archived=True).remember(gateway)
    assert names(gateway, listViewType=view) == expected


def test_jobs_are_filtered_by_tag_property_and_type(gateway: Gateway) -> None:
    insert(gateway, "blue", team="blue")
    insert(gateway, "plain")
    Facts("plain", properties={"commit": "0123"}).remember(gateway)
    assert names(gateway, tag="team") == names(gateway, tag="team=blue") == ["blue"]
    assert names(gateway, tag="team=red") == []
    assert names(gateway, properties="commit=0123") == ["plain"]
    assert names(gateway, jobType="Sweep") == names(gateway, scheduled="true") == []
    assert len(names(gateway, jobType="Pipeline")) == 2


def test_a_summary_is_read_from_the_record_of_a_job(gateway: Gateway, tmp_path: Path) -> None:
    store = SqlStore.open(tmp_path / "store.db")
    try:
        jobs = Jobs(store, None, None, None, None)  # type: ignore[arg-type]
        parts = SimpleNamespace(store=store, jobs=jobs, started_at=gateway.parts.started_at)
        there = Gateway(parts, "https://x", tmp_path, b"s", gateway.tokens, "i")  # type: ignore[arg-type]
        insert(there, "calm_fox", JobState.RUNNING, team="blue")
        (one,) = listed(there)["value"]
    finally:
        store.close()
    assert one["id"] == "/subscriptions/s/workspaces/w/jobs/calm_fox"
    properties = one["properties"]
    assert (properties["displayName"], properties["status"]) == ("CALM_FOX", "Running")
    assert (properties["experimentName"], properties["tags"]) == ("tests", {"team": "blue"})
    assert properties["outputs"]["trained_model"]["jobOutputType"] == "mlflow_model"
