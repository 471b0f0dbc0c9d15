"""Blocks that wait for their list: each a whole file, under its id, in a folder of the upload that it is of.

An upload is the blob's name and the signature with which the blocks were sent. The SDK asks for a signature
for every upload, so two uploads of one blob at once share no blocks, and whichever list comes, what it makes
is one upload's. Nothing is kept in memory: a server that is killed between the blocks and their list finds
them again. What nobody asks for within a week is swept, as Azure does it.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuneloop.core import disk
from tuneloop.server.azure.blobs.errors import BlobError, bad_query
from tuneloop.server.azure.blobs.reading import RESERVE_BYTES, sync

LONGEST_ID = 64
"""Bytes, before base64."""
MOST_BLOCKS = 50_000
"""Of one blob, as Azure has it."""
KEPT_SECONDS = 7 * 24 * 3600.0
SWEPT_SECONDS = 3600.0
"""At most so often is looked for what has to be swept."""
_COPIED_BYTES = 64 * 1024 * 1024
_swept: dict[Path, float] = {}


@dataclass(frozen=True)
class Block:
    id: bytes
    size: int


class Staging:
    """Of one upload. `folder` need not exist."""

    def __init__(self, folder: Path, ensure: Callable[[str], Path], name: str, signature: str) -> None:
        key = hashlib.sha256(f"{len(name)}:{name}{signature}".encode("utf-8", "surrogateescape")).hexdigest()
        self.key = key[:40]
        self._folder = folder / "blocks" / self.key
        self._ensure = ensure

    def add(self, block_id: bytes, written: Path) -> None:
        """`written` becomes the block, in the place of another one with its id."""
        folder = self._ensure(f"blocks/{self.key}")
        os.replace(written, folder / block_id.hex())

    def blocks(self) -> list[Block]:
        """In the order of their ids."""
        try:
            with os.scandir(self._folder) as found:
                return sorted(
                    (Block(bytes.fromhex(one.name), one.stat().st_size) for one in found),
                    key=lambda block: block.id,
                )
        except FileNotFoundError:
            return []

    def put_together(self, ids: Sequence[bytes], target: Path, longest: int) -> None:
        """One file of the blocks, in that order; they stay until `clear`. Raises `BlobError`."""
        sizes = {block.id: block.size for block in self.blocks()}
        missing = next((one for one in ids if one not in sizes), None)
        if missing is not None:
            shown = base64.b64encode(missing).decode()
            raise BlobError(
                400,
                "InvalidBlockList",
                f"The list names the block {shown!r}, which was not sent with this signature, or was sent "
                "more than a week ago.",
            )
        total = sum(sizes[one] for one in ids)
        if total > longest:
            told = f"The blocks have {total:,} bytes together; the most is {longest:,}."
            raise BlobError(413, "RequestBodyTooLarge", told)
        disk.require(self._folder, total + RESERVE_BYTES, "a blob made of blocks")
        with open(target, "wb", buffering=0) as out:
            for one in ids:
                _append(self._folder / one.hex(), out.fileno())
            sync(out.fileno())

    def clear(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def read_id(text: str) -> bytes:
    """Raises `BlobError`."""
    try:
        found = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        found = b""
    if not 1 <= len(found) <= LONGEST_ID:
        raise bad_query("blockid", text, f"it has to be base64 of 1 to {LONGEST_ID} bytes")
    return found


def sweep(folder: Path, *, is_first: bool = False) -> None:
    """Remove what nobody will ask for: blocks that were left for a week, and, `is_first`, what a server that
    was killed was writing."""
    if is_first:
        for left in (folder / "uploads").glob("*"):
            with contextlib.suppress(OSError):
                left.unlink()
    oldest = time.time() - KEPT_SECONDS
    for upload in _folders(folder / "blocks"):
        with contextlib.suppress(OSError):
            if upload.stat().st_mtime < oldest:
                shutil.rmtree(upload, ignore_errors=True)


def sweep_sometimes(folder: Path) -> None:
    """`sweep`, at the first call in this process and then once an hour."""
    now = time.monotonic()
    last = _swept.get(folder)
    if last is None or now - last > SWEPT_SECONDS:
        _swept[folder] = now
        sweep(folder, is_first=last is None)


def _folders(parent: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from list(parent.iterdir())


def _append(source: Path, out: int) -> None:
    with open(source, "rb", buffering=0) as block:
        left = os.fstat(block.fileno()).st_size
        while left:
            count = _copy(block.fileno(), out, min(left, _COPIED_BYTES))
            if count == 0:
                raise BlobError(400, "InvalidBlockList", "A block was taken away while it was read.")
            left -= count


def _copy(source: int, out: int, count: int) -> int:
    """Within the kernel where it can; some file systems share the bytes."""
    if hasattr(os, "copy_file_range"):
        with contextlib.suppress(OSError):
            return os.copy_file_range(source, out, count)
    piece = os.read(source, min(count, 1 << 20))
    view = memoryview(piece)
    while view:
        view = view[os.write(out, view) :]
    return len(piece)
