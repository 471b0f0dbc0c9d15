"""What every noun shares: frozen, strict about keys, JSON in and out."""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, JsonValue


class Noun(BaseModel):
    """Frozen and strict about keys: a typo is an error, not a silence."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ErrorInfo(Noun):
    """Why something failed, in the shape of `TuneloopError.to_json`."""

    code: str
    message: str
    next: str | None = None
    details: JsonValue = None


class Record(Noun):
    """What the store holds. `version` rises by one with every write and is checked by it."""

    kind: ClassVar[str]
    version: int = 0
    created_at: datetime

    @property
    def key(self) -> str:
        raise TypeError(f"{type(self).__name__} has no key")

    @property
    def parent(self) -> str:
        return ""

    @property
    def state_name(self) -> str:
        return str(getattr(self, "state", ""))


class ProcessIdentity(Noun):
    """A process is known by all three; a pid alone may by now be somebody else's."""

    pid: int
    started_at: float
    """As the operating system tells it: seconds after boot on Linux, epoch seconds elsewhere."""
    owner: str
    """The attempt, replica or service id that the process was started for."""


StepKind = Literal["model_import", "preprocess", "finetune", "export", "evaluate"]
"""The steps of a job."""

LookKind = Literal["tokenizer", "check", "probe", "dataset_download"]
"""What `python -m tuneloop.steps` runs besides: a look at data or at the machine, before any job."""


ArtifactKind = Literal["folder", "file", "model_folder", "dataset_folder", "adapter_folder", "mlflow_model"]


def dump(noun: Noun) -> dict[str, Any]:
    """JSON-ready, without what is at its default only when it is None."""
    return noun.model_dump(mode="json", exclude_none=True)
