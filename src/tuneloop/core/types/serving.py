"""Endpoints, deployments, replicas, and the helper processes."""

from __future__ import annotations

from datetime import datetime
from typing import ClassVar, Literal

from pydantic import JsonValue

from tuneloop.core.states import DeploymentState, EndpointState, ReplicaState, ServiceState
from tuneloop.core.types.base import ErrorInfo, Noun, ProcessIdentity, Record


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
    mirror: dict[str, int] = {}
    """Of the requests that follow the traffic, so many per cent are also sent to this one deployment, whose
    replies nobody gets."""

    @property
    def key(self) -> str:
        return self.name


class Probe(Noun):
    """How long a replica may take until it answers. The defaults are Azure's."""

    initial_delay_seconds: float = 10.0
    period_seconds: float = 10.0
    failure_threshold: int = 30

    @property
    def patience_seconds(self) -> float:
        """What a probe of every period would have found wrong often enough by then."""
        return self.initial_delay_seconds + self.period_seconds * self.failure_threshold


class DeploymentRecord(Record):
    kind: ClassVar[str] = "deployment"
    endpoint: str
    name: str
    model: str
    """`name:version` of a registered model, or `base:NAME` for a base model out of the catalogue's cache."""
    artifact: str
    template_digest: str | None = None
    description: str = ""
    tags: dict[str, str] = {}
    replicas: int = 1
    instance_type: str | None = None
    """A size of Azure's list that was asked for. Replicas run on this machine all the same."""
    request_timeout_seconds: float = 90.0
    max_concurrent_requests: int | None = None
    """Of one replica; None: as many as come."""
    max_queue_wait_seconds: float = 0.5
    """Of a request while every replica has as many as it may have."""
    liveness: Probe | None = None
    """None: a replica may load for as long as it takes."""
    environment: dict[str, str] = {}
    """Variables that its replicas get besides our own."""
    memory_bytes: int = 0
    """What each replica is expected to take, and claims."""
    state: DeploymentState = DeploymentState.CREATING
    reason: str | None = None
    """Why a wanted replica waits, for people."""
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
    folder: str
    memory_bytes: int = 0
    """Claimed until its process has ended."""
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
    """One of the helper processes that the reconciler keeps alive: `tracker`, `router`, and `mlflow` while it
    is asked for."""

    kind: ClassVar[str] = "service"
    name: Literal["tracker", "router", "mlflow"]
    state: ServiceState = ServiceState.CLAIMED
    starts: int = 0
    port: int | None = None
    folder: str = ""
    process: ProcessIdentity | None = None
    error: ErrorInfo | None = None
    asked_at: datetime | None = None
    """When somebody last needed it; of `mlflow` alone."""

    @property
    def key(self) -> str:
        return self.name


class AzureRecord(Record):
    """What only the dialect of Azure knows of something: what it was sent and has to say again, such as the
    idle time of a cluster. Nothing of ours depends on it."""

    kind: ClassVar[str] = "azure"
    collection: str
    name: str
    body: dict[str, JsonValue] = {}

    @property
    def key(self) -> str:
        return f"{self.collection}/{self.name.lower()}"

    @property
    def parent(self) -> str:
        return self.collection
