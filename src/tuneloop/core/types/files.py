"""The files that processes hand each other."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import JsonValue, field_validator

from tuneloop.core.types.base import ArtifactKind, ErrorInfo, LookKind, Noun, StepKind


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
    kind: StepKind | LookKind
    parameters: dict[str, JsonValue] = {}
    inputs: dict[str, StepFileInput] = {}
    outputs: dict[str, ArtifactKind] = {}
    previous_attempts: tuple[str, ...] = ()
    """Folders of earlier attempts of this step, newest first: where checkpoints may lie."""
    cache_folder: str | None = None
    """Where downloads may be kept between runs."""
    memory_bytes: int | None = None
    """What steps may claim of this machine, all together; a step is planned within it."""


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
    is_repeatable: bool = True
    """False when the same step may give other outputs tomorrow: they are not remembered for the next job."""
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
    max_concurrent_requests: int | None = None
    """Of one replica; None: as many as come."""
    max_queue_wait_seconds: float = 0.5
    replicas: tuple[RouteReplica, ...] = ()


class RouteEndpoint(Noun):
    key_hashes: tuple[str, ...]
    traffic: dict[str, int] = {}
    mirror: dict[str, int] = {}
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
    mirrors: str | None = None
    """The folder for what mirrored requests came to, `ENDPOINT/DEPLOYMENT/mirror.jsonl`; None: it is only
    counted."""
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
