"""What the tracker carries, and that it carries it once whatever happens."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.fakes import FakeClock, FakeFiles, FakeStore
from tests.fakes_tracking import FakeRun, FakeTrackingServer, Killed
from tuneloop.core.states import AttemptState, JobState, ModelState, StepState
from tuneloop.core.types import (
    AttemptRecord,
    Dataset,
    ErrorInfo,
    Job,
    JobRecord,
    Lineage,
    MetricLine,
    ModelRecord,
    Record,
    Step,
    StepFile,
    StepFileInput,
    StepRecord,
    TrackingRecord,
)
from tuneloop.workspace.tracking import TickReport, Tracker, facts, rebuild
from tuneloop.workspace.tracking.runs import BYTES_PER_TICK
from tuneloop.workspace.tracking.tracker import NEWEST, SWEEP_SECONDS

START = datetime(2026, 1, 1, tzinfo=UTC)
END = START + timedelta(seconds=100)
TRAIN = "sha256:" + "ab" * 32
MODEL = "sha256:" + "cd" * 32


class RealFolders(FakeFiles):
    """Folders that exist, because the tracker reads what steps wrote there."""

    def folder(self, relative: str) -> Path:
        path = self.home / relative
        path.mkdir(parents=True, exist_ok=True)
        return path


class Home:
    """A workspace in which things happen to jobs, and trackers that come and go."""

    def __init__(self, folder: Path) -> None:
        self.store = FakeStore()
        self.files = RealFolders(folder)
        self.server = FakeTrackingServer()
        self.clock = FakeClock(START)
        self.tracker = self.new_tracker()

    def new_tracker(self) -> Tracker:
        self.tracker = Tracker(self.store, self.files, self.server, self.clock)
        return self.tracker

    def tick(self, times: int = 1) -> TickReport:
        for _ in range(times):
            self.clock.move(1)
            report = self.tracker.tick()
        return report

    def job(self, name: str = "calm_heron", state: JobState = JobState.RUNNING, **more: object) -> JobRecord:
        steps = (Step(name="finetune", kind="finetune"), Step(name="evaluate", kind="evaluate"))
        job = Job(name=name, display_name=f"shown {name}", experiment="chat", steps=steps).model_copy(
            update=more
        )
        record = self.store.insert(JobRecord(created_at=self.clock.now(), job=job, state=state))
        for step in steps:
            self.store.insert(StepRecord(created_at=self.clock.now(), job=name, step=step.name))
        return record

    def set(self, kind: type[Record], key: str, **changes: object) -> None:
        self.store.update(self.store.get(kind, key).model_copy(update=changes))

    def attempt(
        self, job: str = "calm_heron", step: str = "finetune", number: int = 1, **parameters: object
    ) -> Path:
        """Claimed by the reconciler and begun by its process."""
        relative = f"jobs/{job}/{step}/{number}"
        self.store.insert(
            AttemptRecord(
                created_at=self.clock.now(),
                job=job,
                step=step,
                number=number,
                state=AttemptState.RUNNING,
                compute="local",
                folder=relative,
            )
        )
        self.set(StepRecord, f"{job}/{step}", attempts=number, state=StepState.RUNNING)
        folder = self.files.folder(relative)
        given = StepFile(
            attempt=f"{job}/{step}/{number}",
            attempt_id="id",
            kind=step,  # type: ignore[arg-type]
            parameters=parameters,  # type: ignore[arg-type]
            inputs={"model": StepFileInput(path="/artifact", digest=MODEL)},
        )
        (folder / "step.json").write_text(given.model_dump_json())
        return folder

    def end_attempt(self, key: str, state: AttemptState = AttemptState.SUCCEEDED, **more: object) -> None:
        self.set(AttemptRecord, key, state=state, finished_at=END, **more)

    def end_step(self, key: str, state: StepState = StepState.SUCCEEDED, **more: object) -> None:
        self.set(StepRecord, key, state=state, started_at=START, finished_at=END, **more)

    def end_job(self, name: str = "calm_heron", state: JobState = JobState.COMPLETED, **more: object) -> None:
        self.set(JobRecord, name, state=state, finished_at=END, **more)

    def model(self, name: str = "ours", version: str = "spring", **more: object) -> ModelRecord:
        record = ModelRecord(
            created_at=self.clock.now(), name=name, model_version=version, artifact=MODEL, description="Good."
        )
        return self.store.insert(record.model_copy(update=more))

    def job_run(self, name: str = "calm_heron") -> FakeRun:
        return self.server.run_with("tuneloop.job", name)

    def attempt_run(self, key: str = "calm_heron/finetune/1") -> FakeRun:
        return self.server.run_with("tuneloop.attempt", key)


def lines(count: int, start: int = 0) -> str:
    """As a step writes them: `loss` falls by one with every step."""
    return "".join(
        MetricLine(at_ms=1000 + step, step=step, values={"loss": 100.0 - step}).model_dump_json() + "\n"
        for step in range(start, start + count)
    )


def append(folder: Path, text: str) -> None:
    with (folder / "metrics.jsonl").open("a") as handle:
        handle.write(text)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


# ---------------------------------------------------------------- runs of jobs and attempts


def test_a_job_is_a_run_with_its_parameters_and_tags(home: Home) -> None:
    home.job(
        base_model="SmolLM2:1",
        recipe_digest="sha256:12",
        warnings=("one", "two"),
        tags={"team": "blue"},
        parameters={"finetune.learning_rate": 2e-5, "finetune.apply_lora": True},
    )
    home.tick()
    run = home.job_run()
    assert (run.experiment, run.name, run.status) == ("chat", "shown calm_heron", "running")
    assert run.parameters == {"finetune.learning_rate": "2e-05", "finetune.apply_lora": "true"}
    assert run.tags["tuneloop.base_model"] == "SmolLM2:1"
    assert run.tags["tuneloop.warnings"] == "one\ntwo"
    assert run.tags["team"] == "blue"


def test_a_job_shows_its_datasets_with_digests(home: Home) -> None:
    home.store.insert(
        Dataset(
            created_at=START,
            name="chat",
            dataset_version="1",
            artifact=TRAIN,
            source_path="/data/chat.jsonl",
            rows=200,
        )
    )
    home.job(datasets={"train": "chat:1", "test": "chat:1", "validation": "gone:1"})
    home.tick()
    (used,) = home.job_run().datasets.values()
    assert (used.name, used.digest, used.roles, used.rows) == ("chat:1", TRAIN, ("train", "test"), 200)
    assert home.job_run().tags["tuneloop.dataset.validation"] == "gone:1"


def test_a_queued_job_is_not_shown_yet(home: Home) -> None:
    home.job(state=JobState.QUEUED)
    home.tick()
    assert home.server.runs == {}


def test_an_attempt_is_a_run_nested_in_its_jobs_run(home: Home) -> None:
    home.job()
    home.attempt(epochs=3)
    home.tick()
    run = home.attempt_run()
    assert run.tags["mlflow.parentRunId"] == home.job_run().id
    assert run.tags["tuneloop.step_kind"] == "finetune"
    assert run.tags["tuneloop.input.model"] == MODEL
    assert run.parameters == {"epochs": "3"}


def test_an_attempt_without_its_step_file_is_shown_once_it_has_one(home: Home) -> None:
    home.job()
    (home.attempt() / "step.json").unlink()
    home.tick()
    assert len(home.server.runs) == 1
    home.end_attempt("calm_heron/finetune/1", AttemptState.LOST)
    home.tick()
    assert home.attempt_run().status == "failed"


def test_curves_appear_while_the_attempt_runs(home: Home) -> None:
    home.job()
    folder = home.attempt()
    append(folder, lines(3))
    home.tick()
    assert home.attempt_run().curve("loss") == [(0, 100.0), (1, 99.0), (2, 98.0)]
    append(folder, lines(2, start=3))
    assert home.tick().lag_bytes == 0
    assert len(home.attempt_run().curve("loss")) == 5


def test_a_picture_comes_to_the_runs_of_the_attempt_and_of_its_job_once_the_attempt_has_ended(
    home: Home,
) -> None:
    home.job()
    folder = home.attempt()
    (folder / "pictures").mkdir()
    (folder / "pictures" / "loss.png").write_bytes(b"drawn")
    (folder / "pictures" / "loss.png.part").write_bytes(b"half of it")
    home.tick()
    assert home.attempt_run().pictures == {}
    home.end_attempt("calm_heron/finetune/1", AttemptState.FAILED)
    home.tick()
    assert home.attempt_run().pictures == {"loss.png": b"drawn"}
    assert home.job_run().pictures == {"finetune/loss.png": b"drawn"}


def test_a_line_that_is_still_being_written_waits(home: Home) -> None:
    home.job()
    folder = home.attempt()
    whole, torn = lines(1), lines(1, start=1)
    append(folder, whole + torn[:10])
    assert home.tick().lag_bytes == 10
    append(folder, torn[10:])
    assert home.tick().lag_bytes == 0
    assert len(home.attempt_run().curve("loss")) == 2


def test_a_torn_last_line_of_a_killed_attempt_holds_nothing_up(home: Home) -> None:
    home.job()
    append(home.attempt(), lines(1) + '{"at_ms": 12')
    home.end_attempt("calm_heron/finetune/1", AttemptState.LOST)
    home.end_job(state=JobState.FAILED)
    assert home.tick().lag_bytes == 0
    assert home.store.get(TrackingRecord, "job/calm_heron").is_finished


def test_a_line_that_is_no_metrics_line_is_passed_over(home: Home) -> None:
    home.job()
    append(home.attempt(), lines(1) + "\0\0\0\n[]\n" + lines(1, start=1))
    assert home.tick().problems == ()
    assert len(home.attempt_run().curve("loss")) == 2


def test_a_loss_that_is_not_a_number_is_shown_as_such(home: Home) -> None:
    home.job()
    line = MetricLine(at_ms=1, step=1, values={"loss": math.nan, "rate": 0.5})
    append(home.attempt(), line.model_dump_json() + "\n")
    home.tick()
    assert math.isnan(home.attempt_run().value("loss"))
    assert home.attempt_run().value("rate") == 0.5


@pytest.mark.parametrize(
    ("state", "status"),
    [
        (AttemptState.SUCCEEDED, "finished"),
        (AttemptState.FAILED, "failed"),
        (AttemptState.LOST, "failed"),
        (AttemptState.CANCELED, "killed"),
    ],
)
def test_an_attempt_ends_as_it_ended(home: Home, state: AttemptState, status: str) -> None:
    home.job()
    home.attempt()
    home.end_attempt(
        "calm_heron/finetune/1", state, peak_memory_bytes=7, error=ErrorInfo(code="x", message="out of disk")
    )
    home.tick()
    run = home.attempt_run()
    assert (run.status, run.ended_at, run.tags["tuneloop.error"]) == (status, END, "out of disk")
    assert run.value("peak_memory_bytes") == 7
    assert home.job_run().value("finetune.peak_memory_bytes") == 7


@pytest.mark.parametrize(
    ("state", "status"),
    [(JobState.COMPLETED, "finished"), (JobState.FAILED, "failed"), (JobState.CANCELED, "killed")],
)
def test_a_job_ends_as_it_ended(home: Home, state: JobState, status: str) -> None:
    home.job()
    home.tick()
    home.end_job(state=state, error=ErrorInfo(code="x", message="finetune failed"))
    home.tick()
    run = home.job_run()
    assert (run.status, run.ended_at, run.tags["tuneloop.error"]) == (status, END, "finetune failed")


def test_final_metrics_of_a_step_are_on_the_jobs_run_as_soon_as_it_ends(home: Home) -> None:
    home.job()
    home.end_step("calm_heron/finetune", metrics={"loss": 1.5}, warnings=("cut 3 rows",))
    home.tick()
    assert home.job_run().value("finetune.loss") == 1.5
    assert home.job_run().value("finetune.seconds") == 100
    assert home.job_run().tags["tuneloop.warnings.finetune"] == "cut 3 rows"


def test_a_reused_step_shows_its_metrics_and_whose_they_are(home: Home) -> None:
    home.job()
    home.end_step(
        "calm_heron/evaluate",
        StepState.REUSED,
        metrics={"base_loss": 3.0, "tuned_loss": 2.0},
        reused_from="old_crow/evaluate/1",
    )
    home.end_job()
    home.tick()
    run = home.job_run()
    assert (run.value("evaluate.base_loss"), run.value("evaluate.tuned_loss")) == (3.0, 2.0)
    assert run.tags["tuneloop.reused.evaluate"] == "old_crow/evaluate/1"


def test_a_retried_job_goes_on_in_its_run(home: Home) -> None:
    home.job()
    home.attempt()
    home.end_attempt("calm_heron/finetune/1", AttemptState.FAILED)
    home.end_job(state=JobState.FAILED)
    home.tick()
    home.set(JobRecord, "calm_heron", state=JobState.RUNNING)
    home.attempt(number=2)
    home.tick()
    assert home.job_run().status == "running"
    home.end_attempt("calm_heron/finetune/2")
    home.end_job()
    home.tick()
    assert home.job_run().status == "finished"
    assert home.attempt_run("calm_heron/finetune/2").status == "finished"
    assert len(home.server.runs) == 3


# ---------------------------------------------------------------- killed, cut off, broken


def whole_life(home: Home) -> list[Callable[[], object]]:
    """A job's life in the order it happens; a tracker may be at work between any two moments."""
    folder = home.files.folder("jobs/calm_heron/finetune/1")
    return [
        lambda: home.job(parameters={"finetune.epochs": 2}),
        lambda: home.attempt(epochs=2),
        lambda: append(folder, lines(3)),
        lambda: append(folder, lines(2, start=3)),
        lambda: home.end_attempt("calm_heron/finetune/1", peak_memory_bytes=7),
        lambda: home.end_step("calm_heron/finetune", metrics={"loss": 1.0}),
        lambda: home.end_step("calm_heron/evaluate", StepState.REUSED, metrics={"tuned_loss": 2.0}),
        lambda: home.model(lineage=Lineage(job="calm_heron")),
        lambda: home.end_job(),
    ]


def shown(server: FakeTrackingServer) -> object:
    """Everything that MLflow would show, without what may differ: nothing may."""
    runs = [(run.name, run.status, run.tags, run.parameters, run.points) for run in server.runs.values()]
    models = [(one.entry, one.run_id) for known in server.models.values() for one in known]
    return runs, models


def live(home: Home) -> None:
    """Ticks between all moments; a killed tracker is replaced by a fresh one at the next."""
    for happen in [*whole_life(home), *[lambda: None] * 3]:
        happen()
        try:
            home.tick()
        except Killed:
            home.new_tracker()


@pytest.mark.parametrize("moment", ["killed_before", "killed_after"])
def test_a_tracker_killed_at_any_call_loses_nothing_and_doubles_nothing(tmp_path: Path, moment: str) -> None:
    undisturbed = Home(tmp_path / "undisturbed")
    live(undisturbed)
    assert undisturbed.server.calls > 10
    for call in range(1, undisturbed.server.calls + 1):
        home = Home(tmp_path / str(call))
        setattr(home.server, moment, call)
        live(home)
        assert shown(home.server) == shown(undisturbed.server), f"{moment} {call}"
        assert home.store.get(TrackingRecord, "job/calm_heron").is_finished


def test_a_tracker_killed_before_it_could_write_down_anything_says_it_again(home: Home) -> None:
    home.job()
    append(home.attempt(), lines(3))
    home.tick()
    before = shown(home.server)
    for tracked in home.store.list(TrackingRecord):
        home.store.delete(tracked)
    home.new_tracker()
    home.tick()
    assert shown(home.server) == before


def test_everything_that_happened_without_a_tracker_is_carried_by_the_next_one(home: Home) -> None:
    for happen in whole_life(home):
        happen()
    home.new_tracker()
    assert home.tick().problems == ()
    assert home.job_run().status == "finished"
    assert len(home.attempt_run().curve("loss")) == 5
    assert home.store.get(ModelRecord, "ours:spring").mlflow_version == 1


def test_silence_is_lag_and_is_caught_up(home: Home) -> None:
    home.server.is_reachable = False
    home.job()
    append(home.attempt(), lines(4))
    report = home.tick()
    assert (report.is_reachable, report.lag_bytes, report.carried) == (False, len(lines(4)), 0)
    assert report.problems == ("MLflow: nobody answers",)
    home.server.is_reachable = True
    home.clock.move(60)
    assert home.tick().lag_bytes == 0
    assert len(home.attempt_run().curve("loss")) == 4


def test_silence_is_met_once_and_then_less_and_less_often(home: Home) -> None:
    asked: list[float] = []

    def ensure_run(*_: object) -> str:
        asked.append((home.clock.now() - START).total_seconds())
        return FakeTrackingServer.ensure_run(home.server, *_)  # type: ignore[arg-type]

    home.server.ensure_run = ensure_run  # type: ignore[method-assign]
    home.server.is_reachable = False
    home.job("one")
    home.job("two")
    home.tick(20)
    assert asked == [1, 2, 4, 8, 16]


def test_a_broken_job_holds_up_no_other_and_no_model(home: Home) -> None:
    home.server.broken = {"shown one"}
    home.job("one")
    home.job("two")
    home.model(lineage=Lineage(job="one"))
    report = home.tick()
    assert home.job_run("two").status == "running"
    assert report.problems == ("job/one: ValueError: shown one is broken",)
    assert home.store.get(ModelRecord, "ours:spring").state == ModelState.REGISTERED


def test_a_broken_attempt_does_not_keep_the_job_from_ending_and_is_tried_again(home: Home) -> None:
    home.server.broken = {"finetune 1"}
    home.job()
    append(home.attempt(), lines(1))
    home.end_attempt("calm_heron/finetune/1")
    home.end_job()
    assert home.tick().lag_bytes > 0
    assert home.job_run().status == "finished"
    home.server.broken.clear()
    home.clock.move(60)
    assert home.tick().problems == ()
    assert len(home.attempt_run().curve("loss")) == 1


def test_a_step_file_that_cannot_be_read_is_that_attempts_problem(home: Home) -> None:
    home.job()
    (home.attempt() / "step.json").write_text("{")
    home.attempt(step="evaluate")
    report = home.tick()
    assert [problem.split(":")[0] for problem in report.problems] == ["attempt/calm_heron/finetune/1"]
    assert home.attempt_run("calm_heron/evaluate/1").status == "running"


def test_a_run_that_a_person_deleted_is_left_alone(home: Home) -> None:
    home.job()
    folder = home.attempt()
    home.tick()
    home.attempt_run().is_deleted = True
    append(folder, lines(2))
    report = home.tick()
    assert (report.problems, report.lag_bytes) == ((), 0)
    home.job_run().is_deleted = True
    home.end_attempt("calm_heron/finetune/1")
    home.end_job()
    assert home.tick(2).problems == ()
    assert len(home.server.runs) == 2


def test_a_lost_database_is_filled_again_with_what_is_still_going_on(home: Home) -> None:
    home.job()
    folder = home.attempt()
    append(folder, lines(2))
    home.tick()
    home.server.lose_everything()
    append(folder, lines(1, start=2))
    assert "carried again" in home.tick().problems[0]
    home.clock.move(60)
    assert home.tick().problems == ()
    assert len(home.attempt_run().curve("loss")) == 3
    assert home.attempt_run().tags["mlflow.parentRunId"] == home.job_run().id


# ---------------------------------------------------------------- the cost of a tick


def test_a_long_file_is_carried_in_portions_so_that_others_have_their_turn(home: Home) -> None:
    home.job()
    text = lines(30_000)
    append(home.attempt(), text)
    report = home.tick()
    assert 0 < report.lag_bytes < len(text)
    assert len(text) - report.lag_bytes >= BYTES_PER_TICK
    home.end_attempt("calm_heron/finetune/1")
    home.end_job()
    assert home.tick().lag_bytes == 0
    assert len(home.attempt_run().curve("loss")) == 30_000
    assert home.attempt_run().status == "finished"


def test_carried_jobs_cost_nothing_any_more(home: Home) -> None:
    home.job()
    home.end_job()
    home.tick()
    calls = home.server.calls
    report = home.tick(int(SWEEP_SECONDS) * 2)
    assert (home.server.calls, report.carried) == (calls, 0)


def test_a_job_that_ended_unseen_among_many_is_found_by_the_next_sweep(home: Home) -> None:
    home.job("old")
    home.end_job("old", JobState.FAILED)
    home.tick(2)
    for number in range(NEWEST + 5):
        home.job(f"later{number}")
        home.end_job(f"later{number}")
    # Retried, and over before the next tick.
    home.end_job("old", JobState.COMPLETED)
    home.tick()
    assert home.job_run("old").status == "failed"
    home.tick(int(SWEEP_SECONDS))
    assert home.job_run("old").status == "finished"
    assert len(home.server.runs) == NEWEST + 6


# ---------------------------------------------------------------- models


def test_a_pending_model_is_registered_with_its_lineage(home: Home) -> None:
    home.job()
    lineage = Lineage(
        job="calm_heron", output="trained_model", base_model="SmolLM2:1", datasets={"train": "chat:1 (ab)"}
    )
    home.model(
        tags={"team": "blue"}, lineage=lineage, template_digest="sha256:77", metrics={"tuned_loss": 1.5}
    )
    home.tick()
    record = home.store.get(ModelRecord, "ours:spring")
    assert (record.state, record.mlflow_version) == (ModelState.REGISTERED, 1)
    (version,) = home.server.models["ours"]
    assert version.source == home.files.artifact_path(MODEL)
    assert version.run_id == home.job_run().id
    assert version.entry.description == "Good."
    assert version.entry.tags == {
        "team": "blue",
        "tuneloop.version": "spring",
        "tuneloop.digest": MODEL,
        "tuneloop.template_digest": "sha256:77",
        "tuneloop.base_model": "SmolLM2:1",
        "tuneloop.job": "calm_heron",
        "tuneloop.output": "trained_model",
        "tuneloop.dataset.train": "chat:1 (ab)",
        "tuneloop.metric.tuned_loss": "1.5",
    }
    assert [event.what for event in home.store.events(subject="model/ours:spring")] == ["registered"]


def test_a_model_whose_answer_was_lost_is_registered_once(home: Home) -> None:
    home.model()
    home.server.killed_after = 1
    with pytest.raises(Killed):
        home.tick()
    home.new_tracker()
    home.tick()
    assert len(home.server.models["ours"]) == 1
    assert home.store.get(ModelRecord, "ours:spring").mlflow_version == 1


def test_a_model_that_cannot_be_registered_says_why(home: Home) -> None:
    home.server.broken = {"ours"}
    home.model()
    home.model("other")
    home.tick(5)
    record = home.store.get(ModelRecord, "ours:spring")
    assert record.error is not None
    assert "ours is broken" in record.error.message
    assert home.store.get(ModelRecord, "other:spring").state == ModelState.REGISTERED
    home.server.broken.clear()
    home.clock.move(60)
    home.tick()
    assert home.store.get(ModelRecord, "ours:spring").error is None


def test_a_deleted_model_leaves_mlflow_and_then_the_store(home: Home) -> None:
    home.model(version="1")
    home.model(version="2")
    home.tick()
    home.set(ModelRecord, "ours:1", state=ModelState.DELETING)
    home.tick()
    assert home.store.find(ModelRecord, "ours:1") is None
    assert [one.entry.version for one in home.server.models["ours"]] == ["2"]


def test_a_model_deleted_before_it_was_registered_is_just_gone(home: Home) -> None:
    home.model(state=ModelState.DELETING)
    home.tick()
    assert home.store.find(ModelRecord, "ours:spring") is None
    assert home.server.models == {}


def test_a_deletion_that_mlflow_did_not_hear_keeps_the_record(home: Home) -> None:
    home.model()
    home.tick()
    home.set(ModelRecord, "ours:spring", state=ModelState.DELETING)
    home.server.is_reachable = False
    home.tick()
    assert home.store.get(ModelRecord, "ours:spring").state == ModelState.DELETING


def test_models_are_rebuilt_from_tags(home: Home) -> None:
    lineage = Lineage(job="j", attempt="j/export/1", datasets={"train": "chat:1 (ab)"}, code_version="0.1")
    home.model(
        tags={"team": "blue"}, lineage=lineage, metrics={"tuned_loss": 1.5}, template_digest="sha256:1"
    )
    home.tick()
    before = home.store.get(ModelRecord, "ours:spring")
    home.store.delete(before)
    assert rebuild(home.store, home.server, home.clock) == [
        "model ours:spring: restored from MLflow's version 1."
    ]
    after = home.store.get(ModelRecord, "ours:spring")
    ignored = {"created_at": after.created_at, "version": after.version}
    assert after == before.model_copy(update=ignored)
    assert rebuild(home.store, home.server, home.clock) == []


def test_rebuild_corrects_a_number_and_tells_what_mlflow_lacks(home: Home) -> None:
    home.model("moved")
    home.model("lost")
    home.tick()
    home.set(ModelRecord, "moved:spring", mlflow_version=9)
    del home.server.models["lost"]
    assert rebuild(home.store, home.server, home.clock) == [
        "model moved:spring: MLflow's version is 1, not 9.",
        "model lost:spring: MLflow has it no more; delete it and register it again.",
    ]
    assert home.store.get(ModelRecord, "moved:spring").mlflow_version == 1


# ---------------------------------------------------------------- another MLflow


def move(home: Home, place: str) -> FakeTrackingServer:
    """The workspace's server was started again with another address; it is another MLflow there."""
    home.server = FakeTrackingServer(place)
    home.new_tracker()
    return home.server


def finished_job_with_model(home: Home) -> None:
    for happen in whole_life(home):
        happen()
    home.tick()


def test_another_mlflow_gets_the_whole_history_and_every_model(home: Home) -> None:
    finished_job_with_model(home)
    before = shown(home.server)
    move(home, "http://elsewhere:5000")
    assert home.tick(2).problems == ()
    assert shown(home.server) == before
    assert home.store.get(ModelRecord, "ours:spring").mlflow_version == 1
    (event,) = home.store.events(subject="service/tracker")
    assert event.what == "jobs and models are carried to http://elsewhere:5000"


def test_a_model_has_no_number_until_the_other_mlflow_has_it(home: Home) -> None:
    finished_job_with_model(home)
    move(home, "http://elsewhere:5000").travelling = {"ours"}
    report = home.tick()
    record = home.store.get(ModelRecord, "ours:spring")
    assert (record.state, record.mlflow_version) == (ModelState.REGISTERED, None)
    assert report.under_way == ("model ours:spring is uploaded to MLflow: 1 of 2 MB",)
    assert report.problems == ()
    home.server.travelling.clear()
    assert home.tick().under_way == ()
    assert home.store.get(ModelRecord, "ours:spring").mlflow_version == 1


def test_coming_back_to_an_mlflow_goes_on_in_the_runs_there(home: Home) -> None:
    home.job()
    folder = home.attempt()
    append(folder, lines(2))
    home.tick()
    first = home.server
    move(home, "http://elsewhere:5000")
    append(folder, lines(1, start=2))
    home.tick()
    assert len(home.attempt_run().curve("loss")) == 3
    append(folder, lines(1, start=3))
    home.server = first
    home.new_tracker()
    home.tick()
    assert len(first.runs) == 2
    assert len(home.attempt_run().curve("loss")) == 4


def test_a_run_deleted_at_one_mlflow_stays_deleted_after_an_excursion_to_another(home: Home) -> None:
    finished_job_with_model(home)
    first = home.server
    home.job_run().is_deleted = True
    move(home, "http://elsewhere:5000")
    home.tick()
    home.server = first
    home.new_tracker()
    assert home.tick(2).problems == ()
    assert len(first.runs) == 2


def test_a_tracker_that_starts_again_at_the_same_mlflow_registers_nothing_again(home: Home) -> None:
    move(home, "http://elsewhere:5000")
    finished_job_with_model(home)
    calls = home.server.calls
    home.new_tracker()
    home.tick()
    assert home.server.calls == calls
    assert home.store.get(ModelRecord, "ours:spring").mlflow_version == 1


# ---------------------------------------------------------------- what MLflow takes


def test_parameters_become_flat_text_of_mlflows_size() -> None:
    assert facts.flat({"a": {"b": [1, 2], "c": {}}, "d": None, "e": "x" * 7000, "f/g": True}) == {
        "a.b": "[1, 2]",
        "a.c": "{}",
        "d": "null",
        "e": "x" * 5999 + "…",
        "f_g": "true",
    }


@pytest.mark.parametrize(
    ("written", "taken"), [("loss@5", "loss_5"), ("../x", "_x"), ("", "_"), ("y" * 300, "y" * 250)]
)
def test_names_become_what_mlflow_takes(written: str, taken: str) -> None:
    assert facts.clean_name(written) == taken


def test_batches_hold_at_most_what_one_call_takes_and_end_at_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = json.dumps({"at_ms": 1, "step": 1, "values": {f"v{number}": 0.5 for number in range(300)}}) + "\n"
    path.write_text(line * 7)
    batches = list(facts.read_curves(path, 0, 1 << 20))
    assert [len(batch.points) for batch in batches] == [900, 900, 300]
    assert [batch.end for batch in batches] == [3 * len(line), 6 * len(line), 7 * len(line)]
