"""Tokenised conversations made up for training tests, and a listener that remembers what a run told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.models import VOCABULARY


def write_dataset(folder: Path, *, train: int = 16, validation: int = 4, seed: int = 0) -> Path:
    """A dataset folder with that many conversations of 5 to 30 tokens; about half of the tokens are
    learned."""
    folder.mkdir(parents=True, exist_ok=True)
    write_split(folder / "train.arrow", *conversations(train, seed))
    write_split(folder / "validation.arrow", *conversations(validation, seed + 1))
    return folder


def conversations(count: int, seed: int) -> tuple[list[list[int]], list[list[bool]]]:
    import numpy as np

    chance = np.random.default_rng(seed)
    ids, learn = [], []
    for _ in range(count):
        length = int(chance.integers(5, 31))
        # A few tokens that come again and again, so that there is something to learn.
        ids.append((10 + chance.integers(0, 40, length)).tolist())
        learn.append([*(chance.random(length - 1) < 0.5).tolist(), True])
    assert max(map(max, ids)) < VOCABULARY
    return ids, learn


def write_split(
    path: Path, ids: list[list[int]], learn: list[list[bool]], *, is_stream: bool = False, chunk: int = 4
) -> Path:
    import pyarrow as pa

    table = pa.table(
        {
            "input_ids": pa.array(ids, pa.list_(pa.int32())),
            "learn": pa.array(learn, pa.list_(pa.bool_())),
            "row": pa.array(range(1, len(ids) + 1), pa.int64()),
        }
    )
    new = pa.ipc.new_stream if is_stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=chunk)
    return path


class Heard:
    """Events of a run. `at_metrics` may raise, which is how tests interrupt one."""

    def __init__(self, at_metrics: Callable[[int, dict[str, float]], None] | None = None) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.stages: list[str] = []
        self.warnings: list[str] = []
        self._at_metrics = at_metrics

    def progress(
        self,
        stage: str,
        done: float | None = None,
        total: float | None = None,
        unit: str | None = None,
        remaining_seconds: float | None = None,
        **values: float,
    ) -> None:
        self.stages.append(stage)

    def metrics(self, step: int, **values: float) -> None:
        self.lines.append((step, values))
        if self._at_metrics is not None:
            self._at_metrics(step, values)

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def curve(self, name: str) -> dict[int, float]:
        """Step to value."""
        return {step: values[name] for step, values in self.lines if name in values}
