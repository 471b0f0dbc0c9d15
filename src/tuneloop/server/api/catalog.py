"""Base models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastapi import APIRouter
from pydantic import BaseModel, Field

from tuneloop.core.types import Card, Compute
from tuneloop.server.parts import Parts


class CardText(BaseModel):
    text: str = Field(max_length=1_000_000)
    path: str = "card"
    """What its mistakes call it."""


class CardFolder(BaseModel):
    folder: str


def routes(parts: Parts) -> APIRouter:
    router = APIRouter(tags=["catalog"])

    @router.get("/cards")
    def list_cards(task: str | None = None) -> list[Card]:
        return parts.catalog.list(task)

    @router.get("/cards/{name}")
    def get_card(name: str) -> Card:
        return parts.catalog.get(name)

    @router.post("/cards", status_code=201)
    def add_card(card: CardText) -> Card:
        return parts.catalog.add(card.text, card.path)

    @router.post("/cards/{name}/source")
    def use_folder(name: str, source: CardFolder) -> Card:
        return parts.catalog.use(name, Path(source.folder))

    @router.get("/computes")
    def list_computes() -> Sequence[Compute]:
        return parts.computes.list()

    return router
