"""Bodies of uploads: straight from the connection to a file, in constant memory, and never more than fits."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.types import Message, Receive

from tuneloop.core import disk
from tuneloop.core.errors import DiskFull
from tuneloop.server.azure.blobs.errors import NOT_FULLY_READ, BlobError, Gone, bad_header, no_space

MOST_BYTES = 256 * 1024**3
"""Of one blob."""
MOST_BLOCK_BYTES = 4000 * 1024**2
"""Of one block, as Azure has it."""
RESERVE_BYTES = 256 * 1024**2
"""Uploads leave so much of the disk free: records are written there too."""
BATCH_BYTES = 1 << 20
"""Gathered before a thread writes it. With what the connection holds, this is the memory of an upload."""
BATCH_PIECES = 256
"""The same for a body that drips in: small pieces take more memory than their bytes. Below what one call may
write."""
LOOKED_BYTES = 64 * 1024**2
"""After so many bytes the free space is looked at again."""
IDLE_SECONDS = 60.0
"""Without a byte: then the connection is given up."""
DRAINED_BYTES = 72 * 1024**2
"""Read and thrown away after a refusal: who still sends does not see an answer. A blob that the SDK sends in
one piece has up to 64 MiB."""

sync: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)
"""A descriptor's bytes are on the disk when it returns."""


class Incoming:
    """`receive` of a request, and whether its body has come to an end."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.is_whole = False

    async def __call__(self) -> Message:
        message = await self._receive()
        self.is_whole = message["type"] != "http.request" or not message.get("more_body")
        return message


def expected_length(http: HttpRequest, most: int) -> int:
    """Raises `BlobError` for a body of unknown or too great length."""
    text = http.headers.get("content-length", "")
    if not text.isdigit():
        told = "An upload needs the header Content-Length; a body in chunks is not read."
        raise BlobError(411, "MissingContentLengthHeader", told, headers=NOT_FULLY_READ)
    length = int(text[:20])
    if length > most:
        told = f"The body has {length:,} bytes; the most is {most:,}."
        raise BlobError(413, "RequestBodyTooLarge", told)
    return length


async def write_body(http: HttpRequest, part: Path, length: int, *, is_durable: bool) -> None:
    """`part` is made and holds the whole body, or it is not there; `is_durable`: also after the machine has
    lost its power. Raises `BlobError` and, when the other side has left, `Gone`."""
    digest = _wanted_digest(http)
    _require_space(part, length)
    try:
        with open(part, "xb", buffering=0, opener=_private) as file:
            await _Writer(http.receive, file.fileno(), part, length, digest is not None).run(digest)
            if is_durable:
                await run_in_threadpool(sync, file.fileno())
    except BaseException:
        part.unlink(missing_ok=True)
        raise


async def drain(incoming: Incoming) -> bool:
    """Throw away what is left of a body that will not be used; False when there is too much of it."""
    left = DRAINED_BYTES
    try:
        async with asyncio.timeout(IDLE_SECONDS):
            while not incoming.is_whole and left >= 0:
                left -= len((await incoming()).get("body", b""))
    except TimeoutError:
        return False
    return incoming.is_whole


class _Writer:
    """One body on its way to one file."""

    def __init__(self, receive: Receive, file: int, part: Path, length: int, is_digested: bool) -> None:
        self._receive = receive
        self._file = file
        self._part = part
        self._length = length
        self._digest = hashlib.md5(usedforsecurity=False) if is_digested else None
        self._written = 0
        self._looked = 0

    async def run(self, wanted: bytes | None) -> None:
        batch: list[bytes] = []
        gathered = 0
        while True:
            piece, is_more = await self._next()
            if piece:
                batch.append(piece)
                gathered += len(piece)
            if self._written + gathered > self._length:
                raise BlobError(400, "InvalidInput", "The body is longer than its Content-Length.")
            if gathered >= BATCH_BYTES or len(batch) >= BATCH_PIECES or not is_more:
                await run_in_threadpool(self._write, batch)
                batch, gathered = [], 0
            if not is_more:
                break
        if self._written != self._length:
            raise Gone
        if self._digest is not None and wanted is not None and self._digest.digest() != wanted:
            told = "The digest of the body is not the one in the header Content-MD5."
            raise BlobError(400, "Md5Mismatch", told)

    async def _next(self) -> tuple[bytes, bool]:
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                message = await self._receive()
        except TimeoutError:
            told = f"No byte of the body arrived for {IDLE_SECONDS:g} s."
            raise BlobError(408, "OperationTimedOut", told, headers=NOT_FULLY_READ) from None
        if message["type"] != "http.request":
            raise Gone
        return message.get("body", b""), bool(message.get("more_body"))

    def _write(self, batch: list[bytes]) -> None:
        if self._digest is not None:
            for piece in batch:
                self._digest.update(piece)
        views = [memoryview(piece) for piece in batch]
        while views:
            # One call for all: each hands the interpreter's lock to the connections and takes it back.
            count = os.writev(self._file, views)
            self._written += count
            while views and count >= len(views[0]):
                count -= len(views.pop(0))
            if count:
                views[0] = views[0][count:]
        if self._written - self._looked >= LOOKED_BYTES:
            self._looked = self._written
            _require_space(self._part, self._length - self._written)


def _require_space(near: Path, size_bytes: int) -> None:
    try:
        disk.require(near, size_bytes + RESERVE_BYTES, "this upload, with what uploads leave free,")
    except DiskFull as full:
        raise no_space(str(full)) from None


def _wanted_digest(http: HttpRequest) -> bytes | None:
    text = http.headers.get("content-md5")
    if text is None:
        return None
    try:
        found = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        found = b""
    if len(found) != 16:
        raise bad_header("Content-MD5", text, "it has to be base64 of 16 bytes")
    return found


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o600)
