"""Endpoints, their keys and traffic, and their deployments. Calls to a model go to the router, not here."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from tuneloop.core.errors import UsageError
from tuneloop.server.api import fields, views
from tuneloop.server.parts import Parts
from tuneloop.server.replica_logs import deployment_log
from tuneloop.workspace.endpoints import MAX_REPLICAS, SLOTS, Wishes


class EndpointBody(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: fields.NewEndpoint
    description: fields.Description = ""
    tags: fields.Tags = {}


class DeploymentBody(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    name: fields.NewName
    model: Annotated[str, Field(max_length=300)]
    replicas: Annotated[int, Field(json_schema_extra={"minimum": 1, "maximum": MAX_REPLICAS})] = 1
    request_timeout_seconds: Annotated[
        float, Field(allow_inf_nan=False, json_schema_extra={"exclusiveMinimum": 0, "maximum": 3600})
    ] = 90.0
    instance_type: Annotated[str | None, Field(max_length=100)] = None


Weight = Annotated[int, Field(json_schema_extra={"minimum": 0, "maximum": 100})]
Weights = Annotated[dict[str, Weight], Field(max_length=1000)]


class SlotBody(BaseModel):
    model_config = ConfigDict(extra="forbid")
    slot: Annotated[str, Field(json_schema_extra={"enum": [*SLOTS]})] = "primary"


def routes(parts: Parts) -> APIRouter:
    router = APIRouter(tags=["endpoints"])

    @router.get("/endpoints")
    def list_endpoints() -> list[dict[str, Any]]:
        return [views.endpoint(parts, record) for record in parts.endpoints.list()]

    @router.post("/endpoints", status_code=201)
    def create(body: EndpointBody) -> dict[str, Any]:
        record = parts.endpoints.create(body.name, description=body.description, tags=body.tags)
        parts.wake()
        return views.endpoint(parts, record)

    @router.get("/endpoints/{name}")
    def get_endpoint(name: fields.Name) -> dict[str, Any]:
        return views.endpoint(parts, parts.endpoints.get(name))

    @router.delete("/endpoints/{name}", status_code=202)
    def delete(name: fields.Name) -> dict[str, Any]:
        record = parts.endpoints.delete(name)
        parts.wake()
        return views.endpoint(parts, record)

    @router.post("/endpoints/{name}/traffic")
    def set_traffic(name: fields.Name, weights: Weights) -> dict[str, Any]:
        record = parts.endpoints.set_traffic(name, weights)
        parts.wake()
        return views.endpoint(parts, record)

    @router.post("/endpoints/{name}/mirror")
    def set_mirror(name: fields.Name, weights: Weights) -> dict[str, Any]:
        record = parts.endpoints.set_mirror(name, weights)
        parts.wake()
        return views.endpoint(parts, record)

    @router.get("/endpoints/{name}/keys")
    def keys(name: fields.Name) -> dict[str, str]:
        return parts.endpoints.keys(name)

    @router.post("/endpoints/{name}/keys/regenerate")
    def regenerate(name: fields.Name, body: SlotBody) -> dict[str, str]:
        fresh = parts.endpoints.regenerate(name, body.slot)
        parts.wake()
        return fresh

    @router.get("/endpoints/{name}/deployments")
    def list_deployments(name: fields.Name) -> list[dict[str, Any]]:
        parts.endpoints.get(name)
        return [views.deployment(parts, found) for found in parts.endpoints.deployments(name)]

    @router.post("/endpoints/{name}/deployments", status_code=201)
    def deploy(name: fields.Name, body: DeploymentBody) -> dict[str, Any]:
        if body.instance_type is not None:
            denied = parts.endpoints.why_not_served_on(body.model, body.instance_type)
            if denied is not None:
                raise UsageError(denied)
        record = parts.endpoints.deploy(
            name,
            body.name,
            body.model,
            replicas=body.replicas,
            request_timeout_seconds=body.request_timeout_seconds,
            wishes=Wishes(instance_type=body.instance_type),
        )
        parts.wake()
        return views.deployment(parts, record)

    @router.get("/endpoints/{name}/deployments/{deployment}")
    def get_deployment(name: fields.Name, deployment: fields.Name) -> dict[str, Any]:
        return views.deployment(parts, parts.endpoints.deployment(name, deployment))

    @router.delete("/endpoints/{name}/deployments/{deployment}", status_code=202)
    def delete_deployment(name: fields.Name, deployment: fields.Name) -> dict[str, Any]:
        record = parts.endpoints.delete_deployment(name, deployment)
        parts.wake()
        return views.deployment(parts, record)

    @router.get("/endpoints/{name}/deployments/{deployment}/logs")
    def logs(name: fields.Name, deployment: fields.Name, lines: fields.Lines = 100) -> dict[str, str]:
        parts.endpoints.deployment(name, deployment)
        return {"text": "\n".join(deployment_log(parts, name, deployment, lines))}

    return router
