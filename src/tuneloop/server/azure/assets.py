"""What data assets and models share: how they are listed, and the fields that only repeat what is known."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from tuneloop.core.errors import UsageError
from tuneloop.core.names import check_name, check_version
from tuneloop.server.azure.bodies import Body
from tuneloop.server.azure.routing import Request

MOST = 1000


def is_shown(request: Request, *, is_archived: bool) -> bool:
    """As `listViewType` wants it; the SDK writes it in several ways (`ListViewType.ACTIVE_ONLY`)."""
    wanted = request.query.get("listviewtype", "").rpartition(".")[2].replace("_", "").lower()
    if wanted == "all":
        return True
    return is_archived == (wanted == "archivedonly")


def top(request: Request, found: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """A list, or as many as the caller wants of it."""
    wanted = request.query.get("$top", "")
    listed = list(found)
    return {"value": listed[: int(wanted)] if wanted.isdigit() else listed}


def next_version(versions: Iterable[str]) -> str:
    """The next whole number."""
    return str(max((int(one) for one in versions if one.isdecimal()), default=0) + 1)


def check_names(name: str, version: str, what: str) -> None:
    """Raises `InvalidName` and `UsageError`."""
    check_name(name, f"{what} name")
    check_version(version)
    if version.lower() == "latest":
        raise UsageError("'latest' names the newest version and cannot be one; choose another.")


def pass_over_envelope(body: Body) -> None:
    """Of every resource: what the address says already."""
    body.passed_over("id", "name", "type", "systemData")


def system_data(created_at: datetime) -> dict[str, Any]:
    at = created_at.astimezone(UTC).isoformat()
    return {"createdAt": at, "createdBy": "tuneloop", "createdByType": "User", "lastModifiedAt": at}
