"""The places that a workspace keeps files in, and the secrets that open them."""

from __future__ import annotations

from tuneloop.server.azure.routing import Routes

routes = Routes()
