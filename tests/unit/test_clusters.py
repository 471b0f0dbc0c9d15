"""Named clusters of an Azure size, mapped onto this machine: one account of slots and memory, one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes import FakeClock, FakeExecutor, FakeFiles, FakeStore
from tuneloop.core.errors import AlreadyExists, InvalidName, InvalidState, NotFound, UsageError
from tuneloop.core.types import Compute, Gpu, Job, JobSettings, Step
from tuneloop.workspace.compute import Computes
from tuneloop.workspace.jobs import Jobs
from tuneloop.workspace.reconcile import Reconciler

GB = 10**9
A100 = "Standard_NC24ads_A100_v4"


class World:
    def __init__(self, home: Path, *, slots: int = 4, memory: int = 10) -> None:
        self.store, self.executor, self.clock = FakeStore(), FakeExecutor(), FakeClock()
        self.files = FakeFiles(home)
        self.computes = Computes(self.store, self.clock)
        self.computes.declare_local(slots=slots, cores=2, memory_bytes=memory * GB)
        self.jobs = Jobs(self.store, self.files, self.clock, None, None)  # type: ignore[arg-type]
        self.reconciler = Reconciler(self.store, self.executor, self.files, self.clock, home_id="home")

    def submit(self, name: str, compute: str, memory: int) -> None:
        step = Step(
            name="a",
            kind="preprocess",
            outputs={"out": "folder"},
            memory_bytes=memory * GB,
            compute=compute,
        )
        self.jobs.record(
            Job(
                name=name,
                display_name=name,
                experiment="tests",
                steps=(step,),
                settings=JobSettings(force_rerun=True),
            )
        )

    def runs(self) -> list[str]:
        return sorted(attempt.job for attempt in self.computes.active())


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_cluster_has_the_size_that_was_asked_for_and_this_machines_capacity(world: World) -> None:
    gpu = Gpu(name="L4", memory_bytes=24 * GB)
    world.computes.declare_local(slots=3, cores=8, memory_bytes=20 * GB, devices=[gpu], limited_by=["x"])
    made = world.computes.create("big", size="standard_nc24ads_a100_v4", max_instances=2)
    assert (made.type, made.size, made.max_instances) == ("cluster", A100, 2)
    assert (made.slots, made.cores, made.memory_bytes, made.gpus, made.devices) == (3, 8, 20 * GB, 1, (gpu,))
    world.computes.declare_local(slots=1, cores=4, memory_bytes=5 * GB)
    assert world.computes.get("big").memory_bytes == 5 * GB


def test_what_a_cluster_claims_is_not_there_for_this_machine_nor_for_another_cluster(world: World) -> None:
    world.computes.create("one", size=A100)
    world.computes.create("two", size="NC6s_v3")
    world.submit("first", "one", 6)
    world.submit("second", "local", 6)
    world.submit("third", "two", 1)
    world.reconciler.tick()
    assert world.runs() == ["first"]
    assert [(one.job, one.compute, one.position) for one in world.computes.queue()] == [
        ("second", "local", 1),
        ("third", "two", 2),
    ]
    assert [(one.job, one.position) for one in world.computes.queue("two")] == [("third", 2)]
    assert world.computes.holdings()["memory_claimed_bytes"] == 6 * GB


def test_slots_are_shared(tmp_path: Path) -> None:
    world = World(tmp_path, slots=1, memory=100)
    world.computes.create("one", size=A100)
    world.submit("first", "one", 1)
    world.submit("second", "local", 1)
    world.reconciler.tick()
    assert world.runs() == ["first"]


def test_a_job_that_names_a_cluster_that_is_not_there_is_refused(world: World) -> None:
    with pytest.raises(NotFound, match="gpu-cluster"):
        world.submit("job", "gpu-cluster", 1)


def test_a_cluster_is_refused_by_name_size_and_nodes(world: World) -> None:
    world.computes.create("big", size=A100)
    with pytest.raises(AlreadyExists, match="already"):
        world.computes.create("big", size=A100)
    with pytest.raises(AlreadyExists, match="this machine"):
        world.computes.create("local", size=A100)
    with pytest.raises(NotFound, match="no size"):
        world.computes.create("other", size="Standard_A1")
    with pytest.raises(UsageError, match="not supported for finetuning"):
        world.computes.create("other", size="Standard_NC6")
    with pytest.raises(InvalidName):
        world.computes.create("a b", size=A100)
    with pytest.raises(UsageError, match="max_instances"):
        world.computes.create("other", size=A100, max_instances=0)


def test_a_cluster_that_a_job_uses_is_kept_until_the_job_has_ended(world: World) -> None:
    world.computes.create("big", size=A100)
    world.submit("job", "big", 1)
    world.reconciler.tick()
    with pytest.raises(InvalidState, match="used by 1 job"):
        world.computes.delete("big")
    world.jobs.cancel("job")
    with pytest.raises(InvalidState, match="used by 1 job"):
        world.computes.delete("big")
    world.executor.end(world.files.folder("jobs/job/a/1"))
    world.reconciler.tick()
    world.reconciler.tick()
    world.computes.delete("big")
    with pytest.raises(NotFound):
        world.computes.get("big")


def test_a_cluster_whose_making_failed_takes_no_job(world: World) -> None:
    world.computes.create("big", size=A100)
    made = world.store.get(Compute, "big")
    world.store.update(made.model_copy(update={"provisioning_state": "failed"}))
    with pytest.raises(InvalidState, match="Provisioning failed"):
        world.submit("job", "big", 1)


def test_this_machine_cannot_be_deleted(world: World) -> None:
    with pytest.raises(InvalidState, match="this machine"):
        world.computes.delete("local")


def test_a_record_of_an_older_home_is_read_as_it_is() -> None:
    old = '{"created_at": "2026-01-01T00:00:00Z", "name": "local", "cores": 2, "memory_bytes": 5}'
    found = Compute.model_validate_json(old)
    assert (found.type, found.devices, found.size, found.max_instances) == ("local", (), None, 1)


def test_a_cluster_is_found_whatever_the_case_of_its_name(world: World) -> None:
    world.computes.create("Gpu-Cluster", size=A100)
    assert world.computes.get("gpu-CLUSTER").name == "Gpu-Cluster"
    found = world.computes.find("GPU-cluster")
    assert found is not None
    assert (found.name, found.slots) == ("Gpu-Cluster", 4)
    assert world.computes.find("gpu") is None
    with pytest.raises(AlreadyExists, match="There is a compute 'Gpu-Cluster' already"):
        world.computes.create("gpu-cluster", size=A100)
    world.computes.delete("GPU-CLUSTER")
    with pytest.raises(NotFound):
        world.computes.get("Gpu-Cluster")


def test_a_cluster_that_a_step_names_in_another_case_is_used(world: World) -> None:
    world.computes.create("Gpu", size=A100)
    world.submit("first", "Gpu", 6)
    with pytest.raises(InvalidState, match="Compute 'Gpu' is used by 1 job"):
        world.computes.delete("GPU")
    assert [one.job for one in world.computes.queue("gPU")] == ["first"]


def test_the_nodes_of_a_cluster_can_be_changed_and_nothing_else_of_it_is(world: World) -> None:
    made = world.computes.create("one", size=A100, max_instances=2)
    changed = world.computes.resize("ONE", max_instances=5)
    assert changed == made.model_copy(update={"max_instances": 5, "version": changed.version})
    stored = world.store.get(Compute, "one")
    assert (stored.max_instances, stored.cores, stored.memory_bytes) == (5, 0, 0)
    assert world.computes.resize("one", max_instances=5) == changed
    with pytest.raises(UsageError, match="expected 1 to 1000"):
        world.computes.resize("one", max_instances=0)
    with pytest.raises(InvalidState, match="'local' is this machine"):
        world.computes.resize("LOCAL", max_instances=2)
    with pytest.raises(NotFound):
        world.computes.resize("two", max_instances=2)
