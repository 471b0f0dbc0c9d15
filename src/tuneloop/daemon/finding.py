"""How the command line reaches the server of a home, starting it when there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneloop.core import disk
from tuneloop.core.errors import HomeUnusable, ServerUnreachable
from tuneloop.core.home import read_mark
from tuneloop.core.settings import Settings
from tuneloop.daemon.home import is_locked, prepare_home

START_TIMEOUT_SECONDS = 60.0
HELD_SECONDS = 45.0
"""For a server that holds the home and does not answer, before it is told."""


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    url: str
    token: str
    version: str
    pid: int


def find(settings: Settings) -> Server | None:
    """The running server of this home, or None. Quick: one look at a file and one request to loopback."""
    try:
        facts = json.loads((settings.home / "server.json").read_text(encoding="utf-8"))
        token = (settings.home / "token").read_text(encoding="utf-8").strip()
        url = f"http://127.0.0.1:{facts['port']}"
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, KeyError):
        return None
    mark = read_mark(settings.home)
    # A server that was started at another path means other files: the home was moved under it, or copied.
    if mark is None or not _is_here(settings.home, facts.get("home")):
        return None
    health = _health(url)
    if health is None or health.get("home_id") != mark.id:
        return None
    return Server(url=url, token=token, version=str(health["version"]), pid=int(health["pid"]))


def ensure(settings: Settings) -> Server:
    """The server of this home, started in the background when there is none. Two callers at once get the same
    one. Raises `ServerUnreachable` with the end of its log when it does not come up."""
    found = find(settings)
    if found is not None:
        return found
    home = prepare_home(settings)
    found = _wait_for_the_last_one(settings)
    if found is not None:
        return found
    log_path = home / "logs" / "server.log"
    begin = log_path.stat().st_size if log_path.exists() else 0
    with disk.explained(home):
        child = _spawn(settings, log_path)
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        found = find(settings)
        if found is not None:
            return found
        # Another caller's server may hold the home; then our child has ended and theirs comes up.
        if child.poll() is not None and not is_locked(home):
            break
        time.sleep(0.05)
    raise _did_not_start(log_path, begin)


def _is_here(home: Path, announced: object) -> bool:
    """Whether `announced`, the path that a server was started with, is this home."""
    if announced is None or announced == str(home):
        return True
    try:
        return Path(str(announced)).samefile(home)
    except OSError:
        return False


def _wait_for_the_last_one(settings: Settings) -> Server | None:
    """A server that holds the home and cannot be used is coming up or ending: it gets some seconds. Raises
    `HomeUnusable` when it does neither."""
    deadline = time.monotonic() + HELD_SECONDS
    while is_locked(settings.home):
        found = find(settings)
        if found is not None:
            return found
        if time.monotonic() > deadline:
            raise _held(settings.home)
        time.sleep(0.05)
    return None


def _held(home: Path) -> HomeUnusable:
    try:
        facts = json.loads((home / "server.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        facts = {}
    place, pid = facts.get("home"), facts.get("pid")
    said = f"A server{f' (pid {pid})' if pid else ''} holds the home {home}"
    if place is not None and not _is_here(home, place):
        said += f", and was started when it lay at {place}"
    return HomeUnusable(
        f"{said}; it does not answer.",
        next_move=f"End it, then try again: kill {pid}" if pid else "End it, then try again.",
    )


def _health(url: str) -> dict[str, Any] | None:
    try:
        # A proxy of the environment is not asked for the way to our own machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{url}/api/health", timeout=2) as answer:
            read: dict[str, Any] = json.load(answer)
            return read
    except (OSError, urllib.error.URLError, json.JSONDecodeError):
        return None


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _spawn(settings: Settings, log_path: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "TUNELOOP_HOME": str(settings.home), "PYTHONUNBUFFERED": "1"}
    with open(log_path, "ab", opener=_private) as output:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "tuneloop.daemon"],
            cwd=settings.home,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    # Kept, so that Python does not warn of a child that is meant to outlive us.
    started.append(child)
    return child


started: list[subprocess.Popen[bytes]] = []


def _did_not_start(log_path: Path, begin: int) -> ServerUnreachable:
    with open(log_path, "rb") as handle:
        handle.seek(begin)
        lines = handle.read().decode("utf-8", "replace").strip().splitlines()
    if not lines:
        # It could not even say why.
        disk.require(log_path, 100_000, "a server")
    reason = lines[-1].removeprefix("error: ") if lines else "it said nothing"
    return ServerUnreachable(
        f"The server did not start: {reason}", next_move=f"Its log: {log_path}. Also try: tuneloop doctor"
    )
