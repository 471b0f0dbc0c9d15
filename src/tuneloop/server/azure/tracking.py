"""MLflow of the workspace, over the listener."""

from __future__ import annotations

from tuneloop.server.azure.routing import Routes

routes = Routes()
