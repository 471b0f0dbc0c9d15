"""Deployments of an online endpoint: models as replica processes on this machine."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tuneloop.core import sizes
from tuneloop.core.errors import InvalidState, NotFound
from tuneloop.core.states import DeploymentState
from tuneloop.core.types import DeploymentRecord, EndpointRecord, Probe
from tuneloop.server.azure import lro
from tuneloop.server.azure.bodies import Body, duration, strings
from tuneloop.server.azure.endpoints import (
    DEPLOYMENTS,
    OWN_PROPERTIES,
    address,
    endpoint_of,
    is_routed,
    system_data,
    wrong_reference,
)
from tuneloop.server.azure.errors import Refusal, not_found
from tuneloop.server.azure.gateway import LOCATION, Gateway
from tuneloop.server.azure.models import find_model
from tuneloop.server.azure.routing import Answer, Request, Routes
from tuneloop.server.replica_logs import deployment_log
from tuneloop.workspace.endpoints import MAX_REPLICAS, Wishes

routes = Routes()

TYPE = "Microsoft.MachineLearningServices/workspaces/onlineEndpoints/deployments"
USUAL_TIMEOUT_SECONDS = 90.0
"""Azure's own is 5 s, which no language model keeps."""
MOST_LINES = 10_000

_MODEL = re.compile(
    r"(?:azureml:)?/subscriptions/.+/models/(?P<arm>[^/]+)/(?P<kind>versions|labels)/(?P<arm_version>[^/]+)"
    r"|azureml://registries/(?P<registry>[^/]+)/models/(?P<base>[^/]+)/(?:versions|labels)/(?P<base_version>[^/]+)"
    r"|azureml://.+/workspaces/[^/]+/models/(?P<long>[^/]+)/versions/(?P<long_version>[^/]+)"
    r"|(?:azureml:)?(?P<name>[^:/@]+)[:@](?P<version>[^:/@]+)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class _Wish:
    model: str
    """As it was written."""
    replicas: int
    request_timeout_seconds: float
    wishes: Wishes
    shown: Mapping[str, Any]
    """What is only shown again."""


# ---------------------------------------------------------------- deployments


@routes.add("GET", "{ws}/onlineEndpoints/{endpoint}/deployments")
def list_deployments(gateway: Gateway, request: Request) -> Answer:
    """The deployments of an endpoint"""
    endpoint = endpoint_of(gateway, request)
    found = gateway.parts.endpoints.deployments(endpoint.name)
    return Answer({"value": [deployment_view(gateway, request, one) for one in found]})


@routes.add("GET", "{ws}/onlineEndpoints/{endpoint}/deployments/{deployment}")
def get_deployment(gateway: Gateway, request: Request) -> Answer:
    """One deployment"""
    return Answer(deployment_view(gateway, request, _deployment_of(gateway, request)))


@routes.add("PUT", "{ws}/onlineEndpoints/{endpoint}/deployments/{deployment}")
def put_deployment(gateway: Gateway, request: Request) -> Answer:
    """Serve a model behind an endpoint, or change what can be changed while it is served"""
    endpoint = endpoint_of(gateway, request)
    wish = _read(request.body)
    name = request["deployment"]
    with gateway.lock(f"endpoint {endpoint.name}"):
        found = _find(gateway, endpoint, name)
        # What is wrong with the body comes first, then what it names.
        warnings = [*request.body.finish(is_loose=gateway.is_loose)]
        model = _served(gateway, wish.model)
        if wish.wishes.instance_type is not None:
            warnings += _about_size(gateway, model, wish.wishes.instance_type)
        record = _written(gateway, endpoint, found, name, model, wish)
        facts = {"of": record.created_at.isoformat(), "warnings": warnings, **wish.shown}
        gateway.remember(DEPLOYMENTS, record.key, facts)
    gateway.parts.wake()
    gateway.warn(f"deployment {record.key}", *warnings)
    if found is not None:
        lro.settles(lambda: _is_done(gateway, record.key))
    # Never without an operation: the SDK of a year ago takes an answer apart twice, and the second time its
    # endpointComputeType is gone. At the end of an operation it asks anew.
    body = deployment_view(gateway, request, gateway.parts.store.get(DeploymentRecord, record.key))
    return lro.accepted(body, _address(gateway, request, record, "operation"), is_new=found is None)


@routes.add("GET", "{ws}/onlineEndpoints/{endpoint}/deployments/{deployment}/operation")
def deployment_operation(gateway: Gateway, request: Request) -> Answer:
    """How far the making or changing of a deployment is"""
    record = _deployment_of(gateway, request)
    if record.state is DeploymentState.FAILED:
        return lro.status(record.name, "Failed", record.error, "DeploymentFailed")
    if record.state is DeploymentState.DELETING:
        return lro.status(record.name, "Canceled")
    return lro.status(record.name, "Succeeded" if _is_done(gateway, record.key) else "InProgress")


@routes.add("DELETE", "{ws}/onlineEndpoints/{endpoint}/deployments/{deployment}")
def delete_deployment(gateway: Gateway, request: Request) -> Answer:
    """Delete a deployment that has no traffic"""
    record = _deployment_of(gateway, request)
    gateway.parts.endpoints.delete_deployment(record.endpoint, record.name)
    gateway.forget(DEPLOYMENTS, record.key)
    gateway.parts.wake()
    return lro.goes_on(_address(gateway, request, record, f"deletion/{_stamp(record)}"))


@routes.add("GET", "{ws}/onlineEndpoints/{endpoint}/deployments/{deployment}/deletion/{stamp}")
def deployment_deletion(gateway: Gateway, request: Request) -> Answer:
    """Whether a deployment is gone, with every process of it"""
    key = f"{request['endpoint']}/{request['deployment']}"
    record = gateway.parts.store.find(DeploymentRecord, key)
    # One that was made since under the same name is another one.
    if record is None or _stamp(record) != request["stamp"]:
        return Answer({})
    return lro.goes_on(_address(gateway, request, record, f"deletion/{_stamp(record)}"))


@routes.add("POST", "{ws}/onlineEndpoints/{endpoint}/deployments/{deployment}/getLogs")
def get_deployment_logs(gateway: Gateway, request: Request) -> Answer:
    """The end of the logs of a deployment's replicas, and what is done in another way than in Azure"""
    record = _deployment_of(gateway, request)
    lines = request.body.number("tail", 1000, least=1, most=MOST_LINES)
    request.body.expect(
        "containerType",
        "InferenceServer",
        why="there is no container that fetches models; they lie on this machine. Ask for InferenceServer.",
    )
    request.body.finish(is_loose=gateway.is_loose)
    told = deployment_log(gateway.parts, record.endpoint, record.name, lines)
    warnings = _known(gateway, record).get("warnings", [])
    shown = [f"warning: {one}" for one in warnings] + told[-lines:]
    return Answer({"content": "\n".join(shown)})


@routes.add("GET", "{ws}/onlineEndpoints/{endpoint}/deployments/{deployment}/skus")
def list_deployment_sizes(gateway: Gateway, request: Request) -> Answer:
    """How many instances a deployment may have"""
    record = _deployment_of(gateway, request)
    capacity = {"minimum": 1, "maximum": MAX_REPLICAS, "default": record.replicas, "scaleType": "Manual"}
    return Answer({"value": [{"resourceType": TYPE, "sku": {"name": "Default"}, "capacity": capacity}]})


# ---------------------------------------------------------------- what is there


def _find(gateway: Gateway, endpoint: EndpointRecord, name: str) -> DeploymentRecord | None:
    found = gateway.parts.endpoints.deployments(endpoint.name)
    return next((one for one in found if one.name.lower() == name.lower()), None)


def _deployment_of(gateway: Gateway, request: Request) -> DeploymentRecord:
    """Raises `Refusal` (404)."""
    endpoint = endpoint_of(gateway, request)
    found = _find(gateway, endpoint, request["deployment"])
    if found is None:
        there = (
            ", ".join(one.name for one in gateway.parts.endpoints.deployments(endpoint.name)) or "none yet"
        )
        raise not_found(
            f"Endpoint {endpoint.name} has no deployment {request['deployment']!r}; there is: {there}.",
            "deploymentName",
        )
    return found


def _address(gateway: Gateway, request: Request, record: DeploymentRecord, rest: str) -> str:
    return address(gateway, request, record.endpoint, "deployments", record.name, rest)


def _stamp(record: DeploymentRecord) -> str:
    return record.created_at.strftime("%Y%m%d%H%M%S%f")


def _is_done(gateway: Gateway, key: str) -> bool:
    record = gateway.parts.store.find(DeploymentRecord, key)
    return (
        record is not None and record.state is DeploymentState.READY and is_routed(gateway, record.endpoint)
    )


def _known(gateway: Gateway, record: DeploymentRecord) -> dict[str, Any]:
    """What is remembered of this deployment, not of one that had its name before."""
    known = gateway.recall(DEPLOYMENTS, record.key) or {}
    return known if known.get("of") == record.created_at.isoformat() else {}


def _written(
    gateway: Gateway,
    endpoint: EndpointRecord,
    found: DeploymentRecord | None,
    name: str,
    model: str,
    wish: _Wish,
) -> DeploymentRecord:
    endpoints = gateway.parts.endpoints
    write: Callable[..., DeploymentRecord] = (
        endpoints.deploy if found is None else endpoints.change_deployment
    )
    try:
        return write(
            endpoint.name,
            name if found is None else found.name,
            model,
            replicas=wish.replicas,
            request_timeout_seconds=wish.request_timeout_seconds,
            wishes=wish.wishes,
        )
    except NotFound as unknown:
        raise wrong_reference(
            unknown, "properties.instanceType" if "size" in str(unknown) else "properties.model"
        ) from None
    except InvalidState as refused:
        raise Refusal(409, "Conflict", str(refused), target="properties") from None


def _served(gateway: Gateway, written: str) -> str:
    """What `Endpoints.deploy` calls the model. Raises `Refusal` for what names no model of ours."""
    found = _MODEL.fullmatch(written)
    if found is None:
        raise Refusal(
            400,
            "InvalidInput",
            f"properties.model is {written!r}; expected the id of a registered model, NAME:VERSION, or "
            "azureml://registries/azureml/models/NAME/versions/VERSION.",
            target="properties.model",
        )
    try:
        if found["base"]:
            card = gateway.parts.catalog.get(f"{found['base']}:{found['base_version']}")
            gateway.parts.models.base_artifact(f"{card.name}:{card.version}")
            return f"base:{card.name}:{card.version}"
        name = found["arm"] or found["long"] or found["name"]
        version = found["arm_version"] or found["long_version"] or found["version"]
        if version.lower() == "latest":
            return gateway.parts.models.get(name).key
        return find_model(gateway, name, version).key
    except NotFound as unknown:
        raise wrong_reference(unknown, "properties.model") from None
    except Refusal as unknown:
        # The request is wrong, not its address.
        raise Refusal(400, unknown.code, unknown.message, target="properties.model") from None


def _about_size(gateway: Gateway, model: str, written: str) -> list[str]:
    """What an instance type does not do here."""
    try:
        size = sizes.get(written)
    except NotFound as unknown:
        raise wrong_reference(unknown, "properties.instanceType") from None
    machine = gateway.parts.computes.get("local")
    gpus = f" and {len(machine.devices)} GPUs" if machine.devices else ""
    told = (
        f"properties.instanceType is {size.name}: it is noted, and a replica runs on this machine "
        f"({machine.cores} cores, {machine.memory_bytes / 2**30:.1f} GiB to claim{gpus})."
    )
    denied = gateway.parts.endpoints.why_not_served_on(model, size.name)
    return [told] if denied is None else [told, denied]


# ---------------------------------------------------------------- bodies


def _read(body: Body) -> _Wish:
    body.passed_over("id", "name", "type", "systemData", "identity")
    body.without_effect("location", f"everything runs on this machine ({LOCATION}).", LOCATION)
    body.without_effect("kind", "there is one kind of deployment here: replicas on this machine.", "Managed")
    tags = body.texts("tags")
    sku = body.object("sku")
    sku.passed_over("name", "tier", "size", "family")
    replicas = sku.number("capacity", 1, least=1, most=MAX_REPLICAS)
    inner = body.object("properties")
    inner.passed_over("provisioningState")
    _refuse(inner)
    model = inner.text("model")
    if not model:
        inner.wrong("model", "is missing; name a registered model.")
    settings = inner.object("requestSettings")
    timeout = settings.seconds("requestTimeout", USUAL_TIMEOUT_SECONDS) or 0.0
    most = settings.number("maxConcurrentRequestsPerInstance", 0, least=1) or None
    wait = settings.seconds("maxQueueWait")
    if wait is not None and most is None:
        settings.warn(
            f"{settings.place('maxQueueWait')} has no effect: a replica takes as many requests at once as "
            "come unless max_concurrent_requests_per_instance says how many, so nothing waits in line."
        )
    size = inner.text("instanceType")
    properties = {key: one for key, one in inner.texts("properties").items() if key not in OWN_PROPERTIES}
    liveness, readiness = inner.raw("livenessProbe"), inner.raw("readinessProbe")
    wishes = Wishes(
        description=inner.text("description"),
        tags=tags,
        instance_type=size or None,
        max_concurrent_requests=most,
        max_queue_wait_seconds=0.5 if wait is None else wait,
        liveness=_liveness(inner),
        environment=inner.texts("environmentVariables"),
    )
    _readiness(inner)
    shown = {"properties": properties, "liveness": liveness, "readiness": readiness, "model": model}
    return _Wish(model, replicas, timeout, wishes, shown)


def _refuse(body: Body) -> None:
    """Fields that mean something only in a container, a cluster or a cloud."""
    body.expect("endpointComputeType", "Managed", why="replicas run on this machine; there is no Kubernetes.")
    body.expect(
        "codeConfiguration",
        why="a scoring script of your own is not run here: a replica serves chat models. Leave it out.",
    )
    body.expect("environmentId", why="there are no containers; a replica runs in Tuneloop's own environment.")
    body.expect("modelMountPath", why="there are no containers that a model could be mounted in.")
    body.expect("dataCollector", why="requests are not kept; there is no data collector.")
    body.expect("appInsightsEnabled", False, why="there is no Application Insights; see get_logs.")
    body.expect("privateNetworkConnection", False, why="there is no virtual network.")
    body.expect(
        "egressPublicNetworkAccess", "Enabled", why="what a replica may reach is not restricted here."
    )
    scale = body.object("scaleSettings")
    scale.expect(
        "scaleType",
        "Default",
        why="the number of instances does not follow the load here. Set instance_count.",
    )


def _liveness(body: Body) -> Probe | None:
    """A replica that does not answer in time is ended and started anew; one that has answered is watched by
    its process."""
    probe = body.object("livenessProbe")
    if not probe.names():
        return None
    why = "whether a replica that has answered once is alive is seen by its process, not by asking it."
    probe.without_effect("timeout", why, "PT2S")
    probe.without_effect("successThreshold", why, 1)
    usual = Probe()
    return Probe(
        initial_delay_seconds=_or(probe.seconds("initialDelay"), usual.initial_delay_seconds),
        period_seconds=_or(probe.seconds("period"), usual.period_seconds),
        failure_threshold=probe.number("failureThreshold", usual.failure_threshold, least=1),
    )


def _readiness(body: Body) -> None:
    probe = body.object("readinessProbe")
    why = "a replica gets requests as soon as its model has answered once, and none before."
    for key, usual in (("initialDelay", "PT10S"), ("period", "PT10S"), ("timeout", "PT2S")):
        probe.without_effect(key, why, usual)
    for key, count in (("failureThreshold", 30), ("successThreshold", 1)):
        probe.without_effect(key, why, count)


def _or(found: float | None, usual: float) -> float:
    return usual if found is None else found


# ---------------------------------------------------------------- views

_STATES = {
    DeploymentState.CREATING: "Creating",
    DeploymentState.READY: "Succeeded",
    DeploymentState.FAILED: "Failed",
    DeploymentState.DELETING: "Deleting",
}


def deployment_view(gateway: Gateway, request: Request, record: DeploymentRecord) -> dict[str, Any]:
    known = _known(gateway, record)
    most = record.max_concurrent_requests
    return {
        "id": f"{request.workspace_id}/onlineEndpoints/{record.endpoint}/deployments/{record.name}",
        "name": record.name,
        "type": TYPE,
        "location": LOCATION,
        "kind": "Managed",
        "tags": record.tags,
        "sku": {"name": "Default", "tier": "Standard", "capacity": record.replicas},
        "systemData": system_data(record.created_at.isoformat()),
        "properties": {
            "endpointComputeType": "Managed",
            "provisioningState": _STATES[record.state],
            "description": record.description,
            "properties": strings(known.get("properties", {})),
            "model": known.get("model") or _model_id(request, record.model),
            "instanceType": record.instance_type,
            "environmentVariables": record.environment,
            "requestSettings": {
                "requestTimeout": duration(record.request_timeout_seconds),
                "maxConcurrentRequestsPerInstance": most,
                "maxQueueWait": None if most is None else duration(record.max_queue_wait_seconds),
            },
            "livenessProbe": known.get("liveness") or _probe_view(record.liveness),
            "readinessProbe": known.get("readiness"),
            "scaleSettings": {"scaleType": "Default"},
            "appInsightsEnabled": False,
            "codeConfiguration": None,
            "environmentId": None,
            "modelMountPath": None,
            "egressPublicNetworkAccess": "Enabled",
        },
    }


def _model_id(request: Request, model: str) -> str:
    if model.startswith("base:"):
        name, _, version = model.removeprefix("base:").partition(":")
        return f"azureml://registries/azureml/models/{name}/versions/{version or 'latest'}"
    name, _, version = model.partition(":")
    return f"{request.workspace_id}/models/{name}/versions/{version}"


def _probe_view(probe: Probe | None) -> dict[str, Any] | None:
    if probe is None:
        return None
    return {
        "initialDelay": duration(probe.initial_delay_seconds),
        "period": duration(probe.period_seconds),
        "failureThreshold": probe.failure_threshold,
        "successThreshold": 1,
        "timeout": "PT2S",
    }
