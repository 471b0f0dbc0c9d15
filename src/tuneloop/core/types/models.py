"""Our models, and where they came from."""

from __future__ import annotations

from typing import ClassVar

from tuneloop.core.states import ModelState
from tuneloop.core.types.base import ErrorInfo, Noun, Record


class Lineage(Noun):
    """How a model came to be."""

    job: str | None = None
    output: str | None = None
    attempt: str | None = None
    base_model: str | None = None
    datasets: dict[str, str] = {}
    """Role to `name:version (digest)`."""
    recipe_digest: str | None = None
    code_version: str | None = None


class ModelRecord(Record):
    """A registered version of ours. Its version string is free; MLflow's integer is kept beside it."""

    kind: ClassVar[str] = "model"
    name: str
    model_version: str
    state: ModelState = ModelState.PENDING
    description: str = ""
    tags: dict[str, str] = {}
    artifact: str
    template_digest: str | None = None
    lineage: Lineage = Lineage()
    metrics: dict[str, float] = {}
    mlflow_version: int | None = None
    error: ErrorInfo | None = None

    @property
    def key(self) -> str:
        return f"{self.name}:{self.model_version}"

    @property
    def parent(self) -> str:
        return self.name
