"""Models of the workspace: what jobs have made or scripts have uploaded, under a name and a version.

The workspace keeps model, description and tags; what only the dialect knows (type, properties, whether it is
archived, what its folder is called) is remembered here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tuneloop.core.errors import AlreadyExists, NotFound
from tuneloop.core.states import ModelState
from tuneloop.core.types import Artifact, ModelRecord
from tuneloop.server.azure import uris
from tuneloop.server.azure.assets import (
    check_names,
    is_shown,
    next_version,
    pass_over_envelope,
    system_data,
    top,
)
from tuneloop.server.azure.bodies import Body
from tuneloop.server.azure.errors import Refusal, not_found
from tuneloop.server.azure.flavors import flavors_of, read_flavors
from tuneloop.server.azure.gateway import Gateway
from tuneloop.server.azure.routing import Answer, Request, Routes
from tuneloop.server.azure.uris import Located

routes = Routes()

FACTS = "models"
"""Of versions: `name:version`."""
CONTAINERS = "model-names"
TYPES = ("mlflow_model", "custom_model")
OURS = "tuneloop."
"""Properties that say where a model comes from; nobody else may write them."""
_RESOURCE = "Microsoft.MachineLearningServices/workspaces/models"


# ---------------------------------------------------------------- names


@routes.add("GET", "{ws}/models")
def list_models(gateway: Gateway, request: Request) -> Answer:
    """Models, without their versions"""
    by_name: dict[str, list[ModelRecord]] = {}
    for record in _known(gateway.parts.models.list()):
        by_name.setdefault(record.name, []).append(record)
    found = [
        _container(gateway, request, name, records)
        for name, records in by_name.items()
        if is_shown(request, is_archived=bool(_names(gateway, name).get("is_archived")))
    ]
    return Answer(top(request, found))


@routes.add("GET", "{ws}/models/{model}")
def get_model_container(gateway: Gateway, request: Request) -> Answer:
    """One model: its newest and its next version"""
    records = _versions(gateway, request["model"])
    if not records:
        raise _no_model(request["model"])
    return Answer(_container(gateway, request, records[0].name, records))


@routes.add("PUT", "{ws}/models/{model}")
def change_model_container(gateway: Gateway, request: Request) -> Answer:
    """Archive or restore a model with all its versions"""
    records = _versions(gateway, request["model"])
    if not records:
        raise _no_model(request["model"])
    name = records[0].name
    pass_over_envelope(request.body)
    properties = request.body.object("properties")
    properties.passed_over("latestVersion", "nextVersion", "provisioningState")
    facts = {
        "name": name,
        "description": properties.text("description"),
        "tags": properties.texts("tags"),
        "properties": properties.texts("properties"),
        "is_archived": properties.flag("isArchived"),
    }
    gateway.warn(f"model {name}", *request.body.finish(is_loose=gateway.is_loose))
    gateway.remember(CONTAINERS, name, facts)
    return Answer(_container(gateway, request, name, records))


# ---------------------------------------------------------------- versions


@routes.add("GET", "{ws}/models/{model}/versions")
def list_model_versions(gateway: Gateway, request: Request) -> Answer:
    """Versions of a model, newest first; the label `latest` is the first. None where there is no such one"""
    stage = request.query.get("stage", "").lower()
    found = [
        model_view(gateway, request, record, facts)
        for record, facts in _with_facts(gateway, _versions(gateway, request["model"]))
        if is_shown(request, is_archived=_is_archived(gateway, record, facts))
        and (not stage or str(facts.get("stage", "")).lower() == stage)
    ]
    return Answer(top(request, found))


@routes.add("GET", "{ws}/models/{model}/versions/{version}")
def get_model(gateway: Gateway, request: Request) -> Answer:
    """One version of a model, with its lineage as properties"""
    record = find_model(gateway, request["model"], request["version"])
    return Answer(model_view(gateway, request, record, _facts(gateway, record)))


@routes.add("PUT", "{ws}/models/{model}/versions/{version}")
def create_model(gateway: Gateway, request: Request) -> Answer:
    """Register an output of a job or what was uploaded; or change what is said of a version"""
    name, version = request["model"], request["version"]
    check_names(name, version, "model")
    with gateway.lock(f"model/{name.lower()}:{version.lower()}"):
        before = _find(gateway, name, version)
        wanted = _read(gateway, request, before)
        gateway.warn(f"model {name}:{version}", *request.body.finish(is_loose=gateway.is_loose))
        located = _locate(gateway, wanted)
        record = _registered(gateway, before, name, version, located, wanted)
        facts = {**({} if before is None else _facts(gateway, before)), **wanted.facts}
        if before is None:
            facts |= {"label": located.name, "is_folder": located.kind == "folder"}
        gateway.remember(FACTS, record.key, facts)
    gateway.parts.wake()
    return Answer(model_view(gateway, request, record, facts), 201 if before is None else 200)


@routes.add("DELETE", "{ws}/models/{model}/versions/{version}")
def delete_model(gateway: Gateway, request: Request) -> Answer:
    """Give up a version; a deployment that serves it hinders that"""
    record = _find(gateway, request["model"], request["version"])
    if record is None:
        return Answer(status=204)
    gateway.parts.models.delete(record.name, record.model_version)
    gateway.forget(FACTS, record.key)
    gateway.parts.wake()
    return Answer(status=200)


# ---------------------------------------------------------------- registering


class _Wanted:
    """A body that was read."""

    def __init__(self, uri: str, kind: str, description: str, tags: dict[str, str], facts: dict[str, Any]):
        self.uri, self.kind = uri, kind
        self.description, self.tags, self.facts = description, tags, facts


def _read(gateway: Gateway, request: Request, before: ModelRecord | None) -> _Wanted:
    pass_over_envelope(request.body)
    properties = request.body.object("properties")
    kind = _kind(properties)
    uri = properties.text("modelUri")
    if not uri:
        properties.wrong("modelUri", "is missing.")
    lineage = {} if before is None else _lineage(gateway, before)
    if before is not None and before.lineage.job is not None:
        properties.expect("jobName", before.lineage.job, why=f"the model comes from {before.lineage.job}.")
    elif found := uris.job_of(uri):
        properties.expect("jobName", found, why=f"modelUri is of the job {found}.")
    else:
        properties.expect("jobName", why="the model comes from no job; name it by azureml://jobs/....")
    properties.passed_over("provisioningState")
    facts = {
        "type": kind,
        "properties": _own_properties(properties, lineage),
        "is_archived": properties.flag("isArchived"),
        "is_anonymous": properties.flag("isAnonymous"),
        "stage": properties.text("stage"),
        "flavors": read_flavors(properties),
    }
    return _Wanted(uri, kind, properties.text("description"), properties.texts("tags"), facts)


def _kind(properties: Body) -> str:
    written = str(properties.raw("modelType") or "")
    if written.lower() == "triton_model":
        told = "is 'triton_model': there is no Triton server here; as custom_model its files are kept."
        properties.wrong("modelType", told, "NotSupported")
        return "custom_model"
    return properties.text("modelType", "custom_model", choices=TYPES)


def _own_properties(properties: Body, lineage: Mapping[str, str]) -> dict[str, str]:
    """The caller's. Ours come back when a script sends what it got."""
    own = {}
    for name, value in properties.texts("properties").items():
        if not name.startswith(OURS):
            own[name] = value
        elif lineage.get(name) != value:
            properties.wrong(
                f"properties.{name}", "is Tuneloop's to say: where the model comes from. Choose another name."
            )
    return own


def _locate(gateway: Gateway, wanted: _Wanted) -> Located:
    """Where the files are. Raises `Refusal`."""
    try:
        located = uris.locate(gateway, wanted.uri)
    except Refusal as refusal:
        raise Refusal(
            refusal.status,
            refusal.code,
            f"properties.modelUri: {refusal.message}",
            target="properties.modelUri",
        ) from None
    if wanted.kind == "mlflow_model" and not (located.path / "MLmodel").is_file():
        what = "a file" if located.kind == "file" else "a folder without a file MLmodel"
        raise Refusal(
            400,
            "InvalidInput",
            f"properties.modelType is mlflow_model, and {wanted.uri[:300]!r} is {what}. Name the folder that "
            "holds MLmodel, or register it as custom_model.",
            target="properties.modelType",
        )
    return located


def _registered(
    gateway: Gateway,
    before: ModelRecord | None,
    name: str,
    version: str,
    located: Located,
    wanted: _Wanted,
) -> ModelRecord:
    """The record, new or with other words. Raises `Refusal` for a version that holds other files."""
    models = gateway.parts.models
    if before is not None:
        name, version = before.name, before.model_version
    said: dict[str, Any] = {"name": name, "version": version, "description": wanted.description}
    said["tags"] = wanted.tags
    try:
        if located.digest is None:
            models.register_files(located.path, **said)
        elif before is None and (origin := _origin(gateway, located)) is not None:
            models.register(*origin, located.digest, **said)
        else:
            models.register_artifact(located.digest, **said)
    except AlreadyExists:
        raise Refusal(
            409,
            "UserError",
            f"Asset paths cannot be updated: the model {name}:{version} holds other files than "
            f"{wanted.uri[:300]!r}. Give another version, or none to take the next number.",
            target="properties.modelUri",
        ) from None
    return models.describe(name, version, description=wanted.description, tags=wanted.tags)


def _origin(gateway: Gateway, located: Located) -> tuple[str, str] | None:
    """Job and output that made an artifact; None for what came from outside."""
    if located.output is not None:
        return located.output
    assert located.digest is not None
    artifact = gateway.parts.store.find(Artifact, located.digest)
    if artifact is None or artifact.producer is None or artifact.type != "mlflow_model":
        return None
    job = artifact.producer.split("/")[0]
    made = gateway.parts.jobs.output_digests(job)
    return next(((job, output) for output, digest in made.items() if digest == located.digest), None)


# ---------------------------------------------------------------- looking up


def find_model(gateway: Gateway, name: str, version: str) -> ModelRecord:
    """Whatever the case of its name. Raises `Refusal`."""
    found = _find(gateway, name, version)
    if found is None:
        there = ", ".join(record.model_version for record in _versions(gateway, name)[:20])
        if not there:
            raise _no_model(name)
        raise not_found(f"There is no version {version!r} of the model {name}; there is: {there}.", "version")
    return found


def _find(gateway: Gateway, name: str, version: str) -> ModelRecord | None:
    found = gateway.parts.store.find(ModelRecord, f"{name}:{version}")
    if found is None:
        wanted = version.lower()
        same = (one for one in _versions(gateway, name) if one.model_version.lower() == wanted)
        found = next(same, None)
    return None if found is None or found.state is ModelState.DELETING else found


def _versions(gateway: Gateway, name: str) -> Sequence[ModelRecord]:
    """Newest first."""
    found = _known(gateway.parts.models.list(name))
    if not found:
        wanted = name.lower()
        found = [one for one in _known(gateway.parts.models.list()) if one.name.lower() == wanted]
    return found


def _known(records: Iterable[ModelRecord]) -> list[ModelRecord]:
    return [record for record in records if record.state is not ModelState.DELETING]


def _no_model(name: str) -> Refusal:
    return not_found(f"There is no model {name[:200]!r}; ml.models.list() shows what there is.", "model")


def _facts(gateway: Gateway, record: ModelRecord) -> dict[str, Any]:
    return gateway.recall(FACTS, record.key) or {}


def _with_facts(
    gateway: Gateway, records: Sequence[ModelRecord]
) -> Iterable[tuple[ModelRecord, dict[str, Any]]]:
    for record in records:
        yield record, _facts(gateway, record)


def _names(gateway: Gateway, name: str) -> dict[str, Any]:
    return gateway.recall(CONTAINERS, name) or {}


def _is_archived(gateway: Gateway, record: ModelRecord, facts: Mapping[str, Any]) -> bool:
    return bool(facts.get("is_archived") or _names(gateway, record.name).get("is_archived"))


# ---------------------------------------------------------------- views


def _container(
    gateway: Gateway, request: Request, name: str, records: Sequence[ModelRecord]
) -> dict[str, Any]:
    facts = _names(gateway, name)
    return {
        "id": f"{request.workspace_id}/models/{name}",
        "name": name,
        "type": _RESOURCE,
        "properties": {
            "description": facts.get("description", ""),
            "tags": facts.get("tags", {}),
            "properties": facts.get("properties", {}),
            "isArchived": bool(facts.get("is_archived")),
            "latestVersion": records[0].model_version,
            "nextVersion": next_version(record.model_version for record in records),
            "provisioningState": "Succeeded",
        },
        "systemData": system_data(records[-1].created_at),
    }


def model_view(
    gateway: Gateway, request: Request, record: ModelRecord, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """One version, as Azure shows it."""
    label = str(facts.get("label") or record.lineage.output or record.name)
    is_folder = bool(facts.get("is_folder", True))
    artifact = gateway.parts.files.artifact_path(record.artifact)
    kind = facts.get("type") or ("mlflow_model" if (artifact / "MLmodel").is_file() else "custom_model")
    return {
        "id": f"{request.workspace_id}/models/{record.name}/versions/{record.model_version}",
        "name": record.model_version,
        "type": f"{_RESOURCE}/versions",
        "properties": {
            "modelUri": uris.named_uri(request, record.artifact, label, is_folder=is_folder),
            "modelType": kind,
            "description": record.description,
            "tags": dict(record.tags),
            "properties": {**facts.get("properties", {}), **_lineage(gateway, record)},
            "flavors": flavors_of(artifact) or facts.get("flavors") or {},
            "isArchived": bool(facts.get("is_archived")),
            "isAnonymous": bool(facts.get("is_anonymous")),
            "jobName": record.lineage.job,
            "stage": facts.get("stage") or None,
            "provisioningState": "Succeeded",
        },
        "systemData": system_data(record.created_at),
    }


def _lineage(gateway: Gateway, record: ModelRecord) -> dict[str, str]:
    """Where the model comes from, and why it cannot be served when it cannot."""
    lineage = record.lineage
    said: dict[str, str | None] = {
        "job": lineage.job,
        "output": lineage.output,
        "attempt": lineage.attempt,
        "base_model": lineage.base_model,
        **{f"data.{role}": text for role, text in lineage.datasets.items()},
        "recipe_digest": lineage.recipe_digest,
        "code_version": lineage.code_version,
        "artifact": record.artifact,
        "template_digest": record.template_digest,
        "not_served": _why_not_served(gateway, record),
    }
    return {f"{OURS}{name}": text for name, text in said.items() if text}


def _why_not_served(gateway: Gateway, record: ModelRecord) -> str | None:
    try:
        return gateway.parts.models.why_not_served(record.artifact)
    except NotFound:
        return None
