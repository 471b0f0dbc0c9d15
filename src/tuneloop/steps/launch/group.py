"""The processes of one machine: torchrun and its ranks, started, watched, and ended to the last one.

They hold a pipe from this process as their standard input and end when it ends: whatever becomes of the
supervisor, `kill -9` included, nothing is left behind.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from tuneloop.core.machine import this_machine
from tuneloop.steps.launch.reports import (
    FOLDER,
    Failure,
    Report,
    Run,
    ending,
    last_lines,
    read_failures,
    read_reports,
)
from tuneloop.steps.launch.settings import interface_of

MARK = "TUNELOOP_RUN"
"""In the environment of every process of a run: its token and the node, by which strays are found."""
LINGER_SECONDS = 2.0
"""How long torchrun may take to end after one of its processes has said that it failed."""


@dataclass(frozen=True)
class Ended:
    """How a machine's processes came out; no failures: all is done."""

    failures: tuple[Failure, ...] = ()


class Group:
    def __init__(self, folder: Path, run: Run, node: int) -> None:
        self.folder, self.run, self.node = folder, run, node
        self.started_at = time.monotonic()
        self._failed_at: float | None = None
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-m", "tuneloop.steps.launch.torchrun"]
        command += [str(self.folder), str(self.node), *torchrun_arguments(self.run, self.node)]
        with open(self.folder / FOLDER / f"node-{self.node}.txt", "ab") as said:
            return subprocess.Popen(
                [*command, "-m", "tuneloop.steps.rank", str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=subprocess.STDOUT,
                env=environment_of(self.run, self.node, os.environ),
                # A signal to the step's group is the supervisor's to answer.
                start_new_session=True,
            )

    def reports(self) -> dict[int, Report]:
        return read_reports(self.folder, self.run, self.run.ranks_of(self.node))

    def poll(self) -> Ended | None:
        """None while they run."""
        code = self._process.poll()
        reports = self.reports()
        if code is None:
            return self._while_running(reports)
        if code == 0:
            return Ended()
        failures = read_failures(self.folder, self.run, self.node, reports)
        return Ended(tuple(failures) or (self._of_torchrun(code),))

    def _while_running(self, reports: Mapping[int, Report]) -> Ended | None:
        if not any(report.state == "failed" for report in reports.values()):
            return None
        self._failed_at = self._failed_at or time.monotonic()
        if time.monotonic() - self._failed_at < LINGER_SECONDS:
            return None
        return Ended(tuple(read_failures(self.folder, self.run, self.node, self.reports())))

    def _of_torchrun(self, code: int) -> Failure:
        said = self.folder / FOLDER / f"node-{self.node}.txt"
        return Failure(
            self.node,
            f"has no torchrun any more, which {ending(code)}",
            exit_code=code,
            last_lines=tuple(last_lines(said)),
        )

    def kill(self) -> None:
        """Returns when none of them is left."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        while marked := _marked(_mark(self.run, self.node)):
            for process in marked:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(marked, timeout=1)


def torchrun_arguments(run: Run, node: int) -> list[str]:
    """Of torchrun, for one try: a fresh attempt is the reconciler's to make."""
    arguments = [f"--nproc-per-node={run.processes}", "--max-restarts=0", "--monitor-interval=0.1"]
    if len(run.nodes) == 1:
        return [*arguments, "--standalone", "--local-addr=127.0.0.1"]
    # Static: with c10d neither of two nodes may come to hold the store.
    return [
        *arguments,
        f"--nnodes={len(run.nodes)}",
        f"--node-rank={node}",
        f"--master-addr={run.nodes[0].address}",
        f"--master-port={run.port}",
    ]


def environment_of(run: Run, node: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Of torchrun and its processes. The machines' secret is none of theirs."""
    inherited = {name: value for name, value in environment.items() if name != "TUNELOOP_NODE_SECRET"}
    interface = interface_of(run.nodes[node].address)
    chosen = {} if interface is None else {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    if len(run.nodes) == 1:
        chosen.pop("NCCL_SOCKET_IFNAME", None)
    return {
        "OMP_WAIT_POLICY": "passive",
        **chosen,
        **inherited,
        "OMP_NUM_THREADS": str(threads_each(run.processes, environment)),
        "PYTHONUNBUFFERED": "1",
        "TORCH_CPP_LOG_LEVEL": environment.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        MARK: _mark(run, node),
    }


def threads_each(processes: int, environment: Mapping[str, str]) -> int:
    """Threads of each of so many processes: they share the physical cores that this process may use, or as
    many as OMP_NUM_THREADS says."""
    written = environment.get("OMP_NUM_THREADS", "")
    if written.isdigit() and int(written) > 0:
        return max(1, int(written) // processes)
    cores = this_machine().cores
    return max(1, min(cores, psutil.cpu_count(logical=False) or cores) // processes)


def _mark(run: Run, node: int) -> str:
    return f"{run.token}/{node}"


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found
