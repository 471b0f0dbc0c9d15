"""What a step may see and say: its inputs, its parameters, and the files it appends to."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from pydantic import JsonValue

from tuneloop.core.types import MetricLine, ProgressLine, StepFile


class Interrupted(BaseException):
    """SIGTERM arrived. Not an `Exception`, so that no step swallows it by accident."""


class StepContext:
    """Given to every step's `run`. Only one thread of the step process uses it."""

    def __init__(self, folder: Path, step: StepFile) -> None:
        self.folder = folder
        self.step = step
        self.parameters: dict[str, JsonValue] = dict(step.parameters)
        self.inputs = {name: Path(given.path) for name, given in step.inputs.items()}
        self.input_names = {name: given.name or given.path for name, given in step.inputs.items()}
        self.input_digests = {name: given.digest for name, given in step.inputs.items()}
        self.cache_folder = Path(step.cache_folder) if step.cache_folder else None
        self.previous_attempts = [Path(previous) for previous in step.previous_attempts]
        self.summary: dict[str, float] = {}
        self.warnings: list[str] = []
        self.is_repeatable = True
        """A step that took what it could get sets False: its outputs are used, and not remembered."""
        self.peak_memory_bytes = 0
        """Of processes that worked together, their sum; the wrapper knows of single ones only."""
        self._lines: dict[str, int] = {}
        """Descriptors of the files that are appended to."""

    def output(self, name: str) -> Path:
        """Where the step makes its output `name`: a file or a folder, made by the step itself."""
        if name not in self.step.outputs:
            raise KeyError(f"step {self.step.attempt} has no output {name!r}")
        parent = self.folder / "outputs"
        parent.mkdir(exist_ok=True)
        return parent / name

    def progress(
        self,
        stage: str,
        done: float | None = None,
        total: float | None = None,
        unit: str | None = None,
        remaining_seconds: float | None = None,
        **values: float,
    ) -> None:
        """Append a line to `progress.jsonl`: what a person who watches sees."""
        line = ProgressLine(
            at=datetime.now(UTC),
            stage=stage,
            done=done,
            total=total,
            unit=unit,
            values=values,
            remaining_seconds=remaining_seconds,
        )
        self._append("progress.jsonl", line.model_dump_json(exclude_none=True))

    def metrics(self, step: int, **values: float) -> None:
        """Append a line to `metrics.jsonl`: what becomes curves in MLflow."""
        line = MetricLine(at_ms=int(time.time() * 1000), step=step, values=values)
        self._append("metrics.jsonl", line.model_dump_json())

    def warn(self, message: str) -> None:
        """Say it in the log, in the result and to whoever watches. The same message counts once."""
        if message not in self.warnings:
            self.warnings.append(message)
            print(f"warning: {message}", flush=True)

    def close(self) -> None:
        while self._lines:
            os.close(self._lines.popitem()[1])

    def _append(self, name: str, text: str) -> None:
        descriptor = self._lines.get(name)
        if descriptor is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            descriptor = self._lines[name] = os.open(self.folder / name, flags, 0o644)
        # One write per line: a reader that meets half a line waits for its newline.
        line = f"{text}\n".encode()
        written = os.write(descriptor, line)
        if written < len(line):
            # The disk is full: half a line would spoil the next one.
            os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder / name))


Run = Callable[[StepContext], None]
