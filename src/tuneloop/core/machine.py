"""What this process may use of the machine: cores and memory, with the limits of its container.

A container sees the whole machine in /proc; what it may really take stands in its control group. Both
versions are read, from the process's own group up to the root: the tightest limit on the way holds.
Sources: Linux kernel documentation, admin-guide/cgroup-v2 (`cpu.max`, `memory.max`), admin-guide/cgroup-v1
(`memory.limit_in_bytes`) and scheduler/sched-bwc (`cpu.cfs_quota_us`, `cpu.cfs_period_us`).
"""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Machine:
    cores: int
    """At least 1; a share of a core counts as one."""
    memory_bytes: int
    limited_by: tuple[str, ...] = ()
    """The files whose limit is below what the machine has, for people."""
    has_fewer_cores: bool = False
    """Fewer than the process sees: what starts a thread per core must be told."""


def this_machine() -> Machine:
    """Of this process. Without control groups: what the scheduler and the kernel tell."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return within_limits(Path("/"), allowed, psutil.virtual_memory().total)


def peak_resident_bytes(pid: int) -> int | None:
    """The most that a process has held of this machine's memory; None where the system does not tell.

    Linux: VmHWM in /proc/PID/status (proc_pid_status(5)). Not getrusage's ru_maxrss, which Linux keeps across
    execve: a process that a large one started would begin with what that one held.
    """
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def own_peak_resident_bytes() -> int:
    """The most that this process has held of this machine's memory."""
    told = peak_resident_bytes(os.getpid())
    if told is not None:
        return told
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def group_memory(root: Path = Path("/")) -> tuple[int, int] | None:
    """(limit, in use) in bytes of the control group that leaves this process the least; None without one."""
    found = []
    for folder in _folders(root, "memory"):
        limit = _memory(folder)
        used = _first_number(folder, "memory.current", "memory.usage_in_bytes")
        if limit is not None and used is not None:
            found.append((limit[0], used[0]))
    return min(found, key=lambda group: group[0] - group[1], default=None)


def within_limits(root: Path, cores: int, memory_bytes: int) -> Machine:
    """`cores` and `memory_bytes`, or less where a control group under `root` (`/` but for tests) says so."""
    limited: list[str] = []
    seen = cores
    for folder in _folders(root, "cpu"):
        quota = _quota(folder)
        if quota is not None and quota[0] < cores:
            cores = max(1, int(quota[0]))
            limited.append(f"{quota[1]}: {quota[0]:g} cores")
    for folder in _folders(root, "memory"):
        limit = _memory(folder)
        if limit is not None and limit[0] < memory_bytes:
            memory_bytes = limit[0]
            limited.append(f"{limit[1]}: {limit[0]} bytes")
    return Machine(cores, memory_bytes, tuple(limited), has_fewer_cores=cores < seen)


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's groups that may limit `controller`, innermost first."""
    mounts = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            # Version 2, alone or beside version 1; a container often sees its own group as the root.
            tops = [mounts, mounts / "unified"]
        elif controller in names.split(","):
            tops = [mounts / names, mounts / controller]
        else:
            continue
        for top in tops:
            if top.is_dir():
                yield from _upwards(top, path)
                break


def _upwards(top: Path, path: str) -> Iterator[Path]:
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    for depth in range(len(parts), -1, -1):
        folder = top.joinpath(*parts[:depth])
        if folder.is_dir():
            yield folder


def _quota(folder: Path) -> tuple[float, Path] | None:
    """Cores that the group may use at once, and the file that says so."""
    for line in _lines(folder / "cpu.max"):
        quota, _, period = line.partition(" ")
        return _share(quota, period or "100000", folder / "cpu.max")
    for quota in _lines(folder / "cpu.cfs_quota_us"):
        for period in _lines(folder / "cpu.cfs_period_us"):
            return _share(quota, period, folder / "cpu.cfs_quota_us")
    return None


def _share(quota: str, period: str, file: Path) -> tuple[float, Path] | None:
    """`max` (version 2) and -1 (version 1) are no limit."""
    if not (quota.isdigit() and period.isdigit() and int(period) > 0):
        return None
    return int(quota) / int(period), file


def _memory(folder: Path) -> tuple[int, Path] | None:
    return _first_number(folder, "memory.max", "memory.limit_in_bytes")


def _first_number(folder: Path, *names: str) -> tuple[int, Path] | None:
    for name in names:
        for line in _lines(folder / name):
            if line.isdigit():
                return int(line), folder / name
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")[:64] if path.is_file() else []
    except OSError:
        return []
