"""The folder that everything lies in: made, private, held by one server."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tuneloop.core import disk
from tuneloop.core.errors import HomeUnusable
from tuneloop.core.home import MARK, new_mark, read_mark, refuse_newer, text_of
from tuneloop.core.private import keep_private
from tuneloop.core.settings import Settings

log = logging.getLogger("tuneloop.daemon")


def prepare_home(settings: Settings) -> Path:
    """Make what is missing of the home. Raises `HomeUnusable` when it cannot be written or is newer than this
    code (then nothing was changed), and `DiskFull`."""
    home = settings.home
    refuse_newer(home)
    if "?" in str(home):
        raise HomeUnusable(
            f"The home {home} has a '?' in its path: the address of MLflow's database cannot say that.",
            next_move="Choose another folder with TUNELOOP_HOME.",
        )
    try:
        for folder in (home, *(home / name for name in ("logs", "jobs", "services", "cache", "mlflow"))):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for told in keep_private(home):
            log.warning("%s", told)
        _secret_file(home / "token", secrets.token_urlsafe(32))
        _secret_file(home / "secret", secrets.token_hex(32))
        _secret_file(home / MARK, text_of(new_mark(home)))
        _require_writable(home)
    except (FileExistsError, NotADirectoryError):
        raise HomeUnusable(
            f"The home {home} is not a folder, or lies in what is none.",
            next_move="Choose a folder with TUNELOOP_HOME.",
        ) from None
    except OSError as broken:
        raise disk.explain(broken, home) or HomeUnusable(
            f"The home {home} cannot be written: {broken.strerror}.",
            next_move="Make it writable, or choose another with TUNELOOP_HOME.",
        ) from broken
    return home


def _require_writable(home: Path) -> None:
    """Asked, not tried: nothing is left behind."""
    if not os.access(home, os.W_OK | os.X_OK):
        is_read_only = os.statvfs(home).f_flag & os.ST_RDONLY
        raise OSError(errno.EROFS if is_read_only else errno.EACCES, os.strerror(errno.EACCES), str(home))


def _secret_file(path: Path, text: str) -> None:
    """Owner-only, and written whole or not at all; of two writers at once the first wins."""
    if path.exists():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink()


def schema_of(settings: Settings) -> int | None:
    """The schema of what is stored, read beside a server or without one; None where there is nothing yet.
    `SCHEMA_VERSION` is what this code knows. Changes nothing. Raises `HomeUnusable` when it is unreadable."""
    from tuneloop.adapters import sql

    mark = read_mark(settings.home)
    stored = sql.schema_of(settings.database)
    known = [found for found in (stored, None if mark is None else mark.schema) if found is not None]
    return max(known, default=None)


def home_id(home: Path) -> str:
    mark = read_mark(home)
    assert mark is not None
    return mark.id


def is_locked(home: Path) -> bool:
    """Leaves no trace: a home may be read-only, or gone."""
    try:
        descriptor = os.open(home / "server.lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def only_server(home: Path) -> Iterator[IO[str]]:
    """One server per home; a second one ends with a sentence."""
    with open(home / "server.lock", "a", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise HomeUnusable(
                f"A server of the home {home} is running already.", next_move="See: tuneloop status"
            ) from None
        yield handle
