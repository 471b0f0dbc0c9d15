"""What marks a folder as a home: `home.json` holds the workspace's id, the schema of what is stored, and
where the home was when a server last ran in it.

Reading, and writing one small file: the command line asks here before it starts a server, and touches nothing
when the home is newer than itself.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tuneloop.core.errors import HomeUnusable
from tuneloop.core.process import write_atomically

SCHEMA_VERSION = 3
"""Of the store. What led from one to the next stands in `adapters/migrations.py`."""

MARK = "home.json"


@dataclass(frozen=True)
class Mark:
    id: str
    """Of the workspace: its processes carry it, and a server is known by it."""
    schema: int
    place: str | None = None
    """Absolute path of the home when a server last ran in it."""


def read_mark(home: Path) -> Mark | None:
    """None where there is no home yet. Raises `HomeUnusable` when the file cannot be read."""
    path = home / MARK
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        return Mark(id=str(written["id"]), schema=int(written["format"]), place=written.get("place"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as broken:
        raise HomeUnusable(
            f"{path} is damaged: {broken}.",
            next_move="Restore it from a copy of the home, or remove it: the next start makes a new one.",
        ) from None
    except OSError as broken:
        raise HomeUnusable(
            f"{path} cannot be read: {broken.strerror}.", next_move="Check its permissions and the disk."
        ) from broken


def text_of(mark: Mark) -> str:
    return json.dumps({"id": mark.id, "format": mark.schema, "place": mark.place})


def new_mark(home: Path) -> Mark:
    return Mark(id=new_id(), schema=SCHEMA_VERSION, place=str(home))


def new_id() -> str:
    return secrets.token_hex(8)


def settle(home: Path, mark: Mark, **changes: object) -> Mark:
    """Write what has changed about the home."""
    changed = replace(mark, **changes)  # type: ignore[arg-type]
    if changed != mark:
        write_atomically(home / MARK, text_of(changed), private=True)
    return changed


def refuse_newer(home: Path) -> None:
    """Raises `HomeUnusable` for a home that a newer Tuneloop wrote. Changes nothing, starts nothing."""
    mark = read_mark(home)
    if mark is not None and mark.schema > SCHEMA_VERSION:
        raise newer(mark.schema)


def newer(schema: int) -> HomeUnusable:
    return HomeUnusable(
        f"This home was written by a newer Tuneloop (schema {schema}; this one knows {SCHEMA_VERSION}). "
        "Nothing was changed.",
        next_move="Upgrade Tuneloop, or choose another home with TUNELOOP_HOME.",
    )


Arrival = Literal["same", "moved", "copied"]


def arrival(home: Path, mark: Mark) -> Arrival:
    """How the home came to be where it is: it was here already, was moved here, or is a copy of one that is
    still where it was."""
    if mark.place is None or mark.place == str(home):
        return "same"
    before = Path(mark.place)
    try:
        if before.samefile(home):
            return "same"  # another way to the same folder: a link, a bind mount
        other = read_mark(before)
    except (OSError, HomeUnusable):
        return "moved"
    return "copied" if other is not None and other.id == mark.id else "moved"


class TokenFile:
    """The API's token as its file has it now: who replaces the file replaces the token; who removes it
    leaves nobody who may ask, until the next command has made a new one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._token = ""

    def read(self) -> str:
        """Empty when there is none."""
        try:
            found = self._path.stat()
            seen = (found.st_ino, found.st_mtime_ns, found.st_size)
            if seen != self._seen:
                self._token = self._path.read_text(encoding="utf-8").strip()
                self._seen = seen
        except OSError:
            self._token, self._seen = "", None
        return self._token
