"""Who may start, who waits, in which order, and what is said of it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from tests.fakes import FakeClock, FakeExecutor, FakeFiles, FakeStore
from tuneloop.core.errors import InvalidState, NoRoom
from tuneloop.core.fit import (
    count_parameters,
    finetune_memory_bytes,
    replica_memory_bytes,
    rows_expected,
    step_memory_bytes,
)
from tuneloop.core.recipe import FinetuneParameters
from tuneloop.core.states import DeploymentState, JobState, ReplicaState
from tuneloop.core.types import (
    Card,
    DeploymentRecord,
    Job,
    JobRecord,
    JobSettings,
    ModelRecord,
    ReplicaRecord,
    ResultFile,
    RowStatistics,
    Step,
    StepOutputInput,
    StepRecord,
)
from tuneloop.workspace.catalog import CARDS
from tuneloop.workspace.compute import Computes
from tuneloop.workspace.endpoints import Endpoints
from tuneloop.workspace.jobs import Jobs
from tuneloop.workspace.models import Models
from tuneloop.workspace.reconcile import Reconciler

NOW = datetime(2026, 1, 1, tzinfo=UTC)
GB = 10**9


class Sized(Models):
    """Every replica is expected to take `size`, whatever its model."""

    size = 4 * GB

    def replica_memory_bytes(self, digest: str) -> int:
        return self.size


class World:
    def __init__(self, home: Path, *, slots: int = 4, memory: int = 10) -> None:
        self.store, self.executor, self.clock = FakeStore(), FakeExecutor(), FakeClock()
        self.files = FakeFiles(home)
        self.computes = Computes(self.store, self.clock)
        self.computes.declare_local(slots=slots, cores=2, memory_bytes=memory * GB)
        self.jobs = Jobs(self.store, self.files, self.clock, None, None)  # type: ignore[arg-type]
        self.models = Sized(self.store, self.files, self.clock)
        self.endpoints = Endpoints(self.store, self.clock, self.models, b"secret")
        self.store.insert(
            ModelRecord(created_at=NOW, name="m", model_version="1", artifact="sha256:m", template_digest="t")
        )
        self.reconciler = Reconciler(self.store, self.executor, self.files, self.clock, home_id="home")

    def submit(
        self, name: str, memory: int = 0, *, priority: str = "medium", then: int | None = None
    ) -> None:
        steps = [self._step(name, "a", memory)]
        if then is not None:
            after = StepOutputInput(step="a", output="out")
            steps.append(self._step(name, "b", then).model_copy(update={"inputs": {"x": after}}))
        self.jobs.record(
            Job(
                name=name,
                display_name=name,
                experiment="tests",
                steps=tuple(steps),
                settings=JobSettings(priority=priority, force_rerun=True),  # type: ignore[arg-type]
                base_model="Base:1",
            )
        )

    def _step(self, job: str, name: str, memory: int) -> Step:
        return Step(name=name, kind="preprocess", outputs={"out": "folder"}, memory_bytes=memory * GB)

    def deploy(self, name: str, replicas: int = 1) -> None:
        if not self.endpoints.list():
            self.endpoints.create("chat")
        self.endpoints.deploy("chat", name, "m:1", replicas=replicas)

    def tick(self, times: int = 1) -> None:
        for _ in range(times):
            self.reconciler.tick()

    def finish(self, job: str, step: str = "a", seconds: float = 0.0) -> None:
        self.clock.move(seconds)
        folder = self.files.folder(f"jobs/{job}/{step}/1")
        self.files.results[folder] = ResultFile(
            attempt_id="x", status="succeeded", started_at=NOW, finished_at=self.clock.now()
        )
        self.executor.end(folder)

    def runs(self) -> list[str]:
        return sorted(attempt.parent for attempt in self.computes.active())

    def reason(self, job: str, step: str = "a") -> str:
        return self.store.get(StepRecord, f"{job}/{step}").reason or ""

    def deployment(self, name: str) -> DeploymentRecord:
        return self.store.get(DeploymentRecord, f"chat/{name}")

    def replicas(self, name: str) -> list[ReplicaRecord]:
        return [one for one in self.endpoints.replicas("chat", name) if one.state is not ReplicaState.STOPPED]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_steps_whose_expected_memory_does_not_fit_together_run_one_after_the_other(world: World) -> None:
    world.submit("first", 6)
    world.submit("second", 6)
    world.tick()
    assert world.runs() == ["first/a"]
    assert "expected to take 6.0 GB, and 6.0 GB of 10.0 GB are claimed by first/a" in world.reason("second")
    world.finish("first")
    world.tick()
    assert world.runs() == ["second/a"]


def test_a_step_that_waits_for_memory_is_not_overtaken_by_a_small_one_behind_it(world: World) -> None:
    world.submit("first", 6)
    world.submit("large", 6)
    world.submit("small", 1)
    world.tick()
    assert world.runs() == ["first/a"]
    assert "large/a is ahead" in world.reason("small")


def test_a_step_alone_starts_whatever_it_is_expected_to_take(world: World) -> None:
    world.submit("huge", 50)
    world.submit("next", 1)
    world.tick(2)
    assert world.runs() == ["huge/a"]
    world.finish("huge")
    world.tick()
    assert world.runs() == ["next/a"]


def test_beside_a_step_of_unknown_size_one_that_cannot_fit_waits(world: World) -> None:
    world.submit("unknown", 0)
    world.submit("huge", 50)
    world.tick()
    assert world.runs() == ["unknown/a"]


def test_higher_priority_starts_first_and_equals_keep_their_order(tmp_path: Path) -> None:
    world = World(tmp_path, slots=1)
    world.submit("running")
    world.tick()
    world.submit("low", priority="low")
    world.submit("one")
    world.submit("two")
    world.submit("urgent", priority="high")
    assert [waiting.job for waiting in world.computes.queue()] == ["urgent", "one", "two", "low"]
    for job, following in [("running", "urgent"), ("urgent", "one"), ("one", "two"), ("two", "low")]:
        world.finish(job)
        world.tick()
        assert world.runs() == [f"{following}/a"]


def test_priority_can_change_while_a_job_waits_and_what_runs_is_not_stopped(tmp_path: Path) -> None:
    world = World(tmp_path, slots=1)
    for name in ("running", "one", "two"):
        world.submit(name)
    world.tick()
    world.jobs.prioritise("two", "high")
    world.tick()
    assert world.runs() == ["running/a"]
    assert [(waiting.job, waiting.position) for waiting in world.computes.queue()] == [("two", 1), ("one", 2)]


def test_the_priority_of_a_job_that_has_ended_cannot_change(world: World) -> None:
    world.submit("one")
    world.tick()
    world.finish("one")
    world.tick()
    with pytest.raises(InvalidState, match="has ended already"):
        world.jobs.prioritise("one", "high")


def test_a_job_is_cancelled_while_it_waits_and_leaves_the_queue(tmp_path: Path) -> None:
    world = World(tmp_path, slots=1)
    for name in ("running", "one", "two"):
        world.submit(name)
    world.tick()
    world.jobs.cancel("one")
    world.tick()
    assert world.store.get(JobRecord, "one").state is JobState.CANCELED
    assert [waiting.job for waiting in world.computes.queue()] == ["two"]
    assert world.runs() == ["running/a"]


def test_the_queue_says_when_by_how_long_such_steps_took(tmp_path: Path) -> None:
    world = World(tmp_path, slots=1)
    world.submit("before")
    world.tick()
    assert world.computes.queue() == []
    world.finish("before", seconds=100)
    world.tick()
    for name in ("running", "one", "two"):
        world.submit(name)
    world.tick()
    world.clock.move(30)
    assert [waiting.expected_seconds for waiting in world.computes.queue()] == [70, 170]
    world.clock.move(500)
    assert [waiting.expected_seconds for waiting in world.computes.queue()] == [0, 100]


def test_the_estimate_of_a_step_that_waits_for_memory_counts_who_holds_it(world: World) -> None:
    world.submit("before", 1)
    world.tick()
    world.finish("before", seconds=100)
    world.tick()
    world.submit("first", 6)
    world.tick()
    world.clock.move(60)
    world.submit("second", 3)
    world.tick()
    world.submit("large", 8)
    world.submit("small", 1)
    world.tick()
    assert world.runs() == ["first/a", "second/a"]
    assert [waiting.expected_seconds for waiting in world.computes.queue()] == [100, 100]


def test_for_what_endpoints_hold_there_is_no_estimate(world: World) -> None:
    world.submit("before", 1)
    world.tick()
    world.finish("before", seconds=100)
    world.tick()
    world.deploy("blue")
    world.tick()
    world.submit("large", 8)
    world.tick()
    assert [waiting.expected_seconds for waiting in world.computes.queue()] == [None]


def test_without_experience_there_is_a_position_and_no_estimate(tmp_path: Path) -> None:
    world = World(tmp_path, slots=1)
    for name in ("running", "one"):
        world.submit(name)
    world.tick()
    (waiting,) = world.computes.queue()
    assert (waiting.position, waiting.expected_seconds) == (1, None)
    assert "its slot is used by running/a" in (waiting.reason or "")


def test_a_step_that_waits_for_another_step_stands_in_no_queue(world: World) -> None:
    world.submit("job", 1, then=1)
    world.tick()
    assert world.computes.queue() == []


def test_a_replica_waits_for_the_memory_of_a_step_and_goes_ahead_of_the_next_one(world: World) -> None:
    world.submit("running", 8)
    world.tick()
    world.deploy("blue")
    world.submit("next", 8)
    world.tick()
    assert world.replicas("blue") == []
    assert "8.0 GB of 10.0 GB are claimed by running/a" in (world.deployment("blue").reason or "")
    world.finish("running")
    world.tick(2)
    assert len(world.replicas("blue")) == 1
    assert world.deployment("blue").reason is None
    assert world.runs() == []
    assert "endpoints (4.0 GB)" in world.reason("next")
    assert "tuneloop deployments delete" in world.reason("next")


def test_what_endpoints_hold_does_not_keep_smaller_steps_from_running(world: World) -> None:
    world.deploy("blue")
    world.tick()
    world.submit("large", 8)
    world.submit("small", 2)
    world.tick()
    assert world.runs() == ["small/a"]


def test_a_deployment_that_can_never_fit_is_refused_and_nothing_is_recorded(world: World) -> None:
    world.deploy("blue")
    with pytest.raises(
        NoRoom, match=r"2 replicas of m:1 would take about 8.0 GB.*endpoints hold 4.0 GB"
    ) as e:
        world.deploy("green", replicas=2)
    assert "memory_gb" in (e.value.next_move or "")
    assert [one.name for one in world.endpoints.deployments("chat")] == ["blue"]


def test_a_deleted_deployment_gives_its_memory_back_when_its_processes_have_ended(world: World) -> None:
    world.deploy("blue", replicas=2)
    world.tick(2)
    assert len(world.replicas("blue")) == 2
    world.submit("job", 5)
    world.tick()
    assert world.runs() == []
    world.endpoints.delete_deployment("chat", "blue")
    world.tick()
    for number in (1, 2):
        world.executor.end(world.files.folder(f"replicas/chat/blue/{number}"))
    world.tick(2)
    assert world.runs() == ["job/a"]


def test_a_failed_deployment_keeps_nothing_from_steps(world: World) -> None:
    world.deploy("blue")
    world.tick()
    folder = world.files.folder("replicas/chat/blue/1")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "error.json").write_text(json.dumps({"code": "template", "message": "another template"}))
    world.executor.end(folder)
    world.tick()
    assert world.deployment("blue").state is DeploymentState.FAILED
    world.submit("job", 9)
    world.tick()
    assert world.runs() == ["job/a"]


@pytest.mark.parametrize(
    ("kind", "measured_gb"),
    [("model_import", 1.2), ("preprocess", 0.5), ("export", 1.2), ("evaluate", 1.2)],
)
def test_the_estimate_is_near_what_the_demo_took(kind: str, measured_gb: float) -> None:
    expected = step_memory_bytes(kind, 134_515_008)  # type: ignore[arg-type]
    assert expected / GB == pytest.approx(measured_gb, rel=0.1)


def test_a_replica_is_expected_to_take_its_weights_in_32_bits() -> None:
    assert replica_memory_bytes(10**9) > 4 * 10**9


def guide_rows() -> RowStatistics:
    """About what `samples:guide/train_sft.jsonl` has."""
    return RowStatistics(
        rows=141,
        messages=282,
        characters=22_400,
        learned_characters=12_000,
        most_messages=2,
        most_characters=330,
    )


def small_card() -> Card:
    return Card.model_validate(yaml.safe_load((CARDS / "SmolLM2-135M-Instruct.yaml").read_text("utf-8")))


def test_a_finetune_claims_what_the_plan_says_of_its_batch_and_rows() -> None:
    card = small_card()
    rows = rows_expected(guide_rows(), -1, card)
    lora = FinetuneParameters(apply_lora=True, lora_r=16, per_device_train_batch_size=2).model_dump()
    claimed = finetune_memory_bytes(card, lora, rows)
    # This shape was measured to take 1.57 with a row of 256 tokens (benchmarks/plan_accuracy.py); two of
    # these have fewer, and lengths that are guessed from characters are guessed long.
    assert 1.4 <= claimed / GB <= 1.8
    assert finetune_memory_bytes(card, {**lora, "per_device_train_batch_size": 16}, rows) > 1.5 * claimed
    assert finetune_memory_bytes(card, {**lora, "apply_lora": False}, rows) > 1.3 * claimed
    assert finetune_memory_bytes(card, lora, rows_expected(None, 4096, card)) > 3 * claimed


def test_where_a_gpu_holds_the_model_only_its_way_there_is_claimed() -> None:
    card = small_card()
    parameters = FinetuneParameters(per_device_train_batch_size=64).model_dump()
    rows = rows_expected(None, 4096, card)
    on_gpu = finetune_memory_bytes(card, parameters, rows, gpus=1)
    assert on_gpu < 0.2 * finetune_memory_bytes(card, parameters, rows)
    assert on_gpu > 2 * card.parameters


def test_an_expected_row_is_never_longer_than_what_is_let_in() -> None:
    card = small_card()
    assert rows_expected(guide_rows(), 50, card).longest == 50
    long = guide_rows().model_copy(update={"most_characters": 10**7})
    assert rows_expected(long, -1, card).longest == card.context_length
    assert rows_expected(None, -1, card).known_by == "worst case"


def test_parameters_are_counted_from_the_headers_of_safetensors(tmp_path: Path) -> None:
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "w": {"dtype": "BF16", "shape": [3, 4], "data_offsets": [0, 24]},
            "b": {"dtype": "F32", "shape": [5], "data_offsets": [24, 44]},
        }
    ).encode()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 20)
    assert count_parameters(tmp_path) == 17


def test_preprocess_is_expected_to_take_more_where_more_cores_work_at_it() -> None:
    two, many = (
        step_memory_bytes("preprocess", 10**9, cores=2),
        step_memory_bytes("preprocess", 10**9, cores=16),
    )
    assert two == step_memory_bytes("preprocess", 10**9)
    assert many - two == 14 * 200_000_000
