"""The system registry: the catalogue's cards as models, and the pipeline component."""

from __future__ import annotations

from tuneloop.server.azure.routing import Routes

routes = Routes()
