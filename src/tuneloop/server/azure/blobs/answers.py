"""What the blob service says of a blob, and how its bytes are sent."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import format_datetime

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tuneloop.server.azure.blobs.errors import BlobError
from tuneloop.server.azure.blobs.store import Blob

PIECE_BYTES = 1 << 20
MOST_DIGESTED_BYTES = 4 * 1024**2
"""Of a range whose digest is asked for, as Azure has it."""


class FileBody(Response):
    """Bytes of an open file; it is closed at the end."""

    def __init__(self, file: int, first: int, count: int, status: int, headers: Mapping[str, str]) -> None:
        super().__init__(None, status, headers={**headers, "content-length": str(count)})
        self._file = file
        self._first = first
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            at, left = self._first, self._count
            while left > 0:
                piece = await run_in_threadpool(os.pread, self._file, min(left, PIECE_BYTES), at)
                if not piece:
                    # A log may have been cut short: what was promised cannot be sent, so the connection ends.
                    raise OSError("the file is shorter than it was")
                at, left = at + len(piece), left - len(piece)
                await send({"type": "http.response.body", "body": piece, "more_body": left > 0})
            if self._count == 0:
                await send({"type": "http.response.body", "body": b""})
        finally:
            os.close(self._file)


def described(blob: Blob) -> dict[str, str]:
    """The headers of a blob."""
    return {
        "etag": blob.etag,
        "last-modified": when(blob.modified),
        "x-ms-creation-time": when(created(blob)),
        "x-ms-blob-type": "BlockBlob",
        "x-ms-lease-status": "unlocked",
        "x-ms-lease-state": "available",
        "x-ms-server-encrypted": "false",
        "accept-ranges": "bytes",
        "content-type": "application/octet-stream",
        **blob.facts.headers,
        **{f"x-ms-meta-{key}": value for key, value in blob.facts.metadata.items()},
    }


def written(blob: Blob, status: int = 201) -> Response:
    """After a change."""
    return Response(
        status_code=status,
        headers={
            "etag": blob.etag,
            "last-modified": when(blob.modified),
            "x-ms-request-server-encrypted": "false",
        },
    )


def span(blob: Blob, wanted: tuple[int, int | None] | None) -> tuple[int, int]:
    """First byte and number of bytes. Raises `BlobError` for a range outside of the blob."""
    if wanted is None:
        return 0, blob.size
    first, last = wanted
    if first >= blob.size:
        told = f"The range begins at byte {first}; the blob has {blob.size} bytes."
        raise BlobError(416, "InvalidRange", told, headers={"content-range": f"bytes */{blob.size}"})
    end = blob.size - 1 if last is None else min(last, blob.size - 1)
    return first, end - first + 1


def digest_of(content: bytes) -> str:
    return base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()


def created(blob: Blob) -> datetime:
    return datetime.fromtimestamp(int(blob.facts.created_at or blob.modified_at), UTC)


def when(at: datetime) -> str:
    return format_datetime(at, usegmt=True)
