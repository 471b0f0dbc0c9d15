"""Datastores: the two containers under the names that workspaces of Azure give them."""

from __future__ import annotations

from typing import Any

from tuneloop.server.azure import containers
from tuneloop.server.azure.blobs import sas
from tuneloop.server.azure.containers import Datastore
from tuneloop.server.azure.errors import not_found, not_supported
from tuneloop.server.azure.gateway import Gateway
from tuneloop.server.azure.routing import Answer, Request, Routes

routes = Routes()

SECRET_HOURS = 1
MOST_SECRET_HOURS = 7 * 24


@routes.add("GET", "{ws}/datastores")
def list_datastores(gateway: Gateway, request: Request) -> Answer:
    """Datastores: what scripts upload, and what the workspace has made"""
    wanted = request.query.get("isdefault", "").lower()
    names = [name.lower() for name in request.query.get("names", "").split(",") if name]
    found = [
        one
        for one in containers.DATASTORES
        if (not wanted or (one is containers.UPLOADS) == (wanted == "true"))
        and (not names or one.name in names)
    ]
    return Answer({"value": [_view(gateway, request, one) for one in found]})


@routes.add("GET", "{ws}/datastores/{datastore}")
def get_datastore(gateway: Gateway, request: Request) -> Answer:
    """One datastore"""
    return Answer(_view(gateway, request, _find(request)))


@routes.add("POST", "{ws}/datastores/{datastore}/listSecrets")
def list_datastore_secrets(gateway: Gateway, request: Request) -> Answer:
    """A shared access signature for a datastore's container"""
    found = _find(request)
    body = request.body
    body.expect("expirableSecret", True, False, why="expected true or false.")
    hours = body.number("expireAfterHours", SECRET_HOURS, least=1, most=MOST_SECRET_HOURS)
    gateway.warn(f"datastore {found.name}", *body.finish(is_loose=gateway.is_loose))
    token = sas.issue(gateway, found.container, found.permissions, seconds=hours * 3600)
    return Answer({"secretsType": "Sas", "sasToken": token})


@routes.add("PUT", "{ws}/datastores/{datastore}")
def create_datastore(gateway: Gateway, request: Request) -> Answer:
    """Refused: other stores cannot be attached"""
    raise not_supported(
        f"The datastore {request['datastore']!r} cannot be made or changed: no other storage is attached. "
        f"There is: {_names()}. Upload the files instead.",
        "datastore",
    )


@routes.add("DELETE", "{ws}/datastores/{datastore}")
def delete_datastore(gateway: Gateway, request: Request) -> Answer:
    """Refused: both are part of every workspace"""
    found = _find(request)
    raise not_supported(f"The datastore {found.name} is part of the workspace and stays.", "datastore")


def _find(request: Request) -> Datastore:
    found = containers.datastore(request["datastore"])
    if found is None:
        raise not_found(f"There is no datastore {request['datastore']!r}; there is: {_names()}.", "datastore")
    return found


def _names() -> str:
    return ", ".join(one.name for one in containers.DATASTORES)


def _view(gateway: Gateway, request: Request, found: Datastore) -> dict[str, Any]:
    return {
        "id": f"{request.workspace_id}/datastores/{found.name}",
        "name": found.name,
        "type": "Microsoft.MachineLearningServices/workspaces/datastores",
        "properties": {
            "datastoreType": "AzureBlob",
            "description": found.description,
            "isDefault": found is containers.UPLOADS,
            "accountName": f"{gateway.host}/{containers.ACCOUNT_PATH}",
            "containerName": found.container,
            "endpoint": "tuneloop.local",
            "protocol": "https",
            "credentials": {"credentialsType": "Sas"},
            "serviceDataAccessAuthIdentity": "None",
            "tags": {},
            "properties": {},
        },
    }
