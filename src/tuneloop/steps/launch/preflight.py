"""Whether the processes of a run reach each other, tried before any of them loads the model.

Each step has a deadline, and who has not answered by then is named: with its number, its machine and its
address. Leaves behind the default group of `torch.distributed`.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from tuneloop.core.errors import RankLost, Unsupported
from tuneloop.core.process import write_atomically
from tuneloop.steps.launch.reports import FOLDER, Run

GROUP_TIMEOUT = timedelta(minutes=30)
"""Of a collective in training: a rank may wait so long for one that writes a large checkpoint. That a machine
is gone is found out by the launchers, within seconds."""
MEASURED_BYTES = 4 << 20
MEASURED_TIMES = 3
DOOR_SECONDS = 5.0
FOLDER_SECONDS = 5.0


@dataclass(frozen=True)
class Measured:
    """Of an all-reduce between all processes."""

    joined_seconds: float
    bytes_per_second: float
    """4 MB, by the time that one took."""
    latency_seconds: float
    """Of one number."""

    def __str__(self) -> str:
        return (
            f"met after {self.joined_seconds:.1f} s; a sum over all takes {self.latency_seconds * 1e3:.1f} "
            f"ms, one of {MEASURED_BYTES / 1e6:.0f} MB goes at {self.bytes_per_second / 1e6:.0f} MB/s"
        )


class Preflight:
    """Of one process. `fail` is called on another thread, with what to say, when the processes do not come
    to an end of it; it ends this process."""

    def __init__(self, folder: Path, run: Run, rank: int, fail: Callable[[RankLost], None]) -> None:
        self._folder, self._run, self._rank, self._fail = folder, run, rank, fail
        self._node = run.node_of(rank)

    def pass_(self) -> Measured:
        """Raises `RankLost` with who does not answer, `Unsupported` when the folder is not the same."""
        started = time.monotonic()
        with self._deadline(self._run.join_seconds, "meet at torch's store on the first node"):
            store, _, _ = next(distributed.rendezvous("env://", timeout=timedelta(days=1)))
            self._meet(store)
        joined = time.monotonic() - started
        self._check_folder(store)
        self._check_doors(store)
        with self._deadline(self._run.all_reduce_seconds, "reach each other in an all-reduce"):
            device = self._form_group(store)
            latency, seconds = _measure(1, device), _measure(MEASURED_BYTES // 4, device)
        return Measured(joined, MEASURED_BYTES / seconds, latency)

    def _meet(self, store: distributed.Store) -> None:
        store.set(f"here/{self._rank}", "")
        keys = [f"here/{rank}" for rank in range(self._run.world)]
        end = time.monotonic() + self._run.join_seconds - 1
        while missing := [rank for rank, key in enumerate(keys) if not store.check([key])]:
            if time.monotonic() > end:
                raise self._lost("did not come", missing)
            time.sleep(0.05)

    def _form_group(self, store: distributed.Store) -> torch.device:
        is_cuda = self._run.machine["device"] == "cuda"
        if is_cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if is_cuda else "gloo",
            store=distributed.PrefixStore("group", store),
            rank=self._rank,
            world_size=self._run.world,
            timeout=GROUP_TIMEOUT,
        )
        return torch.device("cuda" if is_cuda else "cpu")

    # ------------------------------------------------------------ the same folder

    def _check_folder(self, store: distributed.Store) -> None:
        """Checkpoints are written by all processes into one folder."""
        file = self._folder / FOLDER / "shared"
        if self._rank == 0:
            token = secrets.token_hex(8)
            write_atomically(file, token)
            store.set("folder", token)
        token = store.get("folder").decode()
        end = time.monotonic() + FOLDER_SECONDS
        while not file.exists() or file.read_text(encoding="utf-8") != token:
            if time.monotonic() > end:
                raise Unsupported(
                    f"{self._run.describe(self._rank)} does not see {self._folder} as the first one does.",
                    next_move="Put the home on storage that all machines share, under the same path on each.",
                )
            time.sleep(0.1)

    # ------------------------------------------------------------ ports

    def _check_doors(self, store: distributed.Store) -> None:
        """Whether every machine reaches a free port of every other one, as torch's backends will want to: a
        firewall between two of them is named, where a collective would only wait."""
        if len(self._run.nodes) == 1 or self._rank % self._run.processes:
            return
        family = socket.AF_INET6 if ":" in self._node.address else socket.AF_INET
        with socket.create_server((self._node.address, 0), family=family) as door:
            store.set(f"door/{self._node.number}", str(door.getsockname()[1]))
            closed = [each for each in (self._knock(store, node.number) for node in self._run.nodes) if each]
            store.set(f"knocked/{self._node.number}", json.dumps(closed))
            told = [
                text for node in self._run.nodes for text in json.loads(store.get(f"knocked/{node.number}"))
            ]
        if told:
            raise RankLost(
                f"{'; '.join(told)}.",
                next_move="Open all ports between these machines (torch takes free ones), or name the right "
                "network: TUNELOOP_NODE_ADDRESS on the first machine, --interface on the others.",
                details={"node": self._node.number, "rank": self._rank},
            )

    def _knock(self, store: distributed.Store, other: int) -> str | None:
        if other == self._node.number:
            return None
        node = self._run.nodes[other]
        port = int(store.get(f"door/{other}"))
        try:
            socket.create_connection((node.address, port), timeout=DOOR_SECONDS).close()
        except OSError as error:
            return f"{self._node} does not reach {node} on port {port}: {error}"
        return None

    # ------------------------------------------------------------ deadlines

    @contextlib.contextmanager
    def _deadline(self, seconds: float, what: str) -> Iterator[None]:
        """Nothing interrupts a thread that waits in a backend: another one says why, and ends the process."""
        error = RankLost(
            f"The {self._run.world} processes did not {what} within {seconds:g} s: "
            f"{', '.join(map(str, self._run.nodes))}.",
            next_move="Look at the network between these machines; TUNELOOP_JOIN_SECONDS and "
            "TUNELOOP_ALL_REDUCE_SECONDS give them more time.",
            details={"node": self._node.number, "rank": self._rank},
        )
        timer = threading.Timer(seconds, self._fail, [error])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _lost(self, what: str, ranks: Sequence[int]) -> RankLost:
        names = ", ".join(map(self._run.describe, ranks))
        return RankLost(
            f"{names} {what} within {self._run.join_seconds:g} s.",
            next_move="Look at ranks/*.txt of the attempt's folder; TUNELOOP_JOIN_SECONDS gives more time.",
            details={"node": self._run.node_of(ranks[0]).number, "rank": ranks[0]},
        )


def _measure(numbers: int, device: torch.device) -> float:
    """Seconds of one all-reduce of so many fp32 numbers, the best of a few."""
    tensor = torch.ones(numbers, device=device)
    best = float("inf")
    for _ in range(MEASURED_TIMES):
        started = time.monotonic()
        distributed.all_reduce(tensor)
        tensor[0].item()
        best = min(best, time.monotonic() - started)
    return best
