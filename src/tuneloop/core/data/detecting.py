"""What kind of file it is, by its first bytes, then by its name; and what is no file of rows at all."""

from __future__ import annotations

import codecs
import io
import os
import stat
from pathlib import Path
from typing import NamedTuple

from tuneloop.core.data.reading_json import Layout, layout_of
from tuneloop.core.data.reading_text import WHITESPACE, unzipped
from tuneloop.core.data.rows import BrokenFile, Format
from tuneloop.core.errors import DataError, NotFound, Unsupported, UsageError

HEAD_BYTES = 1 << 18

FORMATS = "JSON Lines, JSON, CSV, TSV (each may be gzipped) and Parquet"

_BY_NAME: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}

_OTHERS = (
    (b"PK\x03\x04", "a zip archive or an Excel sheet", "Unpack it, or save the sheet as CSV UTF-8."),
    (b"\xfd7zXZ\x00", "compressed with xz", "Unpack it, or compress it with gzip."),
    (b"BZh", "compressed with bzip2", "Unpack it, or compress it with gzip."),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "Unpack it, or compress it with gzip."),
    (b"ARROW1", "an Arrow file", "Write it as Parquet or JSON Lines (datasets: `to_json`)."),
    (b"\xff\xff\xff\xff", "an Arrow stream", "Write it as Parquet or JSON Lines (datasets: `to_json`)."),
    (b"SQLite format 3", "a SQLite database", "Write its table as JSON Lines."),
    (b"Obj\x01", "an Avro file", "Write it as Parquet or JSON Lines."),
    (b"version https://git-lfs", "a Git LFS pointer, not the data", "Fetch the data: git lfs pull"),
    (b"<!doctype html", "a web page", "Download the file itself (on the hub: its `resolve` link)."),
    (b"<html", "a web page", "Download the file itself (on the hub: its `resolve` link)."),
)


class Look(NamedTuple):
    format: Format
    compression: str | None = None
    encoding: str = "utf-8"
    layout: Layout | None = None
    """Of JSON."""
    has_mark: bool = False
    """A byte order mark at its beginning."""
    has_carriage_returns: bool = False


def stamp(path: Path, shown: str) -> tuple[int, int, int]:
    """Size in bytes, time of change, inode. Raises `NotFound` for what is no file, `UsageError` for what may
    not be read."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise NotFound(f"{shown} is not there (looked for {path}).", next_move=_NEXT) from None
    except (OSError, ValueError) as broken:
        # Such as a loop of links, a name that is too long or holds a NUL, a folder that may not be entered.
        reason = broken.strerror if isinstance(broken, OSError) else broken
        raise NotFound(f"{shown[:200]!r} cannot be looked at: {reason}.") from None
    if not stat.S_ISREG(found.st_mode):
        raise NotFound(
            f"{shown} is not a file but {_kind(found.st_mode)} (looked for {path}).", next_move=_NEXT
        )
    if not os.access(path, os.R_OK):
        raise UsageError(f"{shown} may not be read (looked at {path}).", next_move="Change its mode.")
    return found.st_size, found.st_mtime_ns, found.st_ino


_NEXT = "Name a file of rows. In a recipe paths start at its folder; 'samples:' names what ships."


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    if stat.S_ISFIFO(mode):
        return "a pipe"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def look_at(path: Path, shown: str) -> Look:
    """Raises `UsageError` for what cannot be read, `Unsupported` and `DataError`."""
    suffix = _suffix(path) or _suffix(Path(shown.removeprefix("samples:")))
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as broken:
        raise UsageError(
            f"{shown} cannot be read (looked at {path}): {broken.strerror}.", next_move="Name another file."
        ) from None
    compression = None
    if head.startswith(b"\x1f\x8b"):
        head, compression = _unzipped(head), "gzip"
    _refuse_others(head, shown, compression)
    if head.startswith(b"PAR1"):
        return Look("parquet")
    encoding = _encoding(head, shown)
    text = _decoded(head, encoding)
    if not text.strip(WHITESPACE) and len(head) < HEAD_BYTES:
        raise DataError(f"{shown} has no rows.", next_move="Give a file with one conversation per line.")
    found = _text_format(text, suffix, shown)
    return found._replace(
        compression=compression,
        encoding=encoding,
        has_mark=head.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)),
        has_carriage_returns=b"\r" in text,
    )


def _suffix(path: Path) -> str:
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in _BY_NAME else ""


def _unzipped(head: bytes) -> bytes:
    """As much as there is of the beginning; what is broken later is told where it is read."""
    try:
        return next(unzipped(io.BytesIO(head), HEAD_BYTES), b"")
    except BrokenFile:
        return b""


def _refuse_others(head: bytes, shown: str, compression: str | None) -> None:
    start = head[:64].lstrip(WHITESPACE).lower() if head[:1] in b" \t\r\n<" else head
    for magic, what, next_move in _OTHERS:
        if start.startswith(magic):
            raise Unsupported(f"{shown} is {what}. What is read: {FORMATS}.", next_move=next_move)
    if compression and head.startswith(b"PAR1"):
        raise Unsupported(
            f"{shown} is Parquet inside gzip: it can only be read from its end.",
            next_move="Unpack it with gunzip; Parquet is compressed already.",
        )


def _encoding(head: bytes, shown: str) -> str:
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise Unsupported(f"{shown} is UTF-32.", next_move="Save the file as UTF-8.")
    if head.startswith(codecs.BOM_UTF16_LE):
        return "utf-16-le"
    if head.startswith(codecs.BOM_UTF16_BE):
        return "utf-16-be"
    # JSON begins with two ASCII characters, so a NUL between them tells (RFC 4627, section 3).
    if len(head) > 3 and head[:1] in (b"{", b"[") and head[1] == 0 and head[3:4] == b"\0" and head[2]:
        return "utf-16-le"
    if len(head) > 3 and head[0] == 0 and head[1:2] in (b"{", b"[") and head[2] == 0 and head[3]:
        return "utf-16-be"
    return "utf-8"


def _decoded(head: bytes, encoding: str) -> bytes:
    text = head.decode(encoding, "replace") if encoding != "utf-8" else ""
    return text.encode().removeprefix(codecs.BOM_UTF8) if text else head.removeprefix(codecs.BOM_UTF8)


def _text_format(text: bytes, suffix: str, shown: str) -> Look:
    start = text.lstrip(WHITESPACE)
    if start[:1] in (b"{", b"["):
        layout = layout_of(text, suffix)
        return Look("json" if layout else "jsonl", layout=layout)
    format = _BY_NAME.get(suffix)
    if format is None:
        raise Unsupported(
            f"{shown}: its format cannot be told; it begins with "
            f"{start[:24].decode('utf-8', 'replace')!a}. What is read: {FORMATS}.",
            next_move="Give CSV the name .csv and tab-separated text .tsv, or convert it to JSON Lines.",
        )
    if format == "parquet":
        raise DataError(
            f"{shown} is named Parquet and is not: it does not begin with PAR1.",
            next_move="Write or download the file again.",
        )
    return Look("jsonl" if format == "json" else format)
