"""Azure's error shape, and what of our errors becomes what there.

`{"error": {"code", "message", "target", "details": [{"code", "message", "target"}]}}`, as azure-core reads it
(Microsoft REST API Guidelines, section 7.10.2: Error condition responses).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from tuneloop.core.errors import (
    AlreadyExists,
    Conflict,
    DataError,
    DiskFull,
    ForeignCaller,
    InvalidName,
    InvalidState,
    NoRoom,
    NotAllowed,
    NotFound,
    RecipeError,
    TuneloopError,
    Unavailable,
    Unsupported,
    UsageError,
)

_CODES: tuple[tuple[type[TuneloopError], str], ...] = (
    (InvalidName, "InvalidResourceName"),
    (RecipeError, "InvalidInput"),
    (DataError, "InvalidData"),
    (Unsupported, "NotSupported"),
    (UsageError, "BadArgument"),
    (NotFound, "ResourceNotFound"),
    (AlreadyExists, "ResourceAlreadyExists"),
    (InvalidState, "ResourceNotReady"),
    (NoRoom, "InsufficientCapacity"),
    (Conflict, "Conflict"),
    (ForeignCaller, "AuthorizationFailed"),
    (NotAllowed, "InvalidAuthenticationToken"),
    (DiskFull, "InsufficientStorage"),
    (Unavailable, "ServiceUnavailable"),
)
"""The first that fits; the rest is an InternalServerError."""


class Mistake(NamedTuple):
    """One thing wrong with a request."""

    target: str
    """Where in the body, dotted: `properties.jobs.chat.inputs.batch_size`."""
    message: str
    code: str = "InvalidInput"


class Refusal(Exception):
    """An answer that is an error. `mistakes` are all that is wrong, when there may be several."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        target: str | None = None,
        mistakes: Sequence[Mistake] = (),
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.target = status, code, message, target
        self.mistakes = tuple(mistakes)

    def to_json(self) -> dict[str, Any]:
        return {"error": self.inner()}

    def inner(self) -> dict[str, Any]:
        return {
            "code": self.code,
            "message": self.message,
            "target": self.target,
            "details": [
                {"code": found.code, "message": found.message, "target": found.target}
                for found in self.mistakes
            ],
        }


def not_found(message: str, target: str | None = None) -> Refusal:
    return Refusal(404, "ResourceNotFound", message, target=target)


def not_supported(message: str, target: str | None = None) -> Refusal:
    """Understood, and not done here."""
    return Refusal(400, "NotSupported", message, target=target)


def refused(mistakes: Sequence[Mistake]) -> Refusal:
    """One refusal that says all of them."""
    first = mistakes[0]
    message = " ".join(f"{found.target} {found.message}" for found in mistakes)
    return Refusal(400, first.code, message, target=first.target, mistakes=mistakes)


def from_ours(error: TuneloopError) -> Refusal:
    """With the words that the command line would say, the next move included."""
    code = next((code for kind, code in _CODES if isinstance(error, kind)), "InternalServerError")
    # 422 is not among the statuses that azure-core knows as a refusal of what was written.
    status = 400 if error.http_status == 422 else error.http_status
    return Refusal(status, code, str(error), mistakes=_details(error, code))


def _details(error: TuneloopError, code: str) -> list[Mistake]:
    if not isinstance(error.details, Sequence):
        return []
    found = []
    for one in error.details:
        if not isinstance(one, dict):
            continue
        where = one.get("field") or one.get("file") or ""
        if one.get("file") and one.get("line"):
            where = f"{one['file']} line {one['line']}"
        told = one.get("message") or one.get("fix") or one.get("rule") or ""
        found.append(Mistake(str(where), str(told), code))
    return found
