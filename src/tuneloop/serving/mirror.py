"""Copies of requests for a deployment whose replies nobody gets: sent beside the request, compared, written
down. Used by the router alone; a caller never waits for any of it.

What a copy came to is a line of `ENDPOINT/DEPLOYMENT/mirror.jsonl`: both statuses, both durations, whether
the replies are the same and how far. Never the texts: prompts and replies are the callers' own.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from tuneloop.core.types import RouteEndpoint, RouteTable
from tuneloop.serving.lifecycle import say
from tuneloop.serving.routing import Turns

MOST_COPIES = 16
"""On their way at once; more are left out, and counted."""
MOST_BYTES = 32 * 1024 * 1024
"""Of the requests that they hold."""
REPLY_BYTES = 1024 * 1024
"""Of a reply that is compared; a longer one is not."""
LOG_BYTES = 1024 * 1024
"""Of a log; then it begins anew, and the last one stays beside it."""
MOST_LINES = 1000
"""Held between two writings."""
LOG = "mirror.jsonl"


@dataclass
class Reply:
    """What somebody was answered, as far as it is kept."""

    status: int | None = None
    seconds: float = 0.0
    is_stream: bool = False
    is_whole: bool = True
    _pieces: list[bytes] = field(default_factory=list)
    _size: int = 0

    def hear(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > REPLY_BYTES:
            self.is_whole = False
            self._pieces.clear()
        if self.is_whole:
            self._pieces.append(piece)

    def text(self) -> str | None:
        """What the model said; None where the reply was not kept."""
        if not self.is_whole:
            return None
        raw = b"".join(self._pieces).decode("utf-8", "replace")
        return _streamed(raw) if self.is_stream else _said(raw)


Send = Callable[["Copy"], Awaitable[None]]
"""Asks the mirror's deployment, and lets the copy's `theirs` hear the reply. Raises `LookupError` when none
of its replicas can take one more."""


@dataclass
class Copy:
    """One request that goes to the mirror too."""

    endpoint: str
    deployment: str
    """Whose replies nobody gets."""
    primary: str
    request_id: str
    path: str
    body: bytes
    headers: dict[str, str]
    began: float = field(default_factory=time.monotonic)
    ours: Reply = field(default_factory=Reply)
    """The caller's."""
    theirs: Reply = field(default_factory=Reply)
    task: asyncio.Task[None] | None = None

    def finish(self, status: int) -> None:
        """The caller has the reply."""
        self.ours.status, self.ours.seconds = status, time.monotonic() - self.began


class Mirrors:
    """Decides which requests are copied, and keeps count of what became of them."""

    def __init__(self, folder: Path | None, send: Send) -> None:
        self._folder = folder
        self._send = send
        self._turns = Turns()
        self._tasks: set[asyncio.Task[None]] = set()
        self._copies = 0
        self._bytes = 0
        self._lines: dict[str, list[str]] = {}
        self._left_out: dict[str, int] = {}

    def begin(self, route: RouteEndpoint, copy: Callable[[str], Copy], endpoint: str) -> Copy | None:
        """A copy that is on its way, when it is this request's turn."""
        for deployment, percent in route.mirror.items():
            if self._turns.next(endpoint, {"": 100 - percent, deployment: percent}) != deployment:
                return None
            made = copy(deployment)
            if self._copies >= MOST_COPIES or self._bytes + len(made.body) > MOST_BYTES:
                self._leave_out(made)
                return None
            self._copies += 1
            self._bytes += len(made.body)
            made.task = self._start(self._ask(made))
            made.task.add_done_callback(partial(self._free, len(made.body)))
            return made
        return None

    def compare(self, copy: Copy, status: int) -> None:
        """Note what both came to, once the mirror has answered as well. Nobody waits for this."""
        copy.finish(status)
        self._start(self._compare(copy))

    def abandon(self, copy: Copy) -> None:
        """The caller has left: there is nothing to compare with."""
        if copy.task is not None:
            copy.task.cancel()

    async def write(self, table: RouteTable) -> None:
        """What was noted since the last time, of deployments that are still there."""
        for key, count in self._left_out.items():
            self._note(key, {"left_out": count})
        self._left_out = {}
        lines, self._lines = self._lines, {}
        if lines and self._folder is not None:
            known = {
                f"{endpoint}/{name}"
                for endpoint, route in table.endpoints.items()
                for name in route.deployments
            }
            kept = {key: texts for key, texts in lines.items() if key in known}
            await asyncio.to_thread(_append, self._folder, kept)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ------------------------------------------------------------ inside

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _ask(self, copy: Copy) -> None:
        try:
            await self._send(copy)
        except LookupError:
            self._leave_out(copy)
            raise asyncio.CancelledError from None
        except Exception as problem:
            # Whatever is wrong with the mirror is its own affair; its status stays unknown.
            say(f"mirror {copy.endpoint}/{copy.deployment} {copy.request_id}: {type(problem).__name__}")
        copy.theirs.seconds = time.monotonic() - copy.began

    async def _compare(self, copy: Copy) -> None:
        assert copy.task is not None
        await asyncio.gather(copy.task, return_exceptions=True)
        if not copy.task.cancelled():
            found = await asyncio.to_thread(_compared, copy)
            self._note(f"{copy.endpoint}/{copy.deployment}", found)

    def _free(self, size: int, _task: object) -> None:
        self._copies -= 1
        self._bytes -= size

    def _leave_out(self, copy: Copy) -> None:
        key = f"{copy.endpoint}/{copy.deployment}"
        self._left_out[key] = self._left_out.get(key, 0) + 1

    def _note(self, key: str, found: dict[str, Any]) -> None:
        lines = self._lines.setdefault(key, [])
        if len(lines) < MOST_LINES:
            at = datetime.now(UTC).isoformat(timespec="milliseconds")
            lines.append(json.dumps({"at": at, **found}))


def _compared(copy: Copy) -> dict[str, Any]:
    found: dict[str, Any] = {
        "request": copy.request_id,
        "beside": copy.primary,
        "status": copy.ours.status,
        "mirror_status": copy.theirs.status,
        "seconds": round(copy.ours.seconds, 3),
        "mirror_seconds": round(copy.theirs.seconds, 3),
    }
    ours, theirs = copy.ours.text(), copy.theirs.text()
    if ours is None or theirs is None or copy.theirs.status is None:
        return found
    differs = (at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1])
    return found | {
        "is_same": ours == theirs and copy.ours.status == copy.theirs.status,
        "characters": len(ours),
        "mirror_characters": len(theirs),
        "same_characters": next(differs, min(len(ours), len(theirs))),
    }


def _append(folder: Path, lines: dict[str, list[str]]) -> None:
    for key, texts in lines.items():
        path = folder / key / LOG
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if path.exists() and path.stat().st_size > LOG_BYTES:
                os.replace(path, path.with_name(f"last-{LOG}"))
            with open(path, "a", encoding="utf-8") as log:
                log.write("".join(f"{text}\n" for text in texts))
        except OSError as problem:
            say(f"{path} not written: {problem}")


def _said(raw: str) -> str:
    """The reply's text alone: ids and times are never the same twice."""
    try:
        body = json.loads(raw)
        if "output" in body:
            return json.dumps(body["output"], ensure_ascii=False)
        return str(body["choices"][0]["message"]["content"])
    except (ValueError, TypeError, LookupError):
        return raw


def _streamed(raw: str) -> str:
    text = []
    for line in raw.split("\n"):
        if line.startswith("data: ") and line != "data: [DONE]":
            try:
                choices = json.loads(line.removeprefix("data: "))["choices"]
                text += [one["delta"].get("content") or "" for one in choices]
            except (ValueError, TypeError, LookupError, AttributeError):
                text.append(line)
    return "".join(text)
