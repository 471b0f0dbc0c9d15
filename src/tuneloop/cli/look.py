"""A look at a file of conversations: how many, how long, what is odd about them.

Nothing is judged here: whether a row can be learned from is said by the server when the recipe is checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuneloop.core.errors import NotFound

MOST_BYTES = 64_000_000
"""Of a larger file the beginning is read, and the rest counted by its size (of a packed one not at all)."""
CHUNK_BYTES = 1_000_000

ASCII_PER_TOKEN = 3.5
"""Characters; English prose has about 4 in the tokenizers of the catalogue, code and names have fewer."""
TOKENS_PER_OTHER = 1.0
"""Of a character beyond ASCII: accents cost less, rare scripts more."""
TOKENS_PER_MESSAGE = 8
"""The template's role and end marks."""


@dataclass
class Look:
    """What was seen. Lengths are tokens, estimated: the tokenizer counts when the job runs."""

    path: Path
    rows: int = 0
    is_whole: bool = True
    columns: list[str] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    system_rows: int = 0
    repeated_rows: int = 0
    unread_rows: int = 0
    """Lines that are no object with a list of messages."""
    digests: set[bytes] = field(default_factory=set, repr=False)

    def quantile(self, share: float) -> int:
        """The estimated tokens that this share of the rows does not exceed."""
        ordered = sorted(self.lengths)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0

    def longer_than(self, tokens: int) -> int:
        return sum(length > tokens for length in self.lengths)

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "rows": self.rows,
            "is_whole": self.is_whole,
            "columns": self.columns,
            "messages": {"least": min(self.turns, default=0), "most": max(self.turns, default=0)},
            "tokens": {
                "median": self.quantile(0.5),
                "p95": self.quantile(0.95),
                "most": max(self.lengths, default=0),
            },
            "characters": {"most": max(self.characters, default=0), "sum": sum(self.characters)},
            "rows_with_system": self.system_rows,
            "repeated_rows": self.repeated_rows,
            "unread_rows": self.unread_rows,
        }


def look_at(path: Path) -> Look:
    """A file of any format that data may have. Raises `NotFound` when there is no such file, with the nearest
    of its folder, `UsageError` when it may not be read, and `Unsupported` and `DataError` as reading does."""
    from tuneloop.core.data.reading import open_source

    if not path.is_file():
        raise NotFound(f"There is no file {path}.", next_move=_beside(path))
    source = open_source(path)
    found = Look(path)
    columns: dict[str, None] = {}
    for number, chunk in enumerate(source.chunks(CHUNK_BYTES)):
        if number * CHUNK_BYTES >= MOST_BYTES:
            found.is_whole = False
            break
        for row in chunk.rows():
            _count(found, row.value, columns)
    found.columns = list(columns)
    if not found.is_whole and source.compression is None and source.format != "parquet":
        found.rows = round(found.rows * source.size_bytes / MOST_BYTES)
    return found


def _count(found: Look, row: Mapping[str, Any] | None, columns: dict[str, None]) -> None:
    found.rows += 1
    try:
        messages = [(str(one["role"]), str(one["content"])) for one in (row or {})["messages"]]
    except (KeyError, TypeError):
        found.unread_rows += 1
        return
    assert row is not None
    columns.update(dict.fromkeys(row))
    text = "".join(content for _, content in messages)
    plain = sum(letter.isascii() for letter in text)
    found.turns.append(len(messages))
    found.characters.append(len(text))
    tokens = plain / ASCII_PER_TOKEN + (len(text) - plain) * TOKENS_PER_OTHER
    found.lengths.append(round(tokens) + TOKENS_PER_MESSAGE * len(messages))
    found.system_rows += any(role == "system" for role, _ in messages)
    digest = hashlib.blake2b(repr(messages).encode("utf-8", "replace"), digest_size=12).digest()
    found.repeated_rows += digest in found.digests
    found.digests.add(digest)


def _beside(path: Path) -> str:
    from tuneloop.core.names import did_you_mean

    folder = path.parent
    there = sorted(one.name for one in folder.glob("*.*")) if folder.is_dir() else []
    return (
        did_you_mean(path.name, there)
        or f"Give a file of conversations; {folder.absolute()} has none of that name."
    )
