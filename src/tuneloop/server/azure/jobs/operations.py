"""The routes of jobs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote, urlencode

from tuneloop.core.states import JOB_ENDED, JobState
from tuneloop.core.types import JobRecord
from tuneloop.server.azure import lro
from tuneloop.server.azure.errors import Refusal, not_found, not_supported
from tuneloop.server.azure.gateway import Gateway
from tuneloop.server.azure.jobs import followers
from tuneloop.server.azure.jobs.definition import differences
from tuneloop.server.azure.jobs.facts import (
    GRAPHS,
    JOBS,
    Facts,
    facts_of,
    find_child,
    find_job,
    get_job,
)
from tuneloop.server.azure.jobs.submission import Order, read
from tuneloop.server.azure.jobs.view import declared_outputs, job_id, job_summary, job_view
from tuneloop.server.azure.routing import Answer, Request, Routes
from tuneloop.workspace.jobs import JobSummary

PAGE = 1000
"""Jobs in one answer of a list."""

routes = Routes()


@routes.add("PUT", "{ws}/jobs/{job}")
def create_or_update_job(gateway: Gateway, request: Request) -> Answer:
    """Submit a pipeline job under the name that the client gave it; describe one that is there"""
    # Whoever submits must be allowed to speak to Azure ML, not only to manage resources.
    gateway.tokens.verify_user(request.http.headers.get("x-azureml-token"))
    name = request["job"]
    with gateway.lock(f"job/{name.lower()}"):
        known = find_job(gateway, name)
        if known is not None:
            return Answer(_update(gateway, request, known))
        order = read(gateway, request.body, name)
        record = _submit(gateway, name, order)
    gateway.parts.wake()
    return Answer(job_view(gateway, request, record), 201)


def _submit(gateway: Gateway, name: str, order: Order) -> JobRecord:
    assert order.submission is not None
    # Remembered first: a server that dies in between leaves what the retried request replaces.
    _remember(gateway, name, order)
    try:
        record = gateway.parts.jobs.submit(order.submission)
    except BaseException:
        if find_job(gateway, name) is None:
            gateway.forget(JOBS, name)
            gateway.forget(GRAPHS, name)
        raise
    gateway.warn(f"job {name}", *record.job.warnings)
    return record


def _remember(gateway: Gateway, name: str, order: Order) -> None:
    gateway.remember(GRAPHS, name, {**order.graph, "definition": order.definition})
    Facts(name, order.description, order.properties, order.is_archived, order.outputs).remember(gateway)


def _update(gateway: Gateway, request: Request, record: JobRecord) -> dict[str, Any]:
    """The same request again changes nothing; another description is taken over; another graph is refused."""
    name = record.key
    made = {
        output: str(one["uri"])
        for output, one in job_view(gateway, request, record)["properties"]["outputs"].items()
        if one["uri"]
    }
    order = read(gateway, request.body, name, made=made)
    if order.definition is not None:
        graph = gateway.recall(GRAPHS, name) or {}
        found = list(differences(graph.get("definition") or {}, order.definition))
        if found:
            told = "; ".join(found[:5]) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")
            raise Refusal(
                409,
                "ResourceAlreadyExists",
                f"There is a job {name!r} already, and what runs in it cannot be changed: {told}. "
                "Submit the other one under another name.",
                target="name",
            )
    describe(
        gateway,
        record,
        display_name=order.display_name,
        description=order.description,
        tags=order.tags,
        properties=order.properties,
        is_archived=order.is_archived,
    )
    return job_view(gateway, request, get_job(gateway, name))


def describe(
    gateway: Gateway,
    record: JobRecord,
    *,
    display_name: str | None = None,
    description: str | None = None,
    tags: Mapping[str, str] | None = None,
    properties: Mapping[str, str] | None = None,
    is_archived: bool | None = None,
) -> None:
    """Change what is said of a job; None leaves it."""
    known = facts_of(gateway, record.key)
    Facts(
        record.key,
        known.description if description is None else description,
        known.properties if properties is None else dict(properties),
        known.is_archived if is_archived is None else is_archived,
        known.outputs,
    ).remember(gateway)
    gateway.parts.jobs.describe(record.key, display_name=display_name, tags=tags)


@routes.add("GET", "{ws}/jobs/{job}")
def get_job_(gateway: Gateway, request: Request) -> Answer:
    """One job; a step's own run is pointed at its history"""
    name = request["job"]
    record = find_job(gateway, name)
    if record is not None:
        followers.begins(gateway, record.key)
        return Answer(job_view(gateway, request, record))
    if find_child(gateway, name) is not None:
        # Without properties: so the SDK knows that it is a child, and asks the run history.
        return Answer({"id": job_id(request, name), "name": name, "type": _TYPE, "properties": None})
    raise not_found(f"There is no job {name!r}.", "job")


_TYPE = "Microsoft.MachineLearningServices/workspaces/jobs"


@routes.add("DELETE", "{ws}/jobs/{job}")
def delete_job(gateway: Gateway, request: Request) -> Answer:
    """Refused: jobs are kept, and can be archived"""
    get_job(gateway, request["job"])
    raise not_supported(
        "Jobs are not deleted: they are the record of how models came to be. Archive it.",
        "job",
    )


# ---------------------------------------------------------------- lists


@routes.add("GET", "{ws}/jobs")
def list_jobs(gateway: Gateway, request: Request) -> Answer:
    """Jobs, newest first: active, archived or all, by type, tag and property"""
    skip = _skip(request.query.get("$skip", ""))
    wanted = _view_type(request.query.get("listviewtype", ""))
    chosen = _filter(request.query)
    records = gateway.parts.jobs.summaries(skip + PAGE + 1)
    known = {name.lower(): body for name, body in gateway.remembered(JOBS)}
    found = []
    for record in records[skip : skip + PAGE]:
        facts = Facts.read(record.key, known.get(record.key.lower()))
        if wanted(facts.is_archived) and chosen(record, facts):
            found.append(job_summary(request, record, facts))
    answer: dict[str, Any] = {"value": found}
    if len(records) > skip + PAGE:
        query = {**dict(request.http.query_params), "$skip": str(skip + PAGE)}
        answer["nextLink"] = f"{gateway.base_url}{quote(request.workspace_id)}/jobs?{urlencode(query)}"
    return Answer(answer)


def _skip(text: str) -> int:
    if not text:
        return 0
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise Refusal(
            400, "InvalidInput", f"$skip is {text[:100]!r}; take it from a nextLink.", target="$skip"
        )
    return int(text)


def _view_type(text: str) -> Callable[[bool], bool]:
    """`ActiveOnly`, `ArchivedOnly`, `All`; the SDK may send the name of a Python enum."""
    plain = text.rsplit(".", 1)[-1].replace("_", "").lower()
    if plain in ("", "activeonly"):
        return lambda is_archived: not is_archived
    if plain == "archivedonly":
        return lambda is_archived: is_archived
    if plain == "all":
        return lambda is_archived: True
    raise Refusal(
        400,
        "InvalidInput",
        f"listViewType is {text[:100]!r}; expected one of: ActiveOnly, ArchivedOnly, All.",
        target="listViewType",
    )


def _filter(query: Mapping[str, str]) -> Callable[[JobSummary, Facts], bool]:
    kind, tag = query.get("jobtype", "pipeline").lower(), query.get("tag", "")
    wanted = [each for each in query.get("properties", "").split(",") if each]
    # Nothing is scheduled here.
    is_scheduled = query.get("scheduled", "false").lower() == "true" or bool(query.get("scheduleid"))

    def chosen(record: JobSummary, facts: Facts) -> bool:
        return (
            kind == "pipeline"
            and not is_scheduled
            and (not tag or _has(record.job.tags, tag))
            and all(_has(facts.properties, one) for one in wanted)
        )

    return chosen


def _has(texts: Mapping[str, str], wanted: str) -> bool:
    """`name`, or `name=value`."""
    name, is_valued, value = wanted.partition("=")
    return name in texts and (not is_valued or texts[name] == value)


# ---------------------------------------------------------------- cancelling


@routes.add("POST", "{ws}/jobs/{job}/cancel")
def cancel_job(gateway: Gateway, request: Request) -> Answer:
    """Cancel a job; asking twice is once"""
    record = get_job(gateway, request["job"])
    if record.state is JobState.CANCELED:
        return Answer(None, 200)
    if record.state in JOB_ENDED:
        raise Refusal(
            400,
            "JobHasEnded",
            f"Job {record.key} has ended already: it is {record.state}.",
            target="job",
        )
    gateway.parts.jobs.cancel(record.key)
    gateway.parts.wake()
    return _under_way(gateway, request, record.key)


@routes.add("GET", "{ws}/jobs/{job}/cancel")
def cancel_status(gateway: Gateway, request: Request) -> Answer:
    """Whether a cancelled job has ended"""
    record = get_job(gateway, request["job"])
    if lro.settles(lambda: get_job(gateway, record.key).state in JOB_ENDED):
        return Answer(None, 200)
    return _under_way(gateway, request, record.key)


def _under_way(gateway: Gateway, request: Request, name: str) -> Answer:
    return lro.goes_on(f"{gateway.base_url}{quote(job_id(request, name))}/cancel")


def outputs_of(gateway: Gateway, record: JobRecord) -> list[str]:
    """Names of those declared outputs that are made."""
    made = gateway.parts.jobs.output_digests(record.key)
    return [name for name in declared_outputs(record, facts_of(gateway, record.key)) if name in made]
