"""Blobs as a listing sees them: in the order of their whole names, below a prefix, from a marker on.

Two trees: the folder of what was uploaded, and what the workspace has made, which is put together from
artifacts and runs when it is asked for.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tuneloop.core.types import Artifact, JobRecord
from tuneloop.server.azure import containers
from tuneloop.server.azure.containers import ARTIFACTS, NAMED, RUN_PREFIX, RUNS
from tuneloop.server.azure.gateway import Gateway
from tuneloop.server.azure.history import run_files


@dataclass(frozen=True)
class Child:
    name: str
    is_folder: bool


@dataclass(frozen=True)
class Found:
    """A name in a listing: a blob, or what several names begin with (it ends in '/')."""

    name: str
    is_prefix: bool


class Tree(Protocol):
    def children(self, parts: tuple[str, ...]) -> Iterable[Child]:
        """Of a folder; none where there is no such folder."""

    def content(self, parts: tuple[str, ...]) -> Path | bytes | None:
        """Of a blob; None where there is none. A path need not exist."""


def walk(tree: Tree, prefix: str, marker: str, *, is_flat: bool) -> Iterator[Found]:
    """Names that begin with `prefix`, from `marker` on; unless `is_flat`, what lies in folders below the
    prefix's own is one name that ends in '/'."""
    folder, _, _ = prefix.rpartition("/")
    parts = tuple(folder.split("/")) if folder else ()
    if any(part in ("", ".", "..") for part in parts):
        return
    yield from _walk(tree, parts, prefix, marker, is_flat=is_flat)


def _walk(tree: Tree, parts: tuple[str, ...], prefix: str, marker: str, *, is_flat: bool) -> Iterator[Found]:
    base = "".join(f"{part}/" for part in parts)
    # With its slash a folder stands where all the names in it stand: 'a-b' before 'a/b'.
    names = sorted((f"{base}{child.name}{'/' * child.is_folder}", child) for child in tree.children(parts))
    for name, child in names:
        if not name.startswith(prefix) or _is_before(name, marker):
            continue
        if not child.is_folder:
            yield Found(name, is_prefix=False)
        elif is_flat:
            yield from _walk(tree, (*parts, child.name), prefix, marker, is_flat=True)
        elif any(True for _ in _walk(tree, (*parts, child.name), prefix, "", is_flat=True)):
            yield Found(name, is_prefix=True)


def _is_before(name: str, marker: str) -> bool:
    """Whether the name, and for a folder every name in it, was listed already."""
    return name < marker and not (name.endswith("/") and marker.startswith(name))


class FolderTree:
    """What lies below a folder; links are not there."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def children(self, parts: tuple[str, ...]) -> Iterable[Child]:
        folder = containers.inside(self._root, parts)
        return [] if folder is None else _entries(folder)

    def content(self, parts: tuple[str, ...]) -> Path | None:
        return containers.inside(self._root, parts)


class MadeTree:
    """`artifacts/<hex>/...`, `named/<hex>/<any name>/...` and `ExperimentRun/dcid.<run>/...`."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._files_of_runs: dict[str, Mapping[str, Path | bytes]] = {}

    def children(self, parts: tuple[str, ...]) -> Iterable[Child]:
        if not parts:
            return [Child(ARTIFACTS, True), Child(RUNS, True)]
        if parts[0] == RUNS:
            return self._run_children(parts)
        if parts == (ARTIFACTS,):
            return [
                Child(one.digest.removeprefix("sha256:"), self._is_folder(one.digest))
                for one in self._gateway.parts.store.list(Artifact)
            ]
        if parts[0] == NAMED and len(parts) < 3:
            return []
        found = containers.artifact_of(self._gateway, parts)
        folder = None if found is None else containers.inside(*found)
        return [] if folder is None else _entries(folder)

    def content(self, parts: tuple[str, ...]) -> Path | bytes | None:
        if parts[0] == RUNS:
            return None if len(parts) < 3 else self._files(parts[1]).get("/".join(parts[2:]))
        found = containers.artifact_of(self._gateway, parts)
        return None if found is None else containers.inside(*found)

    def _run_children(self, parts: tuple[str, ...]) -> Iterable[Child]:
        if len(parts) == 1:
            return [Child(RUN_PREFIX + job.key, True) for job in self._gateway.parts.store.list(JobRecord)]
        base = "".join(f"{part}/" for part in parts[2:])
        rest = [name.removeprefix(base) for name in self._files(parts[1]) if name.startswith(base)]
        return {Child(name.split("/")[0], "/" in name) for name in rest}

    def _files(self, part: str) -> Mapping[str, Path | bytes]:
        """Looked up once: a log is put together from many records."""
        if not part.startswith(RUN_PREFIX):
            return {}
        if part not in self._files_of_runs:
            self._files_of_runs[part] = run_files(self._gateway, part.removeprefix(RUN_PREFIX))
        return self._files_of_runs[part]

    def _is_folder(self, digest: str) -> bool:
        return self._gateway.parts.files.artifact_path(digest).is_dir()


def _entries(folder: Path) -> Iterable[Child]:
    """Regular files and folders."""
    try:
        with os.scandir(folder) as found:
            return [
                Child(one.name, one.is_dir(follow_symlinks=False))
                for one in found
                if stat.S_IFMT(one.stat(follow_symlinks=False).st_mode) in (stat.S_IFREG, stat.S_IFDIR)
            ]
    except (FileNotFoundError, NotADirectoryError):
        return []
