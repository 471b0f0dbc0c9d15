"""When to speak and when to save, by the clock or by steps; what is computed never depends on it."""

from __future__ import annotations

import math
import time

PROGRESS_SECONDS = 0.3
"""Least time between two progress lines."""
CHECKPOINT_SHARE = 0.05
"""Most of the time that checkpoints in between may cost: where one takes long, they get rarer."""


class Pace:
    def __init__(self, checkpoint_seconds: float, checkpoint_steps: int = 0) -> None:
        """`checkpoint_seconds` between checkpoints, 0: one after every step; `checkpoint_steps`, above 0,
        decides instead."""
        self._interval, self._every = checkpoint_seconds, checkpoint_steps
        self._saved_at = time.monotonic()
        self._told_at = -math.inf
        self._checkpoint_seconds = 0.0

    def count_checkpoint(self, seconds: float) -> None:
        self._saved_at = time.monotonic()
        self._checkpoint_seconds = seconds

    def is_checkpoint_due(self, step: int) -> bool:
        """After `step` finished ones."""
        if self._every > 0:
            return step % self._every == 0
        if self._interval <= 0:
            return True
        wait = max(self._interval, self._checkpoint_seconds / CHECKPOINT_SHARE)
        return time.monotonic() - self._saved_at >= wait

    def may_tell(self) -> bool:
        now = time.monotonic()
        if now - self._told_at < PROGRESS_SECONDS:
            return False
        self._told_at = now
        return True

    def checkpoints_ahead_seconds(self, steps: int, seconds: float, milestones: int) -> float:
        """What checkpoints will take, over `steps` steps of `seconds` in all; `milestones` are written in any
        case."""
        between = self._between(steps, seconds)
        return self._checkpoint_seconds * (milestones + max(0.0, between - milestones))

    def _between(self, steps: int, seconds: float) -> float:
        if self._every > 0:
            return steps / self._every
        if self._interval <= 0:
            return steps
        return seconds / max(self._interval, self._checkpoint_seconds / CHECKPOINT_SHARE)
