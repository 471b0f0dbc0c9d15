"""The log that the SDK's `stream` prints: lines that were given stay, whatever comes and whoever dies."""

from __future__ import annotations

import itertools
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_azure_submission import made_gateway
from tuneloop.core.states import JobState, StepState
from tuneloop.core.types import (
    AttemptRecord,
    ErrorInfo,
    Event,
    Job,
    JobRecord,
    ProgressLine,
    Step,
    StepRecord,
)
from tuneloop.server.azure.gateway import Gateway
from tuneloop.server.azure.history import log, words
from tuneloop.server.azure.history.runs import error_view
from tuneloop.server.azure.jobs import followers
from tuneloop.server.azure.jobs.facts import find_child, find_job

NAME = "calm_fox_1"


class World:
    """A job with one step, whose process writes what a test wants."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.gateway = made_gateway(home)
        self.store = self.gateway.parts.store
        self.started = self.now = self.gateway.parts.started_at
        job = Job(
            name=NAME,
            display_name="a run",
            experiment="tests",
            steps=(Step(name="finetune", kind="finetune"),),
            parameters={
                "finetune.per_device_train_batch_size": 2,
                "finetune.gradient_accumulation_steps": 4,
                "finetune.number_of_gpu_to_use_finetuning": 8,
                "finetune.num_nodes_finetune": 1,
                "finetune.learning_rate": 5e-6,
                "finetune.apply_lora": True,
            },
            warnings=("there are fewer devices",),
        )
        self.gateway.parts.jobs.record(job)

    @property
    def record(self) -> JobRecord:
        return self.gateway.parts.jobs.get(NAME)

    @property
    def folder(self) -> Path:
        return self.home / "jobs" / NAME / "finetune" / "1"

    def text(self) -> str:
        return log.text(self.gateway, self.record).decode()

    def lines(self) -> list[str]:
        """Without times."""
        return [line[21:] for line in self.text().splitlines()]

    def restart(self) -> None:
        again: Gateway = self.gateway
        self.gateway = Gateway(
            again.parts, again.base_url, again.folder, again.secret, again.tokens, again.identity_secret
        )

    def move(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def step(self, state: StepState, **changes: Any) -> None:
        found = self.store.get(StepRecord, f"{NAME}/finetune")
        self.store.update(found.model_copy(update={"state": state, **changes}))
        self.event("step", step="finetune", state=str(state))

    def state(self, state: JobState, **changes: Any) -> None:
        self.store.update(self.record.model_copy(update={"state": state, **changes}))
        self.event("state", state=str(state))

    def event(self, what: str, **data: Any) -> None:
        self.store.append(Event(at=self.now, subject=f"job/{NAME}", what=what, data=data))

    def start(self) -> None:
        self.state(JobState.RUNNING, started_at=self.now)
        self.step(StepState.RUNNING, started_at=self.now, attempts=1)
        attempt = AttemptRecord(
            created_at=self.now,
            job=NAME,
            step="finetune",
            number=1,
            compute="local",
            folder=f"jobs/{NAME}/finetune/1",
        )
        self.store.insert(attempt)
        self.folder.mkdir(parents=True)

    def write(self, file: str, text: str) -> None:
        with open(self.folder / file, "a", encoding="utf-8") as handle:
            handle.write(text)

    def metrics(self, step: int, **values: float) -> None:
        at_ms = int(self.now.timestamp() * 1000)
        self.write("metrics.jsonl", json.dumps({"at_ms": at_ms, "step": step, "values": values}) + "\n")

    def progress(self, stage: str, **more: Any) -> None:
        self.write("progress.jsonl", json.dumps({"at": self.now.isoformat(), "stage": stage, **more}) + "\n")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_it_begins_with_what_was_submitted(world: World) -> None:
    told = world.text()
    assert "calm_fox_1 was submitted: a run, experiment tests" in told
    assert "effective batch 64 (2 per device x 4 accumulation x 8 devices x 1 nodes)" in told
    assert "learning_rate 5e-06, apply_lora true" in told
    assert "warning: there are fewer devices" in told
    assert world.text() == told


def test_lines_that_were_given_stay_while_more_come(world: World) -> None:
    given = [world.text()]
    world.start()
    given.append(world.text())
    world.move(5)
    world.progress("loading the model")
    world.move(1)
    world.metrics(10, loss=2.5, learning_rate=5e-6)
    given.append(world.text())
    # What was written earlier and arrives late stands behind what was given.
    world.move(-3)
    world.metrics(5, loss=2.75)
    given.append(world.text())
    world.restart()
    world.move(60)
    world.step(StepState.SUCCEEDED, finished_at=world.now, metrics={"loss": 2.5, "steps": 10.0})
    world.state(JobState.COMPLETED, finished_at=world.now)
    given.append(world.text())
    for earlier, later in itertools.pairwise(given):
        assert later.startswith(earlier)
        assert later != earlier
    assert "finetune      started on local" in given[1]
    assert "finetune      step 10  loss 2.5  learning_rate 5e-06" in given[2]
    assert given[3].removeprefix(given[2]).endswith("finetune      step 5  loss 2.75\n")
    assert "finetune      succeeded in 1:03" in given[4]
    assert given[4].splitlines()[-1].endswith("job           completed in 1:03")


def test_what_a_dead_server_wrote_and_gave_to_nobody_is_cut_off(world: World) -> None:
    given = world.text()
    with open(world.home / "azure" / "runs" / NAME / "std_log.txt", "a", encoding="utf-8") as handle:
        handle.write("half a li")
    world.restart()
    assert world.text() == given
    world.start()
    assert world.text().startswith(given)
    assert "half a li" not in world.text()


def test_half_a_line_of_a_step_waits(world: World) -> None:
    world.start()
    line = json.dumps({"at_ms": 0, "step": 1, "values": {"loss": 1.0}})
    world.write("metrics.jsonl", line[:20])
    assert "step 1" not in world.text()
    world.write("metrics.jsonl", line[20:] + "\n")
    assert "step 1  loss 1" in world.text()


@pytest.mark.parametrize(
    "line", ["nonsense", "[]", "{}", '{"at": 3}', '{"at_ms": "x", "values": 3}', "\x00\xff"]
)
def test_what_is_no_line_of_a_step_is_passed_over(world: World, line: str) -> None:
    world.start()
    for file in ("metrics.jsonl", "progress.jsonl"):
        world.write(file, line + "\n")
    world.move(1)
    world.metrics(1, loss=1.0)
    assert world.lines()[-1] == "finetune      step 1  loss 1"


def test_a_long_stage_is_told_now_and_then(world: World) -> None:
    world.start()
    for done in range(100):
        world.move(1)
        world.progress("training", done=done, total=100, unit="steps", remaining_seconds=100 - done)
    told = [line for line in world.lines() if "training" in line]
    assert told[:2] == [
        "finetune      training  0/100 steps  1:40 left",
        "finetune      training  30/100 steps  1:10 left",
    ]
    assert len(told) == 4


def test_many_metrics_are_thinned_and_evaluations_are_not(world: World) -> None:
    world.start()
    for step in range(2000):
        world.metrics(step, loss=1.0)
    world.metrics(2000, eval_loss=0.5)
    told = [line for line in world.lines() if " step " in line]
    assert len(told) == log.METRIC_LINES + 2
    assert told[-1] == "finetune      step 2000  eval_loss 0.5"


def test_a_line_is_one_line_to_whoever_counts(world: World) -> None:
    world.start()
    before = len(world.lines())
    world.progress("a\u2028b\x0bc\x1b[31m\rd")
    assert world.lines()[before:] == ["finetune      a b c [31m d"]


def test_a_warning_is_told_when_it_is_printed_and_only_once(world: World) -> None:
    world.start()
    world.write("log.txt", "loading\nwarning: precision 16 runs as 32 here\n")
    assert world.text().count("warning: precision 16 runs as 32 here") == 1
    world.step(StepState.SUCCEEDED, finished_at=world.now, warnings=("precision 16 runs as 32 here",))
    assert world.text().count("precision 16 runs as 32 here") == 1


def test_a_failure_says_why_and_where(world: World) -> None:
    world.start()
    error = ErrorInfo(
        code="data",
        message="2 rows are too long.\nThey are listed.",
        next="Shorten them.",
        details=[{"file": "train_sft.jsonl", "line": 112, "rule": "length", "fix": "cut it"}],
    )
    world.step(StepState.FAILED, error=error, finished_at=world.now)
    world.state(JobState.FAILED, error=error, finished_at=world.now)
    told = world.lines()
    start = told.index("finetune      failed in 0.0 s")
    assert told[start + 1 : start + 5] == [
        "finetune      error: 2 rows are too long.",
        "finetune      error: They are listed.",
        "finetune        train_sft.jsonl line 112: rule length. cut it",
        "finetune      next: Shorten them.",
    ]
    view = error_view(error)
    assert view is not None
    assert view["error"]["message"].endswith("train_sft.jsonl line 112: rule length. cut it")
    assert view["error"]["details"][0]["target"] == "train_sft.jsonl line 112"


def test_a_lost_attempt_is_told(world: World) -> None:
    world.start()
    world.event("attempt", step="finetune", number=2)
    assert world.lines()[-1] == "finetune      attempt 2: the one before was lost"


# ---------------------------------------------------------------- who waits for the end


def test_an_end_is_told_to_those_who_were_told_that_it_runs(world: World) -> None:
    gateway = world.gateway
    assert not followers.is_news(gateway, NAME, has_ended=False)
    assert not followers.is_news(gateway, NAME, has_ended=True)
    # Somebody else looks at the job that has ended.
    assert followers.is_news(gateway, NAME, has_ended=True)
    world.restart()
    assert not followers.is_news(world.gateway, NAME, has_ended=True)


def test_who_gets_the_job_begins_to_follow_it(world: World) -> None:
    assert not followers.is_news(world.gateway, NAME, has_ended=False)
    followers.begins(world.gateway, NAME)
    assert followers.is_news(world.gateway, NAME, has_ended=True)
    assert not followers.is_news(world.gateway, NAME, has_ended=True)


def test_who_was_told_long_ago_does_not_wait_any_more(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = world.gateway
    assert not followers.is_news(gateway, NAME, has_ended=False)
    later = gateway.now() + timedelta(hours=1)
    monkeypatch.setattr(Gateway, "now", lambda self: later)
    assert followers.is_news(gateway, NAME, has_ended=True)
    assert not followers.is_news(gateway, NAME, has_ended=True)


def test_runs_are_found_by_their_names(world: World) -> None:
    found = find_job(world.gateway, NAME)
    assert found is not None
    assert find_job(world.gateway, "calm") is None
    child = find_child(world.gateway, f"{NAME}.finetune")
    assert child is not None
    assert child[1].step == "finetune"
    assert find_child(world.gateway, f"{NAME}.train") is None
    assert find_child(world.gateway, "finetune") is None


@pytest.mark.parametrize(
    ("done", "total", "unit", "told"),
    [
        (12.0, 60.0, "steps", "training  12/60 steps"),
        (31_400_000.0, 98_362_400.0, "bytes", "training  31.4/98.4 MB"),
        (2_000_000.0, None, "bytes", "training  2.0 MB"),
        (1_234_567.0, 2_000_000.0, "rows", "training  1,234,567/2,000,000 rows"),
        (0.5, None, None, "training  0.5"),
    ],
)
def test_progress_is_told_in_figures_that_people_read(
    done: float, total: float | None, unit: str | None, told: str
) -> None:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    line = ProgressLine(at=at, stage="training", done=done, total=total, unit=unit)
    assert words.of_progress(line) == told
