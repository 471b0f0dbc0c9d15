"""Following a job: what `tuneloop run`, `jobs stream` and `tuneloop demo` show while steps work.

On a terminal a table that is drawn over itself; elsewhere one plain line every few seconds, without control
characters. The job is only watched: when the watcher goes, the job goes on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TextIO

import click

from tuneloop.cli import curves, output
from tuneloop.cli.session import Session
from tuneloop.core.errors import ServerUnreachable, TuneloopError
from tuneloop.core.states import JOB_ENDED, STEP_ENDED

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    from tuneloop.client.views import JobView, ProgressPage, ProgressView, StepView
    from tuneloop.core.types import MetricLine

POLL_SECONDS = 0.5
LINE_SECONDS = 5.0
"""Plain output: at most one line per step in this time, besides changes of state and new stages."""
LONGEST_LINE_SECONDS = 60.0
"""What that time grows to: a log of ten hours should not have seven thousand lines of progress."""
MOST_RECONNECTS = 5
CURVE_SECONDS = 2.0
"""Between two looks at the losses."""
ROOMY_ROWS, ROOMY_COLUMNS = 22, 72
"""A terminal of this size has room for a curve below the steps."""


class View(Protocol):
    """Shows what a page says."""

    def show(self, page: ProgressPage) -> None: ...

    def say(self, text: str) -> None: ...

    def watch_losses(self, read: Callable[[], Sequence[MetricLine]]) -> None:
        """What may be drawn beside the steps, once there is something."""


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
        view.watch_losses(lambda: session.client.metrics(name, "finetune"))
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
    return TerminalView(stream, told=told) if output.is_drawable(stream) else PlainView(stream, told=told)


def stage_text(line: ProgressView, *, percent: bool = False) -> str:
    """`training  120/600 steps  loss 2.31  412 tokens/s  41 % of GEMM peak  3.1 of 3.4 GB planned`, and the
    time that is left."""
    done, total = line.get("done"), line.get("total")
    parts = [line.get("stage", "")]
    if done is not None:
        parts.append(_count_text(done, total, line.get("unit") or ""))
        parts.append(f"{100 * done / total:3.0f} %" if percent and total else "")
    parts += output.figures(line.get("values") or {})
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
        parts.append(f"({queue_text(step, estimate=False)})")
    return " ".join(parts)


class Losses:
    """The losses of a job's fine-tuning, asked for every few seconds while it runs and once at its end."""

    def __init__(
        self, read: Callable[[], Sequence[MetricLine]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._read = read
        self._clock = clock
        self._next = 0.0
        self._seen: tuple[str, int] | None = None
        self._found: list[curves.Series] = []

    def of(self, job: JobView) -> list[curves.Series]:
        tuned = next((step for step in job["steps"] if step["name"] == "finetune"), None)
        if tuned is None or not (tuned["attempts"] or tuned["state"] == "reused"):
            return []
        seen = (tuned["state"], tuned["attempts"])
        is_due = tuned["state"] == "running" and self._clock() >= self._next
        if is_due or seen != self._seen:
            began = self._clock()
            try:
                self._found = curves.series(self._read(), curves.LOSSES)
            except TuneloopError:
                return self._found  # The drawing is an extra: what is wrong is told by the progress.
            # Long curves take long to read: a twentieth of the time, at most.
            self._next = self._clock() + max(CURVE_SECONDS, 20 * (self._clock() - began))
            self._seen = seen
        return self._found


class PlainView(AbstractContextManager["PlainView"]):
    """Lines for a file, a pipe or a log: `00:42  finetune  training  120/600 steps  loss 2.31 ...`."""

    def __init__(
        self, stream: TextIO, clock: Callable[[], float] = time.monotonic, told: Iterable[str] = ()
    ) -> None:
        self._stream = stream
        self._clock = clock
        self._began = clock()
        self._states: dict[str, tuple[str, int]] = {}
        self._stages: set[tuple[str, int, str]] = set()
        self._told: dict[str, float] = {}
        self._warnings = Warnings(told)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def say(self, text: str) -> None:
        click.echo(output.clean(text), file=self._stream)

    def watch_losses(self, read: Callable[[], Sequence[MetricLine]]) -> None:
        """Lines of progress hold the loss already."""

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
            # A step goes back and forth between training and evaluating: only the first time is news.
            stage = (step["name"], line.get("attempt", step["attempts"]), line["stage"])
            is_due = now - self._told.get(step["name"], -LINE_SECONDS) >= self._pause(now)
            if stage not in self._stages or is_due:
                self._line(step, stage_text(line))
                self._told[step["name"]] = now
            self._stages.add(stage)

    def _pause(self, now: float) -> float:
        return min(LONGEST_LINE_SECONDS, max(LINE_SECONDS, (now - self._began) / 20))

    def _line(self, step: StepView, text: str) -> None:
        passed = round(self._clock() - self._began)
        self.say(f"{passed // 60:02}:{passed % 60:02}  {step['name']:<12}  {output.clean(text)}")


class TerminalView(AbstractContextManager["TerminalView"]):
    """One row per step, drawn over itself while the job runs; the last drawing stays."""

    def __init__(self, stream: TextIO, told: Iterable[str] = ()) -> None:
        self._console = output.console(stderr=stream is sys.stderr)
        self._progress: dict[str, ProgressView] = {}
        self._warnings = Warnings(told)
        self._losses: Losses | None = None
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
        self._console.print(output.clean(text))

    def watch_losses(self, read: Callable[[], Sequence[MetricLine]]) -> None:
        self._losses = Losses(read)

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

    def _drawing(self, job: JobView) -> Group:
        from rich.console import Group

        curve = self._curve(job)
        return Group(self._steps(job), *([curve] if curve is not None else []))

    def _curve(self, job: JobView) -> Text | None:
        """Where there is room for it."""
        size = self._console.size
        if self._losses is None or size.height < ROOMY_ROWS or size.width < ROOMY_COLUMNS:
            return None
        found = self._losses.of(job)
        if not any(len(one.points) > 1 for one in found):
            return None
        return curves.drawing(found, self._console.file, min(size.width, ROOMY_COLUMNS))  # type: ignore[arg-type]

    def _steps(self, job: JobView) -> Table:
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
        return queue_text(step) if step["queue"] else step["reason"] or ""


def queue_text(step: StepView, *, estimate: bool = True) -> str:
    """Why a step waits, and where it stands among what waits for its compute."""
    queue, reason = step["queue"], step["reason"] or ""
    if queue is None:
        return reason
    place = "next" if queue["position"] == 1 else f"number {queue['position']} in line"
    seconds = queue["expected_seconds"] if estimate else None
    soon = f", in about {output.duration(seconds)}" if seconds else ""
    return f"{place}{soon}: {reason}" if reason else f"{place}{soon}"
