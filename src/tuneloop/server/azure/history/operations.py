"""The routes of the run history."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from starlette.responses import FileResponse, HTMLResponse, Response

from tuneloop.core.types import JobRecord, StepRecord
from tuneloop.server.azure import uris
from tuneloop.server.azure.errors import Refusal, not_found, not_supported
from tuneloop.server.azure.gateway import Gateway
from tuneloop.server.azure.history import page
from tuneloop.server.azure.history.files import run_files
from tuneloop.server.azure.history.runs import job_details, job_run, output_type, step_details, step_run
from tuneloop.server.azure.jobs.facts import facts_of, find_child, find_job
from tuneloop.server.azure.jobs.links import is_signed
from tuneloop.server.azure.jobs.operations import describe
from tuneloop.server.azure.routing import OPEN, Answer, Request, Routes

_HISTORY = "/history/v1.0{ws}"
_ASSET = re.compile(r"azureml://jobs/(?P<run>[^/]+)/outputs/(?P<output>[^/]+)", re.IGNORECASE)

routes = Routes()


def _find(gateway: Gateway, run: str) -> tuple[JobRecord, StepRecord | None]:
    record = find_job(gateway, run)
    if record is not None:
        return record, None
    child = find_child(gateway, run)
    if child is None:
        raise not_found(f"There is no run {run!r}.", "runId")
    return child


@routes.add("GET", _HISTORY + "/runs/{run}/details", audience="ml")
def run_details(gateway: Gateway, request: Request) -> Answer:
    """Where a run stands, why it failed, and where its logs are"""
    record, step = _find(gateway, request["run"])
    if step is None:
        return Answer(job_details(gateway, record))
    return Answer(step_details(gateway, record, step))


@routes.add("GET", _HISTORY + "/runs/{run}", audience="ml")
def get_run(gateway: Gateway, request: Request) -> Answer:
    """One run"""
    return Answer(_run(gateway, request, request["run"]))


def _run(gateway: Gateway, request: Request, name: str) -> dict[str, Any]:
    record, step = _find(gateway, name)
    word = output_type(request.http.headers.get("user-agent", ""))
    return job_run(gateway, record, word) if step is None else step_run(record, step, word)


@routes.add("GET", _HISTORY + "/runs/{run}/children", audience="ml")
def list_children(gateway: Gateway, request: Request) -> Answer:
    """The steps of a job"""
    record, step = _find(gateway, request["run"])
    steps = [] if step is not None else gateway.parts.jobs.steps(record.key)
    top = request.query.get("$top") or request.query.get("top") or ""
    most = int(top) if top.isascii() and top.isdigit() and len(top) < 9 else None
    word = output_type(request.http.headers.get("user-agent", ""))
    return Answer({"value": [step_run(record, one, word) for one in steps[:most]], "nextLink": None})


@routes.add("GET", _HISTORY + "/runs/{run}/serviceinstances/{node}", audience="ml")
def list_services(gateway: Gateway, request: Request) -> Answer:
    """Services beside a run: none are started"""
    _find(gateway, request["run"])
    return Answer({"instances": {}})


@routes.add("POST", _HISTORY + "/rundata", audience="ml")
def run_data(gateway: Gateway, request: Request) -> Answer:
    """A run with its outputs"""
    body = request.body
    body.passed_over("selectRunMetadata", "selectRunDefinition", "selectJobSpecification")
    run = body.text("runId")
    body.finish(is_loose=gateway.is_loose)
    return Answer(
        {"runMetadata": _run(gateway, request, run), "runDefinition": None, "jobSpecification": None}
    )


@routes.add("PATCH", _HISTORY + "/runs/{run}", audience="ml", name="update_run")
@routes.add("PATCH", _HISTORY + "/experiments/{experiment}/runs/{run}", audience="ml", name="update_run_of")
def update_run(gateway: Gateway, request: Request) -> Answer:
    """Archive, restore or describe a job; tags and properties are added to those that are there"""
    body = request.body
    body.passed_over("runId")
    display_name, description = body.text("displayName"), body.text("description")
    tags, properties = body.texts("tags"), body.texts("properties")
    is_archived = body.flag("hidden") if "hidden" in body else None
    body.finish(is_loose=gateway.is_loose)
    record, step = _find(gateway, request["run"])
    if step is not None:
        raise not_supported("A step of a job has no description of its own; describe the job.", "runId")
    describe(
        gateway,
        record,
        display_name=display_name or None,
        description=description if "description" in body else None,
        tags={**record.job.tags, **tags} if tags else None,
        properties={**facts_of(gateway, record.key).properties, **properties} if properties else None,
        is_archived=is_archived,
    )
    return Answer(_run(gateway, request, record.key))


# ---------------------------------------------------------------- outputs


@routes.add("POST", "/modelregistry/v1.0{ws}/models/batchGetResolvedUris", audience="ml")
def resolve_models(gateway: Gateway, request: Request) -> Answer:
    """Where models among the outputs of runs lie"""
    return Answer({"values": {one: {"path": uri} for one, uri in _resolved(gateway, request).items()}})


@routes.add("POST", "/data/v1.0{ws}/dataversion/batchGetResolvedUris", audience="ml")
def resolve_data(gateway: Gateway, request: Request) -> Answer:
    """Where data among the outputs of runs lie"""
    return Answer({"values": {one: {"uri": uri} for one, uri in _resolved(gateway, request).items()}})


def _resolved(gateway: Gateway, request: Request) -> dict[str, str]:
    values = request.body.raw("values")
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        request.body.wrong("values", "is no list of asset ids.")
        values = []
    request.body.finish(is_loose=gateway.is_loose)
    return {one: uris.artifact_uri(request, _digest(gateway, one)) for one in values}


def _digest(gateway: Gateway, asset: str) -> str:
    found = _ASSET.fullmatch(asset)
    if found is None:
        raise not_found(f"{asset!r} is no output of a run here.", "values")
    record, step = _find(gateway, found["run"])
    if step is None:
        return gateway.parts.jobs.output(record.key, found["output"])[1]
    digest = step.outputs.get(found["output"])
    if digest is None:
        raise not_found(f"Step {step.step} of {record.key} has no output {found['output']!r}.", "values")
    return digest


# ---------------------------------------------------------------- logs


@routes.add("GET", "/logs/{run}/{signature}/{path:path}", audience=OPEN)
def read_log(gateway: Gateway, request: Request) -> Response:
    """A log of a run, or its page; the address carries the secret"""
    run = request["run"]
    if not is_signed(gateway, run, request["signature"]):
        # As for a run that there is not: an address that was guessed tells nothing.
        raise Refusal(404, "ResourceNotFound", "There is nothing at this address.")
    if request["path"] == "":
        return _page(gateway, run)
    found = run_files(gateway, run).get(request["path"])
    if found is None:
        raise not_found(f"Run {run} has no file {request['path'][:200]!r}.", "path")
    if isinstance(found, Path):
        return FileResponse(found, media_type="text/plain; charset=utf-8", content_disposition_type="inline")
    return Response(found, media_type="text/plain; charset=utf-8")


def _page(gateway: Gateway, run: str) -> HTMLResponse:
    record, step = _find(gateway, run)
    files = run_files(gateway, run)
    return page.of_job(gateway, record, files) if step is None else page.of_step(record, step, files)
