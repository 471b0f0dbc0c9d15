"""Following a job: what `tuneloop run`, `jobs stream` and `tuneloop demo` show while steps work.

On a terminal a table that is drawn over itself; elsewhere one plain line every few seconds, without control
characters. The job is only watched: when the watcher goes, the job goes on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TextIO

import click

from tuneloop.cli import output
from tuneloop.cli.session import Session
from tuneloop.core.errors import ServerUnreachable
from tuneloop.core.states import JOB_ENDED, STEP_ENDED

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

    from tuneloop.client.views import JobView, ProgressPage, ProgressView, StepView

POLL_SECONDS = 0.5
LINE_SECONDS = 5.0
"""Plain output: at most one line per step in this time, besides changes of state and stage."""
MOST_RECONNECTS = 5


class View(Protocol):
    """Shows what a page says."""

    def show(self, page: ProgressPage) -> None: ...

    def say(self, text: str) -> None: ...


class Warnings:
    """What a job warns of, each sentence once: a step repeats what was said of its parameters at submission.

    `told` are sentences that the person has read already.
    """

    def __init__(self, told: Iterable[str] = ()) -> None:
        self._told = set(told)

    def of_job(self, job: JobView) -> list[str]:
        return [warning for warning in job["warnings"] if self._is_new(warning)]

    def of_step(self, step: StepView) -> list[str]:
        return [warning for warning in step["warnings"] if self._is_new(warning, f"{step['name']}.")]

    def _is_new(self, warning: str, prefix: str = "") -> bool:
        is_new = self._told.isdisjoint((warning, prefix + warning))
        self._told.update((warning, prefix + warning))
        return is_new


def follow(session: Session, name: str, *, stream: TextIO | None = None, told: Iterable[str] = ()) -> JobView:
    """Show a job until it has ended, and return it. `KeyboardInterrupt` leaves the job running.

    `told` are warnings that have been shown.
    """
    target = stream or sys.stdout
    with view_for(target, told) as view:
        for page in pages(session, name, view.say):
            view.show(page)
    return page["job"]


def pages(session: Session, name: str, say: Callable[[str], None]) -> Iterator[ProgressPage]:
    """Progress of a job as it comes, until the job has ended and everything of it was read.

    A server that died is started again: the steps are processes of their own and have not noticed.
    """
    cursor: str | None = None
    lost = 0
    while True:
        try:
            page = session.client.progress(name, cursor)
        except ServerUnreachable:
            lost += 1
            if lost > MOST_RECONNECTS:
                raise
            say("The background server is gone; the job goes on. Starting the server again.")
            session.reconnect()
            continue
        lost = 0
        cursor = page["cursor"]
        yield page
        if page["job"]["state"] in JOB_ENDED and not page["lines"]:
            return
        time.sleep(POLL_SECONDS)


def view_for(stream: TextIO, told: Iterable[str] = ()) -> AbstractContextManager[View]:
    return TerminalView(stream, told=told) if stream.isatty() else PlainView(stream, told=told)


def stage_text(line: ProgressView, *, percent: bool = False) -> str:
    """`training  120/600 steps  loss 2.31  412 tokens/s  1:10 left`."""
    done, total = line.get("done"), line.get("total")
    parts = [line.get("stage", "")]
    if done is not None:
        parts.append(_count_text(done, total, line.get("unit") or ""))
        parts.append(f"{100 * done / total:3.0f} %" if percent and total else "")
    parts += [output.figure(name, value) for name, value in (line.get("values") or {}).items()]
    remaining = line.get("remaining_seconds")
    if remaining is not None and remaining >= 1:
        parts.append(f"{output.duration(remaining)} left")
    return "  ".join(part for part in parts if part)


def _count_text(done: float, total: float | None, unit: str) -> str:
    spell = output.size if unit == "bytes" else output.number
    text = f"{spell(done)}/{spell(total)}" if total else spell(done)
    return text if unit == "bytes" else f"{text} {unit}".rstrip()


def state_text(step: StepView) -> str:
    """A step's state with what a person wants to know about it: time, reuse, reason, result."""
    state = step["state"]
    if state == "reused":
        return f"reused from {step['reused_from']}" if step["reused_from"] else "reused"
    taken = output.between(step["started_at"], step["finished_at"]) if step["started_at"] else None
    parts = [state]
    if state in STEP_ENDED and taken is not None:
        parts.append(f"in {output.duration(taken)}")
    if state not in ("succeeded", "running") and step["reason"]:
        parts.append(f"({step['reason']})")
    return " ".join(parts)


class PlainView(AbstractContextManager["PlainView"]):
    """Lines for a file, a pipe or a log: `00:42  finetune  training  120/600 steps  loss 2.31 ...`."""

    def __init__(
        self, stream: TextIO, clock: Callable[[], float] = time.monotonic, told: Iterable[str] = ()
    ) -> None:
        self._stream = stream
        self._clock = clock
        self._began = clock()
        self._states: dict[str, tuple[str, int]] = {}
        self._stages: dict[str, str] = {}
        self._told: dict[str, float] = {}
        self._warnings = Warnings(told)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def say(self, text: str) -> None:
        click.echo(text, file=self._stream)

    def show(self, page: ProgressPage) -> None:
        newest: dict[tuple[str, str], ProgressView] = {}
        for line in page["lines"]:
            newest.pop((line["step"], line["stage"]), None)
            newest[line["step"], line["stage"]] = line
        for warning in self._warnings.of_job(page["job"]):
            self.say(f"warning: {output.clean(warning)}")
        for step in page["job"]["steps"]:
            lines = [line for (name, _), line in newest.items() if name == step["name"]]
            if step["state"] in STEP_ENDED:
                self._show_lines(step, lines)
                self._show_state(step)
            else:
                self._show_state(step)
                self._show_lines(step, lines)

    def _show_state(self, step: StepView) -> None:
        name = step["name"]
        state = (step["state"], step["attempts"])
        if state != self._states.get(name, ("pending", 0)):
            again = f" (attempt {step['attempts']})" if step["attempts"] > 1 else ""
            self._line(step, state_text(step) + (again if step["state"] == "running" else ""))
        self._states[name] = state
        for warning in self._warnings.of_step(step):
            self._line(step, f"warning: {warning}")

    def _show_lines(self, step: StepView, lines: list[ProgressView]) -> None:
        now = self._clock()
        for line in lines:
            is_new_stage = self._stages.get(step["name"]) != line["stage"]
            if is_new_stage or now - self._told.get(step["name"], -LINE_SECONDS) >= LINE_SECONDS:
                self._line(step, stage_text(line))
                self._told[step["name"]] = now
            self._stages[step["name"]] = line["stage"]

    def _line(self, step: StepView, text: str) -> None:
        passed = round(self._clock() - self._began)
        self.say(f"{passed // 60:02}:{passed % 60:02}  {step['name']:<12}  {output.clean(text)}")


class TerminalView(AbstractContextManager["TerminalView"]):
    """One row per step, drawn over itself while the job runs; the last drawing stays."""

    def __init__(self, stream: TextIO, told: Iterable[str] = ()) -> None:
        self._console = output.console(stderr=stream is sys.stderr)
        self._progress: dict[str, ProgressView] = {}
        self._warnings = Warnings(told)
        self._live: Live | None = None

    def __enter__(self) -> TerminalView:
        from rich.live import Live

        self._live = Live(console=self._console, refresh_per_second=4, transient=False)
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        self._console.print(text)

    def show(self, page: ProgressPage) -> None:
        for line in page["lines"]:
            self._progress[line["step"]] = line
        for warning in self._warnings.of_job(page["job"]):
            self.say(f"warning: {output.clean(warning)}")
        for step in page["job"]["steps"]:
            for warning in self._warnings.of_step(step):
                self.say(f"warning: {step['name']}: {output.clean(warning)}")
        if self._live is not None:
            self._live.update(self._drawing(page["job"]))

    def _drawing(self, job: JobView) -> Table:
        from rich.table import Table

        drawn = Table(box=None, pad_edge=False, show_header=False, expand=False)
        for width in (12, 10, 8):
            drawn.add_column(min_width=width, no_wrap=True)
        drawn.add_column(overflow="fold")
        for step in job["steps"]:
            taken = output.between(step["started_at"], step["finished_at"]) if step["started_at"] else None
            drawn.add_row(
                output.cell(step["name"]),
                output.cell(step["state"]),
                output.cell(output.duration(taken)),
                output.cell(self._detail(step)),
            )
        return drawn

    def _detail(self, step: StepView) -> str:
        if step["state"] == "running":
            line = self._progress.get(step["name"]) or step["progress"]
            again = f"attempt {step['attempts']}: " if step["attempts"] > 1 else ""
            return again + (output.clean(stage_text(line, percent=True)) if line else "starting")
        if step["state"] == "reused":
            return f"from {step['reused_from']}" if step["reused_from"] else ""
        if step["state"] == "succeeded":
            line = self._progress.get(step["name"])
            return output.clean(stage_text({"values": line.get("values") or {}})) if line else ""
        return step["reason"] or ""
