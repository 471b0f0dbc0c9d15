"""What the API composes out of several records, as typed dictionaries: the JSON that `client` hands on.

Shapes only; nothing here runs. Times are ISO 8601 in UTC, digests `sha256:<64 hex>`.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class HealthView(TypedDict):
    version: str
    pid: int
    home_id: str


class StatusView(TypedDict):
    version: str
    home: str
    pid: int
    started_at: str
    jobs: dict[str, int]
    """State to number."""
    services: list[dict[str, Any]]
    """`ServiceRecord`s: router and tracker."""
    endpoints: int
    router_url: str | None
    mlflow: dict[str, Any]
    """`tracking_uri` and `lag_bytes`."""


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


class StepView(TypedDict):
    name: str
    kind: str
    state: str
    reason: str | None
    compute: str
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
    datasets: dict[str, str]
    parameters: dict[str, Any]
    origins: dict[str, str]
    warnings: list[str]
    tags: dict[str, str]
    outputs: dict[str, OutputView]
    steps: list[StepView]


class JobSummary(TypedDict):
    name: str
    display_name: str
    experiment: str
    state: str
    created_at: str
    finished_at: str | None
    base_model: str | None


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
    error: ErrorView | None


class DeploymentView(TypedDict):
    endpoint: str
    name: str
    model: str
    artifact: str
    replicas: int
    request_timeout_seconds: float
    state: str
    crashes: int
    replica_states: list[ReplicaView]
    template_digest: NotRequired[str]
    error: NotRequired[ErrorView]
    """Absent when there is none."""


class EndpointView(TypedDict):
    name: str
    state: str
    description: str
    tags: dict[str, str]
    auth_mode: str
    traffic: dict[str, int]
    scoring_uri: str | None
    """None, like `openai_base_url`, until the router has its port."""
    openai_base_url: str | None
    deployments: list[DeploymentView]
