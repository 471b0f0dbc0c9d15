"""From one schema of the store to the next, in order, all or nothing, with a copy of what was there before.

To add one: raise `SCHEMA_VERSION` in `core/home.py`, write a function that takes a connection inside a
transaction, and put it here under the version that it starts from. The tables in `sql.py` are what a new home
gets; a migration brings an old one to the same shape, in plain SQL: it must mean the same in ten years.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sa

from tuneloop.core.errors import HomeUnusable

log = logging.getLogger(__name__)

Migration = Callable[[sa.Connection], None]
BACKUPS = "backups"


def _index_by_creation(connection: sa.Connection) -> None:
    """1 to 2: "the newest jobs" without sorting all of them."""
    connection.execute(sa.text("CREATE INDEX records_created ON records (kind, created)"))


def _more_fields(connection: sa.Connection) -> None:
    """2 to 3: nothing to change. Since then records have fields that older code would refuse one by one, in
    the middle of its work (mirrored traffic, probes): it refuses the home instead."""


MIGRATIONS: Mapping[int, Migration] = {1: _index_by_creation, 2: _more_fields}
"""The version that it starts from, to the way to the next."""


def migrate(connection: sa.Connection, found: int, wanted: int, migrations: Mapping[int, Migration]) -> None:
    """Every step from `found` to `wanted`, inside the caller's transaction. Raises `HomeUnusable` for a
    schema from which there is no way."""
    for version in range(found, wanted):
        if version not in migrations:
            raise HomeUnusable(
                f"This home has schema {found}, from which there is no way to {wanted}. Nothing was changed.",
                next_move="Open it with the Tuneloop that wrote it, or choose another with TUNELOOP_HOME.",
            )
        migrations[version](connection)
        log.warning("the store was migrated from schema %s to %s", version, version + 1)


def back_up(database: Path, schema: int) -> Path:
    """A whole copy of what an SQLite file holds, in `backups/` beside it."""
    folder = database.parent / BACKUPS
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"{database.stem}-schema{schema}-{datetime.now(UTC):%Y%m%dT%H%M%S}.db"
    staging = target.with_suffix(".new")
    try:
        os.close(os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
        with (
            contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as source,
            contextlib.closing(sqlite3.connect(staging)) as copy,
        ):
            source.backup(copy)
        os.rename(staging, target)
    finally:
        staging.unlink(missing_ok=True)
    return target
