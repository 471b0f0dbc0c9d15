"""Addresses of files and folders, as the SDK writes them.

    azureml://datastores/{datastore}/paths/{path}
    azureml://subscriptions/{s}/resourcegroups/{g}/workspaces/{w}/datastores/{datastore}/paths/{path}
    azureml://jobs/{job}/outputs/{output}[/paths/{path}]
    azureml:{name}:{version}, azureml:{name}@latest               a data asset
    /subscriptions/.../data/{name}/versions/{version}, azureml://locations/.../data/{name}/versions/{version}

Subscription, group and workspace are any names: one home is one workspace.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tuneloop.core.errors import TuneloopError
from tuneloop.server.azure import containers
from tuneloop.server.azure.containers import BadName
from tuneloop.server.azure.errors import Refusal, not_found
from tuneloop.server.azure.gateway import Gateway
from tuneloop.server.azure.routing import Request

DATA = "data"
"""The collection of data assets; each name has a collection of its versions."""

_WORKSPACE = r"subscriptions/[^/]+/resourcegroups/[^/]+/(?:providers/[^/]+/)?workspaces/[^/]+/"
_PATH = re.compile(rf"azureml://(?:{_WORKSPACE})?datastores/(?P<datastore>[^/]+)/paths/(?P<path>.*)", re.I)
_RUN_PATH = re.compile(r"azureml://datastores/(?P<datastore>[^/]+)/(?P<path>ExperimentRun/.*)", re.I)
_OUTPUT = re.compile(
    r"azureml://jobs/(?P<job>[^/]+)/outputs/(?P<output>[^/]+)(?:/paths(?:/(?P<path>.*))?)?/?", re.I
)
_ASSET = re.compile(
    rf"(?:azureml:)?/?/?(?:{_WORKSPACE}|locations/[^/]+/workspaces/[^/]+/)"
    r"(?P<kind>\w+)/(?P<name>[^/]+)/versions/(?P<version>[^/]+)",
    re.I,
)
_SHORT_ASSET = re.compile(r"azureml:(?!/)(?P<name>[^:@/]+)(?::(?P<version>[^:@/]+)|@(?P<label>[^:@/]+))")
_READ = (
    "azureml://datastores/NAME/paths/PATH, azureml://jobs/JOB/outputs/OUTPUT, "
    "azureml:DATA:VERSION or the id of a data asset"
)


@dataclass(frozen=True)
class Located:
    """What an address names."""

    path: Path
    name: str
    """What people call it: the last part of its address."""
    kind: Literal["file", "folder"]
    digest: str | None = None
    """Of an artifact of ours, when the address names a whole one."""
    output: tuple[str, str] | None = None
    """Job and output, when the address names one."""


def locate(gateway: Gateway, uri: str) -> Located:
    """The file or folder that `uri` names. Raises `Refusal`, which names `uri`."""
    if found := (_PATH.fullmatch(uri) or _RUN_PATH.fullmatch(uri)):
        return _in_datastore(gateway, uri, found["datastore"], found["path"])
    if found := _OUTPUT.fullmatch(uri):
        return _output(gateway, uri, found["job"], found["output"], found["path"] or "")
    if found := _ASSET.fullmatch(uri):
        if found["kind"].lower() != DATA:
            raise _bad(uri, f"names something of {found['kind']}; files and folders are of data")
        return _asset(gateway, uri, found["name"], found["version"])
    if found := _SHORT_ASSET.fullmatch(uri):
        if found["label"] not in (None, "latest"):
            raise _bad(uri, f"has the label {found['label']!r}; the only label is latest")
        return _asset(gateway, uri, found["name"], found["version"])
    raise _bad(uri, f"is not read here. Upload it, or name it as {_READ}")


def artifact_uri(request: Request, digest: str) -> str:
    """Where the files of an artifact are, for the SDK."""
    return _long(request, containers.MADE.name, f"{containers.ARTIFACTS}/{digest.removeprefix('sha256:')}/")


def named_uri(request: Request, digest: str, name: str, *, is_folder: bool = True) -> str:
    """The same with a name of people's at its end, after which a download is called; of a folder that holds
    one file and stands for it, that file."""
    hexadecimal = digest.removeprefix("sha256:")
    if not is_folder:
        return _long(request, containers.MADE.name, f"{containers.ARTIFACTS}/{hexadecimal}/{name}")
    return _long(request, containers.MADE.name, f"{containers.NAMED}/{hexadecimal}/{name}/")


def long_uri(request: Request, uri: str) -> str:
    """An address in a datastore with the caller's workspace in it; any other as it is."""
    found = _PATH.fullmatch(uri)
    return uri if found is None else _long(request, found["datastore"], found["path"])


def job_of(uri: str) -> str | None:
    """The job whose output `uri` names."""
    found = _OUTPUT.fullmatch(uri)
    return None if found is None else found["job"]


def versions_of(name: str) -> str:
    """The collection of a data asset's versions."""
    return f"{DATA}/{name.lower()}"


def _long(request: Request, datastore: str, path: str) -> str:
    at = "/".join(
        f"{kind}/{request[of]}"
        for kind, of in (("subscriptions", "subscription"), ("resourcegroups", "group"))
    )
    return f"azureml://{at}/workspaces/{request['workspace']}/datastores/{datastore}/paths/{path}"


def _in_datastore(gateway: Gateway, uri: str, datastore: str, path: str) -> Located:
    store = containers.datastore(datastore)
    if store is None:
        there = ", ".join(one.name for one in containers.DATASTORES)
        raise not_found(f"{uri!r} is in the datastore {datastore!r}; there is: {there}.", "uri")
    try:
        parts = containers.check_name(path.rstrip("/"))
    except BadName as mistake:
        raise _bad(uri, f"has a path that {mistake}") from None
    if store is containers.UPLOADS:
        return _there(uri, containers.inside(containers.uploads_folder(gateway), parts), parts)
    found = containers.artifact_of(gateway, parts)
    if found is None:
        raise not_found(
            f"{uri!r} names no artifact. In {store.name}: artifacts/<64 hex digits>/...; files of runs are "
            "read with jobs.download.",
            "uri",
        )
    artifact, rest = found
    located = _there(uri, containers.inside(artifact, rest), parts)
    if rest:
        return located
    return Located(located.path, located.name, located.kind, digest=f"sha256:{parts[1]}")


def _output(gateway: Gateway, uri: str, job: str, output: str, path: str) -> Located:
    try:
        _, digest = gateway.parts.jobs.output(job, output)
    except TuneloopError as error:
        raise Refusal(error.http_status, "InvalidInput", f"{uri!r}: {error}", target="uri") from None
    artifact = gateway.parts.files.artifact_path(digest)
    inner = path.strip("/")
    if not inner:
        located = _there(uri, artifact, (output,))
        return Located(located.path, output, located.kind, digest=digest, output=(job, output))
    try:
        parts = containers.check_name(inner)
    except BadName as mistake:
        raise _bad(uri, f"has a path that {mistake}") from None
    return _there(uri, containers.inside(artifact, parts), parts)


def _asset(gateway: Gateway, uri: str, name: str, version: str | None) -> Located:
    collection = versions_of(name)
    if version is None:
        newest = next(gateway.remembered(collection), None)
        found = None if newest is None else newest[1]
    else:
        found = gateway.recall(collection, version)
    if found is None:
        known = [one for one, _ in gateway.remembered(collection)]
        there = f"there is: {', '.join(known[:20])}" if known else "there is none of this name"
        raise not_found(f"{uri!r} names no data asset; {there}.", "uri")
    return locate(gateway, str(found["uri"]))


def _there(uri: str, path: Path | None, parts: Sequence[str]) -> Located:
    if path is not None and path.is_file():
        return Located(path, parts[-1], "file")
    if path is not None and path.is_dir():
        return Located(path, parts[-1], "folder")
    raise not_found(f"{uri!r}: there is nothing there. Was it uploaded?", "uri")


def _bad(uri: str, what: str) -> Refusal:
    return Refusal(400, "InvalidInput", f"{uri[:300]!r} {what}.", target="uri")
