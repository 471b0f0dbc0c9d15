"""Checks of the folder that is the workspace: whose it is, what it lies on, and what is in it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sqlite3
import stat
import tempfile
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tuneloop.cli import output
from tuneloop.cli.checks.finding import Check

if TYPE_CHECKING:
    from tuneloop.core.settings import Settings

LITTLE_SPACE = 5e9
"""Bytes: a 4 billion parameter model in 16 bit needs more, the demo a quarter of it."""
NO_SPACE = 0.2e9
LITTLE_TEMPORARY_SPACE = 0.2e9
FEW_INODES = 1000

ELSEWHERE = "export TUNELOOP_HOME=/a/folder/of/yours"

NETWORK = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "9p",
    "afs",
    "ceph",
    "lustre",
    "glusterfs",
    "beegfs",
    "gpfs",
}
NETWORK_FUSE = ("sshfs", "s3fs", "gcsfuse", "rclone", "glusterfs", "ceph", "davfs")
NOT_FOR_FILES = {
    *("proc", "sysfs", "devtmpfs", "devpts", "cgroup", "cgroup2", "debugfs", "tracefs", "securityfs"),
    *("configfs", "bpf", "mqueue", "pstore", "binfmt_misc", "autofs", "fusectl", "hugetlbfs", "efivarfs"),
}
PASSING = {"tmpfs", "ramfs"}


def check_home(home: Path) -> Check:
    """Whether it is a folder that we can write, or can be made; and whether others can read its secrets."""
    why = "Everything that Tuneloop keeps lies in it; the server does not start without it."
    place = _nearest(home)
    if not place.is_dir():
        return Check("home", "fail", f"{place} is not a folder", ELSEWHERE, why)
    if os.statvfs(place).f_flag & os.ST_RDONLY:
        return Check("home", "fail", f"{place} is on a disk that is read-only", ELSEWHERE, why)
    if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
        return Check("home", "fail", f"{place} is not yours to write", ELSEWHERE, why)
    kind = filesystem(place)
    if kind in NOT_FOR_FILES:
        return Check("home", "fail", f"{home} cannot be made: {kind} holds no files", ELSEWHERE, why)
    if place != home:
        return Check("home", "ok", f"{home} (made at the first start)")
    return _private(home)


def _private(home: Path) -> Check:
    open_ones = [path for path in (home, home / "token", home / "secret") if _others_may(path)]
    if not open_ones:
        return Check("home", "ok", str(home))
    quoted = " ".join(shlex.quote(str(path)) for path in open_ones)
    names = ", ".join("the folder itself" if path == home else path.name for path in open_ones)
    return Check(
        "home",
        "fail" if open_ones != [home] else "warn",
        f"others may read in {home}: {names}",
        f"chmod go-rwx {quoted}",
        "Who can read `token` can run commands as you; `secret` is every endpoint key.",
        partial(_close, open_ones),
    )


def _close(paths: list[Path]) -> str:
    for path in paths:
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o077)
    return "Closed to others: " + ", ".join(str(path) for path in paths)


def _others_may(path: Path) -> bool:
    return path.exists() and bool(path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO))


def _nearest(path: Path) -> Path:
    """The path, or the first folder above it that there is."""
    return next(place for place in (path, *path.parents) if place.exists())


# ---------------------------------------------------------------- what it lies on


def check_filesystem(home: Path) -> Check:
    place = _nearest(home)
    kind = filesystem(place)
    if kind in NOT_FOR_FILES:
        why = "The kernel makes up what is in there; no file can be kept."
        return Check("filesystem", "fail", f"{place} is on {kind}", ELSEWHERE, why)
    if kind in NETWORK or any(part in kind for part in NETWORK_FUSE):
        why = (
            "The store is SQLite with a write-ahead log, which needs memory shared between processes; over a "
            "network it can be damaged."
        )
        return Check(
            "filesystem",
            "fail",
            f"{place} is on {kind}, over a network",
            f"{ELSEWHERE}, on a local disk",
            why,
        )
    if kind in PASSING:
        why = "It is kept in memory: everything in it is gone after a restart of the machine."
        return Check("filesystem", "warn", f"{place} is on {kind}", f"{ELSEWHERE}, on a disk", why)
    return Check("filesystem", "ok", kind or "not known here")


def filesystem(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """The type of the file system that holds `path`; empty where the kernel does not tell (no Linux)."""
    real = os.path.realpath(path)
    best, kind = "", ""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), before.split()[4])
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, after.split()[0]
    return kind


def check_space(home: Path) -> Iterator[Check]:
    """In the home, its cache where that is another disk, and where temporary files go."""
    place = _nearest(home)
    if shutil.disk_usage(place).total == 0:
        return  # No disk; told by the check of the file system.
    yield _space("disk space", place, LITTLE_SPACE, "Weights, checkpoints and models go there.")
    cache = home / "cache"
    if cache.exists() and cache.stat().st_dev != place.stat().st_dev:
        yield _space("cache", cache.resolve(), LITTLE_SPACE, "Downloaded weights go there.")
    temporary = Path(tempfile.gettempdir())
    if temporary.stat().st_dev != place.stat().st_dev:
        why = "Python packages put what they need for a moment there (TMPDIR sets another place)."
        yield _space("temporary files", temporary, LITTLE_TEMPORARY_SPACE, why)


def _space(name: str, place: Path, little: float, why: str) -> Check:
    free = shutil.disk_usage(place).free
    found = f"{output.size(free)} free in {place}"
    counts = os.statvfs(place)
    fix = f"See what takes it: du -xh --max-depth=2 {shlex.quote(str(place))} | sort -h | tail"
    if counts.f_files and counts.f_favail < FEW_INODES:
        return Check(name, "warn", f"{found}, but room for {counts.f_favail} more files", fix, why)
    if free < NO_SPACE:
        return Check(name, "fail", found, fix, why)
    return Check(name, "warn" if free < little else "ok", found, fix if free < little else None, why)


# ---------------------------------------------------------------- what is in it


def check_schema(settings: Settings) -> Check:
    """Told without a server: a home that a newer Tuneloop wrote is not touched by this one."""
    from tuneloop import daemon
    from tuneloop.core.errors import HomeUnusable
    from tuneloop.core.home import SCHEMA_VERSION

    try:
        found = daemon.schema_of(settings)
    except HomeUnusable as broken:
        why = "The store holds every job, model and endpoint."
        return Check("schema", "fail", str(broken.message), f"Restore it from {settings.home}/backups", why)
    if found is None:
        return Check("schema", "ok", "no store yet; the server makes it")
    if found > SCHEMA_VERSION:
        why = "A newer Tuneloop wrote this home; this one would not understand it, and does not touch it."
        newer = f"version {found}; this Tuneloop knows {SCHEMA_VERSION}"
        return Check("schema", "fail", newer, f"Upgrade Tuneloop, or: {ELSEWHERE}", why)
    if found < SCHEMA_VERSION:
        return Check("schema", "ok", f"version {found}; the next start migrates it to {SCHEMA_VERSION}")
    return Check("schema", "ok", f"version {found}")


def ask(database: Path, query: str) -> object:
    """The first value that a query of an SQLite file gives; the file is opened for reading only."""
    with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=5)) as connection:
        row = connection.execute(query).fetchone()
    return row[0] if row else None
