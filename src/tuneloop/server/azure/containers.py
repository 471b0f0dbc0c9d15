"""Where bytes lie in the dialect: two containers, the datastores that are made of them, and names of blobs.

The one is a folder, `azure/blobs/files` of the home: what scripts upload. The other shows what the workspace
has made (artifacts by digest, files of runs) and is written by nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tuneloop.core.errors import NotFound
from tuneloop.server.azure.gateway import Gateway

ACCOUNT_PATH = "blob/store"
"""The SDK makes `https://{account}.blob.{suffix}/{container}/{blob}` of a datastore's account: with the host
and a path as the account's name, the address leads here and no name has to be resolved."""

ARTIFACTS = "artifacts"
NAMED = "named"
"""`named/<hex>/<any name>/...` is `artifacts/<hex>/...`: the SDK calls a download's folder after the last
part of its path."""
RUNS = "ExperimentRun"
RUN_PREFIX = "dcid."

LONGEST_NAME = 1024
"""Characters, as Azure's blob service has it."""
LONGEST_PART = 255
"""Bytes: what file systems take."""


@dataclass(frozen=True)
class Datastore:
    """A name for a container, as workspaces of Azure call it."""

    name: str
    container: str
    description: str
    permissions: str
    """Of its shared access signatures: r(ead), a(dd), c(reate), w(rite), d(elete), l(ist)."""

    @property
    def is_writable(self) -> bool:
        return "w" in self.permissions


UPLOADS = Datastore(
    "workspaceblobstore",
    "azureml-blobstore",
    "What scripts upload: azure/blobs of the home.",
    "racwdl",
)
MADE = Datastore(
    "workspaceartifactstore",
    "azureml",
    "What the workspace has made: artifacts by digest, and files of runs. Read-only.",
    "rl",
)
DATASTORES = (UPLOADS, MADE)
"""The first is the default."""


class BadName(ValueError):
    """What is wrong with the name of a blob."""


def datastore(name: str) -> Datastore | None:
    return next((one for one in DATASTORES if one.name == name.lower()), None)


def by_container(container: str) -> Datastore | None:
    return next((one for one in DATASTORES if one.container == container), None)


def check_name(name: str) -> tuple[str, ...]:
    """The parts of a blob's name. Raises `BadName` for every name that could lead out of a folder, or that
    file systems would not take as it is."""
    if not name:
        raise BadName("is empty")
    if len(name) > LONGEST_NAME:
        raise BadName(f"has {len(name)} characters; the most is {LONGEST_NAME}")
    if "\\" in name:
        raise BadName("holds a backslash; parts are separated by '/'")
    if not name.isprintable():
        raise BadName("holds a character that is not printable")
    parts = tuple(name.split("/"))
    for part in parts:
        if part in ("", ".", ".."):
            raise BadName(f"has the part {part!r}; every part needs a name")
        if len(part.encode("utf-8", "surrogateescape")) > LONGEST_PART:
            raise BadName(f"has a part of more than {LONGEST_PART} bytes: {part[:40]!r}...")
    return parts


def uploads_folder(gateway: Gateway) -> Path:
    """Where committed blobs lie under their names."""
    return gateway.folder / "blobs" / "files"


def artifact_of(gateway: Gateway, parts: tuple[str, ...]) -> tuple[Path, tuple[str, ...]] | None:
    """The artifact that a path in `azureml` names, and the path inside it; None for no such artifact."""
    if len(parts) < 2 or parts[0] not in (ARTIFACTS, NAMED):
        return None
    if parts[1] != parts[1].lower():
        return None
    try:
        artifact = gateway.parts.files.artifact_path(f"sha256:{parts[1]}")
    except NotFound:
        return None
    if artifact.is_symlink() or not artifact.exists():
        return None
    return artifact, parts[2:] if parts[0] == ARTIFACTS else parts[3:]


def inside(root: Path, parts: tuple[str, ...]) -> Path | None:
    """The path below `root`, where no part on the way, and not the last, is a link; None otherwise. It need
    not exist."""
    path = root
    for part in parts:
        path = path / part
        if path.is_symlink():
            return None
    return path
