"""Bytes of a text file as UTF-8, cut at line ends, and JSON Lines out of them.

Memory: a few blocks, or three times a row where one is longer than that; a row above `MAX_ROW_BYTES` is
counted and skipped.
"""

from __future__ import annotations

import codecs
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson

from tuneloop.core.chat import Finding
from tuneloop.core.data.rows import MAX_ROW_BYTES, BadRows, BrokenFile, Chunk, Row

WHITESPACE = b" \t\n\r\f\v"
_PACKED_BYTES = 1 << 16
_BYTE_ORDER_MARKS = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
}

_WRITE_WHOLE = "Write the file again from its source, or remove what is left of this row."


# ---------------------------------------------------------------- blocks


def text_blocks(path: Path, compression: str | None, encoding: str, size: int) -> Iterator[bytes]:
    """The file as UTF-8 in blocks of about `size` bytes, without its byte order mark. Raises `BrokenFile`
    where it cannot be read on, after everything before that was given."""
    blocks = _raw_blocks(path, compression, size)
    if encoding == "utf-8":
        yield from _without_mark(blocks, codecs.BOM_UTF8)
    else:
        yield from _transcoded(_without_mark(blocks, _BYTE_ORDER_MARKS[encoding]), encoding)


def _raw_blocks(path: Path, compression: str | None, size: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        yield from unzipped(file, size) if compression == "gzip" else iter(lambda: _read(file, size), b"")


def _read(file: BinaryIO, size: int) -> bytes:
    try:
        return file.read(size)
    except OSError as broken:
        fix = "The disk or the network refuses to read on; copy the file elsewhere."
        raise BrokenFile(Finding("readable", "", broken.strerror or str(broken), fix)) from None


def unzipped(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The text of a gzip file, in blocks of at most `size`. Raises `BrokenFile` after all that can be had
    before the damage (the gzip module keeps the last block to itself)."""
    members = zlib.decompressobj(wbits=31)
    packed = _read(file, _PACKED_BYTES)
    while packed:
        before = members.copy()
        try:
            text = members.decompress(packed, size)
        except zlib.error as broken:
            yield _up_to_damage(before, packed)
            fix = "The gzip file is damaged: copy or download it again."
            raise BrokenFile(Finding("gzip", "", str(broken)[:80], fix)) from None
        if text:
            yield text
        if not members.eof:
            packed = members.unconsumed_tail or _read(file, _PACKED_BYTES)
            continue
        packed = members.unused_data.lstrip(b"\0")  # files are padded with zeros on tapes
        while not packed:
            if not (more := _read(file, _PACKED_BYTES)):
                return
            packed = more.lstrip(b"\0")
        members = zlib.decompressobj(wbits=31)
    yield members.flush()
    fix = "The gzip file ends too early: copy or download it again."
    raise BrokenFile(Finding("truncated", "", "the end of the file inside gzip data", fix))


def _up_to_damage(members: Any, packed: bytes) -> bytes:
    """Byte by byte: what is fed together with the damage is lost with it."""
    text = []
    try:
        for position in range(len(packed)):
            text.append(members.decompress(packed[position : position + 1]))
    except zlib.error:
        pass
    return b"".join(text)


def _without_mark(blocks: Iterator[bytes], mark: bytes) -> Iterator[bytes]:
    head = b""
    for block in blocks:
        head += block
        if len(head) >= len(mark):
            break
    if kept := head.removeprefix(mark):
        yield kept
    yield from blocks


def _transcoded(blocks: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    """Half surrogate pairs go on as bytes that are no UTF-8, so that their row is found."""
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    for block in blocks:
        if text := decoder.decode(block):
            yield text.encode("utf-8", "surrogatepass")
    if decoder.getstate()[0]:
        raise BrokenFile(Finding("truncated", "", "the end of the file inside a character", _WRITE_WHOLE))


# ---------------------------------------------------------------- lines


class Lines(NamedTuple):
    """Whole lines that follow each other. `line` is the first one's number. `skipped_bytes`: in place of
    `data`, the length of one line that is too long."""

    line: int
    data: bytes
    skipped_bytes: int = 0


def whole_lines(blocks: Iterator[bytes], newline: bytes = b"\n") -> Iterator[Lines]:
    """Blocks cut at line ends. The last line may have no end."""
    line = 1
    parts: list[bytes] = []
    held = 0
    for block in blocks:
        first = block.find(newline) + 1
        if first and held + first - 1 > MAX_ROW_BYTES:
            yield Lines(line, b"", held + first - 1)
            line += 1
            parts, held, block = [], 0, block[first:]
        cut = block.rfind(newline) + 1
        if cut:
            data = b"".join([*parts, block[:cut]])
            parts, held, block = [], 0, block[cut:]
            yield Lines(line, data)
            line += data.count(newline)
        held += len(block)
        parts = [*parts, block] if 0 < held <= MAX_ROW_BYTES else []
    if held:
        yield Lines(line, b"".join(parts), held if held > MAX_ROW_BYTES else 0)


def line_too_long(size_bytes: int) -> Finding:
    shown = f"{size_bytes / 1e6:,.0f} MB, of at most {MAX_ROW_BYTES / 1e6:,.0f}"
    return Finding("row_size", "", shown, "Write one conversation a line, or split this one.")


def unix_line_ends(blocks: Iterator[bytes]) -> Iterator[bytes]:
    r"""`\r\n` and `\r` as `\n`. In JSON this changes nothing: a string holds no bare line end."""
    held = b""
    for block in blocks:
        if held or b"\r" in block:
            block = held + block
            held = b"\r" if block.endswith(b"\r") else b""
            block = block[: len(block) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if block:
            yield block
    if held:
        yield b"\n"


# ---------------------------------------------------------------- JSON Lines


def jsonl_chunks(blocks: Iterator[bytes]) -> Iterator[Chunk]:
    number, line = 1, 1
    try:
        for lines in whole_lines(unix_line_ends(blocks)):
            line = lines.line
            if lines.skipped_bytes:
                yield BadRows(Row(number, line, None, (line_too_long(lines.skipped_bytes),)))
                number, line = number + 1, line + 1
                continue
            yield LinesChunk(number, line, lines.data)
            number += _count_rows(lines.data)
            line += lines.data.count(b"\n")
    except BrokenFile as broken:
        yield BadRows(Row(number, line, None, (broken.finding,)))


def _count_rows(data: bytes) -> int:
    return sum(1 for line in data.split(b"\n") if line and not line.isspace())


@dataclass(frozen=True)
class LinesChunk(Chunk):
    """Lines of JSON. The last one has no line end only where the file ends."""

    number: int
    line: int
    data: bytes

    def rows(self) -> list[Row]:
        rows = []
        number = self.number
        lines = self.data.split(b"\n")
        for line, raw in enumerate(lines, self.line):
            if not raw or raw.isspace():
                continue
            rows.append(read_record(raw, number, line))
            number += 1
        if lines[-1] and rows and rows[-1].value is None:
            rows[-1] = _cut_short(rows[-1], lines[-1])
        return rows


def read_record(raw: bytes, number: int, line: int) -> Row:
    """One JSON object as a row."""
    value = read_json(raw)
    if type(value) is dict:
        found = repeated_key(raw, value.get("messages"))
        return Row(number, line, None, (found,)) if found else Row(number, line, value)
    finding = value if isinstance(value, Finding) else not_an_object(value)
    return Row(number, line, None, (finding,))


def read_json(raw: bytes) -> Any:
    """A value, or the finding that says where it breaks. orjson reads it; what it refuses is looked at with
    the standard library, which takes more (NaN, half surrogate pairs: `content_is_unicode` finds those) and
    says more."""
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        return _read_leniently(raw)


def not_an_object(value: object) -> Finding:
    shape = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
    shown = json.dumps(value, ensure_ascii=False, default=repr)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return Finding("row_is_object", "", shown, f"Write every line as an object: {shape}")


def _read_leniently(raw: bytes) -> Any:
    """What orjson refused: its value all the same, or the finding that says where it breaks."""
    if b"\0" in raw:
        shown = f"byte 0x00 at position {raw.index(0)}"
        return Finding("nul_bytes", "", shown, "The file was not written to its end, or is no text.")
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as broken:
        shown = f"byte {raw[broken.start]:#04x} at position {broken.start}, after {_tail(raw, broken.start)}"
        return Finding("encoding", "", shown, "Save the file as UTF-8.")
    except json.JSONDecodeError as broken:
        place = (
            f"column {broken.colno}"
            if broken.lineno == 1
            else f"its line {broken.lineno}, column {broken.colno}"
        )
        fix = f"Mend the JSON at {place}: {broken.msg.lower()}. One object per line."
        return Finding("json", "", _head(raw), fix)
    except RecursionError:
        return Finding("json", "", "nested too deeply", "Write a flat object with a list of messages.")
    except ValueError as broken:
        return Finding("json", "", str(broken)[:60], "Write numbers of fewer than 4300 digits.")


def _head(raw: bytes) -> str:
    return json.dumps(raw[:60].decode("utf-8", "replace").rstrip(), ensure_ascii=False)


def _tail(raw: bytes, stop: int) -> str:
    return json.dumps(raw[max(0, stop - 16) : stop].decode("utf-8", "ignore"), ensure_ascii=False)


def _cut_short(row: Row, raw: bytes) -> Row:
    """A last line that has no line end and stops in the middle: the file is cut, the row is not mistyped."""
    try:
        json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as broken:
        is_cut = broken.reason == "unexpected end of data"
    except json.JSONDecodeError as broken:
        at_end = broken.pos >= len(broken.doc.rstrip()) - 6
        is_cut = at_end or broken.msg.startswith("Unterminated string")
    except (ValueError, RecursionError):
        is_cut = False
    else:
        is_cut = False
    if not is_cut:
        return row
    shown = f"the end of the file after {_tail(raw, len(raw))}"
    return row._replace(findings=(Finding("truncated", "", shown, _WRITE_WHOLE),))


# ---------------------------------------------------------------- keys that are there twice


def repeated_key(raw: bytes, messages: object) -> Finding | None:
    """The finding for `messages`, `role` or `content` written twice in one object.

    Cheap where they are not: a JSON string "role" is written so nowhere but as a whole key or value, since a
    quote inside of text has a backslash before it.
    """
    count = len(messages) if type(messages) is list else 0
    if raw.count(b'"role"') <= count and raw.count(b'"content"') <= count and raw.count(b'"messages"') <= 1:
        return None
    repeated: list[str] = []

    def take(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        taken = dict(pairs)
        if len(taken) < len(pairs):
            names = [name for name, _ in pairs]
            repeated.extend(name for name in taken if names.count(name) > 1)
        return taken

    try:
        json.loads(raw.decode("utf-8", "surrogatepass"), object_pairs_hook=take)
    except (ValueError, RecursionError):
        return None
    telling = [name for name in repeated if name in ("messages", "role", "content")]
    if not telling:
        return None
    fix = "Write every key once: of two, readers of JSON keep either."
    return Finding("key_once", "", f"the key '{telling[0]}' twice in one object", fix)
