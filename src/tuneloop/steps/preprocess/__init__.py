"""The preprocess step: files of conversations become tokens, each marked when it counts for the loss.

    dataset/
      train/00000.arrow ...          Arrow IPC files of at most about 256 MB: input_ids list<int32>,
      validation/  test/             learn list<bool>, row int64 (the line in the source file)
      stats.json                     counts and lengths per split, template digest, max_seq_length

Every format that `core.data` reads, as a stream, on all cores: this process cuts files into parts and writes
what workers make of them, in order. Nothing is left out in silence: rows that are bad, or too long, fail the
step with file, line, rule and fix, unless the recipe says what to do with them. Splits that are not given are
carved from the training file. Equal inputs give equal bytes, whatever the number of cores. Never imports
torch.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from tuneloop.core.data.reading import Source, open_source
from tuneloop.core.data.split import (
    SPLITS,
    Assignment,
    Groups,
    Share,
    contiguous,
    default_shares,
)
from tuneloop.core.errors import DataError
from tuneloop.core.process import write_atomically
from tuneloop.core.recipe import PreprocessParameters
from tuneloop.steps.context import StepContext
from tuneloop.steps.pool import Pool, processes_for
from tuneloop.steps.preprocess import report
from tuneloop.steps.preprocess.findings import Findings
from tuneloop.steps.preprocess.shards import SCHEMA, SHARD_BYTES, Shards
from tuneloop.steps.preprocess.tally import Tally
from tuneloop.steps.preprocess.work import Done, Part, Splits, Work
from tuneloop.tokens import Tokenize

__all__ = ["SCHEMA", "run"]

PART_BYTES = 1 << 20


def run(context: StepContext) -> None:
    parameters = PreprocessParameters.model_validate(context.parameters)
    context.progress("loading the tokenizer")
    tokenize = Tokenize(
        context.inputs["model"],
        parameters.max_seq_length,
        parameters.long_rows,
        cache=context.cache_folder,
    )
    report.say_what_is_not_done(context, parameters, tokenize.template)
    _Preprocess(context, parameters, tokenize).run()


@dataclass
class Outcome:
    """Of one pass over all files."""

    tallies: dict[str, Tally] = field(default_factory=lambda: {name: Tally() for name in SPLITS})
    findings: Findings = field(default_factory=Findings)
    groups: Groups | None = None

    def add(self, done: Done) -> None:
        self.findings.merge(done.findings)
        for split, tally in done.tallies.items():
            self.tallies[split].merge(tally)
        if done.groups is not None and self.groups is not None:
            self.groups.merge(done.groups)


class _Preprocess:
    def __init__(self, context: StepContext, parameters: PreprocessParameters, tokenize: Tokenize) -> None:
        self._context = context
        self._parameters = parameters
        self._tokenize = tokenize
        self._target = context.output("dataset")
        self._sources = {
            name: open_source(
                context.inputs[name], context.input_names[name], column=parameters.messages_column
            )
            for name in SPLITS
            if name in context.inputs
        }
        self._shares = default_shares(list(self._sources))
        self._is_carved = len(self._sources) < len(SPLITS)

    def run(self) -> None:
        work = Work(
            self._tokenize,
            self._parameters.messages_column,
            self._parameters.batch_size,
            {name: source.shown for name, source in self._sources.items()},
        )
        with Pool[Part, Done](work, processes_for(sum(map(_text_bytes, self._sources.values())))) as pool:
            places, outcome = self._written(pool)
        self._refuse_empty(outcome)
        report.say_what_was_done(self._context, self._parameters, self._tokenize, places, outcome)
        about = report.describe(self._parameters, self._tokenize, outcome)
        write_atomically(self._target / "stats.json", json.dumps(about, indent=1) + "\n")

    def _written(self, pool: Pool[Part, Done]) -> tuple[dict[str, Splits], Outcome]:
        places = self._places(pool)
        outcome = self._pass(pool, places)
        if outcome.groups is not None and (moved := outcome.groups.assignment()).moved:
            # So few opening lines that a split was left without any: rare, and soon done again.
            places["train"] = moved
            outcome = self._pass(pool, places)
        return places, outcome

    # ------------------------------------------------------------ which rows go where

    def _places(self, pool: Pool[Part, Done]) -> dict[str, Splits]:
        whole: dict[str, Splits] = {name: ((name, Share(name, 0, 1 << 62)),) for name in self._sources}
        if not self._is_carved:
            return whole
        if self._parameters.split == "shuffled":
            return {**whole, "train": Assignment(self._parameters.split_seed, self._shares)}
        rows = dict.fromkeys(self._sources, 1)
        shares = contiguous({**rows, "train": self._count(pool, "train")})
        carved = tuple((name, share) for name, share in shares.items() if share.source == "train")
        return {**whole, "train": carved}

    def _count(self, pool: Pool[Part, Done], name: str) -> int:
        self._context.progress("counting rows")
        parts = (Part(name, chunk, None) for chunk in self._sources[name].chunks(PART_BYTES))
        return sum(done.rows for done in pool.do(parts))

    # ------------------------------------------------------------ one pass

    def _pass(self, pool: Pool[Part, Done], places: Mapping[str, Splits]) -> Outcome:
        shutil.rmtree(self._target, ignore_errors=True)
        self._target.mkdir()
        outcome = Outcome()
        train = places["train"]
        if isinstance(train, Assignment):
            outcome.groups = Groups(train.seed, train.shares)
        meter = _Meter(self._context, list(self._sources.values()))
        budget = self._parameters.bad_rows
        with Shards(self._target, SHARD_BYTES) as shards:
            for done in pool.do(self._parts(places)):
                outcome.add(done)
                if outcome.findings.are_enough(budget):
                    break
                for split, batch in done.record_batches():
                    shards.write(split, batch)
                meter.add(done)
        outcome.findings.raise_bad(budget)
        outcome.findings.raise_long(self._tokenize.max_seq_length)
        return outcome

    def _parts(self, places: Mapping[str, Splits]) -> Iterator[Part]:
        for name, source in self._sources.items():
            for chunk in source.chunks(PART_BYTES):
                yield Part(name, chunk, places[name])

    def _refuse_empty(self, outcome: Outcome) -> None:
        empty = [name for name, tally in outcome.tallies.items() if not tally.conversations]
        if empty:
            dropped = sum(tally.dropped_rows for tally in outcome.tallies.values())
            raise DataError(
                f"No row is left for {' and '.join(empty)}: {outcome.findings.bad_rows} bad rows and "
                f"{dropped} long ones were dropped.",
                next_move="Add rows, raise preprocess.max_seq_length, or choose another long_rows.",
            )


def _text_bytes(source: Source) -> int:
    """About: text shrinks to a quarter when it is packed."""
    return source.size_bytes * (4 if source.compression or source.format == "parquet" else 1)


class _Meter:
    """Progress of a pass, a few lines a second at most."""

    def __init__(self, context: StepContext, sources: list[Source]) -> None:
        self._context = context
        self._total_bytes = sum(source.size_bytes for source in sources)
        self._is_packed = any(source.compression or source.format == "parquet" for source in sources)
        self._rows = self._tokens = self._parts = 0
        self._started_at = time.monotonic()
        self._said_at = 0.0

    def add(self, done: Done) -> None:
        self._rows += done.rows
        self._tokens += done.tokens
        self._parts += 1
        now = time.monotonic()
        if now - self._said_at < 0.25:
            return
        self._said_at = now
        seconds = max(now - self._started_at, 1e-6)
        # What is left of a packed file cannot be told.
        left = None if self._is_packed else max(0.0, self._total_bytes / (self._parts * PART_BYTES) - 1)
        self._context.progress(
            "tokenising",
            done=self._rows,
            unit="rows",
            remaining_seconds=None if left is None else seconds * left,
            tokens_per_second=self._tokens / seconds,
        )
