"""Watching a job to its end and telling what came of it: shared by `run`, `jobs stream` and `jobs retry`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tuneloop.cli import curves, failures, live, output
from tuneloop.cli.session import Session, program
from tuneloop.core.states import JobState

if TYPE_CHECKING:
    from tuneloop.client.views import JobView, StepView

DETACHED = 130
"""Exit code after Ctrl-C and of a job that was cancelled."""


def watch(session: Session, name: str, *, as_json: bool = False, told: Iterable[str] = ()) -> int:
    """Stream a job until it ends; the exit code. With JSON the progress goes to stderr, the job to stdout.

    `told` are warnings that have been shown.
    """
    try:
        job = live.follow(session, name, stream=sys.stderr if as_json else sys.stdout, told=told)
    except KeyboardInterrupt:
        output.note(f"\nDetached: job {name} goes on.")
        output.note(f"  come back:  {program()} jobs stream {name}")
        output.note(f"  stop it:    {program()} jobs cancel {name}")
        return DETACHED
    return finish(session, job, as_json=as_json)


def finish(session: Session, job: JobView, *, as_json: bool = False) -> int:
    """Tell how a job that has ended came out; the exit code."""
    if as_json:
        output.print_json(job)
    if job["state"] == JobState.COMPLETED:
        if not as_json:
            tell_completed(job, losses(session, job))
        return 0
    if job["state"] == JobState.CANCELED:
        output.note(f"Job {job['name']} was cancelled.")
        output.note(f"  take it up again:  {program()} jobs retry {job['name']}")
        return DETACHED
    tell_failed(session, job, sys.stderr)
    return 1


def losses(session: Session, job: JobView) -> list[str]:
    """Where no curve was drawn, each curve of the fine-tuning in one line."""
    if output.is_drawable(sys.stdout) or not any(step["name"] == "finetune" for step in job["steps"]):
        return []
    found = curves.series(session.client.metrics(job["name"], "finetune"), curves.LOSSES)
    return [f"training: {curves.in_one_line(one)}" for one in found]


def tell_completed(job: JobView, told: Iterable[str] = ()) -> None:
    """The summary: time, metrics, outputs and the next commands."""
    name = job["name"]
    taken = output.between(job["started_at"] or job["created_at"], job["finished_at"])
    output.say()
    output.say(f"Job {name} completed in {output.duration(taken)}.")
    for line in (*told, *figures(final_metrics(job))):
        output.say(f"  {line}")
    for key, made in job["outputs"].items():
        output.say(f"  {key:<18} {made['path'] or made['digest'] or 'not made'}")
    output.say("Next:")
    for line in next_commands(job):
        output.say(f"  {line}")


def next_commands(job: JobView) -> Iterator[str]:
    name, command = job["name"], program()
    if "trained_model" in job["outputs"]:
        yield f"{command} models register {name}:trained_model --name my-model --version 1"
    if "evaluation_result" in job["outputs"]:
        yield f"{command} jobs outputs {name} --download evaluation_result --to ."
    yield f"{command} jobs show {name}"
    if any(step["kind"] == "finetune" for step in job["steps"]):
        yield f"{command} jobs metrics {name}"
    yield f"{command} mlflow"


def final_metrics(job: JobView) -> dict[str, float]:
    """The evaluation's figures; without an evaluation those of the fine-tuning."""
    measured = {step["kind"]: step["metrics"] for step in job["steps"]}
    return measured.get("evaluate") or measured.get("finetune") or {}


def figures(metrics: Mapping[str, float]) -> Iterator[str]:
    """`loss  6.735 -> 2.098` for what was measured of base and tuned model; the rest in one line."""
    rest = dict(metrics)
    for name, before in metrics.items():
        of = name.removeprefix("base_")
        if of != name and f"tuned_{of}" in metrics:
            after = rest.pop(f"tuned_{of}")
            rest.pop(name)
            spelled = f"{output.number(before)} -> {output.number(after)}"
            yield f"{of.replace('_', ' '):<18} {spelled}  (base -> tuned)"
    if rest:
        yield "  ".join(output.figures(rest))


def pictures(session: Session, job: str, step: StepView) -> list[Path]:
    """What a step has drawn, or the one that it was reused from."""
    attempt = step["reused_from"] or f"{job}/{step['name']}/{step['attempts']}"
    return sorted((session.settings.home / "jobs" / attempt / "pictures").glob("*.png"))


def tell_failed(session: Session, job: JobView, stream: TextIO) -> None:
    """The failed step's error, its next move, and where its log is."""
    print(f"Job {job['name']} {job['state']}.", file=stream)
    failed = [step for step in job["steps"] if step["state"] == "failed"]
    for step in failed:
        _tell_step(session, job["name"], step, stream)
    if not failed and job["error"]:
        error = job["error"]
        _print_lines(failures.describe(error["message"], error["next"], error["details"]), stream)
    print(f"  try again:  {program()} jobs retry {job['name']}", file=stream)


def _tell_step(session: Session, job: str, step: StepView, stream: TextIO) -> None:
    error = step["error"]
    message = error["message"] if error else step["reason"] or "failed without saying why"
    lines = failures.describe(
        f"step {step['name']}: {message}",
        error["next"] if error else None,
        error["details"] if error else None,
    )
    _print_lines(lines, stream)
    log = session.settings.home / "jobs" / job / step["name"] / str(step["attempts"]) / "log.txt"
    if log.exists():
        print(f"  log:        {log}", file=stream)
    for picture in pictures(session, job, step):
        print(f"  picture:    {picture}", file=stream)
    print(f"  read it:    {program()} jobs logs {job} --step {step['name']}", file=stream)


def _print_lines(lines: list[str], stream: TextIO) -> None:
    for line in lines:
        print(output.clean(line), file=stream)
