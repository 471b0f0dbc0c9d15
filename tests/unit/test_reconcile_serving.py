"""Endpoints, replicas and services moved forward by the reconciler, with fake processes."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.fakes import FakeClock, FakeExecutor, FakeFiles, FakeStore
from tuneloop.core.errors import AlreadyExists, InvalidState, NotFound, UsageError
from tuneloop.core.keys import key_hash
from tuneloop.core.states import DeploymentState, ReplicaState, ServiceState
from tuneloop.core.types import (
    DeploymentRecord,
    EndpointRecord,
    ModelRecord,
    ReplicaFile,
    ReplicaRecord,
    RouterFile,
    RouteTable,
    ServiceRecord,
)
from tuneloop.workspace.endpoints import Endpoints
from tuneloop.workspace.models import Models
from tuneloop.workspace.reconcile import Reconciler
from tuneloop.workspace.reconcile.limits import Limits

NOW = datetime(2026, 1, 1, tzinfo=UTC)


class World:
    def __init__(self, home: Path) -> None:
        self.store, self.executor, self.clock = FakeStore(), FakeExecutor(), FakeClock()
        self.files = FakeFiles(home)
        self.models = Models(self.store, self.files, self.clock)
        self.endpoints = Endpoints(self.store, self.clock, self.models, b"secret")
        self.reconciler = self.another_reconciler()
        for version in ("1", "2"):
            self.store.insert(
                ModelRecord(
                    created_at=NOW,
                    name="tuned",
                    model_version=version,
                    artifact=f"sha256:{version}",
                    template_digest="sha256:t",
                )
            )

    def another_reconciler(self) -> Reconciler:
        return Reconciler(
            self.store, self.executor, self.files, self.clock, home_id="home", limits=Limits(max_crashes=3)
        )

    def tick(self, times: int = 1) -> None:
        for _ in range(times):
            self.reconciler.serving.tick()
            self.reconciler.services.tick()

    def deploy(self, name: str = "blue", replicas: int = 1, endpoint: str = "chat") -> None:
        if self.store.find(EndpointRecord, endpoint) is None:
            self.endpoints.create(endpoint)
        self.endpoints.deploy(endpoint, name, "tuned:1", replicas=replicas)

    def folder(self, number: int = 1, deployment: str = "blue") -> Path:
        return self.files.folder(f"replicas/chat/{deployment}/{number}")

    def answer(self, number: int = 1, deployment: str = "blue") -> None:
        self.leave(
            number,
            deployment,
            "ready.json",
            {"address": f"http://127.0.0.1:{9000 + number}", "at": NOW.isoformat()},
        )

    def refuse(self, number: int = 1, deployment: str = "blue") -> None:
        self.leave(number, deployment, "error.json", {"code": "template", "message": "another template"})
        self.executor.end(self.folder(number, deployment))

    def leave(self, number: int, deployment: str, name: str, what: dict[str, str]) -> None:
        folder = self.folder(number, deployment)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(what))

    def deployment(self, name: str = "blue") -> DeploymentRecord:
        return self.store.get(DeploymentRecord, f"chat/{name}")

    def replica_states(self, name: str = "blue") -> list[str]:
        return [str(one.state) for one in self.store.list(ReplicaRecord, parent=f"chat/{name}")]

    def routes(self) -> dict[str, object]:
        text = self.files.written[self.files.folder("services/router") / "routes.json"]
        return dict(RouteTable.model_validate_json(text).model_dump(mode="json")["endpoints"])


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_deployment_is_ready_when_its_replica_answers_and_only_then_routed(world: World) -> None:
    world.deploy()
    world.tick(2)
    assert world.deployment().state is DeploymentState.CREATING
    assert world.routes()["chat"]["deployments"]["blue"]["replicas"] == []  # type: ignore[index]
    world.answer()
    world.tick()
    assert world.deployment().state is DeploymentState.READY
    (route,) = world.routes()["chat"]["deployments"]["blue"]["replicas"]  # type: ignore[index]
    assert route["address"] == "http://127.0.0.1:9001"


def test_a_replica_learns_its_model_template_and_a_token_of_its_own(world: World) -> None:
    world.deploy(replicas=2)
    world.tick(3)
    specs = [
        ReplicaFile.model_validate_json(world.files.written[world.folder(number) / "replica.json"])
        for number in (1, 2)
    ]
    assert {spec.model for spec in specs} == {"tuned:1"}
    assert {spec.template_digest for spec in specs} == {"sha256:t"}
    assert len({spec.token for spec in specs}) == 2


def test_a_killed_replica_is_replaced_and_leaves_the_routes(world: World) -> None:
    world.deploy()
    world.tick()
    world.answer()
    world.tick()
    world.executor.end(world.folder())
    world.tick()
    assert world.replica_states() == ["failed", "claimed"]
    assert world.routes()["chat"]["deployments"]["blue"]["replicas"] == []  # type: ignore[index]
    world.answer(2)
    world.tick()
    assert world.deployment().state is DeploymentState.READY
    assert world.deployment().crashes == 0


def test_a_replica_that_refuses_to_serve_fails_its_deployment_with_the_reason(world: World) -> None:
    world.deploy()
    world.tick()
    world.refuse()
    world.tick(3)
    assert world.deployment().state is DeploymentState.FAILED
    assert world.deployment().error is not None
    assert world.deployment().error.message == "another template"  # type: ignore[union-attr]
    assert world.replica_states() == ["failed"]
    assert world.folder(2) not in world.executor.starts


def test_a_replica_that_never_answers_is_tried_with_growing_pauses_and_then_given_up(world: World) -> None:
    world.deploy()
    world.tick()
    for number in (1, 2, 3):
        world.executor.end(world.folder(number))
        world.tick()
        if number < 3:
            assert len(world.replica_states()) == number
            world.clock.move(30)
            world.tick()
    assert world.deployment().state is DeploymentState.FAILED
    assert world.replica_states() == ["failed"] * 3


def test_rounds_are_frequent_only_while_something_is_on_its_way(world: World) -> None:
    world.tick(2)
    assert not world.reconciler.is_busy()
    world.deploy()
    assert world.reconciler.is_busy()
    world.tick()
    router = world.files.folder("services/router/1")
    router.mkdir(parents=True)
    (router / "ready.json").write_text(json.dumps({"address": "http://127.0.0.1:1", "at": NOW.isoformat()}))
    world.answer()
    world.tick(2)
    assert not world.reconciler.is_busy()
    world.endpoints.delete("chat")
    assert world.reconciler.is_busy()


def test_two_reconcilers_start_each_replica_once(world: World) -> None:
    world.deploy(replicas=4)
    other = world.another_reconciler()
    for _ in range(8):
        world.reconciler.serving.tick()
        other.serving.tick()
    assert len(world.replica_states()) == 4
    assert len(set(world.executor.starts)) == len(world.executor.starts) == 4


def test_deleting_an_endpoint_leaves_no_process_no_record_and_no_router(world: World) -> None:
    world.deploy()
    world.deploy("green")
    world.tick()
    world.answer()
    world.tick(2)
    world.endpoints.delete("chat")
    world.tick(3)
    assert world.store.list(EndpointRecord) == []
    assert world.store.list(DeploymentRecord) == []
    assert world.store.list(ReplicaRecord) == []
    assert world.store.get(ServiceRecord, "router").state is ServiceState.STOPPED
    assert world.executor.running() == [world.files.folder("services/tracker/1")]
    assert world.folder().parent.parent in world.files.removed


def test_deleting_twice_is_once(world: World) -> None:
    world.deploy()
    world.endpoints.delete("chat")
    world.endpoints.delete("chat")
    world.tick(2)
    with pytest.raises(NotFound):
        world.endpoints.delete("chat")


def test_a_deployment_with_traffic_is_not_deleted_and_one_without_is(world: World) -> None:
    world.deploy()
    world.deploy("green")
    world.endpoints.set_traffic("chat", {"blue": 100})
    with pytest.raises(InvalidState, match="100 %") as refused:
        world.endpoints.delete_deployment("chat", "blue")
    assert refused.value.next_move == "First: tuneloop endpoints traffic chat green=100"
    world.endpoints.delete_deployment("chat", "green")
    world.tick(2)
    assert [one.name for one in world.store.list(DeploymentRecord)] == ["blue"]


@pytest.mark.parametrize(
    ("traffic", "error"),
    [
        ({"blue": 90}, UsageError),
        ({"blue": -1}, UsageError),
        ({"blue": 101}, UsageError),
        ({"red": 100}, NotFound),
    ],
)
def test_traffic_that_makes_no_sense_is_refused(
    world: World, traffic: dict[str, int], error: type[Exception]
) -> None:
    world.deploy()
    with pytest.raises(error):
        world.endpoints.set_traffic("chat", traffic)


def test_keys_are_shown_again_and_stored_as_hashes_only(world: World) -> None:
    world.endpoints.create("chat")
    keys = world.endpoints.keys("chat")
    assert keys == world.endpoints.keys("chat")
    stored = world.endpoints.get("chat").model_dump_json()
    assert not any(key in stored for key in keys.values())
    assert all(key_hash(key) in stored for key in keys.values())


def test_regenerating_one_key_keeps_the_other(world: World) -> None:
    world.endpoints.create("chat")
    before = world.endpoints.keys("chat")
    after = world.endpoints.regenerate("chat", "primary")
    assert after["primary"] != before["primary"]
    assert after["secondary"] == before["secondary"]
    world.tick()
    assert key_hash(after["primary"]) in json.dumps(world.routes())
    assert key_hash(before["primary"]) not in json.dumps(world.routes())


def test_an_endpoint_made_again_under_its_name_has_other_keys(world: World) -> None:
    world.endpoints.create("chat")
    before = world.endpoints.keys("chat")
    with pytest.raises(AlreadyExists):
        world.endpoints.create("chat")
    world.endpoints.delete("chat")
    world.tick(2)
    world.endpoints.create("chat")
    assert world.endpoints.keys("chat") != before


def test_a_killed_router_comes_back_on_the_port_it_had(world: World) -> None:
    world.endpoints.create("chat")
    world.tick()
    first = world.files.folder("services/router/1")
    first.mkdir(parents=True)
    (first / "ready.json").write_text(json.dumps({"address": "http://127.0.0.1:8123", "at": NOW.isoformat()}))
    world.tick()
    assert world.endpoints.router_url() == "http://127.0.0.1:8123"
    world.executor.end(first)
    world.tick()
    second = world.files.folder("services/router/2")
    assert second in world.executor.running()
    assert RouterFile.model_validate_json(world.files.written[second / "router.json"]).port == 8123


def test_the_tracker_runs_as_soon_as_its_process_does(world: World) -> None:
    world.tick(2)
    tracker = world.store.get(ServiceRecord, "tracker")
    assert tracker.state is ServiceState.RUNNING
    assert tracker.process is not None


def test_a_service_that_cannot_start_is_tried_with_growing_pauses(world: World) -> None:
    world.tick()
    starts = []
    for _ in range(40):
        for folder in world.executor.running():
            world.executor.end(folder)
        world.clock.move(0.5)
        world.tick()
        starts.append(len(world.executor.starts))
    assert 4 <= starts[-1] <= 8


def test_stopping_everything_keeps_what_is_wanted_for_the_next_server(world: World) -> None:
    world.deploy()
    world.tick()
    world.answer()
    world.tick()
    while not world.reconciler.stop_everything():
        pass
    assert world.executor.running() == []
    assert world.replica_states() == [str(ReplicaState.STOPPED)]
    following = world.another_reconciler()
    following.serving.tick()
    following.services.tick()
    assert world.folder(2) in world.executor.running()


def test_a_model_that_is_served_is_not_deleted(world: World) -> None:
    world.deploy()
    with pytest.raises(InvalidState, match="chat/blue"):
        world.models.delete("tuned", "1")


def test_latest_is_the_version_registered_last_and_unknown_models_are_named(world: World) -> None:
    world.endpoints.create("chat")
    with pytest.raises(NotFound, match=r"tuned:[12]"):
        world.endpoints.deploy("chat", "blue", "tuned:3")
    with pytest.raises(NotFound, match="has not been imported"):
        world.endpoints.deploy("chat", "blue", "base:SmolLM2")
