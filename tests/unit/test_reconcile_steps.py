"""Jobs moved forward by the reconciler, with fake processes and a clock that stands still."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.fakes import FakeClock, FakeExecutor, FakeFiles, FakeStore
from tuneloop.core.errors import InvalidState
from tuneloop.core.states import AttemptState, JobState
from tuneloop.core.types import (
    AttemptRecord,
    ErrorInfo,
    Job,
    JobOutput,
    JobRecord,
    JobSettings,
    ResultFile,
    ResultOutput,
    Step,
    StepOutputInput,
    StepRecord,
)
from tuneloop.workspace.compute import Computes
from tuneloop.workspace.jobs import Jobs
from tuneloop.workspace.reconcile import Reconciler
from tuneloop.workspace.reconcile.limits import Limits

NOW = datetime(2026, 1, 1, tzinfo=UTC)


class World:
    """A workspace with fakes, and the moves that a test makes."""

    def __init__(self, slots: int = 4) -> None:
        self.store, self.executor, self.files, self.clock = (
            FakeStore(),
            FakeExecutor(),
            FakeFiles(),
            FakeClock(),
        )
        Computes(self.store, self.clock).declare_local(slots=slots, cores=2, memory_bytes=1 << 34)
        self.jobs = Jobs(self.store, self.files, self.clock, None, None)  # type: ignore[arg-type]
        self.reconciler = self.another_reconciler()

    def another_reconciler(self) -> Reconciler:
        return Reconciler(
            self.store, self.executor, self.files, self.clock, home_id="home", limits=Limits(max_attempts=3)
        )

    def submit(self, *steps: Step, name: str = "job", **settings: bool) -> None:
        self.jobs.record(
            Job(
                name=name,
                display_name=name,
                experiment="tests",
                steps=steps,
                outputs={"last": JobOutput(step=steps[-1].name, output="out")},
                settings=JobSettings(**settings),
            )
        )

    def tick(self, times: int = 1) -> None:
        for _ in range(times):
            self.reconciler.pipelines.tick()

    def folder(self, step: str, number: int = 1, job: str = "job") -> Path:
        return self.files.folder(f"jobs/{job}/{step}/{number}")

    def finish(self, step: str, number: int = 1, job: str = "job", status: str = "succeeded") -> None:
        folder = self.folder(step, number, job)
        error = ErrorInfo(code="data", message="row 3 is bad") if status == "failed" else None
        outputs = {}
        if status == "succeeded":
            outputs = {
                "out": ResultOutput(digest=f"sha256:{job}-{step}-{number}", size_bytes=1, type="folder")
            }
        self.files.results[folder] = ResultFile(
            attempt_id="x",
            status=status,  # type: ignore[arg-type]
            outputs=outputs,
            metrics={"loss": 1.5},
            error=error,
            started_at=NOW,
            finished_at=NOW,
        )
        self.executor.end(folder)

    def lose_a_rank(self, step: str, number: int) -> None:
        """The result is there; the process is not gone yet."""
        self.files.results[self.folder(step, number)] = ResultFile(
            attempt_id="x",
            status="failed",
            error=ErrorInfo(code="rank_lost", message=f"rank {number} is gone"),
            started_at=NOW,
            finished_at=NOW,
        )

    def states(self, job: str = "job") -> dict[str, str]:
        return {record.step: str(record.state) for record in self.store.list(StepRecord, parent=job)}

    def job(self, name: str = "job") -> JobRecord:
        return self.store.get(JobRecord, name)

    def step(self, name: str, job: str = "job") -> StepRecord:
        return self.store.get(StepRecord, f"{job}/{name}")


def step(name: str, *needs: str, **more: object) -> Step:
    return Step(
        name=name,
        kind="preprocess",
        inputs={f"from_{other}": StepOutputInput(step=other, output="out") for other in needs},
        outputs={"out": "folder"},
        parameters=more.pop("parameters", {"max_seq_length": len(name)}),  # type: ignore[arg-type]
        **more,  # type: ignore[arg-type]
    )


def test_a_chain_runs_one_step_after_the_other_and_completes() -> None:
    world = World()
    world.submit(step("a"), step("b", "a"))
    world.tick()
    assert world.states() == {"a": "running", "b": "pending"}
    assert "waits for a" in (world.step("b").reason or "")
    world.finish("a")
    world.tick()
    assert world.states() == {"a": "succeeded", "b": "running"}
    world.finish("b")
    world.tick()
    assert world.job().state is JobState.COMPLETED
    assert world.jobs.output("job", "last")[1] == "sha256:job-b-1"


def test_independent_steps_run_side_by_side() -> None:
    world = World()
    world.submit(step("a"), step("bb"), step("ccc", "a", "bb"))
    world.tick()
    assert world.states() == {"a": "running", "bb": "running", "ccc": "pending"}


def test_a_full_compute_makes_a_step_wait_and_says_for_whom() -> None:
    world = World(slots=1)
    world.submit(step("a"), name="first")
    world.submit(step("bb"), name="second")
    world.tick()
    assert world.states("second") == {"bb": "pending"}
    assert "first/a" in (world.step("bb", "second").reason or "")
    world.finish("a", job="first")
    world.tick(2)
    assert world.states("second") == {"bb": "running"}


def test_the_claim_is_written_before_anything_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.submit(step("a"))
    seen: list[AttemptRecord | None] = []

    def look(*_: object) -> None:
        seen.append(world.store.find(AttemptRecord, "job/a/1"))

    monkeypatch.setattr(world.executor, "ensure", look)
    world.tick()
    assert seen[0] is not None
    assert seen[0].state is AttemptState.CLAIMED


def test_a_claim_left_by_a_server_that_died_is_fulfilled_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.submit(step("a"))
    ensure = world.executor.ensure
    monkeypatch.setattr(world.executor, "ensure", lambda *_: None)  # died before it could start anything
    world.tick()
    assert world.executor.starts == []
    monkeypatch.setattr(world.executor, "ensure", ensure)
    world.another_reconciler().pipelines.tick()
    assert world.executor.starts == [world.folder("a")]
    assert world.step("a").attempts == 1


def test_two_reconcilers_start_each_step_once() -> None:
    world = World()
    other = world.another_reconciler()
    for number in range(20):
        world.submit(step("a", parameters={"max_seq_length": number + 1}), name=f"job{number}")
        world.tick()
        other.pipelines.tick()
        world.finish("a", job=f"job{number}")
        other.pipelines.tick()
        world.tick()
    assert len(world.executor.starts) == len(set(world.executor.starts)) == 20


def test_equal_key_is_reused_and_says_from_where() -> None:
    world = World()
    world.submit(step("a"), name="first")
    world.tick()
    world.finish("a", job="first")
    world.tick()
    world.submit(step("a"), name="second")
    world.tick()
    assert world.states("second") == {"a": "reused"}
    assert world.step("a", "second").reused_from == "first/a/1"
    assert world.step("a", "second").metrics == {"loss": 1.5}
    assert world.job("second").state is JobState.COMPLETED


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({"force_rerun": True}, {}),
        ({}, {"deterministic": False}),
        ({}, {"parameters": {"max_seq_length": 9}}),
    ],
)
def test_nothing_is_reused_when_forced_not_deterministic_or_different(
    settings: dict[str, bool], changes: dict[str, object]
) -> None:
    world = World()
    for name in ("first", "second"):
        world.submit(step("a", **(changes if name == "second" else {})), name=name, **settings)
        world.tick()
        assert world.states(name) == {"a": "running"}
        world.finish("a", job=name)
        world.tick()


def test_a_cached_output_that_is_gone_is_made_again() -> None:
    world = World()
    world.submit(step("a"), name="first")
    world.tick()
    world.finish("a", job="first")
    world.tick()
    world.files.artifacts.clear()
    world.submit(step("a"), name="second")
    world.tick()
    assert world.states("second") == {"a": "running"}


def test_what_the_same_step_may_give_differently_tomorrow_is_used_and_not_remembered() -> None:
    world = World()
    world.submit(step("a"), name="first")
    world.tick()
    world.finish("a", job="first")
    folder = world.folder("a", job="first")
    world.files.results[folder] = world.files.results[folder].model_copy(update={"is_repeatable": False})
    world.tick()
    assert world.states("first") == {"a": "succeeded"}
    world.submit(step("a"), name="second")
    world.tick()
    assert world.states("second") == {"a": "running"}


def test_a_failed_step_ends_the_job_and_skips_the_rest() -> None:
    world = World()
    world.submit(step("a"), step("bb", "a"), step("ccc"))
    world.tick()
    world.finish("a", status="failed")
    world.tick(3)
    assert world.states() == {"a": "failed", "bb": "skipped", "ccc": "canceled"}
    assert world.job().state is JobState.FAILED
    assert "row 3 is bad" in str(world.job().error)
    assert world.executor.running() == []


def test_continue_on_step_failure_stops_only_the_descendants() -> None:
    world = World()
    world.submit(step("a"), step("bb", "a"), step("ccc"), step("dddd", "ccc"), continue_on_step_failure=True)
    world.tick()
    world.finish("a", status="failed")
    world.finish("ccc")
    world.tick()
    assert world.states() == {"a": "failed", "bb": "skipped", "ccc": "succeeded", "dddd": "running"}
    world.finish("dddd")
    world.tick()
    assert world.job().state is JobState.FAILED


def test_a_process_that_vanished_is_tried_again_with_its_earlier_folder_named() -> None:
    world = World()
    world.submit(step("a"))
    world.tick(2)
    world.executor.end(world.folder("a"))
    world.tick()
    assert world.store.get(AttemptRecord, "job/a/1").state is AttemptState.LOST
    assert world.folder("a", 2) in world.executor.running()
    assert str(world.folder("a", 1)) in world.files.written[world.folder("a", 2) / "step.json"]


def test_after_three_vanished_attempts_the_step_fails_and_a_retry_counts_afresh() -> None:
    world = World()
    world.submit(step("a"))
    world.tick()
    for number in (1, 2, 3):
        world.executor.end(world.folder("a", number))
        world.tick()
    assert world.job().state is JobState.FAILED
    world.jobs.retry("job")
    world.tick()
    world.executor.end(world.folder("a", 4))
    world.tick()
    assert world.states() == {"a": "running"}
    assert world.step("a").attempts == 5


def test_a_step_that_lost_one_of_its_processes_is_tried_again_as_often_as_one_that_vanished() -> None:
    world = World()
    world.submit(step("a"))
    world.tick()
    for number in (1, 2, 3):
        world.lose_a_rank("a", number)
        if number == 1:
            # It has left its word, and is still on its way out.
            world.tick()
            assert world.step("a").attempts == 1
        world.executor.end(world.folder("a", number))
        world.tick()
        attempt = world.store.get(AttemptRecord, f"job/a/{number}")
        assert attempt.state is AttemptState.LOST
        assert attempt.error is not None
        assert attempt.error.code == "rank_lost"
    assert world.step("a").attempts == 3
    assert world.job().state is JobState.FAILED
    assert world.step("a").error == attempt.error


def test_an_interruption_that_was_asked_for_is_not_counted() -> None:
    world = World()
    world.submit(step("a"))
    world.tick()
    for number in range(1, 6):
        world.finish("a", number, status="interrupted")
        world.tick()
    assert world.states() == {"a": "running"}


@pytest.mark.parametrize("ticks_before", [0, 1, 2])
def test_cancel_leaves_no_process_in_any_state(ticks_before: int) -> None:
    world = World()
    world.submit(step("a"), step("bb", "a"))
    world.tick(ticks_before)
    world.jobs.cancel("job")
    world.tick(3)
    assert world.job().state is JobState.CANCELED
    assert set(world.states().values()) == {"canceled"}
    assert world.executor.running() == []


def test_a_process_that_ignores_the_request_is_killed_after_the_grace() -> None:
    world = World()
    world.executor.ignores_stop = True
    world.submit(step("a"))
    world.tick(2)
    world.jobs.cancel("job")
    world.tick()
    assert world.job().state is JobState.CANCELING
    world.clock.move(11)
    world.tick(2)
    assert world.job().state is JobState.CANCELED
    assert (world.folder("a"), True) in world.executor.stopped


def test_cancelling_what_has_ended_is_refused() -> None:
    world = World()
    world.submit(step("a"))
    world.tick()
    world.finish("a")
    world.tick()
    with pytest.raises(InvalidState, match="completed"):
        world.jobs.cancel("job")


def test_retry_keeps_what_succeeded() -> None:
    world = World()
    world.submit(step("a"), step("bb", "a"))
    world.tick()
    world.finish("a")
    world.tick()
    world.finish("bb", status="failed")
    world.tick()
    world.jobs.retry("job")
    world.tick()
    assert world.states() == {"a": "succeeded", "bb": "running"}
    assert world.step("a").attempts == 1


def test_a_job_that_cannot_move_says_why_and_moves_on_once_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.submit(step("a"))

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(world.files, "write_json", no_space)
        world.tick(2)
        assert "No space left on device" in (world.step("a").reason or "")
    world.tick(2)
    world.finish("a")
    world.tick()
    assert world.job().state is JobState.COMPLETED


def test_a_slot_is_free_again_after_every_kind_of_end() -> None:
    world = World(slots=1)
    for number, end in enumerate(("succeeded", "failed", "cancel")):
        name = f"job{number}"
        world.submit(step("a", parameters={"max_seq_length": number + 1}), name=name)
        world.tick()
        assert world.states(name) == {"a": "running"}
        if end == "cancel":
            world.jobs.cancel(name)
        else:
            world.finish("a", job=name, status=end)
        world.tick(2)
    assert Computes(world.store, world.clock).active() == []


def test_a_step_that_can_never_be_started_fails_and_gives_its_slot_back() -> None:
    world = World(slots=1)
    world.submit(step("a"), name="impossible")
    world.executor.refuses = ValueError("embedded null byte")
    world.tick()
    world.executor.refuses = None
    world.submit(step("bb"), name="next")
    world.tick()
    assert world.job("impossible").state is JobState.FAILED
    error = world.job("impossible").error
    assert error is not None
    assert "cannot be started: embedded null byte" in error.message
    assert world.states("next") == {"bb": "running"}
