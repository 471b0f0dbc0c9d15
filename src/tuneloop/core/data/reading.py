"""Files of rows: JSON Lines, JSON, CSV, TSV and Parquet, the text ones also gzipped, as streams.

    source = open_source(Path("train.jsonl"))
    for chunk in source.chunks():      # cheap
        for row in chunk.rows():       # the work; a chunk may be sent to another process

The format is told by what stands in the file, then by its name. Text is UTF-8, or UTF-16 with its mark.
Nothing is loaded whole, and whatever stands in the file, it is a row or a finding, never an exception.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tuneloop.core.data.detecting import Look, look_at, stamp
from tuneloop.core.data.reading_csv import cell_chunks
from tuneloop.core.data.reading_json import json_chunks
from tuneloop.core.data.reading_parquet import batch_chunks, open_parquet
from tuneloop.core.data.reading_text import jsonl_chunks, text_blocks
from tuneloop.core.data.rows import MAX_ROW_BYTES, Chunk, Format, Row
from tuneloop.core.errors import DataError

__all__ = ["MAX_ROW_BYTES", "Chunk", "Format", "Row", "Source", "open_source", "read_rows"]


@dataclass(frozen=True)
class Source:
    """A file that was looked at and not read."""

    path: Path
    shown: str
    """What to call it in messages."""
    look: Look
    size_bytes: int
    column: str = "messages"

    @property
    def format(self) -> Format:
        return self.look.format

    @property
    def compression(self) -> str | None:
        """`gzip`, or None."""
        return self.look.compression

    @property
    def encoding(self) -> str:
        """`utf-8`, `utf-16-le` or `utf-16-be`."""
        return self.look.encoding

    def chunks(self, target_bytes: int = 1 << 20) -> Iterator[Chunk]:
        """The file in order, in parts of about that many bytes. Raises `DataError` at the end when the file
        was written to meanwhile, and `NotFound` when it is gone."""
        before = stamp(self.path, self.shown)
        yield from self._chunks(target_bytes)
        if stamp(self.path, self.shown) != before:
            raise DataError(
                f"{self.shown} was written to while it was read.",
                next_move="Wait until whatever writes it is done, then try again.",
            )

    def _chunks(self, target_bytes: int) -> Iterator[Chunk]:
        if self.format == "parquet":
            return batch_chunks(self.path, self.shown, self.column, target_bytes)
        blocks = text_blocks(self.path, self.compression, self.encoding, target_bytes)
        if self.look.layout is not None:
            return json_chunks(blocks, self.look.layout, target_bytes)
        if self.format == "jsonl":
            return jsonl_chunks(blocks)
        return cell_chunks(blocks, "\t" if self.format == "tsv" else ",", self.column, target_bytes)


def open_source(path: Path, shown: str | None = None, *, column: str = "messages") -> Source:
    """Look at a file. In CSV, TSV and text columns of Parquet, the cells of `column` hold JSON.

    Raises `NotFound`, `UsageError` (may not be read), `Unsupported` (a format that is not read) and
    `DataError` (no rows, or not whole)."""
    shown = shown or str(path)
    size_bytes = stamp(path, shown)[0]
    look = look_at(path, shown)
    if look.format == "parquet":
        open_parquet(path, shown).close()
    return Source(path, shown, look, size_bytes, column)


def read_rows(path: Path, shown: str | None = None, *, column: str = "messages") -> Iterator[Row]:
    """All rows of a file, in this process. Raises as `open_source` and `Source.chunks` do."""
    for chunk in open_source(path, shown, column=column).chunks():
        yield from chunk.rows()
