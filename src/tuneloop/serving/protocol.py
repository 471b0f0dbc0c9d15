"""The two ways to ask a replica for a reply, read strictly and answered in their own shapes. Pure: no torch.

OpenAI's `POST /v1/chat/completions`:

    {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64, "temperature": 0}

`temperature` and `top_p` left out take the values that the model's publisher advises, else 1. `max_tokens`
left out means 512, or what the context leaves. The role `developer` is read as `system`.

Azure's `POST /score`, nested as the published notebook sends it, or flat:

    {"input_data": {"input_string": [[{"role": "user", "content": "Hello"}]],
                    "parameters": {"temperature": 0.6, "top_p": 0.9, "do_sample": true,
                                   "max_new_tokens": 200}},
     "params": {}}
    {"input_data": {"input_string": [{"role": "user", "content": "Hello"}], "parameters": {}}}

One conversation, nested or flat, is answered by `{"output": "text"}`, several by
`{"output": ["text", "text"]}` in their order. `do_sample` left out is true when `temperature` or `top_p` is
given, else false (greedy).
`return_full_text` puts the conversation's rendered text before the reply. A conversation that ends on an
assistant turn is accepted: that turn is taken off, and the header `x-tuneloop-warning` says so.

A field that would be ignored is refused by name, unless ignoring it changes nothing (`user`, `metadata`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tuneloop.core.names import did_you_mean
from tuneloop.serving.wire import Refused, invalid, unsupported

DEFAULT_NEW_TOKENS = 512
MAX_CONVERSATIONS = 64
"""Of one `/score` request."""

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

_OBEYED = frozenset(
    {"messages", "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "n"}
    | {"stream", "stream_options"}
)
_HARMLESS = frozenset(("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier", "store"))
"""Accepted: they are notes of the caller, and change no reply."""
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none",),
}
"""Not supported, but accepted with a value that asks for nothing."""


@dataclass(frozen=True)
class Sampling:
    """None: the model's own advice, or the API's default."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()


Message = dict[str, str]


@dataclass(frozen=True)
class ChatCall:
    messages: list[Message]
    sampling: Sampling
    is_stream: bool = False
    includes_usage: bool = False


@dataclass(frozen=True)
class ScoreCall:
    conversations: list[list[Message]]
    sampling: Sampling
    returns_full_text: bool = False
    warnings: tuple[str, ...] = ()


# ---------------------------------------------------------------- OpenAI


def read_chat(body: Mapping[str, Any]) -> ChatCall:
    """Raises `Refused` (400), naming the field."""
    # None is how clients write "not given".
    given = {name: value for name, value in body.items() if value is not None}
    _refuse_unobeyed(given)
    if given.get("n", 1) != 1:
        raise unsupported("n", f"is {given['n']!r}; one reply per request is what this deployment gives.")
    stream = _flag(given, "stream")
    options = given.get("stream_options", {})
    if options and not stream:
        raise invalid("stream_options", "is only for requests with stream: true.")
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise invalid("stream_options", f"is {options!r}, expected {{'include_usage': true}}.")
    return ChatCall(
        messages=read_messages(given.get("messages"), "messages"),
        sampling=Sampling(
            max_new_tokens=_max_tokens(given),
            temperature=_number(given, "temperature", 0, 2),
            top_p=_number(given, "top_p", 0, 1),
            seed=_whole(given, "seed", -(2**63), 2**63 - 1),
            stop=_stop(given.get("stop")),
        ),
        is_stream=stream,
        includes_usage=_flag(options, "include_usage"),
    )


def _refuse_unobeyed(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name in _OBEYED or name in _HARMLESS:
            continue
        if name not in _NEUTRAL:
            known = [*_OBEYED, *_HARMLESS, *_NEUTRAL]
            hint = did_you_mean(name, known) or "Leave it out."
            raise unsupported(name, f"is not a field that this deployment obeys. {hint}")
        if not any(value == neutral and type(value) is type(neutral) for neutral in _NEUTRAL[name]):
            if isinstance(value, float) and value == 0 and 0 in _NEUTRAL[name]:
                continue
            raise unsupported(name, "is not supported by this deployment; leave it out.")


def _max_tokens(given: Mapping[str, Any]) -> int | None:
    old = _whole(given, "max_tokens", 1)
    new = _whole(given, "max_completion_tokens", 1)
    if old is not None and new is not None and old != new:
        raise invalid("max_completion_tokens", f"is {new} and max_tokens is {old}; send one of them.")
    return new if new is not None else old


def _stop(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value if value is not None else []
    if not isinstance(stops, list) or len(stops) > 4 or not all(isinstance(s, str) and s for s in stops):
        raise invalid("stop", "expected a text or a list of up to 4 texts, none of them empty.")
    for number, text in enumerate(stops):
        _check_unicode(text, f"stop[{number}]")
    return tuple(stops)


def completion_body(
    identity: Mapping[str, Any], text: str, reason: str, usage: dict[str, int]
) -> dict[str, Any]:
    """`identity` is that of `chat_identity`."""
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
    return {**identity, "object": "chat.completion", "choices": [choice], "usage": usage}


def chat_identity(completion_id: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{completion_id}", "created": int(time.time()), "model": model}


def chat_usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


@dataclass(frozen=True)
class ChunkWriter:
    """The events of one stream. With `includes_usage` every chunk has `usage`, null but in the last."""

    identity: Mapping[str, Any]
    includes_usage: bool

    def opening(self) -> bytes:
        return self._chunk({"role": "assistant", "content": ""})

    def content(self, text: str) -> bytes:
        return self._chunk({"content": text})

    def closing(self, reason: str, usage: dict[str, int]) -> bytes:
        """The finish reason, the usage if it was asked for, and `[DONE]`."""
        last = self._chunk({}, reason)
        if self.includes_usage:
            last += self._event({"choices": [], "usage": usage})
        return last + b"data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        usage = {"usage": None} if self.includes_usage else {}
        return self._event({"choices": [choice], **usage})

    def _event(self, fields: dict[str, Any]) -> bytes:
        body = {**self.identity, "object": "chat.completion.chunk", **fields}
        return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


# ---------------------------------------------------------------- /score

_SCORE_PARAMETERS = (
    "temperature",
    "top_p",
    "do_sample",
    "max_new_tokens",
    "return_full_text",
    "seed",
    "stop",
)


def read_score(body: Mapping[str, Any]) -> ScoreCall:
    """Raises `Refused` (400), naming the field."""
    _only(body, ("input_data", "params"), "")
    if body.get("params") not in (None, {}):
        raise unsupported("params", "must be empty; write generation parameters into input_data.parameters.")
    data = body.get("input_data")
    if not isinstance(data, dict):
        raise invalid("input_data", "expected an object with 'input_string' and 'parameters'.")
    _only(data, ("input_string", "parameters"), "input_data.")
    conversations, warnings = _conversations(data.get("input_string"))
    parameters = data.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise invalid("input_data.parameters", "expected an object.")
    _only(parameters, _SCORE_PARAMETERS, "input_data.parameters.")
    given = {name: value for name, value in parameters.items() if value is not None}
    sampling, ignored = _score_sampling(given)
    return ScoreCall(conversations, sampling, _flag(given, "return_full_text"), (*warnings, *ignored))


def _score_sampling(given: Mapping[str, Any]) -> tuple[Sampling, tuple[str, ...]]:
    sampling = Sampling(
        max_new_tokens=_whole(given, "max_new_tokens", 1),
        temperature=_number(given, "temperature", 0, 2),
        top_p=_number(given, "top_p", 0, 1),
        seed=_whole(given, "seed", -(2**63), 2**63 - 1),
        stop=_stop(given.get("stop")),
    )
    unused = [name for name in ("temperature", "top_p") if name in given]
    if _flag(given, "do_sample", default=bool(unused)):
        return sampling, ()
    warnings = (f"do_sample is false, so {' and '.join(unused)} had no effect",) if unused else ()
    return replace(sampling, temperature=0.0, top_p=None), warnings


def _conversations(value: object) -> tuple[list[list[Message]], tuple[str, ...]]:
    """`input_string`: one list of messages, or a list of such lists."""
    where = "input_data.input_string"
    if not isinstance(value, list) or not value:
        raise invalid(where, "expected a list of messages, or a list of such lists.")
    nested = value if isinstance(value[0], list) else [value]
    if len(nested) > MAX_CONVERSATIONS:
        raise invalid(
            where, f"holds {len(nested)} conversations, at most {MAX_CONVERSATIONS} are answered at once."
        )
    conversations, warnings = [], []
    for number, conversation in enumerate(nested):
        place = f"{where}[{number}]" if nested is value else where
        messages = read_messages(conversation, place)
        if messages[-1]["role"] == "assistant":
            messages.pop()
            warnings.append(f"{place} ends on an assistant turn, which was taken off")
        if not messages:
            raise invalid(place, "holds nothing but an assistant turn; there is nothing to reply to.")
        conversations.append(messages)
    return conversations, tuple(warnings)


def score_body(texts: Sequence[str]) -> dict[str, Any]:
    return {"output": texts[0] if len(texts) == 1 else list(texts)}


# ---------------------------------------------------------------- values


def read_messages(value: object, where: str) -> list[Message]:
    """Roles known, contents text. Raises `Refused` (400), naming the message."""
    if not isinstance(value, list) or not value:
        raise invalid(where, 'expected a list of messages: [{"role": "user", "content": "..."}].')
    return [_message(message, f"{where}[{number}]") for number, message in enumerate(value)]


def _message(message: object, where: str) -> Message:
    if not isinstance(message, dict):
        raise invalid(where, 'expected {"role": ..., "content": ...}.')
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise invalid(f"{where}.role", f"is {role!r}, expected one of {', '.join(_ROLES)}.")
    for name, extra in message.items():
        # `refusal` and the like come back as null when a client sends a reply of ours as history.
        if name not in ("role", "content") and extra not in (None, [], {}):
            raise unsupported(f"{where}.{name}", "is not supported by this deployment; leave it out.")
    content = _text(message.get("content"), f"{where}.content")
    if not content and role != "assistant":
        raise invalid(f"{where}.content", "is empty.")
    return {"role": _ROLES[role], "content": content}


def _text(content: object, where: str) -> str:
    """A text, or OpenAI's list of text parts."""
    if isinstance(content, list):
        for number, part in enumerate(content):
            if (
                not isinstance(part, dict)
                or part.get("type") != "text"
                or not isinstance(part.get("text"), str)
            ):
                raise unsupported(f"{where}[{number}]", "only parts of the type 'text' are supported.")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise invalid(where, "expected a text.")
    _check_unicode(content, where)
    return content


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as mistake:
        raise invalid(where, f"holds half of a surrogate pair at character {mistake.start}.") from None


def _only(given: Mapping[str, Any], known: Sequence[str], prefix: str) -> None:
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known) or f"There is: {', '.join(known)}."
            raise unsupported(f"{prefix}{name}", f"is not a field that this deployment obeys. {hint}")


def _flag(given: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = given.get(name, default)
    if not isinstance(value, bool):
        raise invalid(name, f"is {value!r}, expected true or false.")
    return value


def _whole(given: Mapping[str, Any], name: str, least: int, most: int | None = None) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not is_whole or value < least or (most is not None and value > most):
        limits = f"from {least}" if most is None else f"from {least} to {most}"
        raise invalid(name, f"is {value!r}, expected a whole number {limits}.")
    return int(value)


def _number(given: Mapping[str, Any], name: str, least: float, most: float) -> float | None:
    value = given.get(name)
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not least <= value <= most:
        raise invalid(name, f"is {value!r}, expected a number from {least} to {most}.")
    return float(value)


def new_tokens(sampling: Sampling, prompt_tokens: int, context_length: int) -> int:
    """How many tokens the reply may have. Raises 400, with both numbers, when prompt and reply do not fit."""
    if prompt_tokens >= context_length:
        message = (
            f"The conversation has {prompt_tokens} tokens; the model's context holds {context_length}, "
            "the reply included. Shorten it."
        )
        raise Refused(400, "context_length_exceeded", message, param="messages")
    wanted = sampling.max_new_tokens
    if wanted is None:
        return min(DEFAULT_NEW_TOKENS, context_length - prompt_tokens)
    if prompt_tokens + wanted > context_length:
        message = (
            f"The conversation has {prompt_tokens} tokens and {wanted} new ones were asked for; the model's "
            f"context holds {context_length}. Ask for at most {context_length - prompt_tokens}."
        )
        raise Refused(400, "context_length_exceeded", message, param="max_tokens")
    return wanted
