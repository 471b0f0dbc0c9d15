"""Endpoints, their keys and traffic, and their deployments. Calls to a model go to the router, not here."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from tuneloop.server.api import views
from tuneloop.server.parts import Parts


class EndpointBody(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    description: str = ""
    tags: dict[str, str] = {}


class DeploymentBody(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    name: str
    model: str
    replicas: int = 1
    request_timeout_seconds: float = 90.0


class SlotBody(BaseModel):
    slot: str = "primary"


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
    def get_endpoint(name: str) -> dict[str, Any]:
        return views.endpoint(parts, parts.endpoints.get(name))

    @router.delete("/endpoints/{name}", status_code=202)
    def delete(name: str) -> dict[str, Any]:
        record = parts.endpoints.delete(name)
        parts.wake()
        return views.endpoint(parts, record)

    @router.post("/endpoints/{name}/traffic")
    def set_traffic(name: str, weights: dict[str, int]) -> dict[str, Any]:
        record = parts.endpoints.set_traffic(name, weights)
        parts.wake()
        return views.endpoint(parts, record)

    @router.get("/endpoints/{name}/keys")
    def keys(name: str) -> dict[str, str]:
        return parts.endpoints.keys(name)

    @router.post("/endpoints/{name}/keys/regenerate")
    def regenerate(name: str, body: SlotBody) -> dict[str, str]:
        fresh = parts.endpoints.regenerate(name, body.slot)
        parts.wake()
        return fresh

    @router.get("/endpoints/{name}/deployments")
    def list_deployments(name: str) -> list[dict[str, Any]]:
        parts.endpoints.get(name)
        return [views.deployment(parts, found) for found in parts.endpoints.deployments(name)]

    @router.post("/endpoints/{name}/deployments", status_code=201)
    def deploy(name: str, body: DeploymentBody) -> dict[str, Any]:
        record = parts.endpoints.deploy(
            name,
            body.name,
            body.model,
            replicas=body.replicas,
            request_timeout_seconds=body.request_timeout_seconds,
        )
        parts.wake()
        return views.deployment(parts, record)

    @router.get("/endpoints/{name}/deployments/{deployment}")
    def get_deployment(name: str, deployment: str) -> dict[str, Any]:
        return views.deployment(parts, parts.endpoints.deployment(name, deployment))

    @router.delete("/endpoints/{name}/deployments/{deployment}", status_code=202)
    def delete_deployment(name: str, deployment: str) -> dict[str, Any]:
        record = parts.endpoints.delete_deployment(name, deployment)
        parts.wake()
        return views.deployment(parts, record)

    @router.get("/endpoints/{name}/deployments/{deployment}/logs")
    def logs(name: str, deployment: str, lines: int = 100) -> dict[str, str]:
        parts.endpoints.deployment(name, deployment)
        shown = []
        for replica in parts.endpoints.replicas(name, deployment):
            shown.append(f"== replica {replica.number} ({replica.state})")
            shown.extend(parts.executor.last_lines(parts.files.folder(replica.folder), max(1, lines)))
        return {"text": "\n".join(shown)}

    return router
