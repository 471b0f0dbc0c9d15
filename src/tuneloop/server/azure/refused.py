"""What Azure Machine Learning has and this workspace has not: refused by name."""

from __future__ import annotations

from tuneloop.server.azure.routing import Routes

routes = Routes()
