"""One step in several processes, on the machine that has the step: started, watched, and its end told.

A process that dies, a machine that falls silent, an error in any of them: all are ended within seconds, and
the one that it began with is named, with its last lines. Nothing is tried again here but what is asked for
(`auto_find_batch_size`): a fresh attempt from the checkpoint is the reconciler's to make.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tuneloop.core.errors import Internal, OutOfMemory, RankLost, TuneloopError, from_json
from tuneloop.steps.context import StepContext
from tuneloop.steps.launch.group import Ended, Group
from tuneloop.steps.launch.nodes import Host, Link
from tuneloop.steps.launch.reports import (
    FOLDER,
    Failure,
    Node,
    Run,
    cause_of,
    output_of,
    read_reports,
    write_run,
)
from tuneloop.steps.launch.settings import Settings, require_host

POLL_SECONDS = 0.1
GRACE_SECONDS = 3.0
"""How long an error that may be the consequence of another one waits for that."""


@dataclass(frozen=True)
class Wanted:
    """What is to be started."""

    processes: int
    """Of each node."""
    nodes: int
    machine: dict[str, Any]
    strategy: str
    pack_tokens: int
    longest: int
    """Tokens of the longest row: no pack can be smaller."""
    is_checkpointed: bool
    may_lower_packs: bool
    """Whether memory that runs out is met by smaller packs (`auto_find_batch_size`)."""
    planned_bytes: int | None = None
    """Of all processes together."""


def run(context: StepContext, wanted: Wanted, settings: Settings) -> None:
    """Returns when the processes have made the step's outputs. Raises what the first of them failed of,
    `RankLost`, and whatever interrupts this process; no process is left in any case."""
    with _machines(context, wanted, settings) as (nodes, links, port):
        while True:
            killed = killed_for_memory()
            made = _made(wanted, settings, nodes, port)
            failures = _run_once(context, made, links)
            if not failures:
                return _take_over(context, made)
            cause = cause_of(failures)
            lower = lower_packs(cause, wanted, is_memory_short=killed_for_memory() > killed)
            if lower is None:
                raise error_of(made, cause)
            context.warn(
                f"{made.describe(cause.rank or 0)} {cause.what} auto_find_batch_size is true, so at most "
                f"{lower} tokens are computed at a time from the last checkpoint on. The effective batch "
                "stays as it was."
            )
            wanted = replace(wanted, pack_tokens=lower)


def _made(wanted: Wanted, settings: Settings, nodes: tuple[Node, ...], port: int) -> Run:
    return Run(
        token=secrets.token_hex(8),
        nodes=nodes,
        processes=wanted.processes,
        machine=wanted.machine,
        strategy=wanted.strategy,
        port=port,
        pack_tokens=wanted.pack_tokens,
        longest=wanted.longest,
        is_checkpointed=wanted.is_checkpointed,
        planned_bytes=wanted.planned_bytes,
        join_seconds=settings.join_seconds,
        all_reduce_seconds=settings.all_reduce_seconds,
    )


@contextlib.contextmanager
def _machines(
    context: StepContext, wanted: Wanted, settings: Settings
) -> Iterator[tuple[tuple[Node, ...], Sequence[Link], int]]:
    """All nodes, the links to the others, and a port for torch's store."""
    if wanted.nodes == 1:
        yield (Node(0, socket.gethostname()),), (), 0
        return
    require_host(settings)
    context.progress(f"waiting for {wanted.nodes - 1} other machine(s)")
    with Host(settings.address, settings.port, settings.secret, _say) as host:
        links = host.gather(wanted.nodes, settings.wait_seconds)
        own = Node(0, socket.gethostname(), settings.address)
        yield (own, *(link.node for link in links)), links, _free_port(settings)


def _free_port(settings: Settings) -> int:
    """The one after the launchers' where it is free, for the sake of firewalls; else any."""
    for port in (settings.port + 1, 0):
        with contextlib.suppress(OSError), socket.create_server((settings.address, port)) as tried:
            return int(tried.getsockname()[1])
    return settings.port + 1


def _run_once(context: StepContext, made: Run, links: Sequence[Link]) -> list[Failure]:
    folder = context.folder
    write_run(folder, made)
    context.progress(f"starting {made.world} processes")
    output = Follower(output_of(folder, 0))
    for link in links:
        link.send({"type": "run", "folder": str(folder), "run": made.to_json()})
    group = Group(folder, made, 0)
    try:
        failures = Watch(group, links, output).until_ended()
    finally:
        for link in links:
            link.send({"type": "end"})
        group.kill()
        output.forward()
    context.peak_memory_bytes = max(context.peak_memory_bytes, _peak_memory_bytes(group))
    return failures


def _peak_memory_bytes(group: Group) -> int:
    return sum(report.peak_memory_bytes for report in group.reports().values())


def _take_over(context: StepContext, made: Run) -> None:
    """What the first process has to say at the end is the step's."""
    report = read_reports(context.folder, made, [0])[0]
    context.summary.update(report.summary)
    # They stand in the log already.
    context.warnings += [message for message in report.warnings if message not in context.warnings]


def lower_packs(cause: Failure, wanted: Wanted, *, is_memory_short: bool) -> int | None:
    """Half of what was too much, if memory was what it failed of, and less is to be had and allowed."""
    is_memory = cause.error is not None and cause.error["code"] == OutOfMemory.code
    is_memory |= is_memory_short and cause.exit_code == -signal.SIGKILL
    if not (wanted.may_lower_packs and is_memory and wanted.pack_tokens > wanted.longest):
        return None
    return max(wanted.longest, wanted.pack_tokens // 2)


def killed_for_memory() -> int:
    """Processes that this machine's kernel has ended since its start because memory ran out (`oom_kill` of
    /proc/vmstat); 0 where that is not told."""
    try:
        lines = Path("/proc/vmstat").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


@dataclass
class Watch:
    """Looks at all nodes until each has done its part, or one of them has failed."""

    group: Group
    links: Sequence[Link]
    output: Follower
    _ended: dict[int, Ended] = field(default_factory=dict)
    _started: set[int] = field(default_factory=set)
    _failed_at: float | None = None

    def until_ended(self) -> list[Failure]:
        """No failure: all is done."""
        while True:
            self.output.forward()
            self._look()
            failures = self._failures()
            if failures and self._is_settled(failures):
                return failures
            if not failures and len(self._ended) == len(self.group.run.nodes):
                return []
            time.sleep(POLL_SECONDS)

    def _look(self) -> None:
        self._started.update(self.group.reports())
        if 0 not in self._ended and (own := self.group.poll()) is not None:
            self._ended[0] = own
        for link in self.links:
            while not link.messages.empty():
                message = link.messages.get()
                if message["token"] != self.group.run.token:
                    continue
                if message["type"] == "started":
                    self._started.update(message["ranks"])
                elif message["type"] == "ended":
                    failures = tuple(map(Failure.from_json, message["failures"]))
                    self._ended[link.node.number] = Ended(failures)

    def _failures(self) -> list[Failure]:
        found = [failure for ended in self._ended.values() for failure in ended.failures]
        found += [Failure(link.node.number, link.lost) for link in self.links if link.lost is not None]
        return found or self._late()

    def _late(self) -> list[Failure]:
        """Processes that should have begun by now."""
        run = self.group.run
        if time.monotonic() - self.group.started_at < run.join_seconds:
            return []
        return [
            Failure(run.node_of(rank).number, f"did not start within {run.join_seconds:g} s", rank)
            for rank in range(run.world)
            if rank not in self._started and run.node_of(rank).number not in self._ended
        ]

    def _is_settled(self, failures: Sequence[Failure]) -> bool:
        """Whether the cause is among them: other nodes may have yet to tell of it, or to fall silent."""
        self._failed_at = self._failed_at or time.monotonic()
        cause = cause_of(failures)
        if not self.links or cause.rank is None or (cause.error is not None and not cause.is_consequence):
            return True
        if cause.exit_code is not None and cause.exit_code < 0 and not cause.is_consequence:
            return True
        is_quiet = any(link.is_quiet for link in self.links)
        return time.monotonic() - self._failed_at > GRACE_SECONDS and not is_quiet


def error_of(run: Run, cause: Failure) -> TuneloopError:
    """A mistake is told as one process would tell it; a process or a machine that is gone is `RankLost`."""
    who = str(run.nodes[cause.node]) if cause.rank is None else run.describe(cause.rank)
    details: dict[str, Any] = {"node": cause.node, "rank": cause.rank, "exit_code": cause.exit_code}
    details["last_lines"] = "\n".join(cause.last_lines)
    if cause.error is not None and not cause.is_consequence:
        error = from_json(cause.error)
        if not isinstance(error, Internal):
            return error
        told = cause.error.get("details") or {}
        return Internal(f"{who}: {error.message}", next_move=error.next_move, details={**details, **told})
    said = f" Its last line: {cause.last_lines[-1].strip()!r}." if cause.last_lines else ""
    where = (
        ""
        if cause.rank is None
        else f" What it said is in {FOLDER}/{cause.rank}.txt of the attempt's folder."
    )
    return RankLost(
        f"{who[0].upper()}{who[1:]} {cause.what}.{said}",
        next_move=f"The next attempt goes on from the last checkpoint.{where}",
        details=details,
    )


class Follower:
    """Copies what is appended to a file to this process's output: the step's log."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._place = file.stat().st_size if file.exists() else 0

    def forward(self) -> None:
        with contextlib.suppress(OSError), open(self._file, "rb") as handle:
            handle.seek(self._place)
            text = handle.read()
            self._place += len(text)
            if text:
                sys.stdout.flush()
                os.write(sys.stdout.fileno(), text)


def _say(text: str) -> None:
    print(text, flush=True)
