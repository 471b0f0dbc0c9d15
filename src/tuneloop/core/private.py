"""The home is its owner's alone: who can read `token` has a shell, and `secret` is every endpoint key.

`keep_private` is called before anything of a home is used. What is open to others is closed, and told: what
they have read by then stays read. What cannot have been written by us is refused.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tuneloop.core.errors import HomeUnusable

OTHERS = 0o077
SECRETS = ("token", "secret")
FOLDERS = ("logs", "jobs", "services", "replicas", "artifacts", "cache", "mlflow", "azure")
FILES = ("home.json", "server.json", "settings.yaml", "tuneloop.db", "tuneloop.db-wal", "tuneloop.db-shm")
LEAST_SECRET_CHARACTERS = 32


def keep_private(home: Path) -> list[str]:
    """Close what is open to others; a sentence for each thing that was. Raises `HomeUnusable` for a secret
    that is no file of ours, or too short to be one, and when something cannot be closed."""
    told = []
    # The home first: once it is closed, nobody else reaches what lies in it.
    for path in (home, *(home / name for name in (*SECRETS, *FILES, *FOLDERS))):
        mode = _close(path)
        if mode is not None and (path == home or path.name in SECRETS):
            told.append(_told(path, mode))
    for name in SECRETS:
        _check_secret(home / name)
    return told


def keep_secret(path: Path) -> list[str]:
    """The same for one secret that lies deeper in the home; nothing where there is none."""
    mode = _close(path)
    _check_secret(path)
    return [] if mode is None else [_told(path, mode)]


def _close(path: Path) -> int | None:
    """The mode that it had, when it was open to others."""
    mode = _mode(path)
    if mode is None or stat.S_ISLNK(mode) or not mode & OTHERS:
        return None
    try:
        os.chmod(path, stat.S_IMODE(mode) & ~OTHERS)
    except OSError as broken:
        raise HomeUnusable(
            f"{path} is open to other users (mode {stat.S_IMODE(mode):04o}) and cannot be closed: "
            f"{broken.strerror}.",
            next_move="Let it belong to you, or choose another home with TUNELOOP_HOME.",
        ) from None
    return mode


def _mode(path: Path) -> int | None:
    try:
        return os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _told(path: Path, mode: int) -> str:
    said = f"{path} was open to other users (mode {stat.S_IMODE(mode):04o}); it is closed now."
    if not stat.S_ISDIR(mode):
        said += f" If others use this machine, make a new one: tuneloop down, remove {path}, tuneloop up."
    return said


def _check_secret(path: Path) -> None:
    mode = _mode(path)
    if mode is None:
        return
    owner = os.lstat(path).st_uid
    if not stat.S_ISREG(mode) or (owner not in (os.geteuid(), 0) and os.geteuid() != 0):
        raise HomeUnusable(
            f"{path} is not a file of yours (a link, or another user's).",
            next_move="Remove it; the next start makes a new one.",
        )
    if len(path.read_bytes().strip()) < LEAST_SECRET_CHARACTERS:
        raise HomeUnusable(
            f"{path} holds fewer than {LEAST_SECRET_CHARACTERS} characters: anybody could guess it.",
            next_move="Remove it; the next start makes a new one.",
        )
