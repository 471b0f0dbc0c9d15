"""Which conversations each optimiser step learns from: a pure function of seed, step and number of rows, so
that a step can be found again after any interruption, by any process."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import lru_cache


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, rows: int) -> tuple[int, ...]:
    """The order of an epoch: a function of seed, epoch and number of rows alone."""
    order = list(range(rows))
    random.Random(f"order/{seed}/{epoch}").shuffle(order)  # noqa: S311 - to be repeated, not to be secret
    return tuple(order)


@dataclass(frozen=True)
class Course:
    """How the rows of a training set follow each other."""

    rows: int
    effective_batch: int
    """Conversations of an optimiser step, over all processes."""
    epochs: int
    max_steps: int
    """When positive, it decides the length in place of `epochs`."""
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch may be a smaller one: no row is left out."""
        return math.ceil(self.rows / self.effective_batch)

    @property
    def total_steps(self) -> int:
        return self.max_steps if self.max_steps > 0 else self.steps_per_epoch * self.epochs

    def rows_of(self, step: int) -> tuple[int, ...]:
        """Row indices of step number `step`, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.seed, epoch, self.rows)
        return order[place * self.effective_batch : (place + 1) * self.effective_batch]

    def ends_epoch(self, finished_steps: int) -> bool:
        return finished_steps % self.steps_per_epoch == 0
