"""The hub's cache on this machine: names, links, locks and digests of one repository's files.

Its layout is huggingface_hub's, so that what other programs fetched is not fetched again.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tuneloop.steps.context import StepContext
from tuneloop.steps.hub.source import Kind, Source

Method = Literal["sha256", "git-sha1"]
"""Large files are listed with their sha256, small ones with the digest that git gives a blob."""

_DIGESTS: dict[int, Method] = {64: "sha256", 40: "git-sha1"}
_CHUNK_BYTES = 1 << 20


class Listed(NamedTuple):
    """A file as the hub lists it."""

    name: str
    size: int
    digest: str

    @property
    def method(self) -> Method:
        return _DIGESTS[len(self.digest)]

    @classmethod
    def read(cls, entry: Mapping[str, Any], in_folders: bool = False) -> Listed | None:
        """None for a folder, and for a name or a digest that cannot be the name of a file here. With
        `in_folders` the name may be a path below the repository's root."""
        large = entry.get("lfs")
        name, digest = str(entry.get("path")), str(large["oid"] if large else entry.get("oid"))
        parts = name.split("/") if in_folders else [name]
        if entry.get("type") != "file" or not all(map(is_plain, parts)) or method_of(digest) is None:
            return None
        return cls(name, int(large["size"] if large else entry["size"]), digest)


def is_plain(name: str) -> bool:
    """Whether it names a file in the folder itself, whoever wrote it."""
    return name not in ("", ".", "..") and not re.search(r"[/\\\0]", name)


def method_of(digest: str) -> Method | None:
    return _DIGESTS.get(len(digest)) if re.fullmatch(r"[0-9a-f]+", digest) else None


def digest_of(file: Path, method: Method) -> str:
    """Of the content; git's is the SHA-1 of `blob SIZE`, a zero byte and the content."""
    found = hashlib.sha256() if method == "sha256" else hashlib.sha1(usedforsecurity=False)
    with open(file, "rb") as opened:
        if method == "git-sha1":
            found.update(b"blob %d\0" % os.fstat(opened.fileno()).st_size)
        while chunk := opened.read(_CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()


class Repository:
    """Where the files of one repository lie."""

    def __init__(self, root: Path, name: str, kind: Kind = "model") -> None:
        self.root = root
        self._folder = root / (f"{kind}s--" + name.replace("/", "--"))

    @classmethod
    def of(cls, name: str, context: StepContext, kind: Kind = "model") -> Repository:
        """In HF_HUB_CACHE, or HF_HOME, or the home's cache."""
        if own := os.environ.get("HF_HUB_CACHE"):
            return cls(Path(own).expanduser(), name, kind)
        if own := os.environ.get("HF_HOME"):
            return cls(Path(own).expanduser() / "hub", name, kind)
        return cls((context.cache_folder or context.folder / "cache") / "hub", name, kind)

    def make(self) -> None:
        (self._folder / "blobs").mkdir(parents=True, exist_ok=True)

    def snapshot(self, commit: str) -> Path:
        return self._folder / "snapshots" / commit

    def blob(self, file: Listed) -> Path:
        return self._folder / "blobs" / file.digest

    def partial(self, file: Listed) -> Path:
        return self._folder / "blobs" / f"{file.digest}.partial"

    def partial_size(self, file: Listed) -> int:
        try:
            return self.partial(file).stat().st_size
        except FileNotFoundError:
            return 0

    def commit(self, source: Source) -> str | None:
        """The commit of a revision, as far as it is known here."""
        if source.is_pinned:
            return source.revision if self.snapshot(source.revision).is_dir() else None
        try:
            return (self._folder / "refs" / source.revision).read_text(encoding="utf-8").strip() or None
        except OSError:
            return None

    def remember(self, revision: str, commit: str) -> None:
        path = self._folder / "refs" / revision
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(commit, encoding="utf-8")
        os.replace(temporary, path)

    def link(self, commit: str, file: Listed) -> None:
        """Make the blob visible in the snapshot: a relative link, or a copy where links are not allowed."""
        pointer = self.snapshot(commit) / file.name
        pointer.parent.mkdir(parents=True, exist_ok=True)
        temporary = pointer.with_name(f".{pointer.name}.{os.getpid()}.{file.digest[:8]}")
        temporary.unlink(missing_ok=True)
        try:
            up = [".."] * (2 + file.name.count("/"))
            temporary.symlink_to(Path(*up, "blobs", file.digest))
        except OSError:
            shutil.copyfile(self.blob(file), temporary)
        os.replace(temporary, pointer)

    def forget(self, commit: str, file: Listed) -> None:
        """Delete a file, however it is here."""
        pointer = self.snapshot(commit) / file.name
        if pointer.is_symlink() and pointer.exists():
            pointer.resolve().unlink(missing_ok=True)
        for path in (pointer, self.blob(file), self.partial(file)):
            path.unlink(missing_ok=True)

    def is_damaged(self, file: Path) -> bool:
        """Whether a file of a snapshot is another than the name of its blob says. A copy says nothing."""
        blob = file.resolve()
        method = method_of(blob.name) if file.is_symlink() else None
        return method is not None and digest_of(blob, method) != blob.name

    @contextmanager
    def locked(self, file: Listed) -> Iterator[None]:
        """One process fetches a file at a time. The lock is huggingface_hub's own for this file."""
        from huggingface_hub.utils import WeakFileLock

        path = self.root / ".locks" / self._folder.name / f"{file.digest}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(path):
            yield
