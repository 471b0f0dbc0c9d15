"""Token ids by remembered words: what the tokenizer gives for a text, for a fraction of its work.

The words of chat data come again and again, and each of them is cut into tokens by itself, if text is cut
where no token can reach across. Then a text's ids are those of its words, one after the other, and a word has
to be given to the tokenizer once. Where text may be cut, and why that is exact:

- At added tokens (`<|im_end|>`): the tokenizer looks for them first and treats what is between them apart.
- Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM2, Phi-4): before a space that follows something else than
  white space. No alternative of the known patterns takes in a space behind such a character, and none looks
  ahead from one word into the next: the only look-ahead, `\\s+(?!\\S)`, begins with white space, and a word
  ends with none. NFC composes nothing with a space.
- BPE with blanks (Llama 2, Phi-3): before a U+2581 that follows another character, when no token of the
  vocabulary holds such a pair. Merges make tokens of the vocabulary only, so none reaches across.

For tokenizers of any other kind there are no units; tests/unit/test_tokens_units.py holds the rest to the
tokenizer itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from tuneloop.tokens.spans import BLANK, WHITE_SPACE, Added, Kind, kind_of

MOST_CHARACTERS = 2_000_000
"""Of all words that are remembered, some 30 MB; then it begins anew."""

_Words = dict[str, tuple[int, ...]]
_Piece = tuple[bool, list[str]]
"""(whether each has the blank before it that it was cut off with, words)"""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_END = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = frozenset(
    {
        # Llama 3 and Qwen 2.
        *(
            _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _END
            for digits in (r"\p{N}{1,3}", r"\p{N}")
        ),
        # cl100k, as Phi-4 has it.
        _CONTRACTIONS
        + r"|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        # o200k, as Phi-4-mini has it.
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|"
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _END,
    }
)
"""Patterns of `Split` for which the second rule above was looked through."""

_SPACES = f"{WHITE_SPACE}\x1c-\x1f"
"""White space for Rust's patterns or for Python's."""
_CUT = re.compile(f"(?<=[^{_SPACES}]) ")
_CUT_BLANKS = re.compile(f"(?<=[^{BLANK}]){BLANK}")
_DOUBTFUL = tuple(f"{space} " for space in " \t\n\x0b\x0c\r\x1c\x1d\x1e\x1f")
"""What in a text of ASCII makes a space one that may not be cut before."""


class Units:
    """One tokenizer with its memory. Not for threads."""

    def __init__(self, tokenizer: Tokenizer, added: Mapping[str, Added], kind: Kind) -> None:
        self._tokenizer = tokenizer
        self._added = added
        self._kind = kind
        ordered = sorted(added, key=lambda text: (-len(text), text))
        self._pattern = re.compile(f"({'|'.join(map(re.escape, ordered)) or '(?!)'})")
        self._eats = any(each.eats_before or each.eats_after for each in added.values())
        self._begin()

    @classmethod
    def of(cls, described: Mapping[str, Any], tokenizer: Tokenizer) -> Units | None:
        """Of a tokenizer and its JSON; None for a kind for which no words can be told."""
        known = kind_of(described)
        if known is None or not _may_be_cut(described, known):
            return None
        tokens = described.get("added_tokens") or []
        if any(each.get("normalized") and described.get("normalizer") for each in tokens):
            return None
        return cls(tokenizer, Added.of(tokens), known)

    def _begin(self) -> None:
        self._characters = 0
        self._alone: _Words = {text: (each.number,) for text, each in self._added.items()}
        """Words as they are written."""
        self._behind_blank: _Words = {}
        """Words that a space, or a blank, was cut off from."""

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """(T,) int32 ids of each text, without any that a post-processor would add."""
        if self._characters > MOST_CHARACTERS:
            self._begin()
        pieces = [self._pieces(text) for text in texts]
        self._learn(chain.from_iterable(pieces))
        return [self._ids(each) for each in pieces]

    def _ids(self, pieces: list[_Piece]) -> np.ndarray:
        words = (
            map((self._behind_blank if has_blank else self._alone).__getitem__, keys)
            for has_blank, keys in pieces
        )
        return np.fromiter(chain.from_iterable(chain.from_iterable(words)), dtype=np.int32)

    # ------------------------------------------------------------ cutting

    def _pieces(self, text: str) -> list[_Piece]:
        parts = self._pattern.split(text)
        if self._eats:
            self._take_white_space(parts)
        found: list[_Piece] = []
        for place, part in enumerate(parts):
            if place % 2:
                found.append((False, [part]))
            elif part:
                self._cut(part, place == 0, found)
        return found

    def _take_white_space(self, parts: list[str]) -> None:
        """Of what stands between added tokens, what belongs to the tokens."""
        for place in range(1, len(parts), 2):
            added = self._added[parts[place]]
            if added.eats_after:
                parts[place + 1] = added.without_start(parts[place + 1])
            if added.eats_before:
                parts[place - 1] = added.without_end(parts[place - 1])

    def _cut(self, part: str, is_first: bool, found: list[_Piece]) -> None:
        if self._kind.is_byte_level:
            words = part.split(" ") if _is_plain(part) else _CUT.split(part)
        else:
            text = part.replace(" ", BLANK)
            if self._kind.prepend is not None and self._kind.prepend.applies(part, is_first):
                text = BLANK + text
            words = text.split(BLANK) if BLANK * 2 not in text else _CUT_BLANKS.split(text)
        # What begins with the blank has nothing before it.
        if words[0]:
            found.append((False, words[:1]))
        if len(words) > 1:
            found.append((True, words[1:]))

    # ------------------------------------------------------------ asking the tokenizer

    def _learn(self, pieces: Iterable[_Piece]) -> None:
        new: tuple[set[str], set[str]] = (set(), set())
        known = (self._alone, self._behind_blank)
        for has_blank, words in pieces:
            new[has_blank].update(words)
        for has_blank in (False, True):
            # Sorted, so that the tokenizer is asked the same in every process.
            words = sorted(new[has_blank] - known[has_blank].keys())
            blank = "" if not has_blank else " " if self._kind.is_byte_level else BLANK
            known[has_blank].update(zip(words, self._ask([blank + word for word in words]), strict=True))
            self._characters += sum(map(len, words))

    def _ask(self, words: list[str]) -> list[tuple[int, ...]]:
        if self._kind.is_byte_level:
            encodings = self._tokenizer.encode_batch_fast(words, add_special_tokens=False)
            return [tuple(encoding.ids) for encoding in encodings]
        # The normaliser has been at them: the model alone.
        model = self._tokenizer.model
        return [tuple(token.id for token in model.tokenize(word)) for word in words]


def _is_plain(text: str) -> bool:
    """Whether text may be cut before every space."""
    return text.isascii() and not any(pair in text for pair in _DOUBTFUL)


def _may_be_cut(described: Mapping[str, Any], kind: Kind) -> bool:
    if kind.is_byte_level:
        return _has_known_pattern(kind.before)
    vocabulary = described["model"]["vocab"]
    return (
        BLANK in vocabulary
        # Gemma's takes text apart at spaces, of which there is none any more.
        and all(each.get("pattern") == {"String": " "} for each in kind.before)
        and not any(_CUT_BLANKS.search(token) for token in vocabulary)
    )


def _has_known_pattern(before: Sequence[Mapping[str, Any]]) -> bool:
    *first, level = before
    if level["type"] != "ByteLevel":
        return False
    splits = [each for each in first if each["type"] != "Digits"]
    if not splits:
        return bool(level.get("use_regex", True))
    if level.get("use_regex", True) or len(splits) > 1 or splits[0]["type"] != "Split":
        return False
    is_kept = splits[0].get("behavior") == "Isolated" and not splits[0].get("invert")
    return is_kept and splits[0]["pattern"].get("Regex") in PATTERNS
