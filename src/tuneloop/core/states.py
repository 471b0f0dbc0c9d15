"""The states of everything that lives, and the only moves between them.

A move that is not in the table raises `InvalidState`; the tables are walked by the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar

from tuneloop.core.errors import InvalidState


class JobState(StrEnum):
    """Of a whole submission."""

    QUEUED = "queued"
    RUNNING = "running"
    CANCELING = "canceling"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELED = "canceled"


class StepState(StrEnum):
    """Of one step of a job, over all of its attempts."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    REUSED = "reused"
    FAILED = "failed"
    SKIPPED = "skipped"
    CANCELED = "canceled"


class AttemptState(StrEnum):
    """Of one try. CLAIMED is written before anything is started."""

    CLAIMED = "claimed"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    LOST = "lost"
    CANCELED = "canceled"


class EndpointState(StrEnum):
    READY = "ready"
    DELETING = "deleting"


class DeploymentState(StrEnum):
    CREATING = "creating"
    READY = "ready"
    FAILED = "failed"
    DELETING = "deleting"


class ReplicaState(StrEnum):
    CLAIMED = "claimed"
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    FAILED = "failed"
    STOPPED = "stopped"


class ServiceState(StrEnum):
    """Of the helper processes: tracker and router."""

    CLAIMED = "claimed"
    RUNNING = "running"
    STOPPED = "stopped"


class ModelState(StrEnum):
    """REGISTERED once MLflow knows it; PENDING is complete in the store and waits for the tracker."""

    PENDING = "pending"
    REGISTERED = "registered"
    DELETING = "deleting"


State = TypeVar("State", bound=StrEnum)

JOB_MOVES: Mapping[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.CANCELING, JobState.COMPLETED, JobState.FAILED}),
    JobState.RUNNING: frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELING}),
    JobState.CANCELING: frozenset({JobState.CANCELED}),
    JobState.COMPLETED: frozenset(),
    JobState.FAILED: frozenset({JobState.QUEUED}),
    JobState.CANCELED: frozenset({JobState.QUEUED}),
}

STEP_MOVES: Mapping[StepState, frozenset[StepState]] = {
    StepState.PENDING: frozenset(
        {StepState.RUNNING, StepState.REUSED, StepState.SKIPPED, StepState.CANCELED, StepState.FAILED}
    ),
    StepState.RUNNING: frozenset({StepState.SUCCEEDED, StepState.FAILED, StepState.CANCELED}),
    StepState.SUCCEEDED: frozenset(),
    StepState.REUSED: frozenset(),
    StepState.FAILED: frozenset({StepState.PENDING}),
    StepState.SKIPPED: frozenset({StepState.PENDING}),
    StepState.CANCELED: frozenset({StepState.PENDING}),
}

ATTEMPT_MOVES: Mapping[AttemptState, frozenset[AttemptState]] = {
    AttemptState.CLAIMED: frozenset(
        {
            AttemptState.RUNNING,
            AttemptState.SUCCEEDED,
            AttemptState.FAILED,
            AttemptState.LOST,
            AttemptState.CANCELED,
        }
    ),
    AttemptState.RUNNING: frozenset(
        {AttemptState.SUCCEEDED, AttemptState.FAILED, AttemptState.LOST, AttemptState.CANCELED}
    ),
    AttemptState.SUCCEEDED: frozenset(),
    AttemptState.FAILED: frozenset(),
    AttemptState.LOST: frozenset(),
    AttemptState.CANCELED: frozenset(),
}

ENDPOINT_MOVES: Mapping[EndpointState, frozenset[EndpointState]] = {
    EndpointState.READY: frozenset({EndpointState.DELETING}),
    EndpointState.DELETING: frozenset(),
}

DEPLOYMENT_MOVES: Mapping[DeploymentState, frozenset[DeploymentState]] = {
    DeploymentState.CREATING: frozenset(
        {DeploymentState.READY, DeploymentState.FAILED, DeploymentState.DELETING}
    ),
    DeploymentState.READY: frozenset(
        {DeploymentState.CREATING, DeploymentState.FAILED, DeploymentState.DELETING}
    ),
    DeploymentState.FAILED: frozenset({DeploymentState.CREATING, DeploymentState.DELETING}),
    DeploymentState.DELETING: frozenset(),
}

REPLICA_MOVES: Mapping[ReplicaState, frozenset[ReplicaState]] = {
    ReplicaState.CLAIMED: frozenset(
        {ReplicaState.STARTING, ReplicaState.READY, ReplicaState.FAILED, ReplicaState.STOPPING}
    ),
    ReplicaState.STARTING: frozenset({ReplicaState.READY, ReplicaState.FAILED, ReplicaState.STOPPING}),
    ReplicaState.READY: frozenset({ReplicaState.FAILED, ReplicaState.STOPPING}),
    ReplicaState.STOPPING: frozenset({ReplicaState.STOPPED}),
    ReplicaState.FAILED: frozenset(),
    ReplicaState.STOPPED: frozenset(),
}

SERVICE_MOVES: Mapping[ServiceState, frozenset[ServiceState]] = {
    ServiceState.CLAIMED: frozenset({ServiceState.RUNNING, ServiceState.STOPPED}),
    ServiceState.RUNNING: frozenset({ServiceState.CLAIMED, ServiceState.STOPPED}),
    ServiceState.STOPPED: frozenset({ServiceState.CLAIMED}),
}

MODEL_MOVES: Mapping[ModelState, frozenset[ModelState]] = {
    ModelState.PENDING: frozenset({ModelState.REGISTERED, ModelState.DELETING}),
    ModelState.REGISTERED: frozenset({ModelState.DELETING}),
    ModelState.DELETING: frozenset(),
}

TABLES: Mapping[str, Mapping[StrEnum, frozenset[StrEnum]]] = {
    "job": JOB_MOVES,  # type: ignore[dict-item]
    "step": STEP_MOVES,  # type: ignore[dict-item]
    "attempt": ATTEMPT_MOVES,  # type: ignore[dict-item]
    "endpoint": ENDPOINT_MOVES,  # type: ignore[dict-item]
    "deployment": DEPLOYMENT_MOVES,  # type: ignore[dict-item]
    "replica": REPLICA_MOVES,  # type: ignore[dict-item]
    "service": SERVICE_MOVES,  # type: ignore[dict-item]
    "model": MODEL_MOVES,  # type: ignore[dict-item]
}

JOB_ENDED = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELED})
STEP_ENDED = frozenset(
    {
        StepState.SUCCEEDED,
        StepState.REUSED,
        StepState.FAILED,
        StepState.SKIPPED,
        StepState.CANCELED,
    }
)
STEP_GOOD = frozenset({StepState.SUCCEEDED, StepState.REUSED})
ATTEMPT_ENDED = frozenset(
    {AttemptState.SUCCEEDED, AttemptState.FAILED, AttemptState.LOST, AttemptState.CANCELED}
)
REPLICA_ENDED = frozenset({ReplicaState.FAILED, ReplicaState.STOPPED})


def check_move(moves: Mapping[State, frozenset[State]], subject: str, old: State, new: State) -> None:
    """Raise `InvalidState` unless `old` may become `new`; staying in a state is always allowed."""
    if old == new or new in moves[old]:
        return
    allowed = ", ".join(sorted(moves[old])) or "nothing: it has ended"
    raise InvalidState(f"{subject} is {old} and cannot become {new}; from here it can become {allowed}.")
