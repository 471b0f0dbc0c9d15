"""Which tokens count for the loss, found without asking the tokenizer where each token stands.

`core.chat.mask_tokens` over a tokenizer's offsets is the definition. Offsets cost as much as rendering and
reading together, though, and for the tokenizers of chat models they follow from the ids: every token stands
for so many bytes of text, one after the other without a gap, so sums of those lengths are offsets. Each row
is checked: at every added token (`<|im_end|>` and the like) and at the end the sums must meet the text. A
row whose sums do not, or whose tokenizer is of another kind, is told by None: it takes the way of the
definition. So both ways always agree (tests/unit/test_tokens_spans.py).

Two kinds are known. Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM2): a character of a token stands for a
byte. BPE with byte fallback (Llama 2, Phi-3, Mistral, Gemma): U+2581 stands for a space, `<0x0A>` for a
byte, and a space may be put before each piece of text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

BLANK = "\u2581"
WHITE_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
"""What Rust's `char::is_whitespace` holds for white space: the Unicode property White_Space."""
_BLANKS_BEFORE = re.compile(f"[{WHITE_SPACE}]*\\Z")
_BLANKS_AFTER = re.compile(f"[{WHITE_SPACE}]*")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_IMPOSSIBLE = 1 << 40
"""Bytes of a token whose length cannot be told: no sum that holds it meets a text."""


@dataclass(frozen=True)
class Added:
    """A token that is looked for in the text before anything else."""

    number: int
    eats_before: bool
    """It takes the white space before it along."""
    eats_after: bool

    @classmethod
    def of(cls, tokens: Sequence[Mapping[str, Any]]) -> dict[str, Added]:
        """By their text."""
        return {each["content"]: cls(each["id"], each["lstrip"], each["rstrip"]) for each in tokens}

    @staticmethod
    def without_start(text: str) -> str:
        return text[_BLANKS_AFTER.match(text).end() :]  # type: ignore[union-attr]

    @staticmethod
    def without_end(text: str) -> str:
        return text[: _BLANKS_BEFORE.search(text).start()]  # type: ignore[union-attr]


@dataclass(frozen=True)
class Prepend:
    """Where a space is put before a piece of text that stands between two added tokens."""

    only_first: bool = False
    unless_there: bool = False

    def applies(self, piece: str, is_first: bool) -> bool:
        if not piece or (self.only_first and not is_first):
            return False
        return not (self.unless_there and piece[0] in (" ", BLANK))


class Spans:
    """Learned characters to learned tokens, for one tokenizer."""

    def __init__(
        self,
        lengths: np.ndarray,
        added: Mapping[str, Added],
        prepend: Prepend | None,
        *,
        trims: bool,
        normalises: bool,
    ) -> None:
        self._lengths = lengths
        self._is_added = np.zeros(len(lengths), dtype=np.bool_)
        self._is_added[[token.number for token in added.values()]] = True
        self._added = added
        ordered = sorted(added, key=lambda text: (-len(text), text))
        self._pattern = re.compile("|".join(map(re.escape, ordered)) or "(?!)")
        self._prepend = prepend
        self._trims = trims
        self._normalises = normalises
        self._is_plain = prepend is None and not any(
            each.eats_before or each.eats_after for each in added.values()
        )

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Spans | None:
        """Of a tokenizer as its JSON describes it; None for a kind that is not known."""
        kind = kind_of(described)
        if kind is None:
            return None
        tokens = described.get("added_tokens") or []
        lengths = _lengths(described["model"], tokens, kind.is_byte_level)
        added = Added.of(tokens)
        trims = any(each.get("trim_offsets") for each in _parts(described, "post_processor"))
        return cls(lengths, added, kind.prepend, trims=trims, normalises=kind.normalises)

    def mask(self, ids: np.ndarray, text: str, learned: Sequence[tuple[int, int]]) -> np.ndarray | None:
        """(T,) booleans for the T tokens of `text`, or None where the sums do not tell."""
        if self._normalises and not unicodedata.is_normalized("NFC", text):
            return None
        if self._trims and text[:1] == " ":
            # Where a token of nothing but spaces is trimmed to depends on whether it comes first.
            return None
        if len(ids) == 0 or int(ids.max()) >= len(self._lengths):
            return None
        lengths = self._lengths[ids]
        to_bytes = _Bytes(text)
        if not self._is_plain and not self._meets_added(lengths, ids, text, to_bytes):
            return None
        ends = np.cumsum(lengths)
        if int(ends[-1]) != to_bytes.total:
            return None
        return self._covered(ends, lengths, [(to_bytes(start), to_bytes(end)) for start, end in learned])

    def _covered(
        self, ends: np.ndarray, lengths: np.ndarray, learned: list[tuple[int, int]]
    ) -> np.ndarray | None:
        starts = ends - lengths
        if not self._is_plain:
            # A token of nothing but a space that was put in stands at the first character after it.
            ends = np.maximum(ends, starts + 1)
        mask = np.zeros(len(ends), dtype=np.bool_)
        for start, end in learned:
            first = int(ends.searchsorted(start, side="right"))
            stop = int(starts.searchsorted(end, side="left"))
            if self._trims and not (_is_edge(starts, first, start) and _is_edge(ends, stop - 1, end)):
                # Offsets without their spaces: the definition knows which half it belongs to.
                return None
            mask[first:stop] = True
        return mask

    def _meets_added(self, lengths: np.ndarray, ids: np.ndarray, text: str, to_bytes: _Bytes) -> bool:
        """Whether the sums meet the text at every added token; `lengths` is set right where a space was put
        in, and where a token took the white space beside it along."""
        places = np.flatnonzero(self._is_added[ids])
        found = list(self._found(text))
        if [number for number, _, _ in found] != ids[places].tolist():
            return False
        sums = np.concatenate(([0], np.cumsum(lengths)))
        token, character = 0, 0
        bounds = [*zip(places.tolist(), ((start, end) for _, start, end in found), strict=True)]
        for place, (start, end) in [*bounds, (len(ids), (len(text), len(text)))]:
            is_put = self._prepend is not None and self._prepend.applies(
                text[character:start], is_first=character == 0
            )
            if int(sums[place] - sums[token]) != to_bytes(start) - to_bytes(character) + is_put:
                return False
            if is_put:
                lengths[token] -= 1
            if place < len(ids):
                lengths[place] = to_bytes(end) - to_bytes(start)
            token, character = place + 1, end
        return True

    def _found(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(id, start, end) of the added tokens in the text, white space that they take along included."""
        reached = 0
        for match in self._pattern.finditer(text):
            added = self._added[match.group()]
            start, end = match.span()
            if added.eats_before:
                start = _BLANKS_BEFORE.search(text, reached, start).start()  # type: ignore[union-attr]
            if added.eats_after:
                end = _BLANKS_AFTER.match(text, end).end()  # type: ignore[union-attr]
            yield added.number, max(start, reached), end
            reached = end


class _Bytes:
    """Characters to bytes of one text; asked for in rising order it goes over the text once."""

    def __init__(self, text: str) -> None:
        self._text = None if text.isascii() else text
        self._at = self._bytes = 0
        self._known: dict[int, int] = {}
        self.total = len(text) if self._text is None else len(text.encode())

    def __call__(self, character: int) -> int:
        if self._text is None:
            return character
        found = self._known.get(character)
        if found is None:
            if character < self._at:
                self._at = self._bytes = 0
            self._bytes += len(self._text[self._at : character].encode())
            self._at = character
            found = self._known[character] = self._bytes
        return found


def _is_edge(positions: np.ndarray, index: int, wanted: int) -> bool:
    return 0 <= index < len(positions) and int(positions[index]) == wanted


# ---------------------------------------------------------------- what kind of tokenizer it is


def _parts(described: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The steps of a normaliser, pre-tokenizer or post-processor, nested sequences taken apart."""
    return list(_flat(described.get(name)))


def _flat(part: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
    if part is None:
        return
    if part["type"] != "Sequence":
        yield dict(part)
        return
    for key in ("normalizers", "pretokenizers", "processors"):
        for inner in part.get(key) or ():
            yield from _flat(inner)


_SPLITTERS = ("Split", "Digits", "Punctuation", "ByteLevel")
"""Pre-tokenizers that take text apart and change nothing; one that is told to drop some fails in the sums."""


class Kind(NamedTuple):
    is_byte_level: bool
    """Characters of tokens are bytes; else they are characters, and blanks are U+2581."""
    prepend: Prepend | None
    normalises: bool
    """Text is brought to NFC."""
    before: tuple[Mapping[str, Any], ...]
    """The pre-tokenizers."""


def kind_of(described: Mapping[str, Any]) -> Kind | None:
    """Of a tokenizer as its JSON describes it; None for a kind that is not known."""
    model = described["model"]
    is_known = model.get("type") == "BPE" and not model.get("dropout")
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    tokens = described.get("added_tokens") or []
    if not is_known or affixes or any(each.get("single_word") for each in tokens):
        return None
    normaliser, before = _parts(described, "normalizer"), _parts(described, "pre_tokenizer")
    return _byte_level(normaliser, before) or _with_blanks(normaliser, before)


def _byte_level(normaliser: list[dict[str, Any]], before: list[dict[str, Any]]) -> Kind | None:
    levels = [each for each in before if each["type"] == "ByteLevel"]
    if not levels or levels[0].get("add_prefix_space") or len(levels) > 1:
        return None
    if any(each["type"] not in _SPLITTERS for each in before):
        return None
    if any(each["type"] != "NFC" for each in normaliser):
        return None
    return Kind(True, None, bool(normaliser), tuple(before))


def _with_blanks(normaliser: list[dict[str, Any]], before: list[dict[str, Any]]) -> Kind | None:
    prepend = None
    if normaliser and normaliser[0] == {"type": "Prepend", "prepend": BLANK}:
        prepend, normaliser = Prepend(), normaliser[1:]
    if normaliser == [_TO_BLANK]:
        is_whole = all(each["type"] == "Split" for each in before)
        return Kind(False, prepend, False, tuple(before)) if is_whole else None
    if normaliser or prepend or [each["type"] for each in before] != ["Metaspace"]:
        return None
    scheme = before[0].get("prepend_scheme")
    if before[0].get("replacement") != BLANK or scheme not in ("always", "first", "never"):
        return None
    return Kind(False, _SCHEMES[scheme], False, tuple(before))


_TO_BLANK = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
_SCHEMES = {"always": Prepend(unless_there=True), "first": Prepend(True, True), "never": None}


def _lengths(model: Mapping[str, Any], added: list[dict[str, Any]], is_byte_level: bool) -> np.ndarray:
    """Bytes of text that each id stands for."""
    vocabulary: Mapping[str, int] = model["vocab"]
    highest = max((*vocabulary.values(), *(each["id"] for each in added)), default=-1)
    lengths = np.full(highest + 1, _IMPOSSIBLE, dtype=np.int64)
    has_bytes = bool(model.get("byte_fallback"))
    for text, number in vocabulary.items():
        if is_byte_level:
            lengths[number] = len(text)
        elif has_bytes and _BYTE_TOKEN.fullmatch(text):
            lengths[number] = 1
        else:
            lengths[number] = len(text.replace(BLANK, " ").encode())
    for each in added:
        lengths[each["id"]] = len(each["content"].encode())
    unknown = vocabulary.get(model.get("unk_token") or "")
    if unknown is not None and not is_byte_level:
        lengths[unknown] = _IMPOSSIBLE
    return lengths
