"""Files that appear whole, all of them or none, and replace no other content without being told to."""

from __future__ import annotations

import filecmp
import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import psutil

from tuneloop.core import disk
from tuneloop.core.errors import Conflict

State = Literal["written", "unchanged", "replaced"]


class Outputs:
    """Files on their way: each is made beside its place, under the name that `begin` gives."""

    def __init__(self, force: bool) -> None:
        self._force = force
        self._made: dict[Path, Path] = {}

    def begin(self, final: Path) -> Path:
        """Where to write what is to become `final`; its folder is made."""
        final.parent.mkdir(parents=True, exist_ok=True)
        _drop_stale(final)
        temporary = final.with_name(f".{final.name}.{os.getpid()}.partial")
        self._made[final] = temporary
        return temporary

    def finish(self) -> dict[Path, State]:
        """Put all of them into their places. Raises `Conflict`, and changes nothing, when there is something
        else already and it was not said to replace it."""
        states = {final: _state(temporary, final) for final, temporary in self._made.items()}
        differing = [str(final) for final, state in states.items() if state == "replaced"]
        if differing and not self._force:
            raise Conflict(
                f"{', '.join(differing)} {'is' if len(differing) == 1 else 'are'} there already, with other "
                "content than would be written.",
                next_move="Choose another place with --to, or replace what is there: --force",
            )
        for final, temporary in self._made.items():
            if states[final] != "unchanged":
                _flush(temporary)
                os.replace(temporary, final)
        return states

    def drop(self) -> None:
        """Delete what is still on its way."""
        for temporary in self._made.values():
            temporary.unlink(missing_ok=True)


@contextmanager
def outputs(near: Path, force: bool) -> Iterator[Outputs]:
    """Whatever happens, nothing half-written is left. Raises `DiskFull` for what the disk of `near` refuses,
    and `Conflict` where a folder is in the way."""
    made = Outputs(force)
    try:
        with disk.explained(near, "Free some space there, or choose another place with --to."):
            yield made
    finally:
        made.drop()


def _state(temporary: Path, final: Path) -> State:
    if final.is_dir():
        raise Conflict(f"{final} is a folder.", next_move="Choose another place with --to.")
    if not final.exists():
        return "written"
    return "unchanged" if filecmp.cmp(temporary, final, shallow=False) else "replaced"


def _drop_stale(final: Path) -> None:
    """What processes that were killed left on its way."""
    for left in final.parent.glob(f".{glob.escape(final.name)}.*.partial"):
        pid = left.name.split(".")[-2]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            left.unlink(missing_ok=True)


def _flush(file: Path) -> None:
    """To the disk, before its name says that it is whole."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
