"""Run history: details and logs of a run, its children, where its outputs are."""

from __future__ import annotations

from tuneloop.server.azure.routing import Routes

routes = Routes()
