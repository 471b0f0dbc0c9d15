"""Base models."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from tuneloop.core.types import Card
from tuneloop.server.api import fields, views
from tuneloop.server.parts import Parts
from tuneloop.workspace.compute import MOST_INSTANCES


class CardText(BaseModel):
    model_config = ConfigDict(extra="forbid")
    text: fields.Text
    path: fields.Shown = "card"
    """What its mistakes call it."""


class CardFolder(BaseModel):
    model_config = ConfigDict(extra="forbid")
    folder: fields.Folder


class NewCompute(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: fields.NewName
    size: Annotated[str, Field(max_length=100)]
    """Of Azure; case does not matter."""
    max_instances: Annotated[int, Field(ge=1, le=MOST_INSTANCES)] = 1


def routes(parts: Parts) -> APIRouter:
    router = APIRouter(tags=["catalog"])

    @router.get("/cards")
    def list_cards(task: Annotated[str | None, Query(max_length=1000)] = None) -> list[Card]:
        return parts.catalog.list(task)

    @router.get("/cards/{name:path}")
    def get_card(name: fields.Name) -> Card:
        return parts.catalog.get(name)

    @router.post("/cards", status_code=201)
    def add_card(card: CardText) -> Card:
        return parts.catalog.add(card.text, card.path)

    @router.post("/cards/{name:path}/source")
    def use_folder(name: fields.Name, source: CardFolder) -> Card:
        return parts.catalog.use(name, fields.folder(source.folder))

    @router.get("/computes")
    def list_computes() -> list[dict[str, Any]]:
        return [views.compute(parts, compute) for compute in parts.computes.list()]

    @router.get("/computes/{name}")
    def get_compute(name: fields.Name) -> dict[str, Any]:
        return views.compute(parts, parts.computes.get(name))

    @router.post("/computes", status_code=201)
    def create_compute(made: NewCompute) -> dict[str, Any]:
        compute = parts.computes.create(made.name, size=made.size, max_instances=made.max_instances)
        return views.compute(parts, compute)

    @router.delete("/computes/{name}", status_code=204)
    def delete_compute(name: fields.Name) -> None:
        parts.computes.delete(name)

    return router
