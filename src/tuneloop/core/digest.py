"""Digests of files and folders: what makes an artifact immutable and a cache key equal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from tuneloop.core.errors import UsageError

CHUNK_BYTES = 1 << 20


def of_text(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def of_json(value: object) -> str:
    """Of the canonical form: sorted keys, no spaces, so equal values have equal digests."""
    return of_text(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False))


def of_file(path: Path, progress: Callable[[int], None] | None = None) -> tuple[str, int]:
    """`sha256:...` of the contents, and the size in bytes."""
    digest = hashlib.sha256()
    size = 0
    with open(path, "rb") as handle:
        while chunk := handle.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            if progress is not None:
                progress(len(chunk))
    return f"sha256:{digest.hexdigest()}", size


def of_path(path: Path, progress: Callable[[int], None] | None = None) -> tuple[str, int]:
    """Of a file: of its contents. Of a folder: of the sorted list of (relative path, size, digest) of its
    files; empty folders, modes and times do not count. Links are refused: what they point to may change."""
    if path.is_symlink():
        raise UsageError(f"{path} is a link; an artifact holds files and folders only.")
    if path.is_file():
        return of_file(path, progress)
    lines = []
    total = 0
    for inner in sorted(path.rglob("*"), key=lambda found: found.relative_to(path).as_posix()):
        if inner.is_symlink():
            raise UsageError(f"{inner} is a link; an artifact holds files and folders only.")
        if inner.is_file():
            digest, size = of_file(inner, progress)
            lines.append(f"{inner.relative_to(path).as_posix()}\0{size}\0{digest}\n")
            total += size
    return of_text("".join(lines)), total
