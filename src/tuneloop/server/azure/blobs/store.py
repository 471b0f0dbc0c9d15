"""Blobs that were uploaded: files under their names, and beside them what a file does not say.

    files/<name>                  the blob: whole, or not there
    facts/<2 hex>/<62 hex>.json   its headers and metadata, under the digest of its name
    uploads/                      what is being written; nothing in it is a blob
    blocks/                       blocks without their list: see `staging`

A blob appears by one rename. Its facts are written before, and say to which file they belong: whatever is
killed in between, the old blob keeps its own. Facts that are lost make a blob that the SDK uploads again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tuneloop.server.azure import containers
from tuneloop.server.azure.blobs.errors import BlobError, blob_not_found

Check = Callable[["Blob | None"], None]
"""Looks at what is there and raises when the caller's conditions do not hold."""


@dataclass(frozen=True)
class Facts:
    """What is known of a blob beside its bytes."""

    of: str = ""
    """The file that it belongs to: see `_mark`."""
    headers: dict[str, str] = field(default_factory=dict)
    """`content-type` and others, as they are said when it is read."""
    metadata: dict[str, str] = field(default_factory=dict)
    created_at: float = 0.0
    changed_at: float = 0.0
    """Of the metadata alone; the bytes have a time of their own."""
    block_list: str | None = None
    """The digest of the list from which it was made."""


@dataclass(frozen=True)
class Blob:
    """One version of a blob, or what stands for one."""

    name: str
    size: int
    modified_at: float
    etag: str
    facts: Facts = Facts()

    @property
    def modified(self) -> datetime:
        return datetime.fromtimestamp(int(self.modified_at), UTC)


class Store:
    """`folder` is `azure/blobs` of the home; it holds nothing but the names of folders."""

    _lock = threading.RLock()
    """One for all: what it covers takes a millisecond."""

    def __init__(self, folder: Path, ensure: Callable[[str], Path]) -> None:
        """`ensure(name)` makes a folder in `folder`, and says where it is."""
        self._folder = folder
        self._ensure = ensure
        self.files = folder / "files"

    def part(self) -> Path:
        """A new place to write to."""
        return self._ensure("uploads") / f"{os.urandom(12).hex()}.part"

    # ------------------------------------------------------------ reading

    def find(self, name: str, parts: tuple[str, ...]) -> Blob | None:
        path = containers.inside(self.files, parts)
        return None if path is None else self._look(name, path)

    def open(self, name: str, parts: tuple[str, ...]) -> tuple[int, Blob]:
        """A descriptor, and what it reads whatever becomes of the name. Raises `BlobError`."""
        path = containers.inside(self.files, parts)
        if path is None or not path.is_file():
            raise blob_not_found(name)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            raise blob_not_found(name) from None
        return descriptor, self._blob(name, os.fstat(descriptor))

    def _look(self, name: str, path: Path) -> Blob | None:
        try:
            found = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return self._blob(name, found) if path.is_file() else None

    def _blob(self, name: str, found: os.stat_result) -> Blob:
        mark = _mark(found)
        facts = next((one for one in self._read_facts(name) if one.of == mark), Facts())
        changed = max(found.st_mtime, facts.changed_at)
        etag = f'"0x{found.st_mtime_ns:X}{int(facts.changed_at * 1e6):X}{found.st_size:X}"'
        return Blob(name, found.st_size, changed, etag, facts)

    # ------------------------------------------------------------ writing

    def commit(self, name: str, parts: tuple[str, ...], written: Path, facts: Facts, check: Check) -> Blob:
        """`written` becomes the blob, as a whole. Raises `BlobError`."""
        now = time.time_ns()
        # A time that no other version of the blob has: file systems' own clocks tick a few hundred times a
        # second.
        os.utime(written, ns=(now, now))
        found = written.stat()
        with self._lock:
            path, before = self._place(name, parts)
            check(before)
            created = before.facts.created_at if before is not None else 0.0
            made = replace(facts, of=_mark(found), created_at=created or now / 1e9)
            kept = [] if before is None else [before.facts]
            self._write_facts(name, [made, *kept])
            os.replace(written, path)
        return self._blob(name, found)

    def set_metadata(
        self, name: str, parts: tuple[str, ...], change: Callable[[Facts], Facts], check: Check
    ) -> Blob:
        """Other facts for the same bytes. Raises `BlobError`."""
        with self._lock:
            before = self.find(name, parts)
            if before is None:
                raise blob_not_found(name)
            check(before)
            path = self.files.joinpath(*parts)
            mark = _mark(path.stat())
            self._write_facts(name, [replace(change(before.facts), of=mark, changed_at=time.time())])
            found = self.find(name, parts)
            assert found is not None
            return found

    def delete(self, name: str, parts: tuple[str, ...], check: Check) -> None:
        """And the folders that are empty then. Raises `BlobError`."""
        with self._lock:
            before = self.find(name, parts)
            if before is None:
                raise blob_not_found(name)
            check(before)
            path = self.files.joinpath(*parts)
            path.unlink()
            self._facts_path(name).unlink(missing_ok=True)
            for folder in list(path.parents)[: len(parts) - 1]:
                try:
                    folder.rmdir()
                except OSError:
                    break

    def _place(self, name: str, parts: tuple[str, ...]) -> tuple[Path, Blob | None]:
        """Where the blob goes; the folders above it are made."""
        root = self._ensure("files")
        folder = root
        for part in parts[:-1]:
            folder = folder / part
            if folder.is_symlink():
                raise BlobError(409, "ResourceTypeMismatch", f"{name!r} lies below a link.")
            with _refusing(name):
                folder.mkdir(mode=0o700, exist_ok=True)
        path = folder / parts[-1]
        if path.is_symlink():
            raise BlobError(409, "ResourceTypeMismatch", f"{name!r} is a link.")
        if path.is_dir():
            told = f"There are blobs below {name!r}/, so it cannot be a blob itself; choose another name."
            raise BlobError(409, "ResourceTypeMismatch", told)
        _check_spelling(root, parts, name)
        return path, self._look(name, path)

    # ------------------------------------------------------------ facts

    def _facts_path(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
        return self._folder / "facts" / digest[:2] / f"{digest[2:]}.json"

    def _read_facts(self, name: str) -> list[Facts]:
        """Of the file that is there, and while it is being replaced, of the next one."""
        try:
            written = json.loads(self._facts_path(name).read_text(encoding="utf-8"))
            return [Facts(**one) for one in written]
        except (OSError, ValueError, TypeError):
            return []

    def _write_facts(self, name: str, facts: list[Facts]) -> None:
        path = self._facts_path(name)
        self._ensure(f"facts/{path.parent.name}")
        text = json.dumps([_without_defaults(one) for one in facts])
        temporary = path.with_suffix(f".{os.urandom(4).hex()}.tmp")
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def of_home(folder: Path, ensure: Callable[[str], Path]) -> Store:
    """The store in `folder` (`azure` of the home); `ensure` makes a folder of the home."""
    return Store(folder / "blobs", lambda name: ensure(f"azure/blobs/{name}"))


def _mark(found: os.stat_result) -> str:
    """What tells a file from the one that replaces it, and stays when the home is copied."""
    return f"{found.st_size}-{found.st_mtime_ns}"


def _without_defaults(facts: Facts) -> Mapping[str, Any]:
    return {name: value for name, value in asdict(facts).items() if value}


def _check_spelling(root: Path, parts: tuple[str, ...], name: str) -> None:
    """Where the file system takes `A` for `a`, a name may not differ from one that is there by that alone: it
    would be the same file under two names."""
    folder = root
    for part in parts:
        path = folder / part
        if path.exists() and (folder / part.swapcase()).exists() and part not in os.listdir(folder):
            told = f"{name!r} differs from a name that is there only by upper and lower case."
            raise BlobError(409, "ResourceTypeMismatch", told)
        folder = path


@contextlib.contextmanager
def _refusing(name: str) -> Any:
    try:
        yield
    except (FileExistsError, NotADirectoryError):
        told = f"A part of {name!r} is a blob, so nothing can lie below it; choose another name."
        raise BlobError(409, "ResourceTypeMismatch", told) from None
