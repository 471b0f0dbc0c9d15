"""The checks of `tuneloop doctor`: each looks at one thing, changes nothing, and says what to do about it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import socket
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

import tuneloop
from tuneloop.cli.session import Session, program, recorded_processes
from tuneloop.core.errors import TuneloopError
from tuneloop.core.settings import Settings

LOCKS = ("requirements.lock", "constraints.txt", "requirements.txt")
"""Where the pinned versions stand, in order, in the folder that holds `src/`."""

LITTLE_SPACE = 5e9
"""Bytes: a 4 billion parameter model in 16 bit needs more, the demo a quarter of it."""

LIGHT_PACKAGES = (
    "click",
    "httpx",
    "pydantic",
    "starlette",
    "sqlalchemy",
    "torch",
    "transformers",
    "peft",
    "mlflow",
)

MINIMUM_PYTHON = (3, 11)

_PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^\]]*\])?==([^\s;\\]+)")

_TORCH = """
import json, torch
print(json.dumps({"threads": torch.get_num_threads(), "gpus": torch.cuda.device_count()}))
"""


@dataclass(frozen=True)
class Check:
    """What was looked at, what was found, and the next move when it is not ok."""

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    fix: str | None = None


def run(settings: Settings, find: Callable[[], Session | None]) -> list[Check]:
    """Every check, in the order in which a trouble should be looked for."""
    found = [check_python(), *check_packages(), check_torch()]
    found += [check_home(settings.home), check_schema(settings.database), check_space(settings.home)]
    found += [check_ports(settings), *check_processes(settings.home), check_server(find)]
    found += [check_mlflow(settings.tracking_uri), check_hub(dict(os.environ))]
    return found


def check_python() -> Check:
    version = ".".join(str(part) for part in sys.version_info[:3])
    if sys.version_info < MINIMUM_PYTHON:
        return Check("python", "fail", version, "Make a new environment with Python 3.11 or newer.")
    return Check("python", "ok", f"{version} at {sys.executable}")


def check_packages() -> Iterator[Check]:
    missing = [name for name in LIGHT_PACKAGES if _installed(name) is None]
    if missing:
        yield Check("packages", "fail", f"missing: {', '.join(missing)}", _how_to_install())
    lock = find_lock()
    if lock is None:
        yield Check("lock", "ok", "no lock file beside this installation; versions are not compared")
        return
    pins = read_pins(lock.read_text(encoding="utf-8"))
    other = [
        f"{name} {have} instead of {want}"
        for name, want in pins.items()
        if (have := _installed(name)) is not None and _public(have) != _public(want)
    ]
    if other:
        shown = "; ".join(other[:5]) + (f"; and {len(other) - 5} more" if other[5:] else "")
        yield Check("lock", "warn", shown, f"Install what was tested. {_how_to_install()}")
    else:
        yield Check("lock", "ok", f"versions as in {lock.name}")


def _how_to_install() -> str:
    """The versions of the lock file where there is one, else those that the package asks for."""
    lock = find_lock()
    what = f"-r {shlex.quote(str(lock))}" if lock else "tuneloop"
    return f"Install it: {shlex.quote(sys.executable)} -m pip install {what}"


def find_lock() -> Path | None:
    root = Path(tuneloop.__path__[0]).parent.parent
    return next((root / name for name in LOCKS if (root / name).is_file()), None)


def read_pins(text: str) -> dict[str, str]:
    """`name==version` lines of a requirements file."""
    found = (_PIN.match(line.strip()) for line in text.splitlines())
    return {match[1]: match[2] for match in found if match}


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _public(version: str) -> str:
    """Without the build's label: `2.13.0+cpu` is `2.13.0`."""
    return version.partition("+")[0]


def check_torch() -> Check:
    """Asked in a process of its own: torch takes seconds to load and may fail to."""
    version = _installed("torch")
    if version is None:
        return Check("torch", "fail", "not installed", _how_to_install())
    try:
        # In a folder that is surely there: the person's may have been deleted.
        asked = subprocess.run(
            [sys.executable, "-c", _TORCH], capture_output=True, text=True, timeout=120, cwd=sys.prefix
        )
        answer = json.loads(asked.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return Check(
            "torch", "fail", f"{version} does not load", f'See why: {sys.executable} -c "import torch"'
        )
    found = f"{version}, {answer['threads']} threads, {answer['gpus']} GPUs"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if answer["threads"] > cores:
        return Check("torch", "warn", f"{found} on {cores} cores", f"Set OMP_NUM_THREADS={cores}.")
    return Check("torch", "ok", found)


def check_home(home: Path) -> Check:
    if not home.exists():
        parent = next(folder for folder in home.parents if folder.exists())
        if not parent.is_dir():
            return Check("home", "fail", f"{parent} is not a folder", "Set TUNELOOP_HOME to a folder.")
        if not os.access(parent, os.W_OK):
            return Check(
                "home", "fail", f"{parent} is not writable", "Set TUNELOOP_HOME to a folder of yours."
            )
        return Check("home", "ok", f"{home} (made at the first start)")
    if not home.is_dir():
        return Check("home", "fail", f"{home} is not a folder", "Set TUNELOOP_HOME to a folder.")
    if not os.access(home, os.R_OK | os.W_OK | os.X_OK):
        return Check(
            "home", "fail", f"{home} is not yours to write", "Set TUNELOOP_HOME to a folder of yours."
        )
    open_files = [
        name for name in ("token", "secret") if (home / name).exists() and _others_may_read(home / name)
    ]
    if open_files:
        paths = " ".join(shlex.quote(str(home / name)) for name in open_files)
        return Check(
            "home", "fail", f"others may read {' and '.join(open_files)} in {home}", f"chmod 600 {paths}"
        )
    return Check("home", "ok", str(home))


def _others_may_read(path: Path) -> bool:
    return bool(path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO))


def check_schema(database: Path) -> Check:
    if not database.exists():
        return Check("schema", "ok", "no store yet; the server makes it")
    try:
        found = _ask(database, "select value from meta where name = 'schema_version'")
    except sqlite3.Error as error:
        return Check("schema", "fail", f"{database}: {error}", "Restore it from a backup of the home.")
    return Check("schema", "ok", f"version {found}")


def _ask(database: Path, query: str) -> object:
    """The first value that a query of an SQLite file gives; the file is opened for reading only."""
    with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=5)) as connection:
        row = connection.execute(query).fetchone()
    return row[0] if row else None


def check_space(home: Path) -> Check:
    place = next(folder for folder in (home, *home.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    found = f"{free / 1e9:.1f} GB free in {place}"
    if free < LITTLE_SPACE:
        return Check("disk space", "warn", found, "Free some, or set TUNELOOP_HOME to a larger disk.")
    return Check("disk space", "ok", found)


def check_ports(settings: Settings) -> Check:
    """Ports that were set by hand must be free, or ours."""
    wanted = {"TUNELOOP_PORT": settings.port, "TUNELOOP_ROUTER_PORT": settings.router_port}
    fixed = {name: port for name, port in wanted.items() if port}
    if not fixed:
        return Check("ports", "ok", "taken as they are free")
    busy = {name: port for name, port in fixed.items() if _is_taken(port)}
    is_ours = any(process.is_alive for process in recorded_processes(settings.home)) or _server_file(
        settings.home
    )
    if busy and not is_ours:
        name, port = next(iter(busy.items()))
        return Check("ports", "fail", f"{port} is taken by another program", f"Set {name} to another port.")
    return Check("ports", "ok", ", ".join(f"{name}={port}" for name, port in fixed.items()))


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _server_file(home: Path) -> bool:
    return (home / "server.json").exists()


def check_processes(home: Path) -> Iterator[Check]:
    """Processes that still run, and records of processes that ended without a result."""
    alive = [process for process in recorded_processes(home) if process.is_alive]
    names = ", ".join(f"{process.name} (pid {process.pid})" for process in alive)
    if alive and not _server_file(home):
        yield Check(
            "processes",
            "warn",
            f"without a server: {names}",
            f"The next server takes them over ({program()} up), or stop them: {program()} down",
        )
    else:
        yield Check("processes", "ok", names or "none")
    lost = [
        process.name
        for process in recorded_processes(home)
        if not process.is_alive
        and process.folder.parts[-4] == "jobs"
        and not (process.folder / "result.json").exists()
    ]
    if lost:
        yield Check("ended early", "ok", f"{len(lost)} attempts ended without a result, the last: {lost[-1]}")


def check_server(find: Callable[[], Session | None]) -> Check:
    try:
        session = find()
        if session is None:
            return Check("server", "ok", f"none runs; {program()} up starts it")
        health = session.client.health()
    except TuneloopError as error:
        return Check("server", "fail", error.message, error.next_move)
    found = f"{session.client.url}, pid {health['pid']}, version {health['version']}"
    if health["version"] != tuneloop.__version__:
        restart = f"Restart it (jobs go on): {program()} down --server-only && {program()} up"
        return Check("server", "fail", f"{found}, while this command is {tuneloop.__version__}", restart)
    return Check("server", "ok", found)


def check_mlflow(uri: str) -> Check:
    if not uri.startswith("sqlite:///"):
        return Check("mlflow", "ok", f"a server of yours: {urlsplit(uri).hostname or uri}")
    path = mlflow_database(uri)
    if not path.exists():
        return Check("mlflow", "ok", "no database yet; the tracker makes it")
    try:
        version = _ask(path, "select version_num from alembic_version")
        runs = _ask(path, "select count(*) from runs")
    except sqlite3.Error as error:
        return Check("mlflow", "fail", f"{path}: {error}", "Restore it from a backup of the home.")
    return Check("mlflow", "ok", f"{path}, schema {version}, {runs} runs")


def mlflow_database(uri: str) -> Path:
    """The file behind `sqlite:///...`."""
    return Path(unquote(uri.removeprefix("sqlite:///")))


def check_hub(environment: dict[str, str]) -> Check:
    """Where base models would be fetched from, and as whom; never the token itself."""
    parts = [environment.get("HF_ENDPOINT") or "https://huggingface.co"]
    parts.append(
        "with HF_TOKEN" if environment.get("HF_TOKEN") else "without HF_TOKEN (gated models need it)"
    )
    if environment.get("HF_HUB_OFFLINE") in ("1", "true", "yes", "on"):
        parts.append("offline: only what is in its cache")
    return Check("hub", "ok", ", ".join(parts))
