"""Rows that cannot be learned from, and rows that are too long: told at once, with where and what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tuneloop.core.chat import Finding
from tuneloop.core.data.rows import Row, id_of
from tuneloop.core.errors import DataError
from tuneloop.tokens import Loss

MOST_FINDINGS = 100
"""More are counted and not listed."""

SHOWN = 5


@dataclass
class Findings:
    """Of all files, or of a part of one; parts are added up in order."""

    bad_rows: int = 0
    by_rule: Counter[str] = field(default_factory=Counter)
    """Rule to the number of findings of bad rows."""
    listed: list[dict[str, Any]] = field(default_factory=list)
    """The first of them."""
    noted: dict[tuple[str, str], tuple[int, dict[str, Any]]] = field(default_factory=dict)
    """(file, rule) of findings that are no mistakes, to how many and the first."""
    long_rows: int = 0
    longest: int = 0
    long_listed: list[dict[str, Any]] = field(default_factory=list)
    """The first rows that are too long."""
    would_lose: dict[str, Loss] = field(default_factory=dict)
    """Policy to what it would take away from all of them."""

    def add_bad(self, file: str, row: Row, findings: Sequence[Finding]) -> None:
        self.bad_rows += 1
        self.by_rule.update(each.rule for each in findings)
        room = MOST_FINDINGS - len(self.listed)
        self.listed.extend(_described(file, row, each) for each in findings[:room])

    def add_noted(self, file: str, row: Row, finding: Finding) -> None:
        count, first = self.noted.get((file, finding.rule), (0, None))
        self.noted[file, finding.rule] = count + 1, first or _described(file, row, finding)

    def add_long(self, file: str, row: Row, length: int, limit: int, would_lose: Mapping[Any, Loss]) -> None:
        self.long_rows += 1
        self.longest = max(self.longest, length)
        if len(self.long_listed) < MOST_FINDINGS:
            self.long_listed.append(
                {"file": file, "line": row.line, "rule": "max_seq_length", "tokens": length, "limit": limit}
            )
        self._add_losses(would_lose)

    def _add_losses(self, would_lose: Mapping[Any, Loss]) -> None:
        for policy, loss in would_lose.items():
            self.would_lose[policy] = self.would_lose.get(policy, Loss()).plus(loss)

    def merge(self, other: Findings) -> None:
        self.bad_rows += other.bad_rows
        self.by_rule.update(other.by_rule)
        self.listed.extend(other.listed[: MOST_FINDINGS - len(self.listed)])
        for key, (count, first) in other.noted.items():
            known, mine = self.noted.get(key, (0, first))
            self.noted[key] = known + count, mine
        self.long_rows += other.long_rows
        self.longest = max(self.longest, other.longest)
        self.long_listed.extend(other.long_listed[: MOST_FINDINGS - len(self.long_listed)])
        self._add_losses(other.would_lose)

    def are_enough(self, budget: int) -> bool:
        """Whether it fails whatever follows, with as many findings as are listed."""
        return self.bad_rows > budget and len(self.listed) >= MOST_FINDINGS

    def raise_bad(self, budget: int) -> None:
        """Raise one `DataError` with all findings when more rows are bad than `budget` allows."""
        if self.bad_rows <= budget:
            return
        shown = [_line(each) for each in self.listed[:SHOWN]]
        total = self.by_rule.total()
        count = f"{total} findings" if not self.are_enough(budget) else f"{MOST_FINDINGS} findings or more"
        more = f"\n({count}; the first {len(shown)} are shown)" if total > len(shown) else ""
        allowed = f"\n{self.bad_rows} rows are bad; preprocess.bad_rows allows {budget}." if budget else ""
        raise DataError(
            "\n".join(shown) + more + allowed,
            next_move="Mend them (tuneloop data check FILE... --fix), or allow some: preprocess.bad_rows.",
            details=self.listed,
        )

    def raise_long(self, limit: int) -> None:
        """Raise one `DataError` that lists rows over `limit` tokens and what each policy would do to them."""
        if not self.long_rows:
            return
        rows = "\n".join(
            f"  {each['file']} line {each['line']}: {each['tokens']:,} tokens"
            for each in self.long_listed[:SHOWN]
        )
        more = f"\n  ({self.long_rows:,} rows; the first {SHOWN} are shown)" if self.long_rows > SHOWN else ""
        losses = "\n".join(
            f"  {policy}: {loss.rows:,} rows, {loss.turns:,} turns, "
            f"{loss.assistant_tokens:,} assistant tokens"
            for policy, loss in self.would_lose.items()
        )
        raise DataError(
            f"{self.long_rows:,} row{' is' if self.long_rows == 1 else 's are'} longer than "
            f"preprocess.max_seq_length of {limit:,} tokens; the longest has {self.longest:,}.\n"
            f"{rows}{more}\nWhat each preprocess.long_rows would lose:\n{losses}",
            next_move=f"Set preprocess.max_seq_length to {self.longest} if the model and memory allow it, or "
            "choose preprocess.long_rows.",
            details=[
                *self.long_listed,
                *({"policy": policy, **loss._asdict()} for policy, loss in self.would_lose.items()),
            ],
        )


def _described(file: str, row: Row, finding: Finding) -> dict[str, Any]:
    named = id_of(row.value)
    return {
        "file": file,
        "line": row.line,
        **({} if named is None else {"id": named}),
        **finding._asdict(),
    }


def _line(each: dict[str, Any]) -> str:
    return "{file} line {line}: {where}: found {value} (rule {rule}). {fix}".format(
        **each, where=each["field"] or "the row"
    )
