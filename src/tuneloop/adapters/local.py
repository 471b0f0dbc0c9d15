"""The `Executor` port on this machine: detached processes that outlive the server.

A process belongs to a folder (see `core.process`). Each is started in a session of its own, so that signals
reach it together with its children and a closed terminal reaches neither.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
from pydantic import ValidationError

from tuneloop.core import disk
from tuneloop.core.ports import ProcessStatus
from tuneloop.core.process import forbid, is_alive
from tuneloop.core.types import ProcessIdentity

TRACKER = "tuneloop.daemon"
ROOM_TO_START_BYTES = 1_000_000
OWNER_VARIABLE = "TUNELOOP_OWNER"
"""Set in every process that is started, so that a stray child is known by whom it belongs to."""


class LocalExecutor:
    """One per server. Keeps handles of its own children only in order to reap them."""

    def __init__(self, threads: int | None = None) -> None:
        """`threads` of each process, where its container may use fewer cores than it sees; None: torch
        decides."""
        self._threads = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        self._children: dict[Path, subprocess.Popen[bytes]] = {}
        self._ended: set[Path] = set()
        self._lock = threading.Lock()

    def ensure(self, owner: str, folder: Path, module: str, environment: Mapping[str, str]) -> None:
        with self._lock, _locked(folder / "ensure.lock"):
            if (folder / "process.json").exists() or self._starting(folder):
                return
            # One that could not even write down why it ends had better not begin.
            disk.require(folder, ROOM_TO_START_BYTES, "a process")
            self._children[folder] = _start(
                owner, folder, module, {**self._threads_unless_set(), **environment}
            )

    def _threads_unless_set(self) -> Mapping[str, str]:
        return {} if "OMP_NUM_THREADS" in os.environ else self._threads

    def status(self, owner: str, folder: Path) -> ProcessStatus:
        with self._lock:
            died_early = self._reap(folder)
            identity = self.identity(folder)
            if identity is None and died_early:
                # It ended before it could say who it is: nothing else may start in this folder, and it counts
                # as a process that ended.
                forbid(folder, owner)
                identity = self.identity(folder)
            if identity is None:
                return "starting" if died_early or self._starting(folder) else "absent"
            # In a copied home lie the marks of the original's processes: those are none of ours.
            if identity.owner == owner and is_alive(identity):
                return "running"
            # It may have ended since it was looked for above.
            self._reap(folder)
            return "ended"

    def identity(self, folder: Path) -> ProcessIdentity | None:
        try:
            return ProcessIdentity.model_validate_json((folder / "process.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValidationError):
            return None

    def stop(self, owner: str, folder: Path, *, kill: bool = False) -> None:
        wanted = signal.SIGKILL if kill else signal.SIGTERM
        identity = self.identity(folder)
        if identity is not None and identity.owner != owner:
            return
        group = identity.pid if identity is not None else self._child_pid(folder)
        if group is None:
            forbid(folder, owner)
            return
        if not kill:
            if identity is None or is_alive(identity):
                _signal(group, wanted)
            return
        for process in _members(group, owner):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(wanted)

    def end_marked(self, prefix: str, *, kill: bool = False) -> int:
        """Ask every process whose owner begins with `prefix` to end (kill: now), wherever its folder may be;
        how many there were."""
        found = _marked(prefix)
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        return len(found)

    def count_marked(self, prefix: str) -> int:
        return len(_marked(prefix))

    def last_lines(self, folder: Path, count: int = 20) -> list[str]:
        try:
            with open(folder / "log.txt", "rb") as handle:
                handle.seek(0, os.SEEK_END)
                handle.seek(max(0, handle.tell() - 64_000))
                return handle.read().decode("utf-8", "replace").splitlines()[-count:]
        except FileNotFoundError:
            return []

    def _reap(self, folder: Path) -> bool:
        """Collect every child that ended; True when the one of `folder` is among those that did."""
        for known, child in list(self._children.items()):
            if child.poll() is not None and known != folder:
                self._ended.add(known)
                del self._children[known]
        child = self._children.get(folder)
        return folder in self._ended or (child is not None and child.poll() is not None)

    def _starting(self, folder: Path) -> bool:
        """Whether a child of ours is on its way but has not yet said who it is."""
        child = self._children.get(folder)
        return child is not None and child.poll() is None

    def _child_pid(self, folder: Path) -> int | None:
        child = self._children.get(folder)
        return child.pid if child is not None and child.poll() is None else None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two servers that ensure the same folder do so one after the other."""
    with open(path, "a", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


NO_CACHED_FRAGMENTS = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
"""torch asks for aligned blocks. glibc cuts each out of a larger one and caches the splinters in front, which
keep what is freed from being joined and used again: with an adapter, training was measured to take a fifth to
a third more memory. Without these caches splinters are joined at once (glibc manual, Memory Allocation
Tunables). What it costs in speed: docs/explanation/memory.md."""


def _start(owner: str, folder: Path, module: str, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(folder)],
            cwd=folder,
            env=_environment(owner, module, environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _environment(owner: str, module: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The server's own environment without what belongs to its submitters, then the submission's. How to log
    in at MLflow is for the tracker alone."""
    withheld = ("HF_",) if module == TRACKER else ("HF_", "MLFLOW_TRACKING_", "TUNELOOP_MLFLOW_TRACKING_URI")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(withheld)}
    return {
        **inherited,
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "true",
        # Threads that wait for each other sleep instead of spinning: with anything else on the machine,
        # spinning makes two threads several times slower than one. Must be set before libgomp is loaded.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", NO_CACHED_FRAGMENTS),
        **environment,
        OWNER_VARIABLE: owner,
    }


def _signal(group: int, wanted: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, wanted)


def _members(group: int, owner: str) -> list[psutil.Process]:
    """The processes of a session that carry our mark: a reused number is not ours to kill."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.environ().get(OWNER_VARIABLE) == owner:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def _marked(prefix: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            is_ours = process.environ().get(OWNER_VARIABLE, "").startswith(prefix)
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found
