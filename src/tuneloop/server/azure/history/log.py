"""The log that `stream` prints: `user_logs/std_log.txt`, written from what is known of a job.

`stream` fetches the whole text again and again and prints the lines behind those that it has counted. So a
line that was given stays as it is and where it is: each look appends what is new since the last one, and the
text lies in a file. `cursor.json` beside it says how far each source has been told and how long the text was
then; what a server that died wrote behind that was given to nobody, and is cut off.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from tuneloop.core.process import write_atomically
from tuneloop.core.types import JobRecord, MetricLine, Noun, ProgressLine
from tuneloop.server.azure.gateway import Gateway
from tuneloop.server.azure.history import words

N = TypeVar("N", bound=Noun)

MOST_BYTES = 4 * 1024 * 1024
"""Read of one file of one attempt at a time."""
PROGRESS_SECONDS = 30.0
"""Between lines of progress in one stage."""
METRIC_LINES = 1000
METRIC_SECONDS = 10.0
"""Between lines of metrics of an attempt that has logged so many; evaluations are always told."""
EVENTS = 1000


@dataclass
class Cursor:
    """How far a job's log has come."""

    length: int = 0
    """Bytes of text that were given."""
    event: int = 0
    """The last event that was told."""
    offsets: dict[str, int] = field(default_factory=dict)
    """File of an attempt to the bytes of it that were told."""
    told_at: dict[str, float] = field(default_factory=dict)
    """What is told now and then (`attempt stage`): when it was told last, by its own clock."""
    counts: dict[str, int] = field(default_factory=dict)
    """Lines of metrics of an attempt that were told."""
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Line:
    at: float
    """Seconds since the epoch."""
    who: str
    """A step, or `job`."""
    text: str


def text(gateway: Gateway, record: JobRecord) -> bytes:
    """All of it; what is new is appended first."""
    folder = _folder(gateway, record.key)
    with gateway.lock(f"log/{record.key}"):
        cursor = _load(folder)
        path = folder / "std_log.txt"
        before = None
        # Until nothing is left: whoever is told of the end fetches once more, and no more.
        while cursor != before:
            before = copy.deepcopy(cursor)
            new = "".join(_render(line) for line in _new_lines(gateway, record, cursor)).encode()
            if new:
                _append(path, cursor.length, new)
                cursor.length += len(new)
            if cursor != before:
                _save(folder, cursor)
        try:
            return path.read_bytes()[: cursor.length]
        except FileNotFoundError:
            return b""


# ---------------------------------------------------------------- what is new


def _new_lines(gateway: Gateway, record: JobRecord, cursor: Cursor) -> list[Line]:
    """In the order of their times; moves the cursor."""
    # Events last: what an attempt left behind is told before its end is.
    lines = [*_of_attempts(gateway, record, cursor)]
    lines += _of_events(gateway, record, cursor)
    return sorted(lines, key=lambda line: line.at)


def _of_events(gateway: Gateway, record: JobRecord, cursor: Cursor) -> Iterator[Line]:
    store, subject = gateway.parts.store, f"job/{record.key}"
    while True:
        events = store.events(after=cursor.event, subject=subject, limit=EVENTS)
        for event in events:
            cursor.event = event.sequence
            at = event.at.timestamp()
            for who, told, is_warning in words.of_event(gateway.parts, record, event):
                if not is_warning or _is_new_warning(cursor, who, told):
                    yield Line(at, who, f"warning: {told}" if is_warning else told)
        if len(events) < EVENTS:
            return


def _of_attempts(gateway: Gateway, record: JobRecord, cursor: Cursor) -> Iterator[Line]:
    for step in gateway.parts.jobs.steps(record.key):
        for attempt in gateway.parts.jobs.attempts(record.key, step.step):
            folder = gateway.parts.files.folder(attempt.folder)
            yield from _of_metrics(folder, step.step, attempt.key, cursor)
            yield from _of_progress(folder, step.step, attempt.key, cursor)
            yield from _of_prints(folder, step.step, attempt.key, cursor)


def _of_metrics(folder: Path, step: str, attempt: str, cursor: Cursor) -> Iterator[Line]:
    for one in _read(MetricLine, folder / "metrics.jsonl", f"{attempt} metrics", cursor):
        told, at = words.of_metrics(one), one.at_ms / 1000
        if not told:
            continue
        count = cursor.counts.get(attempt, 0)
        is_evaluation = any(name.startswith("eval_") for name in one.values)
        if count < METRIC_LINES or is_evaluation or _is_due(cursor, attempt, at, METRIC_SECONDS):
            cursor.counts[attempt] = count + 1
            yield Line(at, step, told)


def _of_progress(folder: Path, step: str, attempt: str, cursor: Cursor) -> Iterator[Line]:
    for one in _read(ProgressLine, folder / "progress.jsonl", f"{attempt} progress", cursor):
        at = one.at.timestamp()
        if _is_due(cursor, f"{attempt} {one.stage}", at, PROGRESS_SECONDS):
            yield Line(at, step, words.of_progress(one))


def _of_prints(folder: Path, step: str, attempt: str, cursor: Cursor) -> Iterator[Line]:
    """Warnings, when they are printed and not only when the step has ended."""
    path = folder / "log.txt"
    for line in _whole_lines(path, f"{attempt} log", cursor):
        told = line.removeprefix("warning: ")
        if told != line and _is_new_warning(cursor, step, told):
            # Prints have no times; the step's end is later than the last of them.
            yield Line(path.stat().st_mtime, step, line)


def _is_due(cursor: Cursor, what: str, at: float, pause: float) -> bool:
    last = cursor.told_at.get(what)
    if last is not None and at - last < pause:
        return False
    cursor.told_at[what] = at
    return True


def _is_new_warning(cursor: Cursor, who: str, told: str) -> bool:
    key = f"{who}: {told}"
    if key in cursor.warnings:
        return False
    cursor.warnings.append(key)
    return True


# ---------------------------------------------------------------- files


def _read(kind: type[N], path: Path, what: str, cursor: Cursor) -> Iterator[N]:
    """What is no such line (a full disk, a lost machine) is passed over."""
    for line in _whole_lines(path, what, cursor):
        with contextlib.suppress(ValidationError):
            yield kind.model_validate_json(line)


def _whole_lines(path: Path, what: str, cursor: Cursor) -> list[str]:
    offset = cursor.offsets.get(what, 0)
    try:
        with open(path, "rb") as handle:
            handle.seek(offset)
            read = handle.read(MOST_BYTES)
    except FileNotFoundError:
        return []
    whole = read[: read.rfind(b"\n") + 1]
    if not whole and len(read) == MOST_BYTES:
        # A line that never ends is passed over, or nothing behind it would be told.
        cursor.offsets[what] = offset + len(read)
        return []
    if whole:
        cursor.offsets[what] = offset + len(whole)
    return whole.decode("utf-8", "replace").split("\n")[:-1]


def _folder(gateway: Gateway, job: str) -> Path:
    return gateway.folder / "runs" / job


def _load(folder: Path) -> Cursor:
    try:
        return Cursor(**json.loads((folder / "cursor.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Cursor()


def _save(folder: Path, cursor: Cursor) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "cursor.json", json.dumps(asdict(cursor)))


def _append(path: Path, length: int, new: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as handle:
        handle.truncate(length)
        handle.write(new)
        handle.flush()
        os.fsync(handle.fileno())


def _render(line: Line) -> str:
    at = datetime.fromtimestamp(line.at, UTC)
    return f"{at:%Y-%m-%d %H:%M:%S}  {line.who:<12}  {words.clean(line.text)}\n"
