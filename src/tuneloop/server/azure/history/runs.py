"""A job and its steps as runs of the history: the SDK knows a step only as a child run."""

from __future__ import annotations

import re
from typing import Any

from tuneloop.core.states import JOB_ENDED, JobState, StepState
from tuneloop.core.types import ErrorInfo, JobRecord, StepRecord
from tuneloop.server.azure.gateway import Gateway
from tuneloop.server.azure.history import words
from tuneloop.server.azure.history.files import log_files
from tuneloop.server.azure.jobs import followers
from tuneloop.server.azure.jobs.facts import (
    JOB_STATUS,
    STEP_STATUS,
    child_name,
    facts_of,
)
from tuneloop.server.azure.jobs.operations import outputs_of
from tuneloop.server.azure.jobs.view import when

_SDK = re.compile(r"azure-ai-ml/(\d+)\.(\d+)")
_RENAMED = (1, 35)


def output_type(user_agent: str) -> str:
    """What the SDK takes an output for. Models are called folders too: azure-ai-ml 1.35 cannot ask where a
    model lies (its own request fails on the name of a field), and asks for both in the same way. It also has
    another word for a folder than all before it. The job itself says which outputs are models."""
    found = _SDK.search(user_agent)
    is_new = found is not None and (int(found[1]), int(found[2])) >= _RENAMED
    return "uri_folder" if is_new else "UriFolder"


def job_details(gateway: Gateway, record: JobRecord) -> dict[str, Any]:
    """What `stream` polls."""
    has_ended = record.state in JOB_ENDED
    status = JOB_STATUS[record.state]
    # CancelRequested ends a stream before the last lines are there.
    if followers.is_news(gateway, record.key, has_ended) or record.state is JobState.CANCELING:
        status = "Finalizing"
    return {
        "runId": record.key,
        "parentRunId": None,
        "target": None,
        "status": status,
        "createdTimeUtc": when(record.created_at),
        "startTimeUtc": when(record.started_at),
        "endTimeUtc": when(record.finished_at),
        "error": error_view(record.error) if record.state is JobState.FAILED else None,
        "warnings": [],
        "tags": record.job.tags,
        "properties": facts_of(gateway, record.key).properties,
        "inputDatasets": [],
        "outputDatasets": [],
        "logFiles": log_files(gateway, record.key),
        "services": {},
    }


def step_details(gateway: Gateway, record: JobRecord, step: StepRecord) -> dict[str, Any]:
    name = child_name(step)
    return {
        "runId": name,
        "parentRunId": record.key,
        "target": record.job.step(step.step).compute,
        "status": STEP_STATUS[step.state],
        "createdTimeUtc": when(step.created_at),
        "startTimeUtc": when(step.started_at),
        "endTimeUtc": when(step.finished_at),
        "error": error_view(step.error) if step.state is StepState.FAILED else None,
        "warnings": [{"source": step.step, "message": warning} for warning in step.warnings],
        "tags": {},
        "properties": _step_properties(step),
        "inputDatasets": [],
        "outputDatasets": [],
        "logFiles": log_files(gateway, name),
        "services": {},
    }


def job_run(gateway: Gateway, record: JobRecord, output_type: str) -> dict[str, Any]:
    facts = facts_of(gateway, record.key)
    return {
        "runId": record.key,
        "rootRunId": record.key,
        "parentRunId": None,
        "experimentId": record.job.experiment,
        "runType": "azureml.PipelineRun",
        "name": record.job.display_name,
        "displayName": record.job.display_name,
        "description": facts.description or None,
        "status": JOB_STATUS[record.state],
        "hidden": facts.is_archived,
        "createdUtc": when(record.created_at),
        "startTimeUtc": when(record.started_at),
        "endTimeUtc": when(record.finished_at),
        "error": error_view(record.error) if record.state is JobState.FAILED else None,
        "warnings": [{"source": "job", "message": warning} for warning in record.job.warnings],
        "tags": record.job.tags,
        "properties": facts.properties,
        "services": {},
        "inputs": {},
        "outputs": {
            name: {"assetId": asset_id(record.key, name), "type": output_type}
            for name in outputs_of(gateway, record)
        },
    }


def step_run(record: JobRecord, step: StepRecord, output_type: str) -> dict[str, Any]:
    """A step as a child run."""
    name = child_name(step)
    spec = record.job.step(step.step)
    return {
        "runId": name,
        "rootRunId": record.key,
        "parentRunId": record.key,
        "experimentId": record.job.experiment,
        "runType": "azureml.StepRun",
        "name": step.step,
        "displayName": step.step,
        "description": step.reason,
        "status": STEP_STATUS[step.state],
        "hidden": False,
        "createdUtc": when(step.created_at),
        "startTimeUtc": when(step.started_at),
        "endTimeUtc": when(step.finished_at),
        "error": error_view(step.error) if step.state is StepState.FAILED else None,
        "warnings": [{"source": step.step, "message": warning} for warning in step.warnings],
        "tags": {},
        "properties": _step_properties(step),
        "target": spec.compute,
        "compute": {"target": spec.compute},
        "services": {},
        "inputs": {},
        "outputs": {
            output: {
                "assetId": asset_id(name, output),
                "type": output_type,
            }
            for output in step.outputs
        },
    }


def _step_properties(step: StepRecord) -> dict[str, str]:
    """With the words that the SDK knows a reused step by."""
    found = {f"metric.{name}": repr(value) for name, value in step.metrics.items()}
    if step.state is StepState.REUSED and step.reused_from:
        job, name, _ = step.reused_from.split("/")
        found |= {"azureml.isreused": "true", "azureml.reusedrunid": f"{job}.{name}"}
    return found


def asset_id(run: str, output: str) -> str:
    """What an output is called until it is asked where it lies."""
    return f"azureml://jobs/{run}/outputs/{output}"


def error_view(error: ErrorInfo | None) -> dict[str, Any] | None:
    """As run history has it: what happened, what to do, and each place that is named."""
    if error is None:
        return None
    message = f"{error.message} {error.next}" if error.next else error.message
    places = list(words.details(error))
    if places and not any(where and where in message for _, where in places):
        message += " " + " ".join(told for told, _ in places[:3])
    return {
        "error": {
            "code": "UserError",
            "message": message,
            "target": error.code,
            "details": [
                {"code": error.code, "message": told, "target": where}
                for told, where in places[: words.MOST_DETAILS]
            ],
        }
    }
