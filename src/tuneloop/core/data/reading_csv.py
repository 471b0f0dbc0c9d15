"""CSV and TSV as the standard library reads them: the first record names the columns, quotes may hold line
ends, a quote inside of quotes is doubled. The cells of one column hold a conversation as JSON; the others are
text.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tuneloop.core.chat import Finding
from tuneloop.core.data.reading_text import (
    line_too_long,
    read_json,
    repeated_key,
    unix_line_ends,
    whole_lines,
)
from tuneloop.core.data.rows import MAX_ROW_BYTES, BadRows, BrokenFile, Chunk, Row

_NOT_READ = "What follows was not read."


@dataclass(frozen=True)
class CellsChunk(Chunk):
    columns: tuple[str, ...]
    records: tuple[tuple[int, int, list[str]], ...]
    """(number, line, cells)."""
    column: str

    def rows(self) -> list[Row]:
        return [self._row(number, line, cells) for number, line, cells in self.records]

    def _row(self, number: int, line: int, cells: list[str]) -> Row:
        if len(cells) != len(self.columns):
            return Row(number, line, None, (_wrong_count(self.columns, cells),))
        value: dict[str, Any] = dict(zip(self.columns, cells, strict=True))
        for name, cell in value.items():
            if not cell.isascii() and (found := _bad_bytes(name, cell)):
                return Row(number, line, None, (found,))
        return with_parsed_cell(Row(number, line, value), self.column)


def with_parsed_cell(row: Row, column: str) -> Row:
    """The row with the JSON in `column` read; other rows as they are."""
    cell = row.value.get(column) if row.value else None
    if not isinstance(cell, str) or not cell.strip() or row.value is None:
        return row
    raw = cell.encode("utf-8", "surrogatepass")
    read = read_json(raw)
    found = _as_cell_finding(read, column, cell) if isinstance(read, Finding) else repeated_key(raw, read)
    if found:
        return row._replace(value=None, findings=(found,))
    return row._replace(value={**row.value, column: read})


def _as_cell_finding(found: Finding, column: str, cell: str) -> Finding:
    if cell.lstrip().startswith(("[{'", "{'", "[{\"role': ")) or "{'role'" in cell:
        fix = "Python wrote it with str(), as pandas' to_csv does: write json.dumps(messages) into the cell."
    elif found.rule == "json":
        fix = f"{found.fix.removesuffix(' One object per line.')} Or is it text for `tuneloop data convert`?"
    else:
        fix = found.fix
    shown = cell if len(cell) <= 60 else f"{cell[:57]}..."
    return Finding("cell_is_json", column, ascii(shown) if not shown.isprintable() else f'"{shown}"', fix)


def _wrong_count(columns: tuple[str, ...], cells: list[str]) -> Finding:
    shown = f"{len(cells)} cells, and the header has {len(columns)}"
    fix = 'Put cells that hold the separator between quotes, and double the quotes in them ("" for ").'
    return Finding("cells", "", shown, fix)


def _bad_bytes(name: str, cell: str) -> Finding | None:
    try:
        cell.encode("utf-8")
    except UnicodeEncodeError as broken:
        byte = ord(cell[broken.start]) & 0xFF
        shown = f"byte {byte:#04x} at character {broken.start} of the cell"
        return Finding("encoding", name, shown, "Save the file as UTF-8 (in Excel: CSV UTF-8).")
    return None


# ---------------------------------------------------------------- cutting


def cell_chunks(blocks: Iterator[bytes], delimiter: str, column: str, target_bytes: int) -> Iterator[Chunk]:
    csv.field_size_limit(MAX_ROW_BYTES)
    lines = _TextLines(blocks)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header, trouble = _header(reader)
    if trouble:
        yield BadRows(Row(1, 1, None, (trouble,)))
        return
    yield from _Cutter(reader, lines, header, column, target_bytes).chunks()


def _header(reader: Any) -> tuple[tuple[str, ...], Finding | None]:
    try:
        names: list[str] = next((record for record in reader if record), [])
    except (csv.Error, BrokenFile) as broken:
        return (), broken.finding if isinstance(broken, BrokenFile) else _quotes(str(broken))
    return tuple(names), header_finding(names)


def header_finding(names: list[str]) -> Finding | None:
    doubled = [name for name in names if names.count(name) > 1]
    if doubled:
        return Finding("header", "", f"two columns '{doubled[0][:40]}'", "Give every column its own name.")
    broken = [name for name in names if not name.isascii() and _bad_bytes(name, name)]
    if broken:
        return Finding("encoding", "", ascii(broken[0])[:60], "Save the file as UTF-8 (in Excel: CSV UTF-8).")
    return None


class _Cutter:
    def __init__(
        self, reader: Any, lines: _TextLines, header: tuple[str, ...], column: str, target_bytes: int
    ) -> None:
        self._reader, self._lines = reader, lines
        self._header, self._column, self._target_bytes = header, column, target_bytes
        self._number = 1
        self._records: list[tuple[int, int, list[str]]] = []
        self._is_over = False

    def chunks(self) -> Iterator[Chunk]:
        while not self._is_over:
            bad = self._fill()
            if self._records:
                yield CellsChunk(self._header, tuple(self._records), self._column)
                self._records = []
            if bad:
                yield BadRows(bad)

    def _fill(self) -> Row | None:
        """Records until there are enough bytes, the end, or a row that cannot be read."""
        size = 0
        while size < self._target_bytes:
            line = self._lines.count + 1
            try:
                cells = next(self._reader, None)
            except BrokenFile as broken:
                self._is_over = not self._lines.goes_on
                return self._bad(line, broken.finding)
            except csv.Error as broken:
                self._is_over = self._lines.is_at_end or "field limit" in str(broken)
                return self._bad(line, _quotes(str(broken)))
            if cells is None:
                self._is_over = True
                break
            if cells:
                self._records.append((self._number, line, cells))
                self._number += 1
                size += sum(map(len, cells)) + 64
        return None

    def _bad(self, line: int, finding: Finding) -> Row:
        self._number += 1
        return Row(self._number - 1, line, None, (finding,))


def _quotes(reason: str) -> Finding:
    if "end of data" in reason:
        shown = "the end of the file inside a quoted cell"
        return Finding(
            "truncated", "", shown, "Close the quote that opens in this row, or write the file again."
        )
    if "field limit" in reason:
        shown = f"a cell of more than {MAX_ROW_BYTES / 1e6:,.0f} MB"
        return Finding("row_size", "", shown, f"Close the quote that opens it, or split the row. {_NOT_READ}")
    return Finding("quotes", "", reason, 'Double the quotes inside of a quoted cell ("" for ").')


class _TextLines:
    """Lines for the csv reader, counted; bytes that are no UTF-8 become half surrogates, to be found later.
    A line that is too long is raised as `BrokenFile`, and the next call goes on behind it."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._parts = whole_lines(_lone_cr_as_line_end(blocks))
        self._pending: Iterator[str] = iter(())
        self.count = 0
        self.goes_on = False
        self.is_at_end = False

    def __iter__(self) -> _TextLines:
        return self

    def __next__(self) -> str:
        line = next(self._pending, None)
        while line is None:
            self._refill()
            line = next(self._pending, None)
        self.count += 1
        return line

    def _refill(self) -> None:
        self.goes_on = False
        try:
            part = next(self._parts)
        except StopIteration:
            self.is_at_end = True
            raise
        if part.skipped_bytes:
            self.count += 1
            self.goes_on = True
            raise BrokenFile(line_too_long(part.skipped_bytes))
        text = part.data.decode("utf-8", "surrogateescape")
        lines = text.split("\n")
        last = lines.pop()
        self._pending = iter([f"{line}\n" for line in lines] + ([last] if last else []))


def _lone_cr_as_line_end(blocks: Iterator[bytes]) -> Iterator[bytes]:
    r"""Line ends are `\r` where the first block has no `\n`; elsewhere `\r` may stand in a cell."""
    first = next(blocks, b"")
    if b"\r" in first and b"\n" not in first:
        yield from unix_line_ends(_chained(first, blocks))
    else:
        yield from _chained(first, blocks)


def _chained(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    if first:
        yield first
    yield from rest
