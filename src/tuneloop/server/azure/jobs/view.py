"""How a job looks to the SDK."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from tuneloop.core.types import JobRecord
from tuneloop.server.azure import uris
from tuneloop.server.azure.gateway import Gateway
from tuneloop.server.azure.jobs.facts import ALWAYS_THERE, GRAPHS, JOB_STATUS, Facts, facts_of
from tuneloop.server.azure.jobs.links import page_link
from tuneloop.server.azure.routing import Request
from tuneloop.workspace.jobs import JobSummary

_TYPES = {"mlflow_model": "mlflow_model"}
"""Artifact kind to the type of an output; the rest are folders."""


def job_id(request: Request, name: str) -> str:
    return f"{request.workspace_id}/jobs/{name}"


def job_view(gateway: Gateway, request: Request, record: JobRecord) -> dict[str, Any]:
    facts = facts_of(gateway, record.key)
    graph = gateway.recall(GRAPHS, record.key) or {}
    digests = gateway.parts.jobs.output_digests(record.key)
    view = job_summary(request, record, facts)
    settings = record.job.settings.model_dump(include={"force_rerun", "continue_on_step_failure"})
    view["properties"] |= {
        "inputs": graph.get("inputs") or {},
        "jobs": graph.get("jobs") or {},
        "settings": {**settings, **(graph.get("settings") or {})},
        "services": services(gateway, record.key),
        "computeId": graph.get("computeId"),
        "componentId": graph.get("componentId"),
    }
    for name, output in view["properties"]["outputs"].items():
        if name in digests:
            output["uri"] = uris.artifact_uri(request, digests[name])
    return view


def job_summary(request: Request, record: JobRecord | JobSummary, facts: Facts) -> dict[str, Any]:
    """Without what has to be looked up for it: nodes, where outputs lie, the page."""
    job = record.job
    return {
        "id": job_id(request, job.name),
        "name": job.name,
        "type": "Microsoft.MachineLearningServices/workspaces/jobs",
        "systemData": {
            "createdAt": when(record.created_at),
            "createdBy": "tuneloop",
            "createdByType": "User",
        },
        "properties": {
            "jobType": "Pipeline",
            "displayName": job.display_name,
            "description": facts.description or None,
            "experimentName": job.experiment,
            "status": JOB_STATUS[record.state],
            "tags": job.tags,
            "properties": facts.properties,
            "isArchived": facts.is_archived,
            # The SDK asks for the cloud's metadata once for each job with a page, over a new connection.
            "services": {},
            "inputs": {},
            "jobs": {},
            "outputs": declared_outputs(record, facts),
            "settings": {},
            "computeId": None,
            "identity": None,
        },
    }


def declared_outputs(record: JobRecord | JobSummary, facts: Facts) -> dict[str, dict[str, Any]]:
    """What the job declared and what is always there; of a job that was submitted elsewhere, all."""
    job = record.job
    steps = {step.name: step for step in job.steps}
    found = {}
    for name, mapped in job.outputs.items():
        declared = facts.outputs.get(name)
        if facts.outputs and declared is None and name != ALWAYS_THERE:
            continue
        kind = steps[mapped.step].outputs[mapped.output]
        found[name] = {
            "jobOutputType": (declared or {}).get("type") or _TYPES.get(kind, "uri_folder"),
            "mode": (declared or {}).get("mode") or "ReadWriteMount",
            "uri": None,
        }
        if declared and declared.get("description"):
            found[name]["description"] = declared["description"]
    return found


def services(gateway: Gateway, name: str) -> dict[str, Any]:
    return {
        "Studio": {
            "jobServiceType": "Studio",
            "port": None,
            "endpoint": page_link(gateway, name),
            "status": None,
        }
    }


def when(at: datetime | None) -> str | None:
    """RFC 3339, in UTC."""
    return None if at is None else at.isoformat().replace("+00:00", "Z")
