"""Online endpoints, their keys and traffic. Requests to a model go to the router, not here."""

from __future__ import annotations

import hashlib
import http.client
import json
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

from pydantic import ValidationError

from tuneloop.core.errors import NotFound, TuneloopError
from tuneloop.core.states import DeploymentState, EndpointState, ReplicaState
from tuneloop.core.types import EndpointRecord, RouteTable, ServiceRecord
from tuneloop.server.azure import lro
from tuneloop.server.azure.bodies import Body, strings
from tuneloop.server.azure.errors import Refusal, not_found, not_supported
from tuneloop.server.azure.gateway import LOCATION, Gateway
from tuneloop.server.azure.routing import Answer, Request, Routes
from tuneloop.workspace.reconcile.replicas import ROUTES

routes = Routes()

COLLECTION = "onlineEndpoints"
DEPLOYMENTS = "deployments"
"""Of what is remembered beside the records."""
AZURES_MOST_MIRRORED = 50
ROUTER_SECONDS = 2.0
TYPE = "Microsoft.MachineLearningServices/workspaces/onlineEndpoints"
OWN_PROPERTIES = ("createdBy", "createdAt", "lastModifiedAt")
"""What the SDK puts among the properties of what it was sent, and sends back."""


class _Wish(NamedTuple):
    description: str
    tags: Mapping[str, str]
    properties: Mapping[str, str]
    traffic: Mapping[str, int]
    mirror: Mapping[str, int]


# ---------------------------------------------------------------- endpoints


@routes.add("GET", "{ws}/onlineEndpoints")
def list_endpoints(gateway: Gateway, request: Request) -> Answer:
    """All endpoints"""
    found = [endpoint_view(gateway, request, one) for one in gateway.parts.endpoints.list()]
    return Answer({"value": found})


@routes.add("GET", "{ws}/onlineEndpoints/{endpoint}")
def get_endpoint(gateway: Gateway, request: Request) -> Answer:
    """One endpoint"""
    return Answer(endpoint_view(gateway, request, endpoint_of(gateway, request)))


@routes.add("PUT", "{ws}/onlineEndpoints/{endpoint}")
def put_endpoint(gateway: Gateway, request: Request) -> Answer:
    """Create an endpoint, or say anew what it is and where its traffic goes"""
    wish = _read(request.body)
    warnings = request.body.finish(is_loose=gateway.is_loose)
    endpoints, name = gateway.parts.endpoints, request["endpoint"]
    with gateway.lock(f"endpoint {name.lower()}"):
        found = find_endpoint(gateway, name)
        if found is None:
            _refuse_traffic(wish)
            record = endpoints.create(name, description=wish.description, tags=wish.tags)
        else:
            record = _changed(gateway, found, wish)
        facts = {"of": record.created_at.isoformat(), "properties": dict(wish.properties)}
        gateway.remember(COLLECTION, record.name, facts)
    gateway.parts.wake()
    gateway.warn(f"endpoint {record.name}", *warnings)
    is_settled = lro.settles(lambda: is_routed(gateway, record.name))
    body = endpoint_view(gateway, request, endpoints.get(record.name))
    if is_settled:
        return Answer(body, 201 if found is None else 200)
    return lro.accepted(body, address(gateway, request, record.name, "operation"), is_new=found is None)


@routes.add("GET", "{ws}/onlineEndpoints/{endpoint}/operation")
def endpoint_operation(gateway: Gateway, request: Request) -> Answer:
    """How far the making or changing of an endpoint is"""
    record = endpoint_of(gateway, request)
    router = gateway.parts.store.find(ServiceRecord, "router")
    if router is not None and router.port is None and router.error is not None:
        return lro.status(record.name, "Failed", router.error, "ServiceUnavailable")
    is_done = is_routed(gateway, record.name)
    return lro.status(record.name, "Succeeded" if is_done else "InProgress")


@routes.add("DELETE", "{ws}/onlineEndpoints/{endpoint}")
def delete_endpoint(gateway: Gateway, request: Request) -> Answer:
    """Delete an endpoint with its deployments"""
    record = endpoint_of(gateway, request)
    for deployment in gateway.parts.endpoints.deployments(record.name):
        gateway.forget(DEPLOYMENTS, deployment.key)
    gateway.forget(COLLECTION, record.name)
    gateway.parts.endpoints.delete(record.name)
    gateway.parts.wake()
    return lro.goes_on(address(gateway, request, record.name, f"deletion/{record.id}"))


@routes.add("GET", "{ws}/onlineEndpoints/{endpoint}/deletion/{id}")
def endpoint_deletion(gateway: Gateway, request: Request) -> Answer:
    """Whether an endpoint is gone, with every process of it"""
    record = find_endpoint(gateway, request["endpoint"])
    # One that was made since under the same name is another one.
    if record is None or record.id != request["id"]:
        return Answer({})
    return lro.goes_on(address(gateway, request, record.name, f"deletion/{record.id}"))


# ---------------------------------------------------------------- keys


@routes.add("POST", "{ws}/onlineEndpoints/{endpoint}/listKeys")
def list_keys(gateway: Gateway, request: Request) -> Answer:
    """Both keys of an endpoint"""
    keys = gateway.parts.endpoints.keys(endpoint_of(gateway, request).name)
    return Answer({"primaryKey": keys["primary"], "secondaryKey": keys["secondary"]})


@routes.add("POST", "{ws}/onlineEndpoints/{endpoint}/regenerateKeys")
def regenerate_keys(gateway: Gateway, request: Request) -> Answer:
    """A new key in the place of one; the other goes on working"""
    record = endpoint_of(gateway, request)
    slot = request.body.text("keyType", "Primary", choices=("Primary", "Secondary")).lower()
    given = request.body.raw("keyValue")
    request.body.finish(is_loose=gateway.is_loose)
    # The SDK sends the key that is there, which is a wish for another one. One of the caller's own cannot be.
    current = gateway.parts.endpoints.keys(record.name)
    if given not in (None, "") and given not in current.values():
        raise not_supported(
            f"Keys of endpoint {record.name} are made here, so keyValue cannot be one of your own. Leave it "
            "out, and read the new key with get_keys.",
            "keyValue",
        )
    gateway.parts.endpoints.regenerate(record.name, slot)
    gateway.parts.wake()
    if lro.settles(lambda: is_routed(gateway, record.name)):
        return Answer({})
    return lro.goes_on(address(gateway, request, record.name, "keysOperation"))


@routes.add("GET", "{ws}/onlineEndpoints/{endpoint}/keysOperation")
def keys_operation(gateway: Gateway, request: Request) -> Answer:
    """Whether new keys are known to what checks them"""
    record = endpoint_of(gateway, request)
    if is_routed(gateway, record.name):
        return Answer({})
    return lro.goes_on(address(gateway, request, record.name, "keysOperation"))


@routes.add("POST", "{ws}/onlineEndpoints/{endpoint}/token")
def get_token(gateway: Gateway, request: Request) -> Answer:
    """A token of an endpoint with auth_mode aml_token: not there"""
    record = endpoint_of(gateway, request)
    raise not_supported(
        f"Endpoint {record.name} is called with a key (auth_mode key), so there are no tokens for it. Its "
        "keys: ml_client.online_endpoints.get_keys(name).",
        "authMode",
    )


# ---------------------------------------------------------------- what is there


def find_endpoint(gateway: Gateway, name: str) -> EndpointRecord | None:
    """Whatever the case of the name."""
    found = gateway.parts.store.find(EndpointRecord, name)
    if found is not None:
        return found
    others = gateway.parts.endpoints.list()
    return next((one for one in others if one.name.lower() == name.lower()), None)


def endpoint_of(gateway: Gateway, request: Request) -> EndpointRecord:
    """Raises `Refusal` (404)."""
    found = find_endpoint(gateway, request["endpoint"])
    if found is None:
        there = ", ".join(one.name for one in gateway.parts.endpoints.list()) or "none yet"
        raise not_found(f"There is no endpoint {request['endpoint']!r}; there is: {there}.", "endpointName")
    return found


def address(gateway: Gateway, request: Request, endpoint: str, *rest: str) -> str:
    return "/".join(
        [f"{gateway.base_url}{quote(request.workspace_id)}/onlineEndpoints/{quote(endpoint)}", *rest]
    )


def is_routed(gateway: Gateway, name: str) -> bool:
    """Whether the router obeys what the records say of an endpoint: its keys, its traffic, its replicas."""
    parts = gateway.parts
    record, url = parts.store.find(EndpointRecord, name), parts.endpoints.router_url()
    if record is None or record.state is not EndpointState.READY or url is None:
        return False
    try:
        text = (parts.files.folder(ROUTES) / "routes.json").read_bytes()
        route = RouteTable.model_validate_json(text).endpoints.get(name)
    except (OSError, ValidationError):
        return False
    if route is None or set(route.key_hashes) != set(record.key_hashes.values()):
        return False
    if (route.traffic, route.mirror) != (record.traffic, record.mirror):
        return False
    for deployment in parts.endpoints.deployments(name):
        if deployment.state is DeploymentState.DELETING:
            continue
        there = route.deployments.get(deployment.name)
        ready = [
            one for one in parts.endpoints.replicas(name, deployment.name) if one.state is ReplicaState.READY
        ]
        if there is None or len(there.replicas) != len(ready):
            return False
        if (there.request_timeout_seconds, there.max_concurrent_requests) != (
            deployment.request_timeout_seconds,
            deployment.max_concurrent_requests,
        ):
            return False
    return _read_by_router(url) in (hashlib.sha256(text).hexdigest(), UNTOLD)


UNTOLD = ""


def _read_by_router(url: str) -> str | None:
    """The digest of the route table that the router obeys, `UNTOLD` by one of an older version that still
    runs; None while it cannot be asked."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=ROUTER_SECONDS)
    try:
        connection.request("GET", "/health")
        return str(json.loads(connection.getresponse().read()).get("routes", UNTOLD))
    except (OSError, ValueError, http.client.HTTPException):
        return None
    finally:
        connection.close()


# ---------------------------------------------------------------- bodies


def _read(body: Body) -> _Wish:
    body.passed_over("id", "name", "type", "systemData", "sku")
    body.without_effect("location", f"everything runs on this machine ({LOCATION}).", LOCATION)
    body.without_effect("kind", "there is one kind of endpoint here: replicas on this machine.", "Managed")
    identity = body.object("identity")
    identity.passed_over("type", "principalId", "tenantId")
    identity.without_effect("userAssignedIdentities", "an endpoint has no identity here; it runs as you.")
    tags = body.texts("tags")
    inner = body.object("properties")
    inner.passed_over("scoringUri", "swaggerUri", "provisioningState", "endpoint")
    inner.expect(
        "authMode",
        "Key",
        why="endpoints are called with keys here. Set auth_mode to key; tokens (aml_token, aad_token) are "
        "not there.",
    )
    inner.expect("compute", why="there is no Kubernetes; replicas run on this machine.")
    inner.expect("keys", why="keys are made here; read them with get_keys.")
    inner.without_effect(
        "publicNetworkAccess", "an endpoint answers this machine alone, on 127.0.0.1.", "Disabled"
    )
    properties = {key: one for key, one in inner.texts("properties").items() if key not in OWN_PROPERTIES}
    mirror = _weights(inner, "mirrorTraffic")
    for deployment, percent in mirror.items():
        if percent > AZURES_MOST_MIRRORED:
            inner.warn(
                f"{inner.place('mirrorTraffic')}.{deployment} is {percent}: it is done here, and Azure takes "
                f"{AZURES_MOST_MIRRORED} at most."
            )
    return _Wish(inner.text("description"), tags, properties, _weights(inner, "traffic"), mirror)


def _weights(body: Body, key: str) -> dict[str, int]:
    inner = body.object(key)
    found = {name: inner.number(name, least=0, most=100) for name in inner.names()}
    return {name: weight for name, weight in found.items() if weight}


def _refuse_traffic(wish: _Wish) -> None:
    for key, weights in (("traffic", wish.traffic), ("mirrorTraffic", wish.mirror)):
        for deployment in weights:
            raise Refusal(
                400,
                "InvalidInput",
                f"properties.{key} names deployment {deployment!r}, and a new endpoint has none. Create the "
                "endpoint without traffic, then the deployment, then set the traffic.",
                target=f"properties.{key}.{deployment}",
            )


def _changed(gateway: Gateway, old: EndpointRecord, wish: _Wish) -> EndpointRecord:
    endpoints = gateway.parts.endpoints
    with gateway.parts.store.transaction():
        record = endpoints.describe(old.name, description=wish.description, tags=wish.tags)
        if (record.traffic, record.mirror) == (wish.traffic, wish.mirror):
            return record
        try:
            return endpoints.set_traffic(old.name, wish.traffic, wish.mirror)
        except NotFound as unknown:
            raise wrong_reference(unknown, "properties.traffic") from None


def wrong_reference(error: TuneloopError, target: str) -> Refusal:
    """What a body names is not there: the request is wrong, not its address."""
    return Refusal(400, "ResourceNotFound", str(error), target=target)


# ---------------------------------------------------------------- views


def endpoint_view(gateway: Gateway, request: Request, record: EndpointRecord) -> dict[str, Any]:
    url = gateway.parts.endpoints.router_url()
    known = gateway.recall(COLLECTION, record.name) or {}
    is_known = known.get("of") == record.created_at.isoformat()
    state = "Deleting" if record.state is EndpointState.DELETING else "Succeeded" if url else "Creating"
    return {
        "id": f"{request.workspace_id}/onlineEndpoints/{record.name}",
        "name": record.name,
        "type": TYPE,
        "location": LOCATION,
        "kind": "Managed",
        "tags": record.tags,
        "identity": {"type": "SystemAssigned"},
        "systemData": system_data(record.created_at.isoformat()),
        "properties": {
            "authMode": "Key",
            "description": record.description,
            "properties": strings(known.get("properties", {}) if is_known else {}),
            "provisioningState": state,
            "publicNetworkAccess": "Disabled",
            "scoringUri": None if url is None else f"{url}/endpoints/{record.name}/score",
            "swaggerUri": None,
            "traffic": record.traffic,
            "mirrorTraffic": record.mirror,
        },
    }


def system_data(created_at: str) -> dict[str, str]:
    """The SDK takes all of it apart when there is any."""
    return {
        "createdAt": created_at,
        "createdBy": "you",
        "createdByType": "User",
        "lastModifiedAt": created_at,
    }
