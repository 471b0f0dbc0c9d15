"""What only the dialect knows of a job, and how a job is found by the name in an address.

Two records per job: `jobs` is small and read by lists; `job-graphs` is the request, as it is given back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tuneloop.core.states import JobState, StepState
from tuneloop.core.types import JobRecord, StepRecord
from tuneloop.server.azure.errors import not_found
from tuneloop.server.azure.gateway import Gateway

JOBS = "jobs"
GRAPHS = "job-graphs"

JOB_STATUS: Mapping[JobState, str] = {
    JobState.QUEUED: "Queued",
    JobState.RUNNING: "Running",
    JobState.CANCELING: "CancelRequested",
    JobState.COMPLETED: "Completed",
    JobState.FAILED: "Failed",
    JobState.CANCELED: "Canceled",
}
STEP_STATUS: Mapping[StepState, str] = {
    StepState.PENDING: "NotStarted",
    StepState.RUNNING: "Running",
    StepState.SUCCEEDED: "Completed",
    StepState.REUSED: "Completed",
    StepState.FAILED: "Failed",
    StepState.SKIPPED: "Canceled",
    StepState.CANCELED: "Canceled",
}
NODE_OUTPUTS: Mapping[str, tuple[str, str]] = {
    "mlflow_model_folder": ("export", "mlflow_model"),
    "pytorch_model_folder": ("finetune", "trained"),
    "evaluation_result": ("evaluate", "evaluation"),
}
"""The component's outputs: the step and the output of ours."""
ALWAYS_THERE = "evaluation_result"
"""An output of the component that is switched on and off over its versions; here it is there."""


@dataclass(frozen=True)
class Facts:
    """Of a job that was submitted from elsewhere: all empty."""

    name: str
    """As it was spelled when it was made."""
    description: str = ""
    properties: dict[str, str] = field(default_factory=dict)
    is_archived: bool = False
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The job's declared outputs: `{"node": the node's output, "type", "mode", "description"}`."""

    @classmethod
    def read(cls, name: str, body: Mapping[str, Any] | None) -> Facts:
        return cls(**{"name": name, **(body or {})})

    def remember(self, gateway: Gateway) -> None:
        gateway.remember(JOBS, self.name, asdict(self))


def facts_of(gateway: Gateway, name: str) -> Facts:
    return Facts.read(name, gateway.recall(JOBS, name))


def find_job(gateway: Gateway, name: str) -> JobRecord | None:
    """Names match whatever their case."""
    store = gateway.parts.store
    found = store.find(JobRecord, name)
    if found is None:
        spelled = facts_of(gateway, name).name
        found = store.find(JobRecord, spelled) if spelled != name else None
    return found


def get_job(gateway: Gateway, name: str) -> JobRecord:
    found = find_job(gateway, name)
    if found is None:
        raise not_found(f"There is no job {name!r}.", "job")
    return found


def child_name(step: StepRecord) -> str:
    """A step as a run of its own."""
    return f"{step.job}.{step.step}"


def find_child(gateway: Gateway, name: str) -> tuple[JobRecord, StepRecord] | None:
    """The job and the step of a child run."""
    job, dot, step = name.rpartition(".")
    record = find_job(gateway, job) if dot else None
    if record is None:
        return None
    found = gateway.parts.store.find(StepRecord, f"{record.key}/{step.lower()}")
    return None if found is None else (record, found)
