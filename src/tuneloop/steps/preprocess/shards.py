"""Tokenised conversations as Arrow IPC files of bounded size, which training maps into memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa

from tuneloop.tokens import Tokens

SCHEMA = pa.schema(
    [("input_ids", pa.list_(pa.int32())), ("learn", pa.list_(pa.bool_())), ("row", pa.int64())]
)

SHARD_BYTES = 256 << 20
"""A shard that has reached it is followed by another."""


def record_batch(conversations: Sequence[tuple[int, Tokens]]) -> pa.RecordBatch:
    """Of (line in the source file, tokens)."""
    ends = np.cumsum([0, *(each.tokens for _, each in conversations)], dtype=np.int32)
    ids = np.concatenate([each.input_ids for _, each in conversations])
    learn = np.concatenate([each.learn for _, each in conversations])
    columns = [
        pa.ListArray.from_arrays(_array(pa.int32(), ends), _array(pa.int32(), ids)),
        pa.ListArray.from_arrays(_array(pa.int32(), ends), _bits(learn)),
        _array(pa.int64(), np.array([line for line, _ in conversations], dtype=np.int64)),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _array(kind: pa.DataType, values: np.ndarray) -> pa.Array:
    """Without `pa.array`, which loads pandas (a quarter of a second, 50 MB) to look at what it is given."""
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def _bits(values: np.ndarray) -> pa.Array:
    packed = np.packbits(values, bitorder="little")
    return pa.Array.from_buffers(pa.bool_(), len(values), [None, pa.py_buffer(packed)])


class Shards:
    """The splits of a dataset folder while they are written: `train/00000.arrow`, `train/00001.arrow` ..."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._open: dict[str, tuple[pa.OSFile, pa.RecordBatchFileWriter]] = {}
        self._count: dict[str, int] = {}

    def write(self, split: str, batch: pa.RecordBatch) -> None:
        sink, writer = self._open.get(split) or self._begin(split)
        writer.write_batch(batch)
        if sink.tell() >= self._shard_bytes:
            self._end(split)

    def _begin(self, split: str) -> tuple[pa.OSFile, pa.RecordBatchFileWriter]:
        number = self._count.get(split, 0)
        self._count[split] = number + 1
        (self._folder / split).mkdir(exist_ok=True)
        sink = pa.OSFile(str(self._folder / split / f"{number:05}.arrow"), "wb")
        self._open[split] = sink, pa.ipc.new_file(sink, SCHEMA)
        return self._open[split]

    def _end(self, split: str) -> None:
        sink, writer = self._open.pop(split)
        try:
            writer.close()
        finally:
            sink.close()

    def __enter__(self) -> Shards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if kind is not None:
            # Half-written files need no footer, and closing writers on a full disk would hide why.
            for sink, _ in self._open.values():
                sink.close()
            return
        for split in list(self._open):
            self._end(split)
