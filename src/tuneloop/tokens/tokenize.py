"""Conversations to token ids, each marked when it counts for the loss."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from tuneloop.core.chat import ChatTemplate, Finding, Message, Rendered, mask_tokens
from tuneloop.core.data.rows import Row
from tuneloop.core.data.rules import check_template
from tuneloop.core.errors import DataError, Unsupported
from tuneloop.tokens.backend import Backend, load_backend
from tuneloop.tokens.folders import load_template, resolve_folders
from tuneloop.tokens.lengths import POLICIES, LongRows, Loss, Turns, first_turns, last_turns
from tuneloop.tokens.spans import Spans
from tuneloop.tokens.units import Units


class Tokens(NamedTuple):
    """A conversation as it is trained on."""

    input_ids: np.ndarray
    """(T,) int32"""
    learn: np.ndarray
    """(T,) bool: whether the token counts for the loss, as something to predict."""

    @property
    def tokens(self) -> int:
        return len(self.input_ids)

    @property
    def learned(self) -> int:
        """Without the first token: it has nothing before it that it could be predicted from."""
        return int(np.count_nonzero(self.learn[1:]))


class Explained(NamedTuple):
    """A conversation as the model will see it."""

    tokens: int
    learned_tokens: int
    spans: list[tuple[str, bool]]
    """Text and whether it is learned, one after the other: all of the rendered text."""


class Tokenised(NamedTuple):
    """What came of one row."""

    row: Row
    tokens: list[Tokens]
    """Mostly one; several of a row that was split; none of a bad row and of one that was dropped."""
    findings: list[Finding]
    """Why it cannot be learned from; empty for a good row."""
    length: int = 0
    """Tokens of the whole row, before any policy."""
    turns: int = 0
    """Turns that are left."""
    is_long: bool = False
    lost: Loss = Loss()
    would_lose: Mapping[LongRows, Loss] = {}
    """Of a row that is too long, under the policy `error`: what each of the others would take away."""


class Tokenize:
    """Rows to tokens as the model's own `apply_chat_template(tokenize=True)` would have them, and a mask that
    equals `core.chat.mask_tokens` over the tokenizer's offsets. Picklable, for worker processes."""

    def __init__(
        self,
        folder: Path,
        max_seq_length: int = -1,
        long_rows: LongRows = "error",
        *,
        cache: Path | None = None,
    ) -> None:
        """`folder`: a model, or a tokenizer with its config.json. `cache`: see `load_backend`. Raises
        `ModelUnavailable`, and `Unsupported` for more tokens than the model reads."""
        backend = load_backend(folder, cache)
        longest = _longest(folder, backend, max_seq_length)
        self._set(backend, load_template(folder), longest, long_rows)

    def _set(self, backend: Backend, template: ChatTemplate, longest: int, long_rows: LongRows) -> None:
        self.template = template
        self.max_seq_length = longest
        self.long_rows = long_rows
        self.special_pattern = re.compile("|".join(map(re.escape, backend.special_tokens)) or "(?!)")
        """Matches the text of any special token: wherever it stands, it is tokenised as that token."""
        self._special_starts = {text[0] for text in backend.special_tokens}
        self._backend = backend

    @cached_property
    def _rust(self) -> Tokenizer:
        """Built where it is used: who only hands this on to worker processes needs none."""
        return self._backend.tokenizer()

    @cached_property
    def _spans(self) -> Spans | None:
        return Spans.of(json.loads(self._backend.described))

    @cached_property
    def _units(self) -> Units | None:
        return Units.of(json.loads(self._backend.described), self._rust)

    def __getstate__(self) -> tuple[Any, ...]:
        return self._backend, self.template, self.max_seq_length, self.long_rows

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._set(*state)

    def __call__(
        self, rows: Sequence[Row], column: str = "messages"
    ) -> Iterator[tuple[Row, list[Tokens] | list[Finding]]]:
        """Rows whose `messages` have passed `check_row`, in order; no tokens and no findings: dropped."""
        for each in self.rows(rows, column):
            yield each.row, each.findings or each.tokens

    def rows(self, rows: Sequence[Row], column: str = "messages") -> Iterator[Tokenised]:
        """The same, with what was lost."""
        conversations = [_messages(row, column) for row in rows]
        encoded = self._encode(conversations, column)
        for row, messages, each in zip(rows, conversations, encoded, strict=True):
            if isinstance(each, list):
                yield Tokenised(row, [], each)
            elif each.tokens > self.max_seq_length:
                yield self._shorten(row, messages, each, column)
            elif not each.learned:
                yield Tokenised(row, [], [self._nothing_learned(each, column)], each.tokens)
            else:
                yield Tokenised(row, [each], [], each.tokens, _turns(messages))

    def holds_special_text(self, messages: Sequence[Message]) -> bool:
        """Whether somebody wrote what reads as a special token."""
        return any(
            self.special_pattern.search(message["content"]) is not None
            for message in messages
            if any(start in message["content"] for start in self._special_starts)
        )

    def explain(self, messages: Sequence[Message]) -> Explained:
        """For people, of a conversation that can be rendered: the text, cut where what is learned begins and
        ends, by tokens."""
        rendered = self.template.segments(messages)
        (encoding,) = self._rust.encode_batch([rendered.text], add_special_tokens=False)
        learn = mask_tokens(encoding.offsets, rendered.learned)
        spans: list[tuple[str, bool]] = []
        position = 0
        for (_, end), is_learned in zip(encoding.offsets, learn, strict=True):
            if end > position:
                text = rendered.text[position:end]
                if spans and spans[-1][1] == is_learned:
                    text = spans.pop()[0] + text
                spans.append((text, is_learned))
                position = end
        if position < len(rendered.text):
            spans.append((rendered.text[position:], False))
        return Explained(len(learn), sum(learn[1:]), spans)

    # ------------------------------------------------------------ ids and marks

    def _encode(
        self, conversations: Sequence[Sequence[Message]], column: str
    ) -> list[Tokens | list[Finding]]:
        rendered = [self._render(messages, column) for messages in conversations]
        good = [each for each in rendered if isinstance(each, Rendered)]
        tokens = iter(self._tokens(good))
        return [next(tokens) if isinstance(each, Rendered) else each for each in rendered]

    def _render(self, messages: Sequence[Message], column: str) -> Rendered | list[Finding]:
        try:
            return self.template.segments(messages)
        except (DataError, Unsupported) as refused:
            fix = refused.next_move or "Change the conversation to what the template takes."
            roles = ", ".join(str(message["role"]) for message in messages[:4])
            found = Finding("template", column, f"roles {roles}: {refused.message}", fix)
            return check_template(self.template, messages, column) or [found]

    def _tokens(self, rendered: Sequence[Rendered]) -> list[Tokens]:
        if self._spans is None:
            return self._by_offsets(rendered)
        found: list[Tokens | None] = []
        for ids, each in zip(self._ids([each.text for each in rendered]), rendered, strict=True):
            mask = self._spans.mask(ids, each.text, each.learned)
            found.append(None if mask is None else Tokens(ids, mask))
        rest = iter(
            self._by_offsets([each for each, one in zip(rendered, found, strict=True) if one is None])
        )
        return [next(rest) if each is None else each for each in found]

    def _ids(self, texts: list[str]) -> list[np.ndarray]:
        if self._units is not None:
            return self._units.encode(texts)
        encodings = self._rust.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _by_offsets(self, rendered: Sequence[Rendered]) -> list[Tokens]:
        """The definition: where the tokenizer itself says that each token stands."""
        encodings = self._rust.encode_batch([each.text for each in rendered], add_special_tokens=False)
        return [
            Tokens(
                np.array(encoding.ids, dtype=np.int32),
                np.array(mask_tokens(encoding.offsets, each.learned), dtype=np.bool_),
            )
            for encoding, each in zip(encodings, rendered, strict=True)
        ]

    # ------------------------------------------------------------ rows that are too long

    def _shorten(self, row: Row, messages: list[Message], whole: Tokens, column: str) -> Tokenised:
        if self.long_rows == "error":
            losses = {policy: self._apply(policy, messages, whole)[2] for policy in POLICIES[1:]}
            found = [self._too_long(whole, column)]
            return Tokenised(row, [], found, whole.tokens, is_long=True, would_lose=losses)
        kept, turns, lost = self._apply(self.long_rows, messages, whole)
        if self.long_rows == "cut" and not kept:
            return Tokenised(
                row, [], [self._nothing_learned(whole, column)], whole.tokens, is_long=True, lost=lost
            )
        return Tokenised(row, kept, [], whole.tokens, turns, is_long=True, lost=lost)

    def _apply(
        self, policy: LongRows, messages: list[Message], whole: Tokens
    ) -> tuple[list[Tokens], int, Loss]:
        """What is kept, the turns in it, and what is lost."""
        turns = Turns.of(messages)
        if policy == "keep_last_turns":
            found = last_turns(turns, self.max_seq_length, self._one)
            pieces = [] if found is None else [found]
        elif policy == "split_turns":
            pieces = self._split(turns)
        elif policy == "cut":
            return self._cut(turns, whole)
        else:
            pieces = []
        kept = [tokens for _, tokens in pieces]
        count = sum(number for number, _ in pieces)
        learned = max(0, whole.learned - sum(each.learned for each in kept))
        return kept, count, Loss(int(not kept), len(turns.turns) - count, learned)

    def _split(self, turns: Turns) -> list[tuple[int, Tokens]]:
        pieces, start = [], 0
        while start < len(turns.turns):
            found = first_turns(turns, start, self.max_seq_length, self._one)
            if found is not None:
                pieces.append(found)
            # A turn that does not fit by itself is left out.
            start += 1 if found is None else found[0]
        return pieces

    def _cut(self, turns: Turns, whole: Tokens) -> tuple[list[Tokens], int, Loss]:
        kept = Tokens(whole.input_ids[: self.max_seq_length], whole.learn[: self.max_seq_length])
        fitting = first_turns(turns, 0, self.max_seq_length, self._one)
        count = 0 if fitting is None else fitting[0]
        learned = whole.learned - kept.learned
        if not kept.learned:
            return [], 0, Loss(1, len(turns.turns), whole.learned)
        return [kept], count, Loss(0, len(turns.turns) - count, learned)

    def _one(self, messages: list[Message]) -> Tokens | None:
        (found,) = self._encode([messages], "messages")
        return found if isinstance(found, Tokens) and found.learned else None

    def _too_long(self, whole: Tokens, column: str) -> Finding:
        fix = "Raise preprocess.max_seq_length, shorten the row, or choose preprocess.long_rows."
        return Finding("max_seq_length", column, f"{whole.tokens} tokens, limit {self.max_seq_length}", fix)

    def _nothing_learned(self, whole: Tokens, column: str) -> Finding:
        fix = "Raise preprocess.max_seq_length, or shorten what stands before the first answer."
        shown = f"{whole.tokens} tokens, none to learn among the first {self.max_seq_length}"
        return Finding("learned_token", column, shown, fix)


def _messages(row: Row, column: str) -> list[Message]:
    assert row.value is not None
    return list(row.value[column])


def _turns(messages: Sequence[Message]) -> int:
    """As `Turns` counts them."""
    return len(Turns.of(messages).turns)


def _longest(model: Path, backend: Backend, wanted: int) -> int:
    config = json.loads((resolve_folders(model)[0] / "config.json").read_text(encoding="utf-8"))
    bounds = [config.get("max_position_embeddings"), backend.model_max_length]
    most = min(int(bound) for bound in bounds if bound)
    if wanted > most:
        raise Unsupported(
            f"preprocess.max_seq_length is {wanted}, and the model reads at most {most} tokens.",
            next_move=f"Set it to {most} or less, or to -1 for the model's maximum.",
        )
    return most if wanted < 0 else wanted
