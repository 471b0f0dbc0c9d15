"""From an HTTP response to the error that it carries."""

from __future__ import annotations

import json

from tuneloop.core.errors import (
    NotAllowed,
    NotFound,
    TuneloopError,
    Unavailable,
    UsageError,
    all_errors,
    from_json,
)


def error_of(status: int, content: bytes) -> TuneloopError:
    """The error in a response's body, or one made from its status when the body is somebody else's."""
    try:
        body = json.loads(content)["error"]
        if body.get("code") in {error.code for error in all_errors()}:
            return from_json(body)
        return _by_status(status)(str(body["message"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        message = content.decode(errors="replace").strip()[:500] or "no message"
    return _by_status(status)(f"HTTP {status}: {message}")


def _by_status(status: int) -> type[TuneloopError]:
    if status in (401, 403):
        return NotAllowed
    if status == 404:
        return NotFound
    if status in (429, 502, 503, 504):
        return Unavailable
    return UsageError if 400 <= status < 500 else TuneloopError
