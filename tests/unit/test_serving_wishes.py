"""How a deployment is to be served: what it is told, what may change while it runs, when a replica is given
up, mirrored traffic, sizes, and the helper process that is kept only while it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.test_reconcile_serving import NOW, World
from tuneloop.core.errors import InvalidState, NotFound, UsageError
from tuneloop.core.states import DeploymentState, ReplicaState, ServiceState
from tuneloop.core.types import DeploymentRecord, Lineage, ModelRecord, Probe, ServiceRecord
from tuneloop.workspace.endpoints import Wishes
from tuneloop.workspace.reconcile.services import UNASKED_SECONDS


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def deployed(world: World, wishes: Wishes, **more: int) -> None:
    world.endpoints.create("chat")
    world.endpoints.deploy("chat", "blue", "tuned:1", wishes=wishes, **more)
    world.tick(2)


def changed(
    world: World, model: str = "tuned:1", wishes: Wishes | None = None, **more: float
) -> DeploymentRecord:
    told = {"replicas": 1, "request_timeout_seconds": 90.0, **more}
    return world.endpoints.change_deployment("chat", "blue", model, wishes=wishes or Wishes(), **told)  # type: ignore[arg-type]


# ---------------------------------------------------------------- what it is told


def test_replicas_get_the_variables_of_their_deployment_and_ours_stay(world: World) -> None:
    deployed(world, Wishes(environment={"OMP_NUM_THREADS": "2"}))
    assert world.executor.environments[world.folder()] == {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize(
    "wishes",
    [
        Wishes(environment={"HF_HUB_OFFLINE": "0"}),
        Wishes(environment={"TUNELOOP_HOME": "/"}),
        Wishes(environment={"A=B": "c"}),
        Wishes(environment={"A": "b\0"}),
        Wishes(max_concurrent_requests=0),
        Wishes(max_queue_wait_seconds=-1),
        Wishes(max_queue_wait_seconds=float("nan")),
        Wishes(liveness=Probe(period_seconds=0)),
        Wishes(liveness=Probe(initial_delay_seconds=1e9)),
        Wishes(liveness=Probe(failure_threshold=0)),
    ],
)
def test_wishes_that_make_no_sense_are_refused(world: World, wishes: Wishes) -> None:
    world.endpoints.create("chat")
    with pytest.raises(UsageError):
        world.endpoints.deploy("chat", "blue", "tuned:1", wishes=wishes)


def test_the_router_is_told_the_limits_and_the_mirror(world: World) -> None:
    deployed(world, Wishes(max_concurrent_requests=3, max_queue_wait_seconds=2.5))
    world.deploy("green")
    world.endpoints.set_traffic("chat", {"blue": 100}, {"green": 10})
    world.tick()
    route = world.routes()["chat"]
    assert route["mirror"] == {"green": 10}  # type: ignore[index]
    blue = route["deployments"]["blue"]  # type: ignore[index]
    assert (blue["max_concurrent_requests"], blue["max_queue_wait_seconds"]) == (3, 2.5)


# ---------------------------------------------------------------- changes


def test_what_needs_no_other_process_is_changed_in_place(world: World) -> None:
    deployed(world, Wishes())
    world.answer()
    world.tick()
    changed(world, wishes=Wishes(description="new", tags={"a": "b"}), request_timeout_seconds=5.0)
    world.tick()
    record = world.deployment()
    assert (record.description, record.tags, record.request_timeout_seconds) == ("new", {"a": "b"}, 5.0)
    assert (record.state, world.replica_states()) == (DeploymentState.READY, ["ready"])
    assert world.routes()["chat"]["deployments"]["blue"]["request_timeout_seconds"] == 5.0  # type: ignore[index]


def test_more_replicas_are_on_their_way_at_once_and_fewer_end(world: World) -> None:
    deployed(world, Wishes())
    world.answer()
    world.tick()
    assert changed(world, replicas=2).state is DeploymentState.CREATING
    world.tick(2)
    world.answer(2)
    world.tick()
    assert world.deployment().state is DeploymentState.READY
    assert changed(world, replicas=1).state is DeploymentState.READY
    world.tick(2)
    assert world.replica_states() == ["ready", "stopped"]


@pytest.mark.parametrize(
    ("model", "wishes", "what"),
    [
        ("tuned:2", Wishes(), "its model"),
        ("tuned:1", Wishes(environment={"A": "b"}), "its environment variables"),
    ],
)
def test_what_only_another_process_could_have_is_refused_while_it_runs(
    world: World, model: str, wishes: Wishes, what: str
) -> None:
    deployed(world, Wishes())
    with pytest.raises(InvalidState, match=what) as refused:
        changed(world, model, wishes)
    assert "another deployment" in str(refused.value)


def test_a_deployment_that_failed_is_tried_again_with_another_model(world: World) -> None:
    deployed(world, Wishes())
    world.refuse()
    world.tick()
    assert world.deployment().state is DeploymentState.FAILED
    changed(world, "tuned:2")
    world.tick(2)
    world.answer(2)
    world.tick()
    record = world.deployment()
    assert (record.state, record.model, record.error) == (DeploymentState.READY, "tuned:2", None)


# ---------------------------------------------------------------- the liveness probe


def test_a_replica_that_loads_longer_than_its_probe_allows_is_started_anew(world: World) -> None:
    deployed(world, Wishes(liveness=Probe(initial_delay_seconds=600, period_seconds=10, failure_threshold=3)))
    world.clock.move(629)
    world.tick()
    assert world.replica_states() == ["starting"]
    world.clock.move(2)
    world.tick()
    assert (world.folder(), True) in world.executor.stopped
    error = world.deployment().error
    assert error is not None
    assert (error.code, "630 s" in error.message) == ("replica_too_slow", True)
    world.clock.move(10)
    world.tick(2)
    assert world.replica_states() == ["failed", "starting"]
    world.answer(2)
    world.tick()
    assert (world.deployment().state, world.deployment().error) == (DeploymentState.READY, None)


def test_a_replica_that_has_answered_is_past_its_probe(world: World) -> None:
    deployed(world, Wishes(liveness=Probe(initial_delay_seconds=1)))
    world.answer()
    world.tick()
    world.clock.move(100_000)
    world.tick(2)
    assert world.replica_states() == [str(ReplicaState.READY)]


def test_without_a_probe_a_replica_may_load_for_days(world: World) -> None:
    deployed(world, Wishes())
    world.clock.move(1_000_000)
    world.tick()
    assert world.replica_states() == ["starting"]


# ---------------------------------------------------------------- mirrored traffic


@pytest.mark.parametrize(
    ("mirror", "error"),
    [
        ({"red": 10}, NotFound),
        ({"green": 101}, UsageError),
        ({"green": 10, "grey": 10}, UsageError),
        ({"blue": 10}, UsageError),
    ],
)
def test_mirrors_that_make_no_sense_are_refused(
    world: World, mirror: dict[str, int], error: type[Exception]
) -> None:
    for name in ("blue", "green", "grey"):
        world.deploy(name)
    world.endpoints.set_traffic("chat", {"blue": 100})
    with pytest.raises(error):
        world.endpoints.set_mirror("chat", mirror)
    assert world.endpoints.get("chat").mirror == {}


def test_a_mirror_that_gets_the_traffic_is_one_no_longer_and_keeps_its_deployment_until_then(
    world: World,
) -> None:
    world.deploy("blue")
    world.deploy("green")
    world.endpoints.set_traffic("chat", {"blue": 100})
    world.endpoints.set_mirror("chat", {"green": 30})
    with pytest.raises(InvalidState, match="30 %") as refused:
        world.endpoints.delete_deployment("chat", "green")
    assert refused.value.next_move == "First: tuneloop endpoints traffic chat --mirror green=0"
    assert world.endpoints.set_traffic("chat", {"blue": 100}).mirror == {"green": 30}
    assert world.endpoints.set_traffic("chat", {"green": 100}).mirror == {}
    world.endpoints.set_mirror("chat", {"blue": 10})
    assert world.endpoints.set_mirror("chat", {"blue": 0}).mirror == {}


# ---------------------------------------------------------------- sizes


def test_a_size_beside_the_allow_list_of_the_base_model_is_told_and_an_unknown_one_refused(
    world: World,
) -> None:
    world.store.insert(
        ModelRecord(
            created_at=NOW,
            name="phi",
            model_version="1",
            artifact="sha256:1",
            lineage=Lineage(base_model="Phi-3-mini-4k-instruct"),
        )
    )
    assert world.endpoints.why_not_served_on("phi:1", "standard_nc6s_v3") is None
    told = world.endpoints.why_not_served_on("phi:1", "Standard_D12_v2")
    assert told is not None
    assert told.startswith(
        "Standard_D12_v2 is not in the inference_compute_allow_list of Phi-3-mini-4k-instruct"
    )
    assert world.endpoints.why_not_served_on("tuned:1", "Standard_D12_v2") is None
    with pytest.raises(NotFound, match="no size"):
        deployed(world, Wishes(instance_type="Standard_Nothing"))


def test_a_size_is_noted_as_the_table_spells_it(world: World) -> None:
    deployed(world, Wishes(instance_type="nc6s_v3"))
    assert world.deployment().instance_type == "Standard_NC6s_v3"


# ---------------------------------------------------------------- mlflow while it is asked for


def test_the_process_that_speaks_mlflow_runs_only_while_somebody_asks(world: World) -> None:
    world.tick()
    assert world.store.find(ServiceRecord, "mlflow") is None
    now = world.clock.now()
    world.store.insert(ServiceRecord(created_at=now, name="mlflow", state=ServiceState.STOPPED, asked_at=now))
    world.tick(2)
    folder = world.files.folder("services/mlflow/1")
    assert world.executor.modules[folder] == "tuneloop.daemon"
    world.clock.move(UNASKED_SECONDS - 1)
    world.tick()
    assert folder in world.executor.running()
    world.clock.move(2)
    world.tick(2)
    assert folder not in world.executor.running()
    assert world.store.get(ServiceRecord, "mlflow").state is ServiceState.STOPPED
    assert (folder, False) in world.executor.stopped
    world.tick(2)
    assert len([one for one in world.executor.starts if one == folder]) == 1
