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

    def control() -> AzureControl:
        if parts.azure is None:
            raise Unavailable("This server has no Azure listener.")
        return parts.azure

    @router.get("/azure")
    def status() -> dict[str, Any]:
        return _shown(control().status())

    @router.post("/azure/up")
    def up() -> dict[str, Any]:
        return _shown(control().up())

    @router.post("/azure/down")
    def down() -> dict[str, Any]:
        return _shown(control().down())

    @router.get("/azure/warnings")
    def warnings(after: fields.Offset = 0) -> list[dict[str, Any]]:
        """What is done in another way than Azure does it, since the event `after`."""
        found = parts.store.events(after=after, subject=WARNINGS)
        return [
            {"number": one.sequence, "about": one.data.get("about", ""), "text": one.what} for one in found
        ]

    return router


def _shown(status: AzureStatus) -> dict[str, Any]:
    return {"url": status.url, "folder": str(status.folder), "is_loose": status.is_loose}
