"""What the API composes out of several records, as typed dictionaries: the JSON that `client` hands on.

Shapes only; nothing here runs. Times are ISO 8601 in UTC, digests `sha256:<64 hex>`.
"""

from __future__ import annotations

from typing import Any, NotRequired

# Not typing's: of that one pydantic makes no schema before Python 3.12.
from typing_extensions import TypedDict


class HealthView(TypedDict):
    version: str
    pid: int
    home_id: str


class AzureView(TypedDict):
    """The HTTPS listener for Azure's SDK."""

    url: str | None
    """None: it is closed."""
    folder: str
    """Where its certificates, `config.json` and the secret of its identity lie."""
    is_loose: bool
    """Whether a field that would have no effect is a warning instead of an error (`azure_loose`)."""
    newest_warning: int
    """The number of the last warning; 0: there was none."""


class AzureWarningView(TypedDict):
    """Something that was done in another way than Azure does it."""

    number: int
    at: str
    about: str
    """`job calm_fox_1`, `deployment demo/blue`, ..."""
    text: str


class ActiveView(TypedDict):
    """An attempt or a replica that is alive."""

    what: str
    """`attempt JOB/STEP/N` or `replica ENDPOINT/DEPLOYMENT/N`."""
    state: str
    pid: int | None


class StatusView(TypedDict):
    version: str
    home: str
    pid: int
    started_at: str
    jobs: dict[str, int]
    """State to number."""
    services: list[dict[str, Any]]
    """`ServiceRecord`s: router and tracker."""
    processes: list[ActiveView]
    endpoints: int
    router_url: str | None
    computes: list[dict[str, Any]]
    """`Compute` records; who holds them and who waits is told by `compute show`."""
    mlflow: dict[str, Any]
    """`tracking_uri`, `lag_bytes`, `models_pending`; `problems` and `under_way` as sentences."""


class Resolution(TypedDict):
    """A recipe's final set, flat, with where each value came from."""

    display_name: str
    parameters: dict[str, Any]
    origins: dict[str, str]
    warnings: list[str]


class ErrorView(TypedDict):
    code: str
    message: str
    next: str | None
    details: Any


class ProgressView(TypedDict, total=False):
    """`ProgressLine`; `step` and `attempt` say whose it is in a `ProgressPage`."""

    at: str
    stage: str
    done: float | None
    total: float | None
    unit: str | None
    values: dict[str, float]
    remaining_seconds: float | None
    step: str
    attempt: int


class QueueView(TypedDict):
    position: int
    """1 is next."""
    expected_seconds: float | None
    """Until it is expected to start, by how long such steps took before; None where none ran yet."""


class StepView(TypedDict):
    name: str
    kind: str
    state: str
    reason: str | None
    compute: str
    deterministic: bool
    attempts: int
    reused_from: str | None
    outputs: dict[str, str]
    metrics: dict[str, float]
    warnings: list[str]
    error: ErrorView | None
    started_at: str | None
    finished_at: str | None
    depends_on: list[str]
    peak_memory_bytes: int | None
    """Of the attempt that made the outputs, another job's when they were reused; None before its end."""
    memory_bytes: int
    """What it is expected to take, and claims; 0 claims none."""
    queue: QueueView | None
    """Of a step that could start but for its compute."""
    progress: ProgressView | None


class OutputView(TypedDict):
    step: str
    output: str
    digest: str | None
    path: str | None


class JobView(TypedDict):
    name: str
    display_name: str
    experiment: str
    state: str
    error: ErrorView | None
    created_at: str
    started_at: str | None
    finished_at: str | None
    base_model: str | None
    priority: str
    datasets: dict[str, str]
    parameters: dict[str, Any]
    origins: dict[str, str]
    warnings: list[str]
    tags: dict[str, str]
    recipe: str | None
    """The resolved copy, as YAML."""
    recipe_digest: str | None
    outputs: dict[str, OutputView]
    steps: list[StepView]


class HolderView(TypedDict):
    what: str
    memory_bytes: int


class WaitingView(TypedDict):
    job: str
    step: str
    compute: str
    priority: str
    position: int
    reason: str | None
    expected_seconds: float | None


class GpuView(TypedDict):
    name: str
    memory_bytes: int


class ComputeView(TypedDict):
    name: str
    type: str
    """`local`, or `cluster`: a name with an Azure size, mapped onto this machine."""
    size: NotRequired[str]
    """Of a cluster."""
    max_instances: int
    provisioning_state: str
    devices: list[GpuView]
    limited_by: list[str]
    """A container's limits below what the machine has."""
    slots: int
    slots_used: int
    cores: int
    gpus: int
    memory_bytes: int
    """What may be claimed."""
    memory_claimed_bytes: int
    holders: list[HolderView]
    queue: list[WaitingView]
    version: int
    created_at: str


class JobSummary(TypedDict):
    name: str
    display_name: str
    experiment: str
    state: str
    error: ErrorView | None
    created_at: str
    started_at: str | None
    finished_at: str | None
    base_model: str | None
    priority: str
    """`high`, `medium` or `low`."""


class ProgressPage(TypedDict):
    cursor: str
    lines: list[ProgressView]
    job: JobView


class LogPage(TypedDict):
    text: str
    offset: int
    attempt: str
    """`job/step/n`; another job's when the step was reused."""


class FileEntry(TypedDict):
    path: str
    size_bytes: int


class KeysView(TypedDict):
    primary: str
    secondary: str


class ReplicaView(TypedDict):
    number: int
    state: str
    address: str | None
    pid: NotRequired[int | None]
    error: ErrorView | None


class ProbeView(TypedDict):
    """A replica that has not answered after the delay and so many periods is ended and started anew."""

    initial_delay_seconds: float
    period_seconds: float
    failure_threshold: int


class DeploymentView(TypedDict):
    version: int
    """Of the record: rises with every change."""
    created_at: str
    endpoint: str
    name: str
    model: str
    artifact: str
    description: str
    tags: dict[str, str]
    replicas: int
    instance_type: NotRequired[str]
    """A size of Azure's list that was asked for; replicas run on this machine all the same."""
    request_timeout_seconds: float
    max_concurrent_requests: NotRequired[int]
    """Of one replica; absent: as many as come."""
    max_queue_wait_seconds: float
    liveness: NotRequired[ProbeView]
    """Absent: a replica may load for as long as it takes."""
    environment: dict[str, str]
    memory_bytes: NotRequired[int]
    """What each replica is expected to take, and claims."""
    state: str
    crashes: int
    replica_states: list[ReplicaView]
    template_digest: NotRequired[str]
    error: NotRequired[ErrorView]
    """Absent when there is none."""


class EndpointView(TypedDict):
    name: str
    created_at: str
    state: str
    description: str
    tags: dict[str, str]
    auth_mode: str
    traffic: dict[str, int]
    mirror: dict[str, int]
    """Of the requests that follow the traffic, so many per cent are also sent to this deployment."""
    scoring_uri: str | None
    """None, like `openai_base_url`, until the router has its port."""
    openai_base_url: str | None
    deployments: list[DeploymentView]
