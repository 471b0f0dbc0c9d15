"""What becomes of a conversation that is longer than `max_seq_length`: the five policies of `long_rows`.

A turn is what the user says up to and with what the assistant answers: it begins at the first message after
an answer. Messages of the system at the beginning are no turn; they stay in front of whatever is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

LongRows = Literal["error", "drop", "keep_last_turns", "split_turns", "cut"]
POLICIES: tuple[LongRows, ...] = ("error", "drop", "keep_last_turns", "split_turns", "cut")


class Loss(NamedTuple):
    """What a policy takes away from rows that are too long."""

    rows: int = 0
    """Rows of which nothing is left."""
    turns: int = 0
    """Turns of which something or all is gone; those of dropped rows included."""
    assistant_tokens: int = 0
    """Tokens that would have been learned."""

    def plus(self, other: Loss) -> Loss:
        return Loss(*(one + more for one, more in zip(self, other, strict=True)))


class Turns(NamedTuple):
    """A conversation taken apart; put together again they are all its messages, in order."""

    lead: tuple[Any, ...]
    turns: tuple[tuple[Any, ...], ...]

    @classmethod
    def of(cls, messages: Sequence[Any]) -> Turns:
        first = next((n for n, message in enumerate(messages) if message["role"] != "system"), len(messages))
        starts = [
            number
            for number in range(first, len(messages))
            if number == first
            or (messages[number - 1]["role"] == "assistant" and messages[number]["role"] != "assistant")
        ]
        ends = [*starts[1:], len(messages)]
        parts = tuple(tuple(messages[start:end]) for start, end in zip(starts, ends, strict=True))
        return cls(tuple(messages[:first]), parts)

    def part(self, start: int, stop: int) -> list[Any]:
        """The messages of turns `start` to `stop`, what leads the conversation before them."""
        return [*self.lead, *(message for turn in self.turns[start:stop] for message in turn)]


class Measured(Protocol):
    """A tokenised conversation; None in its place: it cannot be rendered, or has nothing to learn."""

    @property
    def tokens(self) -> int: ...


M = TypeVar("M", bound=Measured)


def last_turns(turns: Turns, most: int, encode: Callable[[list[Any]], M | None]) -> tuple[int, M] | None:
    """(first turn that is kept, its tokens): as many of the last turns as fit. None when not even one does.

    Found by halving, so a conversation of n turns is tokenised log2(n) times."""
    return _longest(
        lambda kept: turns.part(len(turns.turns) - kept, len(turns.turns)), len(turns.turns), most, encode
    )


def first_turns(
    turns: Turns, start: int, most: int, encode: Callable[[list[Any]], M | None]
) -> tuple[int, M] | None:
    """(turns kept, their tokens): as many from turn `start` on as fit. None when not even one does."""
    return _longest(lambda kept: turns.part(start, start + kept), len(turns.turns) - start, most, encode)


def _longest(
    part: Callable[[int], list[Any]],
    count: int,
    most: int,
    encode: Callable[[list[Any]], M | None],
) -> tuple[int, M] | None:
    best: tuple[int, M] | None = None
    least, top = 1, count
    while least <= top:
        middle = (least + top) // 2
        found = encode(part(middle))
        if found is not None and found.tokens <= most:
            best, least = (middle, found), middle + 1
        elif found is None and middle < top:
            # Nothing to learn in so few turns: more of them may have it.
            least = middle + 1
        else:
            top = middle - 1
    return best
