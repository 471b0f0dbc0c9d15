"""Every error that a person can meet, as one tree.

Each class has a stable `code`, an HTTP status and an exit code; the message says what happened, the
value seen, the limit or the choices, and `next_move` says what to do now.

    TuneloopError                      exit  http
    ├── UsageError                     2     400   what was written is wrong
    │   ├── InvalidName                2     400
    │   ├── RecipeError                2     422   all mistakes of one recipe at once
    │   ├── DataError                  2     422   rows that cannot be learned from
    │   └── Unsupported                2     422   understood, and refused by name
    ├── NotFound                       3     404
    ├── Conflict                       4     409
    │   ├── AlreadyExists              4     409
    │   ├── InvalidState               4     409
    │   ├── NoRoom                     4     409   more memory is asked for than the machine gives
    │   └── Stale                      4     409   somebody else wrote first
    ├── NotAllowed                     5     401   wrong or missing token or key
    │   └── ForeignCaller              5     403   Host or Origin is not ours
    ├── Unavailable                    6     503
    │   ├── ServerUnreachable          6     503
    │   ├── PortTaken                  6     503
    │   ├── HomeUnusable               6     503   read-only, newer schema, moved, not a home
    │   ├── DiskFull                   6     507   no space, or no quota, where something is written
    │   └── VersionMismatch            6     503   client and server differ
    ├── StepFailed                     1     500   a step ended without its result
    │   ├── ModelUnavailable           1     500   weights cannot be had, or are not what was asked
    │   ├── DatasetUnavailable         1     500   data cannot be had, or is not what was asked
    │   ├── ExportMismatch             1     500   merged weights do not answer as the adapter does
    │   ├── OutOfMemory                1     500   of the machine, or of the accelerator
    │   ├── RankLost                   1     500   one of several processes died, or its machine is gone
    │   └── Diverged                   1     500   the loss is not a number, or has blown up
    └── Internal                       70    500   a defect of Tuneloop

`tuneloop run` and `jobs stream` exit with 1 when the job failed and with 130 when it was cancelled or
the person detached with Ctrl-C.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar


class TuneloopError(Exception):
    """The root. `details` is JSON for programs; `next_move` is a sentence or a command for people."""

    code: ClassVar[str] = "error"
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        next_move: str | None = None,
        details: Mapping[str, Any] | Sequence[Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.next_move = next_move
        self.details = details

    def __str__(self) -> str:
        return f"{self.message} {self.next_move}" if self.next_move else self.message

    def to_json(self) -> dict[str, Any]:
        """The body of every error response: `{code, message, next, details}`."""
        return {
            "code": self.code,
            "message": self.message,
            "next": self.next_move,
            "details": self.details,
        }


class UsageError(TuneloopError):
    code = "usage"
    http_status = 400
    exit_code = 2


class InvalidName(UsageError):
    code = "invalid_name"


class RecipeError(UsageError):
    """`details` is a list of `{line, field, message}`, one per mistake."""

    code = "recipe"
    http_status = 422


class DataError(UsageError):
    """`details` is a list of findings: `{file, line, field, rule, value, fix}`."""

    code = "data"
    http_status = 422


class Unsupported(UsageError):
    code = "unsupported"
    http_status = 422


class NotFound(TuneloopError):
    code = "not_found"
    http_status = 404
    exit_code = 3


class Conflict(TuneloopError):
    code = "conflict"
    http_status = 409
    exit_code = 4


class AlreadyExists(Conflict):
    code = "already_exists"


class InvalidState(Conflict):
    code = "invalid_state"


class NoRoom(Conflict):
    code = "no_room"


class Stale(Conflict):
    code = "stale"


class NotAllowed(TuneloopError):
    code = "not_allowed"
    http_status = 401
    exit_code = 5


class ForeignCaller(NotAllowed):
    code = "foreign_caller"
    http_status = 403


class Unavailable(TuneloopError):
    code = "unavailable"
    http_status = 503
    exit_code = 6


class ServerUnreachable(Unavailable):
    code = "server_unreachable"


class PortTaken(Unavailable):
    code = "port_taken"


class HomeUnusable(Unavailable):
    code = "home_unusable"


class DiskFull(Unavailable):
    code = "disk_full"
    http_status = 507


class VersionMismatch(Unavailable):
    code = "version_mismatch"


class StepFailed(TuneloopError):
    code = "step_failed"


class ModelUnavailable(StepFailed):
    code = "model_unavailable"


class DatasetUnavailable(StepFailed):
    code = "dataset_unavailable"


class ExportMismatch(StepFailed):
    code = "export_mismatch"


class OutOfMemory(StepFailed):
    code = "out_of_memory"


class RankLost(StepFailed):
    """An attempt that ends so is lost, not failed: the next one goes on from its checkpoint. `details` hold
    `node`, `rank` and `last_lines`."""

    code = "rank_lost"


class Diverged(StepFailed):
    code = "diverged"


class Internal(TuneloopError):
    code = "internal"
    exit_code = 70


def _tree(root: type[TuneloopError]) -> list[type[TuneloopError]]:
    found = [root]
    for child in root.__subclasses__():
        found.extend(_tree(child))
    return found


def all_errors() -> list[type[TuneloopError]]:
    """Every class of the tree, root first, depth first."""
    return _tree(TuneloopError)


def from_json(body: Mapping[str, Any]) -> TuneloopError:
    """The error that a server's body describes; an unknown code becomes `TuneloopError`."""
    classes = {error.code: error for error in all_errors()}
    chosen = classes.get(str(body.get("code")), TuneloopError)
    return chosen(
        str(body.get("message", "unknown error")),
        next_move=body.get("next"),
        details=body.get("details"),
    )
