"""JSON files as streams of records: an array of rows, one object with one list of rows, or values that follow
each other (a row written over several lines).

The file is only cut into the bytes of its rows here, at the commas of the list; orjson reads each of them.
(A parser of events would be slower, and yajl writes `?` for half of a surrogate pair without a word.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tuneloop.core.chat import Finding
from tuneloop.core.data.reading_text import WHITESPACE, read_record
from tuneloop.core.data.rows import MAX_ROW_BYTES, BadRows, BrokenFile, Chunk, Row

Layout = Literal["array", "wrapped", "sequence"]
"""`[row, ...]`, `{"data": [row, ...]}`, `row row ...`."""

_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+("?)|[\[\]{},]', re.DOTALL)
_OPENING, _CLOSING, _COMMA, _QUOTE = b"[{", b"]}", 0x2C, 0x22
_DEPTH: dict[Layout, int] = {"sequence": 0, "array": 1, "wrapped": 2}
_NOT_READ = "What follows was not read."


@dataclass(frozen=True)
class RecordsChunk(Chunk):
    number: int
    records: tuple[bytes, ...]

    def rows(self) -> list[Row]:
        return [read_record(raw, number, number) for number, raw in enumerate(self.records, self.number)]


def json_chunks(blocks: Iterator[bytes], layout: Layout, target_bytes: int) -> Iterator[Chunk]:
    number, size = 1, 0
    records: list[bytes] = []
    trouble: Finding | None = None
    try:
        for record in _Cutter(layout).records(blocks):
            records.append(record)
            size += len(record)
            if size >= target_bytes:
                yield RecordsChunk(number, tuple(records))
                number, size, records = number + len(records), 0, []
    except BrokenFile as broken:
        trouble = broken.finding
    if records:
        yield RecordsChunk(number, tuple(records))
        number += len(records)
    if trouble:
        yield BadRows(Row(number, number, None, (trouble,)))


class _Cutter:
    """Cuts out the bytes of each row. Brackets are counted, not matched: what is wrong inside of a row is
    told by whoever reads it."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._row_depth = _DEPTH[layout]
        self._depth = 0
        self._may_be_rows = layout == "array"
        self._is_inside = layout == "sequence"
        self._is_done = False
        self._begin = 0
        """Where what is not given out yet begins in the buffer."""
        self._given = 0
        self._held = 0

    def records(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        buffer, position = b"", 0
        for more in self._enough(blocks):
            buffer = buffer[self._begin :] + more
            position -= self._begin
            self._begin = 0
            for token in _TOKEN.finditer(buffer, position):
                start, end = token.span()
                kind = buffer[start]
                if kind == _QUOTE and not token[1]:
                    position = start
                    break
                position = end
                # Most of what there is, and of no matter: texts, and the commas inside of a row.
                is_in_row = self._is_inside and (self._depth != self._row_depth or kind == _QUOTE)
                if not (is_in_row and kind in (_QUOTE, _COMMA)):
                    yield from self._take(buffer, start, end)
            else:
                position = len(buffer)
            if not self._is_inside and not self._is_over:
                self._begin = position
            self._held = len(buffer) - self._begin
            if self._held > MAX_ROW_BYTES:
                raise BrokenFile(_too_long(self._held))
        yield from self._at_end(buffer[self._begin :])

    @property
    def _is_over(self) -> bool:
        return self._is_done and self._depth == 0

    def _enough(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        """Blocks, joined while a row is longer than one: what is held is looked at again each time."""
        parts: list[bytes] = []
        size = 0
        for block in blocks:
            parts.append(block)
            size += len(block)
            if size >= self._held:
                yield b"".join(parts)
                parts, size = [], 0
        if parts:
            yield b"".join(parts)

    def _take(self, buffer: bytes, start: int, end: int) -> Iterator[bytes]:
        token = buffer[start]
        if self._is_over:
            raise BrokenFile(_misplaced(buffer, start, "more after the end of the list"))
        if self._layout == "wrapped" and not self._is_inside:
            self._look_for_rows(token, start)
        if token in _OPENING:
            self._depth += 1
            if self._layout == "array" and self._depth == 1:
                self._is_inside, self._begin = True, end
        elif token in _CLOSING:
            yield from self._close(buffer, start, end)
        elif token == _COMMA and self._is_inside and self._depth == self._row_depth:
            yield self._record(buffer, start, end)

    def _look_for_rows(self, token: int, start: int) -> None:
        """The list whose first element is an object is the list of rows."""
        if self._may_be_rows and token == _OPENING[1]:
            if self._is_done:
                fix = "Write each list to a file of its own, or all rows into one list."
                raise BrokenFile(Finding("one_list", "", "a second list of rows in the same object", fix))
            self._is_inside, self._begin = True, start
        self._may_be_rows = token == _OPENING[0] and self._depth == 1

    def _close(self, buffer: bytes, start: int, end: int) -> Iterator[bytes]:
        if self._depth == 0:
            raise BrokenFile(_misplaced(buffer, start, "a bracket that closes nothing"))
        self._depth -= 1
        if self._layout == "sequence":
            if self._depth == 0:
                yield self._record(buffer, end, end)
        elif self._is_inside and self._depth == self._row_depth - 1:
            is_row = self._given or buffer[self._begin : start].strip(WHITESPACE)
            self._is_inside, self._is_done = False, True
            if is_row:
                yield self._record(buffer, start, end)
            self._begin = end
        elif self._depth == 0:
            self._is_done, self._begin = True, end

    def _record(self, buffer: bytes, stop: int, begin: int) -> bytes:
        record = buffer[self._begin : stop].strip(WHITESPACE)
        self._begin = begin
        self._given += 1
        return record

    def _at_end(self, rest: bytes) -> Iterator[bytes]:
        rest = rest.strip(WHITESPACE)
        if self._depth or (self._layout != "sequence" and not self._is_done):
            shown = "the end of the file inside the list of rows"
            fix = "Write the file again from its source: its end is missing."
            raise BrokenFile(Finding("truncated", "", shown, fix))
        if rest and self._is_done:
            raise BrokenFile(_misplaced(rest, 0, "more after the end of the list"))
        if rest:
            yield rest


def _too_long(held: int) -> Finding:
    shown = f"more than {held / 1e6:,.0f} MB, of at most {MAX_ROW_BYTES / 1e6:,.0f}"
    fix = f"Split this row, or close the quote or bracket that it leaves open. {_NOT_READ}"
    return Finding("row_size", "", shown, fix)


def _misplaced(buffer: bytes, start: int, what: str) -> Finding:
    text = buffer[start : start + 40].decode("utf-8", "replace")
    return Finding("json", "", f"{what}: {text!r}", f"Write one list of rows and nothing else. {_NOT_READ}")


# ---------------------------------------------------------------- which layout


def layout_of(head: bytes, suffix: str) -> Layout | None:
    """Of text that begins with a bracket, by its first bytes; None: JSON Lines."""
    lines = [line for line in head.split(b"\n") if line.strip(WHITESPACE)]
    is_whole = _is_one_value(lines[0])
    if head.lstrip(WHITESPACE).startswith(b"["):
        has_more_rows = len(lines) > 1 and lines[1].lstrip(WHITESPACE)[:1] in (b"[", b"{")
        return None if is_whole and has_more_rows else "array"
    if is_whole and len(lines) > 1:
        return None
    if _holds_list_of_rows(head):
        # `{"rows": [{...}]}` on one line of JSON Lines is one row, a bad one; in a .json file it is the list.
        return "wrapped" if suffix == ".json" or not is_whole else None
    is_spread = not is_whole and len(lines) > 1 and not lines[1].startswith(b"{")
    if suffix in (".jsonl", ".ndjson"):
        return "sequence" if is_spread and _stops_between_values(lines[0]) else None
    return None if is_whole or not (is_spread or suffix == ".json") else "sequence"


def _is_one_value(line: bytes) -> bool:
    depth, is_closed = 0, True
    for token in _TOKEN.finditer(line):
        if token[0][:1] == b'"':
            is_closed = bool(token[1])
        depth += (token[0] in (b"[", b"{")) - (token[0] in (b"]", b"}"))
    return depth == 0 and is_closed


def _stops_between_values(line: bytes) -> bool:
    return line.rstrip(WHITESPACE).endswith((b"{", b"[", b",")) and not _is_one_value(line)


def _holds_list_of_rows(head: bytes) -> bool:
    """Whether the first object has a list of objects that are no messages: they are the rows."""
    keys = _keys_of_first_object_in_a_list(head)
    return bool(keys) and not {b'"role"', b'"from"'} & keys


def _keys_of_first_object_in_a_list(head: bytes) -> set[bytes]:
    keys: set[bytes] = set()
    depth, opened, is_in_list = 0, b"", False
    for token in _TOKEN.finditer(head):
        written = token[0]
        if written in (b"]", b"}"):
            depth -= 1
            if (is_in_list and depth == 2) or depth == 0:
                break
        elif is_in_list and depth == 3 and head[token.end() :].lstrip(WHITESPACE)[:1] == b":":
            keys.add(written)
        elif written in (b"[", b"{"):
            is_in_list = is_in_list or (depth == 2 and opened == b"[" and written == b"{")
            depth += 1
        opened = written
    return keys
