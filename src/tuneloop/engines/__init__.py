"""Engines: what turns token ids into more of them. One small seam, behind which each engine lives in a file.

    engine = engines.open(path)                       # loads; raises ModelUnavailable
    ids = engine.encode(messages)                     # through core.chat; raises DataError
    ticket = engine.submit(GenerationRequest(ids), sink)   # the sink is called with every chunk
    ticket.cancel()                                   # stops it within a step
    engine.close()

`submit` may be called from any thread, and returns at once; whether requests are batched or take turns is the
engine's own affair. Sinks are called from the engine's thread and must not block. The last chunk of a request
has a `finish_reason`, and none comes after it. This module imports no engine until one is opened: a process
pays for the libraries of its own engine only.
"""

from __future__ import annotations

import importlib
import queue
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from tuneloop.core.chat import ChatTemplate
from tuneloop.core.errors import NotFound

FinishReason = Literal["stop", "length", "cancelled", "error"]

ENGINES = ("transformers",)
"""Each is a module of this package with a function `load(path) -> Engine`."""


@dataclass(frozen=True)
class GenerationRequest:
    """What to continue, and how. Greedy when `temperature` is 0, whatever the other choices say."""

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Texts at which the reply ends; they are not part of it."""


@dataclass(frozen=True)
class GenerationChunk:
    """A piece of a reply. `text` is whole characters; empty while a character is still incomplete."""

    text: str
    token_ids: tuple[int, ...] = ()
    """Every token that was generated, the end-of-turn marker included."""
    finish_reason: FinishReason | None = None
    error: BaseException | None = None


@dataclass(frozen=True)
class Completion:
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


Sink = Callable[[GenerationChunk], None]


class Ticket(Protocol):
    def cancel(self) -> None:
        """The request ends with `cancelled` within a step. A request that has ended is not changed."""


class Engine(Protocol):
    name: str
    context_length: int
    """Tokens of prompt and reply together."""
    template: ChatTemplate

    @property
    def defaults(self) -> Mapping[str, float]:
        """`temperature` and `top_p` that the model's publisher advises, if any."""

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """The prompt's ids, equal to `apply_chat_template(add_generation_prompt=True)`."""

    def submit(self, request: GenerationRequest, sink: Sink) -> Ticket: ...

    def complete(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """The replies to all of them, in order, as fast as the engine can; waits. Raises what went wrong."""

    def close(self) -> None:
        """Cancel what runs and wait until the engine's threads have ended."""


def open(path: Path, name: str = "transformers") -> Engine:
    """The engine `name` with the model in `path` (Hugging Face or MLflow layout) loaded."""
    if name not in ENGINES:
        raise NotFound(f"There is no engine {name!r}; there is: {', '.join(ENGINES)}.")
    engine: Engine = importlib.import_module(f"tuneloop.engines.{name}").load(path)
    return engine


def collect(chunks: queue.SimpleQueue[GenerationChunk]) -> Completion:
    """The whole reply whose chunks arrive there; waits for it. Raises what the engine raised."""
    text: list[str] = []
    token_ids: list[int] = []
    while True:
        chunk = chunks.get()
        text.append(chunk.text)
        token_ids.extend(chunk.token_ids)
        if chunk.error is not None:
            raise chunk.error
        if chunk.finish_reason is not None:
            return Completion("".join(text), tuple(token_ids), chunk.finish_reason)
