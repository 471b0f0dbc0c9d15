"""Tokenised conversations out of Arrow, their order, and micro-batches packed without padding.

Letters: T tokens of all conversations of a micro-batch, K those of them that count for the loss.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from tuneloop.core.errors import DataError


@dataclass(frozen=True)
class Conversation:
    row: int
    """Line number in the source file."""
    input_ids: np.ndarray
    learn: np.ndarray
    """Whether each token counts for the loss, as something to predict."""


def split_path(dataset: Path, name: str) -> Path:
    """Where a dataset folder keeps a split: a folder of shards, or one file as older versions wrote it.
    Raises `DataError` when it has no such split."""
    for path in (dataset / name, dataset / f"{name}.arrow"):
        if path.exists():
            return path
    raise DataError(f"{dataset.name} holds no split {name}. Run the preprocess step again.")


class Conversations(Sequence[Conversation]):
    """A split of a dataset, memory-mapped: only the rows that are asked for are read."""

    def __init__(self, path: Path) -> None:
        """`path`: a folder of shards, read in the order of their names, or a single Arrow file. Raises
        `DataError` when it is neither."""
        self.path = path
        table = _read_split(path)
        self._input_ids = table["input_ids"]
        self._learn = table["learn"]
        self._row = table["row"]
        self.tokens = sum(len(chunk.flatten()) for chunk in self._input_ids.chunks)
        learned = [_learned_per_row(chunk) for chunk in self._learn.chunks]
        self.learned_per_row = np.concatenate(learned) if learned else np.zeros(0, dtype=np.int64)
        self.learned_tokens = int(self.learned_per_row.sum())

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, index: int) -> Conversation:  # type: ignore[override]
        return Conversation(
            row=self._row[index].as_py(),
            input_ids=self._input_ids[index].values.to_numpy(),
            learn=self._learn[index].values.to_numpy(zero_copy_only=False),
        )

    def check(self, vocabulary_size: int) -> None:
        """Raise `DataError` for rows that nothing can be learned from and for tokens that the model lacks."""
        empty = [self._row[int(index)].as_py() for index in np.flatnonzero(self.learned_per_row == 0)]
        if empty or not len(self):
            where = f"row(s) {_some(empty)}" if empty else "any row: it has none"
            raise DataError(
                f"{self.path.name}: no token to learn in {where}.",
                next_move="Give every conversation an assistant turn within preprocess.max_seq_length.",
            )
        largest = max(
            int(pc.max(chunk.flatten()).as_py() or 0) for chunk in self._input_ids.chunks if len(chunk)
        )
        if largest >= vocabulary_size:
            raise DataError(
                f"{self.path.name}: token {largest} is not in the model's vocabulary of "
                f"{vocabulary_size}; the data was tokenised for another model. Run the preprocess step "
                "again with this one."
            )


def _learned_per_row(learn: pa.ListArray) -> np.ndarray:
    """Tokens to predict in each row: the first of a row never counts, having nothing before it."""
    offsets = learn.offsets.to_numpy()
    marks = learn.values.to_numpy(zero_copy_only=False).astype(np.int64)
    sums = np.concatenate([[0], np.cumsum(marks)])
    is_filled = offsets[1:] > offsets[:-1]
    first = np.zeros(len(learn), dtype=np.int64)
    first[is_filled] = marks[offsets[:-1][is_filled]]
    learned: np.ndarray = sums[offsets[1:]] - sums[offsets[:-1]] - first
    return learned


def _some(rows: Sequence[int], limit: int = 20) -> str:
    text = ", ".join(str(row) for row in rows[:limit])
    return text if len(rows) <= limit else f"{text} and {len(rows) - limit} more"


def _read_split(path: Path) -> pa.Table:
    if not path.is_dir():
        return _read_table(path)
    shards = sorted(path.glob("*.arrow"))
    if not shards:
        raise DataError(f"{path} holds no *.arrow file. Run the preprocess step again.")
    return pa.concat_tables([_read_table(shard) for shard in shards])


def _read_table(path: Path) -> pa.Table:
    try:
        source = pa.memory_map(str(path))
        try:
            table = pa.ipc.open_file(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            table = pa.ipc.open_stream(source).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} cannot be read as Arrow: {error}. Run the preprocess step again.") from error
    missing = {"input_ids", "learn", "row"} - set(table.column_names)
    if missing:
        raise DataError(
            f"{path} has no column {', '.join(sorted(missing))}; found {', '.join(table.column_names)}. "
            "Run the preprocess step again."
        )
    return table


@dataclass(frozen=True)
class Batch:
    """One row of T tokens: conversations end to end, positions starting afresh with each, nothing padded."""

    input_ids: torch.Tensor
    """(1, T)"""
    position_ids: torch.Tensor
    """(1, T)"""
    predict_from: torch.Tensor
    """(K,) where the model's output is needed: one before each learned token."""
    targets: torch.Tensor
    """(K,) the learned tokens."""
    rows: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def learned(self) -> int:
        return self.targets.shape[0]

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        return Batch(
            self.input_ids.to(device),
            self.position_ids.to(device),
            self.predict_from.to(device),
            self.targets.to(device),
            self.rows,
        )


def pack(conversations: Sequence[Conversation]) -> Batch:
    """One micro-batch of the given conversations, in their order."""
    ids = np.concatenate([each.input_ids for each in conversations]).astype(np.int64)
    positions = np.concatenate([np.arange(len(each.input_ids)) for each in conversations])
    learn = np.concatenate([each.learn for each in conversations]).astype(bool)
    # The first token of a conversation would be predicted from the conversation before it.
    learned_at = np.flatnonzero(learn & (positions > 0))
    return Batch(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.from_numpy(positions)[None],
        predict_from=torch.from_numpy(learned_at - 1),
        targets=torch.from_numpy(ids[learned_at]),
        rows=tuple(each.row for each in conversations),
    )


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, rows: int) -> tuple[int, ...]:
    """The order of an epoch: a function of seed, epoch and number of rows alone."""
    order = list(range(rows))
    random.Random(f"order/{seed}/{epoch}").shuffle(order)  # noqa: S311 - to be repeated, not to be secret
    return tuple(order)


@dataclass(frozen=True)
class Course:
    """Which rows each optimiser step learns from. Pure, so a step can be found again after any
    interruption."""

    rows: int
    batch_size: int
    """Conversations of a micro-batch."""
    accumulation: int
    """Micro-batches of an optimiser step."""
    epochs: int
    max_steps: int
    """When positive, it decides the length in place of `epochs`."""
    seed: int

    @property
    def effective_batch(self) -> int:
        return self.batch_size * self.accumulation

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch may be a smaller one: no row is left out."""
        return math.ceil(self.rows / self.effective_batch)

    @property
    def total_steps(self) -> int:
        return self.max_steps if self.max_steps > 0 else self.steps_per_epoch * self.epochs

    def micro_batches(self, step: int) -> list[tuple[int, ...]]:
        """Row indices of the micro-batches of step number `step`, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.seed, epoch, self.rows)
        chosen = order[place * self.effective_batch : (place + 1) * self.effective_batch]
        return [chosen[start : start + self.batch_size] for start in range(0, len(chosen), self.batch_size)]

    def ends_epoch(self, finished_steps: int) -> bool:
        return finished_steps % self.steps_per_epoch == 0


def in_order(rows: int, batch_size: int) -> Iterator[range]:
    """Row indices of consecutive micro-batches, for evaluation."""
    for start in range(0, rows, batch_size):
        yield range(start, min(rows, start + batch_size))
