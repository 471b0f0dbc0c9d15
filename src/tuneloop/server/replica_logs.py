"""The log of a deployment: of its replicas one after the other, and of what was mirrored to it."""

from __future__ import annotations

from collections import deque

from tuneloop.server.parts import Parts
from tuneloop.workspace.reconcile.replicas import MIRRORS

MIRROR_LOG = "mirror.jsonl"


def deployment_log(parts: Parts, endpoint: str, deployment: str, lines: int) -> list[str]:
    """The last so many lines of each."""
    shown: list[str] = []
    for replica in parts.endpoints.replicas(endpoint, deployment):
        shown.append(f"== replica {replica.number} ({replica.state})")
        shown.extend(parts.executor.last_lines(parts.files.folder(replica.folder), lines))
    mirrored = _mirrored(parts, endpoint, deployment, lines)
    if mirrored:
        shown.append("== mirrored requests")
        shown.extend(mirrored)
    return shown


def _mirrored(parts: Parts, endpoint: str, deployment: str, lines: int) -> list[str]:
    path = parts.home / MIRRORS / endpoint / deployment / MIRROR_LOG
    try:
        with open(path, encoding="utf-8", errors="replace") as log:
            return [line.rstrip("\n") for line in deque(log, lines)]
    except FileNotFoundError:
        return []
