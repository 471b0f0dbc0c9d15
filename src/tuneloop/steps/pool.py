"""Parts of files, done in order by as many processes as there are cores, or right here.

A worker is `python -m tuneloop.steps.pool_worker FD`, talked to over a socket. It holds nothing that outlives
it: when this process dies or lets go of the socket, it ends at once, and no signal but SIGKILL ends it
before. Few parts are under way at any time, so memory is the same for any length of file.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe, wait
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

from tuneloop.core.errors import Internal, OutOfMemory, StepFailed, from_json
from tuneloop.core.machine import this_machine

AHEAD = 2
"""Parts that a worker is given at once: the next one is there when it has sent the last."""

WINDOW = 4
"""Parts under way or waiting for an earlier one, for each worker."""

WORTH_BYTES = 4 << 20
"""Text that is worth a process: about as long as one takes to start."""

Part = TypeVar("Part")
Done = TypeVar("Done")
_Part = TypeVar("_Part", contravariant=True)
_Done = TypeVar("_Done", covariant=True)


class Work(Protocol[_Part, _Done]):
    """What is done to every part. Picklable, as parts are and what comes of them."""

    def do(self, part: _Part, /) -> _Done: ...


def processes_for(text_bytes: int) -> int:
    """As many as cores that this process may use (OMP_NUM_THREADS counts), and not more than is worth it."""
    written = os.environ.get("OMP_NUM_THREADS", "")
    cores = this_machine().cores
    if written.isdigit() and int(written) > 0:
        cores = min(cores, int(written))
    return min(cores, max(1, text_bytes // WORTH_BYTES))


class Pool(Generic[Part, Done]):
    """`with Pool(work, processes) as pool: for done in pool.do(parts): ...`. One process: no other is
    started."""

    def __init__(self, work: Work[Part, Done], processes: int) -> None:
        self._work = work
        self._processes = processes
        self._workers: list[_Worker] = []

    def __enter__(self) -> Pool[Part, Done]:
        if self._processes < 2:
            # The tokenizer's own threads would share this one's core.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        while self._workers:
            self._workers.pop().end()

    def do(self, parts: Iterator[Part]) -> Iterator[Done]:
        """What comes of each part, in their order. Raises what a part raised, `OutOfMemory` or `StepFailed`
        for a worker that died, `Internal` for a defect in one."""
        if self._processes < 2:
            yield from map(self._work.do, parts)
            return
        while len(self._workers) < self._processes:
            self._workers.append(_Worker(self._work))
        yield from self._in_order(parts)

    def _in_order(self, parts: Iterator[Part]) -> Iterator[Done]:
        waiting: dict[int, Done] = {}
        given = taken = 0
        has_more = True
        while has_more or given > taken:
            while has_more and given - taken < WINDOW * len(self._workers):
                worker = min(self._workers, key=lambda each: len(each.under_way))
                if len(worker.under_way) >= AHEAD:
                    break
                part = next(parts, None)
                has_more = part is not None
                if part is not None:
                    worker.give(given, part)
                    given += 1
            if given > taken and taken not in waiting:
                self._receive(waiting)
            while taken in waiting:
                yield waiting.pop(taken)
                taken += 1

    def _receive(self, waiting: dict[int, Done]) -> None:
        busy = {worker.connection: worker for worker in self._workers if worker.under_way}
        for ready in wait(list(busy)):
            assert isinstance(ready, Connection)
            number, done = busy[ready].take()
            waiting[number] = done


class _Worker:
    def __init__(self, work: object) -> None:
        self.under_way: list[int] = []
        """Numbers of parts, in the order in which it does them."""
        self.connection, far = Pipe()
        alone = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with far:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tuneloop.steps.pool_worker", str(far.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[far.fileno()],
                env={**os.environ, **alone},
            )
        self._send(work)

    def give(self, number: int, part: object) -> None:
        self._send(part)
        self.under_way.append(number)

    def take(self) -> tuple[int, Any]:
        """The number of the part that it has done first, and what came of it."""
        try:
            is_done, answer = self.connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._died() from None
        if not is_done:
            raise _failure(answer)
        return self.under_way.pop(0), answer

    def _send(self, what: object) -> None:
        try:
            self.connection.send(what)
        except (BrokenPipeError, ConnectionResetError):
            raise self._died() from None

    def _died(self) -> StepFailed:
        code = self.process.wait()
        if code == -signal.SIGKILL:
            return OutOfMemory(
                "A worker process of this step was killed, perhaps because memory ran out.",
                next_move="Free some memory, or set OMP_NUM_THREADS=1: one process does it; then retry.",
            )
        return StepFailed(
            f"A worker process of this step ended with exit code {code}.",
            next_move="What it said last is in the step's log; retry the job.",
        )

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


def _failure(answer: dict[str, Any]) -> BaseException:
    if "error" in answer:
        return from_json(answer["error"])
    if answer["kind"] == "MemoryError":
        return MemoryError(answer["text"])
    return Internal(f"A worker process of this step failed: {answer['text']}")
