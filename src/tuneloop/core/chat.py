"""The one chat template: what a model is trained on is what it is served.

Preprocessing, evaluation and replicas render conversations here and nowhere else. Rendering equals
transformers' `apply_chat_template(tokenize=False)`; on top of it, `segments` says which characters the model
has to produce itself, and so which tokens count for the loss. Needs jinja2 only: never import torch,
transformers or tokenizers.

The learned span of an assistant turn is everything that the model must write after the prompt that it is
served with: the answer and the end-of-turn marker (or it would never learn to stop), but neither the turn's
header nor the line break after the marker.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from tuneloop.core import digest
from tuneloop.core.chat_syntax import (
    GENERATION_END,
    GENERATION_START,
    compile_template,
    end_marker,
    marks_generation,
    variables_of,
)
from tuneloop.core.errors import DataError, ModelUnavailable, Unsupported

ROLES = ("system", "user", "assistant")

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The named tokens that transformers hands to a template."""

Message = Mapping[str, Any]


class Finding(NamedTuple):
    """One mistake in one row. `field` is a path such as `messages[2].content`."""

    rule: str
    field: str
    value: str
    fix: str


class Rendered(NamedTuple):
    """`learned` holds (start, end) character positions in `text`, in order, not overlapping."""

    text: str
    learned: list[tuple[int, int]]


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and the special tokens that it may write. `origin` is for error messages."""

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    origin: str = "the model's chat template"

    @classmethod
    def from_folder(cls, folder: Path) -> ChatTemplate:
        """Of a tokenizer folder: `chat_template.jinja`, or the `chat_template` of `tokenizer_config.json`.
        Raises `ModelUnavailable`, naming what is missing."""
        config = _read_object(folder / "tokenizer_config.json")
        named = {**_read_object(folder / "special_tokens_map.json"), **config}
        tokens = {name: _token_text(named[name]) for name in SPECIAL_TOKENS if named.get(name) is not None}
        source = _template_source(folder, config)
        if source is None:
            raise ModelUnavailable(
                f"{folder} holds no chat template: neither chat_template.jinja nor 'chat_template' in "
                "tokenizer_config.json.",
                next_move="Take the model's chat version, or put its chat_template.jinja into the folder.",
            )
        return cls(source, tokens, f"the chat template in {folder}")

    @cached_property
    def digest(self) -> str:
        """`sha256:...` of the source and of those special tokens that the source mentions."""
        return digest.of_json({"template": self.source, "special_tokens": self._used_tokens})

    @cached_property
    def _used_tokens(self) -> dict[str, str]:
        used = self._compiled_or_refused()[1]
        return {name: token for name, token in self.special_tokens.items() if name in used}

    @property
    def writes_date(self) -> bool:
        """Whether what is rendered depends on the day it is rendered on."""
        return "strftime_now" in self.source

    @property
    def end_of_turn(self) -> str:
        """What follows every answer, such as `<|im_end|>`; empty when the template writes nothing there."""
        return self._habits.end_of_turn

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text of a conversation. Raises `DataError` with the template's own words when it refuses."""
        return self._render(messages, add_generation_prompt, track=False)

    def segments(self, messages: Sequence[Message]) -> Rendered:
        """The text and its learned spans, one per assistant turn that the template writes.

        An answer with the weight 0 (OpenAI's format for fine-tuning) is in the text and not learned. Raises
        `DataError` when the template refuses the conversation or leaves a message out, and `Unsupported` when
        the answers cannot be told from the rest of the text.
        """
        text = self.render(messages)
        if marks_generation(self.source):
            learned = _strip_markers(self._render(messages, False, track=True), text)
        else:
            learned = self._spans_by_frame(messages, text) or self._located(messages, text)
        return Rendered(text, self._without_weightless(messages, learned))

    def _located(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        _refuse_dropped(messages, text, self.origin)
        found = self._spans_by_placeholders(messages, text)
        return self._spans_by_prefixes(messages, text) if found is None else found

    def _without_weightless(
        self, messages: Sequence[Message], learned: list[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        counts = [message.get("weight") != 0 for message in messages if message["role"] == "assistant"]
        if all(counts):
            return learned
        if len(counts) != len(learned):
            raise Unsupported(
                f"{self.origin} marks {len(learned)} spans for {len(counts)} answers, so the answer with the "
                "weight 0 cannot be told from the others.",
                next_move="Mark every answer in the template with one {% generation %} block.",
            )
        return [span for span, is_learned in zip(learned, counts, strict=True) if is_learned]

    # ------------------------------------------------------------ rendering

    def _compiled_or_refused(self) -> tuple[jinja2.Template, frozenset[str]]:
        try:
            return compile_template(self.source, False), variables_of(self.source)
        except jinja2.TemplateError as error:
            raise Unsupported(f"{self.origin} is not a template that can be run: {error}.") from None

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool, track: bool) -> str:
        self._compiled_or_refused()
        template = compile_template(self.source, track)
        # As transformers does it: a key whose value is None counts as absent. Weights are for the loss.
        given = [
            {key: value for key, value in message.items() if value is not None and key != "weight"}
            for message in messages
        ]
        try:
            return template.render(
                messages=given,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise DataError(f"{self.origin} refuses the conversation: {error}") from None

    # ------------------------------------------------------------ learned spans

    @cached_property
    def _habits(self) -> _Habits:
        """What the template writes around an answer, found by rendering a conversation of placeholders."""
        mark = _PROBE[1]["content"]
        ended = self.render(_PROBE)
        opened = self.render(_PROBE, add_generation_prompt=True)
        followed = self.render([*_PROBE, _PROBE[0]])
        if not (mark in ended and mark in opened and mark in followed):
            raise Unsupported(
                f"{self.origin} does not write out the assistant's answer, so nothing can be learned with it."
            )
        tails = [text[text.index(mark) + len(mark) :] for text in (ended, opened, followed)]
        prompt = self.render(_PROBE[:1], add_generation_prompt=True)
        lead = ended[len(prompt) : ended.index(mark)] if ended.startswith(prompt) else ""
        return _Habits(lead, end_marker(tails, self.special_tokens.get("eos_token", "")))

    @cached_property
    def _frames(self) -> dict[tuple[str, ...], tuple[str, ...] | None]:
        """Roles to what the template writes before, between and after the contents; None where it does
        anything but write each content once, in order."""
        return {}

    def _spans_by_frame(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]] | None:
        """Where the text is the contents in the frame of their roles, as it nearly always is: the same spans
        as by placeholders, without rendering once more. None where it is not, and without answers."""
        roles = tuple(message["role"] for message in messages)
        if roles not in self._frames:
            if len(self._frames) >= _MOST_FRAMES:
                return None
            self._frames[roles] = self._frame(roles)
        frame = self._frames[roles]
        if frame is None or any(not _FRAMED_KEYS.issuperset(message) for message in messages):
            return None
        learned = []
        position = 0
        for between, message in zip(frame, messages, strict=False):
            content = message["content"]
            start = position + len(between)
            if not (text.startswith(between, position) and text.startswith(content, start)):
                return None
            position = start + len(content)
            if message["role"] == "assistant":
                if self._habits.lead and between.endswith(self._habits.lead):
                    start -= len(self._habits.lead)
                learned.append((start, position + len(self._marker_at(text, position))))
        return learned if text[position:] == frame[-1] else None

    def _frame(self, roles: tuple[str, ...]) -> tuple[str, ...] | None:
        marks = _placeholders(len(roles), "")
        try:
            rest = self.render(
                [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
            )
        except DataError:
            return None
        frame = []
        for mark in marks:
            between, found, rest = rest.partition(mark)
            if not found:
                return None
            frame.append(between)
        frame.append(rest)
        return None if any(mark in between for mark in marks for between in frame) else tuple(frame)

    def _spans_by_placeholders(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]] | None:
        """Render with every answer replaced by a placeholder: what stands between the placeholders is the
        template's. None where the template changes the answers by more than trimming them."""
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        marks = _placeholders(len(turns), text)
        replaced = list(messages)
        for turn, mark in zip(turns, marks, strict=True):
            replaced[turn] = {**messages[turn], "content": mark}
        rest = self.render(replaced)
        learned = []
        position = 0
        for turn, mark in zip(turns, marks, strict=True):
            between, found, rest = rest.partition(mark)
            if not found or not text.startswith(between, position):
                return None
            start = position + len(between)
            follows = _up_to_any(rest, marks)
            end = _end_of_answer(text, start, messages[turn]["content"], follows)
            if end is None:
                return None
            if self._habits.lead and between.endswith(self._habits.lead):
                start -= len(self._habits.lead)
            learned.append((start, end + len(self._marker_at(text, end))))
            position = end
        return learned if text[position:] == rest else None

    def _spans_by_prefixes(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Render the conversation up to each answer, as it is served: the answer begins where that ends, and
        ends with the first end-of-turn marker. Raises `Unsupported` where earlier text changes."""
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        starts = []
        for turn in turns:
            prompt = self.render(messages[:turn], add_generation_prompt=True) if turn else ""
            if not text.startswith(prompt):
                raise self._not_located(turn)
            starts.append(len(prompt))
        learned = []
        for turn, start, limit in zip(turns, starts, [*starts[1:], len(text)], strict=True):
            end = text.find(self.end_of_turn, start, limit) if self.end_of_turn else -1
            answer, content = text[start:end].strip(), str(messages[turn]["content"]).strip()
            # The two must end alike; if not, the marker that was found is not this answer's.
            if end < 0 or not answer or answer[-16:] != content[-len(answer[-16:]) :]:
                raise self._not_located(turn)
            learned.append((start, end + len(self.end_of_turn)))
        return learned

    def _marker_at(self, text: str, position: int) -> str:
        for marker in (self.end_of_turn, self.special_tokens.get("eos_token", "")):
            if marker and text.startswith(marker, position):
                return marker
        return ""

    def _not_located(self, turn: int) -> Unsupported:
        return Unsupported(
            f"{self.origin} rewrites earlier turns, so the answer in messages[{turn}] cannot be found in the "
            "rendered text.",
            next_move="Mark the answer in the template with {% generation %} ... {% endgeneration %}.",
        )


_MOST_FRAMES = 512
_FRAMED_KEYS = frozenset(("role", "content", "weight"))


class _Habits(NamedTuple):
    lead: str
    """What stands between the generation prompt and a last answer (Qwen3 writes an empty thought there)."""
    end_of_turn: str


_PROBE: tuple[dict[str, str], ...] = (
    {"role": "user", "content": "question\ue010"},
    {"role": "assistant", "content": "answer\ue011"},
)


def mask_tokens(offsets: Iterable[tuple[int, int]], learned: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens count for the loss: those that cover a learned character.

    `offsets` are (start, end) of each token in the same text, in order. A tokenizer that trims the offsets
    of spaces gives (end, end) for a token of spaces only: it belongs to the text before `end`.
    """
    mask = []
    spans = iter(learned)
    span = next(spans, None)
    for start, end in offsets:
        first = start if start < end else start - 1
        while span is not None and span[1] <= first:
            span = next(spans, None)
        mask.append(span is not None and first >= 0 and first < span[1] and end > span[0])
    return mask


# ---------------------------------------------------------------- finding answers in the text


def _placeholders(count: int, text: str) -> list[str]:
    """Strings of private-use characters that do not occur in `text`, none within another."""
    opening = next((chr(code) for code in range(0xE100, 0xF8FF) if chr(code) not in text), None)
    if opening is None:
        raise DataError("The conversation holds every private-use character of Unicode; remove some.")
    return [f"{opening}{number}{opening}" for number in range(count)]


def _up_to_any(text: str, marks: Sequence[str]) -> str:
    """`text` up to the first placeholder; all of them begin with the same character."""
    return text.partition(marks[0][0])[0]


def _end_of_answer(text: str, start: int, content: str, follows: str) -> int | None:
    """Where an answer that begins at `start`, and may have been trimmed, gives way to `follows`."""
    for written in (content, content.rstrip(), content.lstrip(), content.strip()):
        if text.startswith(written + follows, start):
            return start + len(written)
    return None


def _refuse_dropped(messages: Sequence[Message], text: str, origin: str) -> None:
    for number, message in enumerate(messages):
        if message["role"] != "assistant" and str(message["content"]).strip() not in text:
            raise DataError(
                f"{origin} leaves messages[{number}] out: it has no place for the role {message['role']!r}.",
                next_move="Move its text into the first user message.",
            )


def _strip_markers(marked: str, text: str) -> list[tuple[int, int]]:
    """The spans that the template itself marks with `{% generation %}`."""
    pieces = re.split(f"[{GENERATION_START}{GENERATION_END}]", marked)
    if "".join(pieces) != text:
        raise DataError("The conversation holds the private-use characters U+F8F0 or U+F8F1; remove them.")
    learned = []
    position = 0
    for number, piece in enumerate(pieces):
        # Every second piece stood between a start and an end.
        if number % 2:
            learned.append((position, position + len(piece)))
        position += len(piece)
    return learned


# ---------------------------------------------------------------- reading tokenizer folders


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelUnavailable(f"{path} is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ModelUnavailable(f"{path} holds no JSON object.")
    return value


def _token_text(token: object) -> str:
    """Tokens are written as text or as `{"content": text, ...}`."""
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    written = config.get("chat_template")
    if isinstance(written, list):
        written = {entry["name"]: entry["template"] for entry in written}.get("default")
    return written if isinstance(written, str) else None
