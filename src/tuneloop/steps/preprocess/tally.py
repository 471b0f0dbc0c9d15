"""What is counted of each split: exact, in memory that does not grow with the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tuneloop.tokens import Loss, Tokenised


@dataclass
class Tally:
    """Of one split, or of a part of it; parts are added up."""

    rows: int = 0
    """Rows of the source files of which something is kept."""
    conversations: int = 0
    """What is trained on: as many as rows, or more where rows were split."""
    turns: int = 0
    learned_tokens: int = 0
    long_rows: int = 0
    """Longer than max_seq_length."""
    first_long_line: int | None = None
    truncated_rows: int = 0
    """Long rows of which a part is kept."""
    dropped_rows: int = 0
    """Long rows of which nothing is kept."""
    lost_turns: int = 0
    lost_learned_tokens: int = 0
    special_text_rows: int = 0
    """Rows in which somebody wrote the text of a special token."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Tokens of a conversation, to how many are that long."""

    def count(self, each: Tokenised, *, special_text: bool) -> None:
        self.rows += bool(each.tokens)
        self.conversations += len(each.tokens)
        self.turns += each.turns
        self.learned_tokens += sum(tokens.learned for tokens in each.tokens)
        self.lengths.update(tokens.tokens for tokens in each.tokens)
        self.special_text_rows += special_text
        if each.is_long:
            self.long_rows += 1
            self.first_long_line = self.first_long_line or each.row.line
            self.dropped_rows += not each.tokens
            self.truncated_rows += bool(each.tokens) and each.lost != Loss()
            self.lost_turns += each.lost.turns
            self.lost_learned_tokens += each.lost.assistant_tokens

    def merge(self, other: Tally) -> None:
        self.first_long_line = self.first_long_line or other.first_long_line
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.lengths.update(other.lengths)

    @property
    def tokens(self) -> int:
        return sum(length * count for length, count in self.lengths.items())

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "conversations": self.conversations,
            "turns": self.turns,
            "tokens": self.tokens,
            "learned_tokens": self.learned_tokens,
            "lengths": describe(self.lengths),
            "long_rows": self.long_rows,
            "first_long_line": self.first_long_line,
            "truncated_rows": self.truncated_rows,
            "dropped_rows": self.dropped_rows,
            "lost_turns": self.lost_turns,
            "lost_learned_tokens": self.lost_learned_tokens,
            "special_text_rows": self.special_text_rows,
        }


_COUNTS = (
    "rows",
    "conversations",
    "turns",
    "learned_tokens",
    "long_rows",
    "truncated_rows",
    "dropped_rows",
    "lost_turns",
    "lost_learned_tokens",
    "special_text_rows",
)


def describe(lengths: Mapping[int, int]) -> dict[str, Any]:
    """Median, 90th and 99th percentile (nearest rank), the most, and a histogram with edges at powers of 2:
    `{"up_to": 256, "conversations": 12}` counts those of 129 to 256 tokens."""
    ordered = sorted(lengths.items())
    total = sum(lengths.values())
    found = {"median": 0, "p90": 0, "p99": 0, "max": ordered[-1][0] if ordered else 0}
    ranks = {"median": -(-total // 2), "p90": -(-total * 90 // 100), "p99": -(-total * 99 // 100)}
    seen = 0
    bins: Counter[int] = Counter()
    for length, count in ordered:
        for name, rank in ranks.items():
            if seen < rank <= seen + count:
                found[name] = length
        seen += count
        bins[1 << max(0, length - 1).bit_length()] += count
    histogram = [{"up_to": edge, "conversations": count} for edge, count in sorted(bins.items())]
    return {**found, "histogram": histogram}
