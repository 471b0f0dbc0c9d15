"""Listing and sending the files of an artifact; a path never leaves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi.responses import FileResponse

from tuneloop.core.errors import NotFound


def list_files(artifact: Path) -> list[dict[str, Any]]:
    """`path` relative to the artifact, `size_bytes`. A file is listed as itself, under its own name."""
    if artifact.is_file():
        return [{"path": artifact.name, "size_bytes": artifact.stat().st_size}]
    files = sorted(found for found in artifact.rglob("*") if found.is_file() and not found.is_symlink())
    return [
        {"path": found.relative_to(artifact).as_posix(), "size_bytes": found.stat().st_size}
        for found in files
    ]


def send_file(artifact: Path, path: str) -> FileResponse:
    # Looked up in the listing, not opened by name: there is no path that could lead out.
    root = artifact.parent if artifact.is_file() else artifact
    if path not in {found["path"] for found in list_files(artifact)}:
        raise NotFound(f"There is no file {path!r} here.")
    return FileResponse(root / path, media_type="application/octet-stream")
