"""`python -m tuneloop.steps.rank DIR`: one of several processes of the finetune step in DIR.

Started by torchrun under `launch.supervise`. What it prints goes to DIR/ranks/RANK.txt, how it is doing to
DIR/ranks/RANK.json. Rank 0 speaks for all: it appends the step's progress and metrics and writes its outputs.
Its standard input is a pipe that the supervisor holds: when that ends, it ends at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

from tuneloop.core.errors import TuneloopError
from tuneloop.core.machine import own_peak_resident_bytes
from tuneloop.core.types import StepFile
from tuneloop.steps.context import StepContext
from tuneloop.steps.failure import describe
from tuneloop.steps.launch.reports import Report, Run, State, output_of, read_run, write_report

_ANOTHER_IS_GONE = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")


def main(arguments: list[str]) -> int:
    # torchrun ends with it those that are left; in a collective only the kernel's own answer is heard.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_supervisor, daemon=True).start()
    folder = Path(arguments[0])
    run, rank = read_run(folder), int(os.environ["RANK"])
    if run is None:
        print(f"{folder} holds no run", file=sys.stderr)
        return 2
    _print_into(output_of(folder, rank))
    step = StepFile.model_validate_json((folder / "step.json").read_text(encoding="utf-8"))
    return Rank(StepContext(folder, step), run, rank).work()


def _end_with_supervisor() -> None:
    """Nothing is ever written into the pipe: it ends."""
    with contextlib.suppress(OSError):
        os.read(0, 1)
    os.kill(os.getpid(), signal.SIGKILL)


def _print_into(file: Path) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)


class Rank:
    def __init__(self, context: StepContext, run: Run, rank: int) -> None:
        self._context, self._run, self._rank = context, run, rank
        self._reporting = threading.Lock()

    def work(self) -> int:
        """The exit code."""
        self._report("started")
        try:
            self._train()
        except BaseException as defect:
            self._confess(defect)
            return 1
        self._report("done", summary=self._context.summary, warnings=tuple(self._context.warnings))
        return 0

    def _train(self) -> None:
        # Imported here: a process has said that it has begun before torch takes its seconds.
        from tuneloop.steps.finetune import work
        from tuneloop.steps.launch.preflight import Preflight

        measured = Preflight(self._context.folder, self._run, self._rank, self._fail).pass_()
        if self._rank == 0:
            print(f"{self._run.world} processes on {len(self._run.nodes)} node(s) {measured}", flush=True)
        self._report("ready")
        work.train_together(self._context, self._run, self._rank)

    def _fail(self, error: TuneloopError) -> NoReturn:
        """From another thread, while the main one waits for what does not come."""
        print(f"error: {error}", file=sys.stderr, flush=True)
        self._report("failed", error=error.to_json())
        os._exit(1)

    def _confess(self, defect: BaseException) -> None:
        told = f"error: {defect}" if isinstance(defect, TuneloopError) else traceback.format_exc()
        with contextlib.suppress(OSError, ValueError):
            print(told, file=sys.stderr, flush=True)
        error = describe(defect, self._context).model_dump(mode="json")
        self._report("failed", error=error, is_consequence=_is_consequence(defect))

    def _report(self, state: State, **told: Any) -> None:
        with self._reporting:
            report = Report(
                self._run.token, self._rank, state, peak_memory_bytes=own_peak_resident_bytes(), **told
            )
            write_report(self._context.folder, report)


def _is_consequence(defect: BaseException) -> bool:
    """Whether it may be what the end of another process looks like from here."""
    from torch import distributed

    if isinstance(defect, distributed.DistError):
        return True
    return isinstance(defect, RuntimeError) and any(words in str(defect) for words in _ANOTHER_IS_GONE)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    # All that counts is on the disk; a group whose other members are gone would wait for them.
    os._exit(code)
