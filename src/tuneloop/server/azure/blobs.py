"""Azure's blob service, as far as the SDK speaks it."""

from __future__ import annotations

from tuneloop.server.azure.routing import Routes

routes = Routes()
