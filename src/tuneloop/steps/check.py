"""The look `check`: files of conversations held to every rule, before there is any job.

    report       JSON: `report` (core.data.report.Report), `tokens` (file to its lengths; null without a
                 tokenizer), `max_seq_length`, `long_rows`, `fixed` (a list of core.data.repair.Repaired)
    findings     JSON Lines: every finding, however many

With `fix` (input name to a path that is not there yet) a repaired copy of each file is written there.
Inputs: the files, by any names, and `tokenizer`, a model's or a tokenizer's folder, where the rules that need
one are wanted. With `row` (and one file) it shows one row as the model will see it instead: `report` then is
`{row, line, tokens, learned_tokens, spans: [{text, learned}], findings}`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from tuneloop.core.chat import Finding
from tuneloop.core.data.check import Checker, Part
from tuneloop.core.data.reading import Source, open_source
from tuneloop.core.data.repair import repair_file
from tuneloop.core.data.report import RowFinding
from tuneloop.core.data.rows import Chunk, Row
from tuneloop.core.data.rules import check_row, is_error, special_text
from tuneloop.core.errors import DataError, NotFound
from tuneloop.core.recipe.values import Count, CountOrZero, Length, Parameters
from tuneloop.steps.context import StepContext
from tuneloop.steps.pool import Pool, processes_for
from tuneloop.steps.preprocess.tally import describe
from tuneloop.tokens import LongRows, Loss, Tokenised, Tokenize

TOKENIZER = "tokenizer"
BATCH_ROWS = 256
PACKED = 3
"""Text in a byte of gzip or Parquet, about."""


class CheckParameters(Parameters):
    messages_column: str = Field(default="messages", min_length=1)
    max_seq_length: Length = -1
    long_rows: LongRows = "error"
    bad_rows: CountOrZero = 0
    most_findings: CountOrZero = 1000
    """In the report; the file of findings has all."""
    fix: dict[str, str] = {}
    row: Count | None = None


def run(context: StepContext) -> None:
    parameters = CheckParameters.model_validate(context.parameters)
    tokenizer = context.inputs.get(TOKENIZER)
    tokenize = None
    if tokenizer is not None:
        context.progress("loading the tokenizer")
        tokenize = Tokenize(tokenizer, parameters.max_seq_length, cache=context.cache_folder)
    sources = {
        name: open_source(path, context.input_names[name], column=parameters.messages_column)
        for name, path in context.inputs.items()
        if name != TOKENIZER
    }
    if parameters.row is not None:
        (source,) = sources.values()
        said = show(source, parameters.row, parameters.messages_column, tokenize)
    else:
        said = _check(context, parameters, sources, tokenize)
    context.output("report").write_text(json.dumps(said), encoding="utf-8")


# ---------------------------------------------------------------- all rows


@dataclass
class Lengths:
    """Of the rows of a file that pass every rule but the one about their length."""

    rows: Counter[int] = field(default_factory=Counter)
    """Tokens of a whole row, to how many are that long."""
    learned_tokens: int = 0
    turns: int = 0
    long_rows: int = 0
    would_lose: dict[str, Loss] = field(default_factory=dict)

    def add(self, each: Tokenised) -> None:
        self.rows[each.length] += 1
        self.learned_tokens += sum(tokens.learned for tokens in each.tokens)
        self.turns += each.turns
        if each.is_long:
            self.long_rows += 1
            # What dropping the row would lose is all that it has.
            self.learned_tokens += each.would_lose["drop"].assistant_tokens
            self.turns += each.would_lose["drop"].turns
            for policy, loss in each.would_lose.items():
                self.would_lose[policy] = self.would_lose.get(policy, Loss()).plus(loss)

    def merge(self, other: Lengths) -> None:
        self.rows.update(other.rows)
        self.learned_tokens += other.learned_tokens
        self.turns += other.turns
        self.long_rows += other.long_rows
        for policy, loss in other.would_lose.items():
            self.would_lose[policy] = self.would_lose.get(policy, Loss()).plus(loss)

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows.total(),
            "tokens": sum(length * count for length, count in self.rows.items()),
            "learned_tokens": self.learned_tokens,
            "turns": self.turns,
            "lengths": describe(self.rows),
            "long_rows": self.long_rows,
            "would_lose": {policy: loss._asdict() for policy, loss in self.would_lose.items()},
        }


@dataclass
class Work:
    """What is done to a part of a file, in whichever process. Picklable."""

    column: str
    long_rows: LongRows
    tokenize: Tokenize | None

    def do(self, chunk: Chunk) -> tuple[Part, Lengths]:
        rows = chunk.rows()
        found = {row.number: self._plain(row) for row in rows}
        lengths = Lengths()
        good = [row for row in rows if row.value is not None and not any(map(is_error, found[row.number]))]
        for each in self._tokenised(good):
            found[each.row.number].extend(self._of_tokens(each))
            if each.length and not any(finding.rule != "max_seq_length" for finding in each.findings):
                lengths.add(each)
        part = Part()
        for row in rows:
            part.add(row, found[row.number], self.column)
        return part, lengths

    def of_value(self, value: dict[str, Any]) -> list[Finding]:
        """What the template and the tokens say of a row that passed the other rules."""
        return [found for each in self._tokenised([Row(1, 1, value)]) for found in self._of_tokens(each)]

    def _plain(self, row: Row) -> list[Finding]:
        return (
            list(row.findings) if row.value is None else [*row.findings, *check_row(row.value, self.column)]
        )

    def _tokenised(self, rows: list[Row]) -> Iterator[Tokenised]:
        if self.tokenize is None:
            return
        waiting = iter(rows)
        while batch := list(itertools.islice(waiting, BATCH_ROWS)):
            yield from self.tokenize.rows(batch, self.column)

    def _of_tokens(self, each: Tokenised) -> Iterator[Finding]:
        assert self.tokenize is not None
        assert each.row.value is not None
        messages = each.row.value[self.column]
        yield from special_text(self.tokenize.special_pattern, messages, self.column)
        for finding in each.findings:
            # A policy was chosen: what it takes away is in the statistics, and no mistake of the row.
            if finding.rule != "max_seq_length" or self.long_rows == "error":
                yield finding


def _check(
    context: StepContext,
    parameters: CheckParameters,
    sources: dict[str, Source],
    tokenize: Tokenize | None,
) -> dict[str, Any]:
    work = Work(parameters.messages_column, parameters.long_rows, tokenize)
    meter = _Meter(context, sources)
    tokens: dict[str, Any] = {}
    with contextlib.ExitStack() as holding:
        listing = holding.enter_context(open(context.output("findings"), "w", encoding="utf-8"))
        checker = Checker(
            parameters.bad_rows, parameters.most_findings, lambda finding: _write(listing, finding)
        )
        pool = holding.enter_context(Pool(work, processes_for(_text_bytes(sources.values()))))
        for name, source in sources.items():
            checker.begin(name, source)
            lengths = Lengths()
            for part, more in pool.do(source.chunks()):
                checker.add(part)
                lengths.merge(more)
                meter.add(len(part.lines))
            tokens[source.shown] = lengths.to_json()
        report = checker.finish()
    _refuse_empty(report.files)
    return {
        "report": report.model_dump(mode="json"),
        "tokens": tokens if tokenize is not None else None,
        "max_seq_length": None if tokenize is None else tokenize.max_seq_length,
        "long_rows": parameters.long_rows,
        "fixed": [
            _repaired(context, sources[name], Path(target), work) for name, target in parameters.fix.items()
        ],
    }


def _text_bytes(sources: Iterable[Source]) -> int:
    """About as much text as the files hold."""
    return sum(source.size_bytes * (PACKED if _is_packed(source) else 1) for source in sources)


def _is_packed(source: Source) -> bool:
    return source.compression is not None or source.format == "parquet"


def _repaired(context: StepContext, source: Source, target: Path, work: Work) -> dict[str, Any]:
    context.progress(f"repairing {source.shown}")

    def further(value: dict[str, Any]) -> list[Finding]:
        return work.of_value(value)

    found = repair_file(source, target, further=None if work.tokenize is None else further)
    return found.model_dump(mode="json")


def _write(listing: Any, finding: RowFinding) -> None:
    listing.write(finding.model_dump_json(exclude_none=True) + "\n")


def _refuse_empty(files: Any) -> None:
    for each in files:
        if each.rows == 0:
            raise DataError(f"{each.file} has no rows.", next_move="Give a file with one conversation a row.")


class _Meter:
    def __init__(self, context: StepContext, sources: dict[str, Source]) -> None:
        self._context = context
        self._rows = 0
        self._shown = ", ".join(Path(source.shown).name for source in sources.values())

    def add(self, rows: int) -> None:
        self._rows += rows
        self._context.progress("checking", done=self._rows, unit="rows")


# ---------------------------------------------------------------- one row


def show(source: Source, number: int, column: str, tokenize: Tokenize | None) -> dict[str, Any]:
    """One row as the model will see it. Raises `NotFound` when there are fewer rows."""
    row = _find(source, number)
    findings = list(row.findings) if row.value is None else [*row.findings, *check_row(row.value, column)]
    said: dict[str, Any] = {"row": row.number, "line": row.line, "tokens": None, "learned_tokens": None}
    said["messages"] = None if row.value is None else row.value.get(column)
    said["spans"] = []
    if tokenize is not None and row.value is not None and not any(map(is_error, findings)):
        messages = row.value[column]
        findings.extend(special_text(tokenize.special_pattern, messages, column))
        (each,) = tokenize.rows([row], column)
        findings.extend(each.findings)
        if each.length:
            said.update(tokenize.explain(messages)._asdict())
    said["findings"] = [finding._asdict() for finding in findings]
    return said


def _find(source: Source, number: int) -> Row:
    seen = 0
    for chunk in source.chunks():
        for row in chunk.rows():
            seen += 1
            if row.number == number:
                return row
    raise NotFound(f"{source.shown} has {seen} rows; there is no row {number}.")
