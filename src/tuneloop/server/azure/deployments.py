"""Deployments of an online endpoint."""

from __future__ import annotations

from tuneloop.server.azure.routing import Routes

routes = Routes()
