"""From tokens to text while tokens still arrive: whole characters only, nothing past a stop text. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"
"""What a decoder writes for the bytes of a character that is not whole yet."""


class Detokenizer:
    """Text token by token. What `push` and `flush` return adds up to the decoding of all tokens at once.

    A token is decoded together with the few before it, because a decoder writes some tokens differently at
    the start of a text (the method of text-generation-inference's `decode_token`).
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0
        self._read = 0

    def push(self, token: int) -> str:
        self._ids.append(token)
        text = self._unread()
        if not text or text.endswith(_BROKEN):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return text

    def flush(self) -> str:
        """What is left: bytes that never became a character are shown as they are."""
        text = self._unread()
        self._start = self._read = len(self._ids)
        return text

    def _unread(self) -> str:
        before = self._decode(self._ids[self._start : self._read])
        return self._decode(self._ids[self._start :])[len(before) :]


class StopTexts:
    """Holds back what may turn out to be the beginning of a stop text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.is_met = False

    def push(self, text: str) -> str:
        """What may be shown now. Once `is_met`, the reply is over."""
        text = self._held + text
        self._held = ""
        ends = [text.find(stop) for stop in self._stops if stop in text]
        if ends:
            self.is_met = True
            return text[: min(ends)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The reply has ended otherwise: what was held back was no stop text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
