"""Every operation of the dialect, put together."""

from __future__ import annotations

from tuneloop.server.azure import (
    blobs,
    computes,
    data,
    datastores,
    deployments,
    endpoints,
    history,
    identity,
    jobs,
    models,
    refused,
    registry,
    tracking,
    workspace,
)
from tuneloop.server.azure.routing import Table

MODULES = (
    identity,
    workspace,
    registry,
    computes,
    datastores,
    blobs,
    data,
    models,
    jobs,
    history,
    endpoints,
    deployments,
    tracking,
    refused,
)
"""`refused` stands last: it matches whole families of addresses."""


def all_operations() -> Table:
    """The first that matches an address answers."""
    return Table([module.routes for module in MODULES])
