"""What the processes of a run say of themselves, each in a file of its own in the attempt's folder.

    ranks/run.json        what is run; read by every process, so that the folder has to be the same for all
    ranks/0.json          how far process 0 is, and how it ended
    ranks/0.txt           what it printed
    ranks/node-0.json     which processes torchrun saw fail on that machine
    ranks/node-0.txt      what torchrun printed

Each carries the run's token: what an earlier run left behind counts for nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tuneloop.core.process import write_atomically

FOLDER = "ranks"
LAST_LINES = 10
TAIL_BYTES = 64_000

State = Literal["started", "ready", "done", "failed"]
"""Begun; has met all others; has done its work; has said why not."""


@dataclass(frozen=True)
class Node:
    number: int
    host: str = ""
    address: str = "127.0.0.1"

    def __str__(self) -> str:
        return f"node {self.number} ({self.host}, {self.address})"


@dataclass(frozen=True)
class Run:
    """All that the launchers and the processes of a run have to know beside the step."""

    token: str
    nodes: tuple[Node, ...]
    processes: int
    """Of each node."""
    machine: dict[str, Any]
    """Of each node: the fields of `training.Machine`."""
    strategy: str = "ddp"
    """As in `training.plan.Plan`."""
    port: int = 0
    """Of torch's store, on the first node; with one node a free one is taken."""
    pack_tokens: int = 0
    longest: int = 0
    """Tokens of the longest row: no pack can be smaller."""
    is_checkpointed: bool = False
    planned_bytes: int | None = None
    """Of all processes together."""
    join_seconds: float = 60
    all_reduce_seconds: float = 10

    @property
    def world(self) -> int:
        return self.processes * len(self.nodes)

    def node_of(self, rank: int) -> Node:
        return self.nodes[rank // self.processes]

    def ranks_of(self, node: int) -> range:
        return range(node * self.processes, (node + 1) * self.processes)

    def describe(self, rank: int) -> str:
        """`process 2 of 2 (rank 1)`, with its node where there are several."""
        where = f" on {self.node_of(rank)}" if len(self.nodes) > 1 else ""
        return f"process {rank + 1} of {self.world} (rank {rank}){where}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(read: dict[str, Any]) -> Run:
        return Run(**{**read, "nodes": tuple(Node(**node) for node in read["nodes"])})


def write_run(folder: Path, run: Run) -> None:
    (folder / FOLDER).mkdir(exist_ok=True)
    write_atomically(folder / FOLDER / "run.json", json.dumps(run.to_json(), indent=1))


def read_run(folder: Path) -> Run | None:
    """None when there is none, or half of one."""
    read = _read(folder / FOLDER / "run.json")
    return None if read is None else Run.from_json(read)


@dataclass(frozen=True)
class Report:
    """What a process says of itself."""

    token: str
    rank: int
    state: State
    error: dict[str, Any] | None = None
    """As `TuneloopError.to_json()`."""
    is_consequence: bool = False
    """Whether the error is only what the end of another process looks like from here."""
    peak_memory_bytes: int = 0
    summary: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def write_report(folder: Path, report: Report) -> None:
    write_atomically(folder / FOLDER / f"{report.rank}.json", json.dumps(asdict(report)))


def read_reports(folder: Path, run: Run, ranks: Iterable[int]) -> dict[int, Report]:
    found = {}
    for rank in ranks:
        read = _read(folder / FOLDER / f"{rank}.json")
        if read is not None and read.get("token") == run.token:
            found[rank] = Report(**{**read, "warnings": tuple(read["warnings"])})
    return found


def output_of(folder: Path, rank: int) -> Path:
    return folder / FOLDER / f"{rank}.txt"


def last_lines(file: Path, count: int = LAST_LINES) -> list[str]:
    with contextlib.suppress(OSError), open(file, "rb") as handle:
        handle.seek(0, os.SEEK_END)
        handle.seek(max(0, handle.tell() - TAIL_BYTES))
        return handle.read().decode("utf-8", "replace").splitlines()[-count:]
    return []


# ---------------------------------------------------------------- failures


@dataclass(frozen=True)
class Failure:
    """How a process, or a whole node, came to a bad end."""

    node: int
    what: str
    """For people, after its name: `was ended by SIGKILL`."""
    rank: int | None = None
    """None: of the node itself."""
    exit_code: int | None = None
    """Negative: the signal."""
    error: dict[str, Any] | None = None
    is_consequence: bool = False
    last_lines: tuple[str, ...] = ()
    at: float = field(default_factory=time.monotonic, compare=False)

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "at"}

    @staticmethod
    def from_json(read: dict[str, Any]) -> Failure:
        return Failure(**{**read, "last_lines": tuple(read["last_lines"])})


def write_failures(folder: Path, run: Run, node: int, failures: Sequence[tuple[int, int]]) -> None:
    """(rank, exit code) of each process that torchrun saw fail."""
    write_atomically(
        folder / FOLDER / f"node-{node}.json", json.dumps({"token": run.token, "failures": failures})
    )


def read_failures(folder: Path, run: Run, node: int, reports: dict[int, Report]) -> list[Failure]:
    """Of the node's processes, by what they said themselves and by what torchrun saw."""
    seen = _read(folder / FOLDER / f"node-{node}.json") or {}
    codes = dict(seen["failures"]) if seen.get("token") == run.token else {}
    found = []
    for rank in run.ranks_of(node):
        report = reports.get(rank)
        if report is not None and report.state == "failed":
            found.append(_of_report(report, node))
        elif rank in codes:
            found.append(Failure(node, ending(codes[rank]), rank, codes[rank]))
    return [replace(each, last_lines=tuple(_lines(folder, each.rank))) for each in found]


def _of_report(report: Report, node: int) -> Failure:
    assert report.error is not None
    return Failure(
        node,
        f"failed: {report.error['message']}",
        report.rank,
        error=report.error,
        is_consequence=report.is_consequence,
    )


def _lines(folder: Path, rank: int | None) -> list[str]:
    return [] if rank is None else last_lines(output_of(folder, rank))


def ending(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code} and said no reason"
    name = signal.Signals(-exit_code).name if -exit_code in iter(signal.Signals) else f"signal {-exit_code}"
    killed = ": by somebody, or because memory ran out" if exit_code == -signal.SIGKILL else ""
    return f"was ended by {name}{killed}"


def cause_of(failures: Sequence[Failure]) -> Failure:
    """The one that the others followed from."""
    return min(failures, key=lambda failure: (_rank_of_kind(failure), failure.at))


def _rank_of_kind(failure: Failure) -> int:
    if failure.is_consequence:
        return 5
    if failure.exit_code == -signal.SIGTERM:
        # torchrun ends those that are left in this way.
        return 4
    if failure.error is not None:
        return 0 if failure.error["code"] != "internal" else 2
    return 1 if (failure.exit_code or 0) < 0 or failure.rank is None else 3


def _read(path: Path) -> dict[str, Any] | None:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return read if isinstance(read, dict) else None
