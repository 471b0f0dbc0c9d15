"""Data assets: a name and a version for a file or folder that was uploaded or made. Nothing is copied until a
job takes it; what they say is only the dialect's."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from tuneloop.core.errors import InvalidName
from tuneloop.core.names import check_name
from tuneloop.server.azure import uris
from tuneloop.server.azure.assets import (
    check_names,
    is_shown,
    next_version,
    pass_over_envelope,
    system_data,
    top,
)
from tuneloop.server.azure.bodies import Body, strings
from tuneloop.server.azure.errors import Refusal, not_found
from tuneloop.server.azure.gateway import Gateway
from tuneloop.server.azure.routing import Answer, Request, Routes
from tuneloop.server.azure.uris import DATA, versions_of

routes = Routes()

KINDS = {"uri_file": "file", "uri_folder": "folder"}
_WHY_NO_TABLE = (
    "is 'mltable': tables that are computed when they are read are not there. Rows are read from files of "
    "JSON Lines, JSON, CSV, TSV or Parquet: name one as a uri_file."
)


@routes.add("GET", "{ws}/data")
def list_data(gateway: Gateway, request: Request) -> Answer:
    """Data assets, without their versions"""
    found = [
        _container(gateway, request, name, body)
        for name, body in gateway.remembered(DATA)
        if is_shown(request, is_archived=bool(body.get("is_archived")))
    ]
    return Answer(top(request, found))


@routes.add("GET", "{ws}/data/{data}")
def get_data_container(gateway: Gateway, request: Request) -> Answer:
    """One data asset: its newest and its next version"""
    return Answer(_container(gateway, request, *_find(gateway, request["data"])))


@routes.add("PUT", "{ws}/data/{data}")
def change_data_container(gateway: Gateway, request: Request) -> Answer:
    """Archive or restore a data asset with all its versions"""
    name, before = _find(gateway, request["data"])
    pass_over_envelope(request.body)
    properties = request.body.object("properties")
    properties.expect("dataType", before["type"], why="the type of a data asset stays what it is.")
    properties.passed_over("latestVersion", "nextVersion", "provisioningState")
    body = {**before, **_described(properties)}
    gateway.warn(f"data {name}", *request.body.finish(is_loose=gateway.is_loose))
    gateway.remember(DATA, name, body)
    return Answer(_container(gateway, request, name, body))


@routes.add("GET", "{ws}/data/{data}/versions")
def list_data_versions(gateway: Gateway, request: Request) -> Answer:
    """Versions of a data asset, newest first; the label `latest` is the first"""
    name, container = _find(gateway, request["data"])
    found = [
        _version(request, name, version, body)
        for version, body in gateway.remembered(versions_of(name))
        if is_shown(request, is_archived=_is_archived(container, body))
    ]
    return Answer(top(request, found))


@routes.add("GET", "{ws}/data/{data}/versions/{version}")
def get_data(gateway: Gateway, request: Request) -> Answer:
    """One version of a data asset"""
    name, _ = _find(gateway, request["data"])
    version, body = _find_version(gateway, name, request["version"])
    return Answer(_version(request, name, version, body))


@routes.add("PUT", "{ws}/data/{data}/versions/{version}")
def create_data(gateway: Gateway, request: Request) -> Answer:
    """Name a file or folder, or change what is said of it; its address stays"""
    name, version = request["data"], request["version"]
    check_names(name, version, "data")
    pass_over_envelope(request.body)
    properties = request.body.object("properties")
    kind = _kind(properties)
    uri = properties.text("dataUri")
    if not uri:
        properties.wrong("dataUri", "is missing.")
    properties.flag("isAnonymous")
    properties.passed_over("provisioningState", "referencedUris")
    properties.expect("stage", "Development", "Production", why="stages of data have no meaning here.")
    described = _described(properties)
    gateway.warn(f"data {name}:{version}", *request.body.finish(is_loose=gateway.is_loose))
    _check_address(gateway, uri, kind)
    with gateway.lock(f"data/{name.lower()}"):
        before = gateway.recall(versions_of(name), version)
        if before is not None and not _is_same(before, uri, kind):
            raise _taken(f"{name}:{version}", str(before["uri"]))
        created = before["created_at"] if before is not None else gateway.now().isoformat()
        spelled = before["version"] if before is not None else version
        body = {"version": spelled, "uri": uri, "type": kind, "created_at": created, **described}
        gateway.remember(versions_of(name), version, body)
        if gateway.recall(DATA, name) is None:
            gateway.remember(DATA, name, {"name": name, "type": kind, "created_at": created})
    return Answer(_version(request, name, spelled, body), 200 if before is not None else 201)


# ---------------------------------------------------------------- inside


def _kind(properties: Body) -> str:
    if str(properties.raw("dataType")).lower() == "mltable":
        properties.wrong("dataType", _WHY_NO_TABLE, "NotSupported")
        return "uri_file"
    return properties.text("dataType", "uri_folder", choices=tuple(KINDS))


def _described(properties: Body) -> dict[str, Any]:
    return {
        "description": properties.text("description"),
        "tags": properties.texts("tags"),
        "properties": properties.texts("properties"),
        "is_archived": properties.flag("isArchived"),
    }


def _check_address(gateway: Gateway, uri: str, kind: str) -> None:
    """Raises `Refusal` unless there is such a file or folder."""
    if not uri.lower().startswith("azureml://") or "/versions/" in uri:
        raise Refusal(
            400,
            "InvalidInput",
            f"properties.dataUri is {uri[:300]!r}; only files of this workspace are read here "
            "(azureml://datastores/..., azureml://jobs/...). Give a local path, and it is uploaded.",
            target="properties.dataUri",
        )
    located = uris.locate(gateway, uri)
    if located.kind != KINDS[kind]:
        there = next(name for name, what in KINDS.items() if what == located.kind)
        raise Refusal(
            400,
            "InvalidInput",
            f"properties.dataUri is {uri[:300]!r}, a {located.kind}, and properties.dataType is {kind!r}; "
            f"make it {there!r}.",
            target="properties.dataType",
        )


def _is_same(before: Mapping[str, Any], uri: str, kind: str) -> bool:
    return before["type"] == kind and _plain(str(before["uri"])) == _plain(uri)


def _plain(uri: str) -> str:
    """Whatever workspace it names: one home is one."""
    head, found, path = uri.partition("/datastores/")
    return f"{found}{path.rstrip('/')}" if found else head.rstrip("/")


def _taken(key: str, uri: str) -> Refusal:
    return Refusal(
        409,
        "UserError",
        f"The data asset {key} names {uri!r} already, and what a version names stays. Give another version, "
        "or none to take the next number.",
        target="properties.dataUri",
    )


def _find(gateway: Gateway, name: str) -> tuple[str, dict[str, Any]]:
    """Its name as it was made, and what is remembered. Raises `Refusal`."""
    try:
        check_name(name)
    except InvalidName:
        raise not_found(f"There is no data asset {name[:200]!r}.", "data") from None
    found = gateway.recall(DATA, name)
    if found is None:
        raise not_found(f"There is no data asset {name!r}; ml.data.list() shows what there is.", "data")
    return str(found["name"]), found


def _find_version(gateway: Gateway, name: str, version: str) -> tuple[str, dict[str, Any]]:
    found = gateway.recall(versions_of(name), version)
    if found is None:
        known = ", ".join(one for one, _ in gateway.remembered(versions_of(name)))
        raise not_found(
            f"There is no version {version[:100]!r} of the data asset {name}; there is: {known}.", "version"
        )
    return str(found["version"]), found


def _is_archived(container: Mapping[str, Any], body: Mapping[str, Any]) -> bool:
    return bool(container.get("is_archived") or body.get("is_archived"))


def _container(gateway: Gateway, request: Request, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
    versions = [version for version, _ in gateway.remembered(versions_of(name))]
    return {
        "id": f"{request.workspace_id}/data/{name}",
        "name": name,
        "type": "Microsoft.MachineLearningServices/workspaces/data",
        "properties": {
            "dataType": body["type"],
            "description": body.get("description", ""),
            "tags": body.get("tags", {}),
            "properties": body.get("properties", {}),
            "isArchived": bool(body.get("is_archived")),
            "latestVersion": versions[0] if versions else None,
            "nextVersion": next_version(versions),
        },
        "systemData": system_data(datetime.fromisoformat(body["created_at"])),
    }


def _version(request: Request, name: str, version: str, body: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": f"{request.workspace_id}/data/{name}/versions/{version}",
        "name": version,
        "type": "Microsoft.MachineLearningServices/workspaces/data/versions",
        "properties": {
            "dataUri": uris.long_uri(request, body["uri"]),
            "dataType": body["type"],
            "description": body.get("description", ""),
            "tags": body.get("tags", {}),
            "properties": strings(body.get("properties", {})),
            "isArchived": bool(body.get("is_archived")),
            "isAnonymous": False,
        },
        "systemData": system_data(datetime.fromisoformat(body["created_at"])),
    }
