"""Registered data: files of conversations, stored by content, with a name and a version."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from tuneloop.core.types import Dataset
from tuneloop.server.api import fields
from tuneloop.server.parts import Parts


class DatasetFile(BaseModel):
    model_config = ConfigDict(extra="forbid")
    path: fields.Folder
    """Absolute, on the server's machine."""
    name: fields.NewName | None = None
    """Left out: the file's name without its suffix."""
    license: Annotated[str | None, Field(max_length=1000)] = None
    bad_rows: Annotated[int, Field(ge=0, le=fields.GREATEST)] = 0


def routes(parts: Parts) -> APIRouter:
    router = APIRouter(tags=["data"])

    @router.get("/datasets")
    def list_datasets(name: Annotated[str | None, Query(max_length=300)] = None) -> list[Dataset]:
        return [found for found in parts.data.list() if name in (None, found.name)]

    @router.get("/datasets/{name}")
    def get_dataset(name: fields.Name) -> Dataset:
        return parts.data.get(name)

    @router.post("/datasets", status_code=201)
    def register_dataset(file: DatasetFile) -> Dataset:
        path = fields.folder(file.path, "path")
        return parts.data.register(
            path,
            path.name,
            name=file.name,
            license=file.license,
            bad_rows=file.bad_rows,
        )

    return router
