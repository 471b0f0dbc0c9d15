"""What a file of rows is read into, whatever its format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from tuneloop.core.chat import Finding

Format = Literal["jsonl", "json", "csv", "tsv", "parquet"]

MAX_ROW_BYTES = 16 << 20
"""A longer row is refused unread: some 4 million tokens are no conversation."""


class Row(NamedTuple):
    number: int
    """1-based row of the file, bad ones included; blank lines are no rows."""
    line: int
    """1-based line where the row begins; in Parquet and in JSON arrays equal to `number`."""
    value: dict[str, Any] | None
    """None when it could not be read."""
    findings: tuple[Finding, ...] = ()
    """Why it could not be read."""


class Chunk(ABC):
    """About a megabyte of a file. Picklable: `rows` is where the work is done, mostly in another process."""

    @abstractmethod
    def rows(self) -> list[Row]:
        """The rows of this part, in order. Never raises for what stands in the file."""


class BadRows(Chunk):
    """Rows whose mistake was found while the file was cut into chunks."""

    def __init__(self, *rows: Row) -> None:
        self._rows = list(rows)

    def rows(self) -> list[Row]:
        return self._rows


class BrokenFile(Exception):
    """The file cannot be read any further; the finding says why. Never leaves this package."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.rule)
        self.finding = finding


ID_COLUMNS = ("prompt_id", "id", "uuid", "conversation_id")


def id_of(value: Mapping[str, Any] | None) -> str | None:
    """What the row calls itself, where it does so in the usual columns; cut to 80 characters."""
    for column in ID_COLUMNS:
        named = value.get(column) if value else None
        if isinstance(named, str | int) and not isinstance(named, bool) and named != "":
            return str(named)[:80]
    return None
