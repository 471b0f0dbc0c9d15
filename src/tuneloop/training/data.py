"""Tokenised conversations out of Arrow, and packs of them without padding.

Letters: T tokens of all conversations of a pack, K those of them that count for the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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

    def __init__(self, path: Path, *, learns_all: bool = False) -> None:
        """`path`: a folder of shards, read in the order of their names, or a single Arrow file.
        `learns_all`: every token counts, not only those that were marked. Raises `DataError` when `path` is
        neither."""
        self.path = path
        self._learns_all = learns_all
        table = _read_split(path)
        self._input_ids = table["input_ids"]
        self._learn = table["learn"]
        self._row = table["row"]
        self.lengths = _joined([np.diff(chunk.offsets.to_numpy()) for chunk in self._input_ids.chunks])
        """(rows,) tokens of each."""
        self.tokens = int(self.lengths.sum())
        self.learned_per_row = (
            np.maximum(self.lengths - 1, 0)
            if learns_all
            else _joined([_learned_per_row(chunk) for chunk in self._learn.chunks])
        )
        self.learned_tokens = int(self.learned_per_row.sum())

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, index: int) -> Conversation:  # type: ignore[override]
        input_ids = self._input_ids[index].values.to_numpy()
        learn = (
            np.ones(len(input_ids), dtype=bool)
            if self._learns_all
            else self._learn[index].values.to_numpy(zero_copy_only=False)
        )
        return Conversation(row=self._row[index].as_py(), input_ids=input_ids, learn=learn)

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


def _joined(chunks: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(chunks).astype(np.int64) if chunks else np.zeros(0, dtype=np.int64)


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
    boundaries: tuple[int, ...]
    """0, then where each conversation ends; the last is T."""
    predict_from: torch.Tensor
    """(K,) where the model's output is needed: one before each learned token."""
    targets: torch.Tensor
    """(K,) the learned tokens."""
    rows: tuple[int, ...]
    weight: float = 1.0
    """Of its loss. 0.0: a filler, computed because other processes compute a pack at the same time."""

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def learned(self) -> int:
        return self.targets.shape[0]

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            predict_from=self.predict_from.to(device),
            targets=self.targets.to(device),
        )

    def as_filler(self) -> Batch:
        """The same computation, which counts for nothing."""
        return replace(self, rows=(), weight=0.0)


def pack(conversations: Sequence[Conversation]) -> Batch:
    """One pack of the given conversations, in their order."""
    ids = np.concatenate([each.input_ids for each in conversations]).astype(np.int64)
    positions = np.concatenate([np.arange(len(each.input_ids)) for each in conversations])
    learn = np.concatenate([each.learn for each in conversations]).astype(bool)
    # The first token of a conversation would be predicted from the conversation before it.
    learned_at = np.flatnonzero(learn & (positions > 0))
    return Batch(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.from_numpy(positions)[None],
        boundaries=(0, *np.cumsum([len(each.input_ids) for each in conversations]).tolist()),
        predict_from=torch.from_numpy(learned_at - 1),
        targets=torch.from_numpy(ids[learned_at]),
        rows=tuple(each.row for each in conversations),
    )
