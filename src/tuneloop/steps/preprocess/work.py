"""The work on one part of a file: rows read, checked, rendered, tokenised, put to their splits. Done in
worker processes or in the step's own; what it gives depends on the part alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa

from tuneloop.core.chat import Message
from tuneloop.core.data.rows import Chunk, Row
from tuneloop.core.data.rules import check_row, is_error
from tuneloop.core.data.split import Assignment, Groups, Share, group_of
from tuneloop.steps.preprocess.findings import Findings
from tuneloop.steps.preprocess.shards import SCHEMA, record_batch
from tuneloop.steps.preprocess.tally import Tally
from tuneloop.tokens import Tokenised, Tokenize, Tokens

Splits = Assignment | tuple[tuple[str, Share], ...]
"""Of a file's rows: by their groups, or (split, rows) by their numbers."""


class Part(NamedTuple):
    """A piece of work."""

    source: str
    """Input name of the file."""
    chunk: Chunk
    splits: Splits | None
    """Where its rows go; None: nowhere, they are only counted."""


@dataclass
class Done:
    """What came of a part. Picklable and small: record batches as bytes."""

    rows: int = 0
    """Rows read, bad ones included."""
    tokens: int = 0
    batches: dict[str, bytes] = field(default_factory=dict)
    """Split to a serialised record batch."""
    tallies: dict[str, Tally] = field(default_factory=dict)
    findings: Findings = field(default_factory=Findings)
    groups: Groups | None = None
    """Of the rows that are kept, where they are shuffled."""

    def record_batches(self) -> list[tuple[str, pa.RecordBatch]]:
        return [
            (split, pa.ipc.read_record_batch(pa.py_buffer(data), SCHEMA))
            for split, data in self.batches.items()
        ]


@dataclass
class Work:
    """All that is needed to do a part; sent to every worker once."""

    tokenize: Tokenize
    column: str
    batch_size: int
    files: dict[str, str]
    """Input name to the file's name, for messages."""

    def do(self, part: Part) -> Done:
        rows = part.chunk.rows()
        done = Done(rows=len(rows))
        if part.splits is None:
            return done
        if isinstance(part.splits, Assignment):
            done.groups = Groups(part.splits.seed, part.splits.shares)
        file = self.files[part.source]
        good = iter([row for row in rows if self._is_good(row, file, done.findings)])
        kept: dict[str, list[tuple[int, Tokens]]] = {}
        while batch := list(itertools.islice(good, self.batch_size)):
            for each in self.tokenize.rows(batch, self.column):
                self._sort(each, file, part, done, kept)
        for split, conversations in kept.items():
            done.batches[split] = record_batch(conversations).serialize().to_pybytes()
        return done

    def _is_good(self, row: Row, file: str, findings: Findings) -> bool:
        found = (
            list(row.findings) if row.value is None else [*row.findings, *check_row(row.value, self.column)]
        )
        if not found:
            return True
        mistakes = [each for each in found if is_error(each)]
        if mistakes or row.value is None:
            findings.add_bad(file, row, mistakes or found)
            return False
        for each in found:
            findings.add_noted(file, row, each)
        return True

    def _sort(
        self,
        each: Tokenised,
        file: str,
        part: Part,
        done: Done,
        kept: dict[str, list[tuple[int, Tokens]]],
    ) -> None:
        if each.is_long and each.would_lose:
            limit = self.tokenize.max_seq_length
            done.findings.add_long(file, each.row, each.length, limit, each.would_lose)
            return
        if each.findings:
            done.findings.add_bad(file, each.row, each.findings)
            return
        assert each.row.value is not None
        messages = each.row.value[self.column]
        split = _split_of(each, part.splits, messages, done)
        tally = done.tallies.setdefault(split, Tally())
        tally.count(each, special_text=self.tokenize.holds_special_text(messages))
        if each.tokens:
            kept.setdefault(split, []).extend((each.row.line, tokens) for tokens in each.tokens)
            done.tokens += sum(tokens.tokens for tokens in each.tokens)


def _split_of(each: Tokenised, splits: Splits | None, messages: Sequence[Message], done: Done) -> str:
    if isinstance(splits, Assignment):
        group = group_of(messages)
        if each.tokens and done.groups is not None:
            done.groups.add(group)
        return splits(group)
    assert splits is not None
    return next(name for name, share in splits if share.start < each.row.number <= share.stop)
