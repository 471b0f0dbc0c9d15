"""Pipeline jobs: submitted, looked at, cancelled."""

from __future__ import annotations

from tuneloop.server.azure.routing import Routes

routes = Routes()
