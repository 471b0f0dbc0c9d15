"""What the blob service says when it refuses: XML and a header, as Azure Storage does (its status and error
codes: learn.microsoft.com/rest/api/storageservices)."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from xml.sax.saxutils import escape

from starlette.responses import Response

from tuneloop.core import disk
from tuneloop.core.errors import DiskFull, TuneloopError
from tuneloop.server.azure.errors import Refusal, from_ours

NOT_FULLY_READ = {"connection": "close"}
"""The rest of a body is not read: the connection cannot be used again."""


class BlobError(Exception):
    def __init__(
        self, status: int, code: str, message: str, *, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.headers = dict(headers or {})

    def response(self) -> Response:
        headers = {**self.headers, "x-ms-error-code": self.code}
        if self.status == 304:
            return Response(status_code=304, headers=headers)
        text = (
            '<?xml version="1.0" encoding="utf-8"?>'
            f"<Error><Code>{escape(self.code)}</Code><Message>{escape(_printable(self.message))}</Message></Error>"
        )
        return Response(text, self.status, headers=headers, media_type="application/xml")


class Gone(Exception):
    """Who uploaded has closed the connection; nobody reads an answer."""


def translated(error: Exception, near: Path) -> BlobError | None:
    """What an error that is not of this service is here; None for a defect."""
    if isinstance(error, BlobError):
        return error
    if isinstance(error, Refusal):
        return BlobError(error.status, error.code, error.message)
    if isinstance(error, OSError):
        if error.errno == errno.ENAMETOOLONG:
            return BlobError(400, "InvalidResourceName", "The name of the blob is too long for the disk.")
        known = disk.explain(error, near)
        return None if known is None else _ours(known)
    if isinstance(error, TuneloopError):
        return _ours(error)
    return None


def _ours(error: TuneloopError) -> BlobError:
    if isinstance(error, DiskFull):
        return no_space(str(error))
    refusal = from_ours(error)
    return BlobError(refusal.status, refusal.code, refusal.message)


def no_space(message: str) -> BlobError:
    """413, since the SDK tries again for a minute on every 5xx, and space does not come by itself."""
    return BlobError(413, "InsufficientStorage", message)


def blob_not_found(name: str) -> BlobError:
    return BlobError(404, "BlobNotFound", f"The blob {name[:200]!r} does not exist.")


def bad_name(name: str, why: str) -> BlobError:
    return BlobError(400, "InvalidResourceName", f"The name of the blob {name[:200]!r} {why}.")


def bad_header(name: str, value: str, why: str) -> BlobError:
    return BlobError(400, "InvalidHeaderValue", f"The header {name} is {value[:200]!r}; {why}.")


def bad_query(name: str, value: str, why: str) -> BlobError:
    return BlobError(
        400, "InvalidQueryParameterValue", f"The query parameter {name} is {value[:200]!r}; {why}."
    )


def _printable(text: str) -> str:
    """XML 1.0 has no control characters."""
    return "".join(char if char.isprintable() or char in "\n\t" else "?" for char in text)
