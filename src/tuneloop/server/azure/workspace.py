"""The workspace itself, and where the services of a workspace and of the registry are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tuneloop.server.azure.errors import not_found
from tuneloop.server.azure.gateway import LOCATION, REGISTRY, Gateway
from tuneloop.server.azure.routing import OPEN, Answer, Request, Routes
from tuneloop.server.azure.tracking import tracking_uri

routes = Routes()


@routes.add("GET", "/registrymanagement/v1.0/registries/{registry}/discovery", audience="ml")
def discover_registry(gateway: Gateway, request: Request) -> Answer:
    """Where a registry is"""
    if request["registry"].lower() != REGISTRY:
        raise not_found(f"There is no registry {request['registry']!r}; there is: {REGISTRY}.", "registry")
    return Answer(
        {
            "registryName": REGISTRY,
            "subscriptionId": "00000000-0000-0000-0000-000000000000",
            "resourceGroup": "tuneloop",
            "primaryRegion": LOCATION,
            "primaryRegionResourceProviderUri": f"{gateway.base_url}/",
        }
    )


@routes.add("GET", "/discovery", audience=OPEN)
def discover_services(gateway: Gateway, request: Request) -> Answer:
    """Where the services of a workspace are"""
    return Answer(
        {
            "api": gateway.base_url,
            "history": gateway.base_url,
            "experimentation": gateway.base_url,
            "modelmanagement": gateway.base_url,
        }
    )


_WORKSPACES = "/providers/Microsoft.MachineLearningServices/workspaces"
_USUAL = {"group": "tuneloop", "workspace": "local"}
"""What `config.json` calls them."""


@routes.add("GET", "/subscriptions/{subscription}/resourceGroups/{group}" + _WORKSPACES)
def list_workspaces(gateway: Gateway, request: Request) -> Answer:
    """The one workspace, of a resource group"""
    return Answer({"value": [_usual_view(gateway, request)]})


@routes.add("GET", "/subscriptions/{subscription}" + _WORKSPACES)
def list_all_workspaces(gateway: Gateway, request: Request) -> Answer:
    """The one workspace, of a subscription"""
    return Answer({"value": [_usual_view(gateway, request)]})


def _usual_view(gateway: Gateway, request: Request) -> dict[str, Any]:
    return workspace_view(gateway, replace(request, params={**_USUAL, **request.params}))


@routes.add("GET", "{ws}")
def get_workspace(gateway: Gateway, request: Request) -> Answer:
    """One workspace: this home, whatever it is called"""
    return Answer(workspace_view(gateway, request))


def workspace_view(gateway: Gateway, request: Request) -> dict[str, Any]:
    """A home is one workspace: it answers to every name, and is the same under each."""
    return {
        "id": request.workspace_id,
        "name": request["workspace"],
        "type": "Microsoft.MachineLearningServices/workspaces",
        "location": LOCATION,
        "kind": "Default",
        "tags": {},
        "sku": {"name": "Basic", "tier": "Basic"},
        "properties": {
            "workspaceId": gateway.parts.home_id,
            "friendlyName": request["workspace"],
            "description": f"Tuneloop on this machine: {gateway.parts.home}",
            "discoveryUrl": f"{gateway.base_url}/discovery",
            "mlFlowTrackingUri": tracking_uri(gateway, request.workspace_id),
            "provisioningState": "Succeeded",
            "publicNetworkAccess": "Disabled",
        },
    }
