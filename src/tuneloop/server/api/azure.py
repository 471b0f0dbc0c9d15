"""The HTTPS listener for the official Azure ML SDK."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from tuneloop.core.errors import Unavailable
from tuneloop.server.api import fields
from tuneloop.server.parts import AzureControl, AzureStatus, Parts

WARNINGS = "azure/warnings"
"""Where the dialect writes what a script should know (`server.azure.gateway`)."""


def routes(parts: Parts) -> APIRouter:
    router = APIRouter(tags=["azure"])
    newest_known = 0

    def control() -> AzureControl:
        if parts.azure is None:
            raise Unavailable("This server has no Azure listener.")
        return parts.azure

    def newest() -> int:
        # Events are read forwards only; what was read by the last call is not read again.
        nonlocal newest_known
        while found := parts.store.events(after=newest_known, subject=WARNINGS):
            newest_known = found[-1].sequence
        return newest_known

    def shown(status: AzureStatus) -> dict[str, Any]:
        return {
            "url": status.url,
            "folder": str(status.folder),
            "is_loose": status.is_loose,
            "newest_warning": newest(),
        }

    @router.get("/azure")
    def status() -> dict[str, Any]:
        return shown(control().status())

    @router.post("/azure/up")
    def up() -> dict[str, Any]:
        return shown(control().up())

    @router.post("/azure/down")
    def down() -> dict[str, Any]:
        return shown(control().down())

    @router.get("/azure/warnings")
    def warnings(after: fields.Offset = 0) -> list[dict[str, Any]]:
        """What is done in another way than Azure does it, since the warning `after`."""
        return [
            {
                "number": one.sequence,
                "at": one.at.isoformat(),
                "about": one.data.get("about", ""),
                "text": one.what,
            }
            for one in parts.store.events(after=after, subject=WARNINGS)
        ]

    return router
