"""What a run says of itself while it trains: its speed and what that is of the machine's, its memory against
the plan, and how long it still takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from tuneloop import lm
from tuneloop.core.machine import own_peak_resident_bytes
from tuneloop.training.course import Course, epoch_order
from tuneloop.training.data import Conversations
from tuneloop.training.flops import Work
from tuneloop.training.pace import Pace
from tuneloop.training.seam import Events
from tuneloop.training.tally import Tally

ABOVE_PLAN = 1.15
"""Memory beyond this share of the plan is worth a warning: the plan is right to about so much."""
FORWARD_SHARE = 1 / 3
"""Of learning from a conversation, what looking at it takes (arXiv:2001.08361, section 2.1)."""
FADING = 0.98
"""A step counts this much of the one after it: a machine that gets busy is noticed within some fifty."""


@dataclass(frozen=True)
class Limits:
    """What there is, over all processes."""

    peak_flops: float | None
    """A second, at matrix products."""
    planned_memory_bytes: int | None


def memory_bytes(device: torch.device) -> int:
    """The most that this process has held: of the accelerator, or of the machine."""
    on_device = lm.peak_device_memory_bytes(device)
    return own_peak_resident_bytes() if on_device is None else on_device


class Cost:
    """What each step of the course takes, in FLOPs; in tokens, where those cannot be counted."""

    def __init__(self, course: Course, train: Conversations, work: Work | None) -> None:
        self._course = course
        self._per_row = cost_of(train, work)
        self._epoch = float(self._per_row.sum())
        self._known: dict[int, np.ndarray] = {}

    def of(self, step: int) -> float:
        """Of step number `step`, counted from 0."""
        return self.until(step + 1) - self.until(step)

    def until(self, step: int) -> float:
        """Of all steps before this one."""
        epoch, place = divmod(step, self._course.steps_per_epoch)
        if not place:
            return epoch * self._epoch
        return epoch * self._epoch + float(self._sums(epoch)[place * self._course.effective_batch])

    def _sums(self, epoch: int) -> np.ndarray:
        """(rows + 1,) in the order of the epoch."""
        if epoch not in self._known:
            order = np.array(epoch_order(self._course.seed, epoch, self._course.rows))
            if len(self._known) >= 2:
                # Asked for are the epoch in work and the last one.
                self._known.pop(min(self._known))
            self._known[epoch] = np.concatenate([[0.0], np.cumsum(self._per_row[order])])
        return self._known[epoch]


def cost_of(conversations: Conversations, work: Work | None) -> np.ndarray:
    """(rows,)"""
    if work is None:
        return conversations.lengths.astype(np.float64)
    return work.of(conversations.lengths, conversations.learned_per_row)


@dataclass(frozen=True)
class Schedule:
    """After which steps something is due besides learning; every so many, and at the end of all."""

    evaluations: int
    """0: none."""
    epochs: int

    def ahead(self, step: int, total: int) -> tuple[int, int]:
        """Evaluations and milestones (evaluations and ends of epochs) after `step` steps."""
        both = math.lcm(self.evaluations, self.epochs) if self.evaluations else 0
        evaluated = _multiples(self.evaluations, step, total)
        ends = _multiples(self.epochs, step, total)
        milestones = evaluated + ends - _multiples(both, step, total)
        is_end_extra = step < total and not any(
            each and total % each == 0 for each in (self.evaluations, self.epochs)
        )
        is_last_extra = step < total and bool(self.evaluations) and total % self.evaluations != 0
        return evaluated + is_last_extra, milestones + is_end_extra


def _multiples(of: int, after: int, until: int) -> int:
    return until // of - after // of if of else 0


class Clock:
    """How long it still takes: what is left of the work at the rate of late, evaluations and checkpoints."""

    def __init__(
        self, course: Course, cost: Cost, pace: Pace, schedule: Schedule, validation_cost: float
    ) -> None:
        self._course, self._cost, self._pace, self._schedule = course, cost, pace, schedule
        self._validation_cost = validation_cost
        self._done = self._seconds = 0.0
        self._cost_in_all = self._seconds_in_all = 0.0
        self._evaluation_seconds: float | None = None

    def count_step(self, cost: float, seconds: float) -> None:
        self._done = FADING * self._done + cost
        self._seconds = FADING * self._seconds + seconds
        self._cost_in_all += cost
        self._seconds_in_all += seconds

    def count_evaluation(self, seconds: float) -> None:
        self._evaluation_seconds = seconds

    @property
    def rate(self) -> float:
        """Cost a second, of late."""
        return self._done / max(self._seconds, 1e-9)

    @property
    def mean_rate(self) -> float:
        """Cost a second, of this attempt."""
        return self._cost_in_all / max(self._seconds_in_all, 1e-9)

    def remaining_seconds(self, step: int) -> float | None:
        """After `step` steps; None before the first of this attempt. Early stopping may make it less."""
        if not self._done:
            return None
        total = self._course.total_steps
        learning = (self._cost.until(total) - self._cost.until(step)) / self.rate
        evaluations, milestones = self._schedule.ahead(step, total)
        each = self._evaluation_seconds
        if each is None:
            each = FORWARD_SHARE * self._validation_cost / self.rate
        saving = self._pace.checkpoints_ahead_seconds(total - step, learning, milestones)
        return learning + evaluations * each + saving


class Health:
    """Tells events how a run is doing."""

    def __init__(
        self, events: Events, limits: Limits, is_counted: bool, clock: Clock, epoch_steps: int
    ) -> None:
        """`is_counted`: costs are FLOPs."""
        self._events, self._limits, self._clock = events, limits, clock
        self._is_counted = is_counted
        self._epoch_steps = epoch_steps
        self._memory_bytes = 0.0
        self._is_warned = False

    def count_memory(self, memory_bytes: float) -> None:
        """Of all processes together, the most so far."""
        self._memory_bytes = memory_bytes
        planned = self._limits.planned_memory_bytes
        if planned and memory_bytes > ABOVE_PLAN * planned and not self._is_warned:
            self._is_warned = True
            self._events.warn(
                f"training takes {memory_bytes / 1e9:.1f} GB, {memory_bytes / planned - 1:.0%} more memory "
                f"than the {planned / 1e9:.1f} GB that were planned. Other jobs are started by the plan: "
                "leave room for it, or lower finetune.pack_tokens."
            )

    def log(self, tally: Tally, *, rate: float, norm: float) -> None:
        """A point of every curve."""
        loss, speed, flops = tally.close_window()
        self._events.metrics(
            tally.step,
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            epoch=tally.step / self._epoch_steps,
            tokens_per_second=speed,
            tokens_seen=tally.tokens,
            **self._of_machine(flops),
        )

    def tell(self, tally: Tally, total: int, loss: float) -> None:
        """What a person who watches sees."""
        self._events.progress(
            "training",
            tally.step,
            total,
            "steps",
            remaining_seconds=self._clock.remaining_seconds(tally.step),
            loss=loss,
            tokens_per_second=tally.tokens / max(tally.seconds, 1e-9),
            **self._of_machine(self._clock.rate),
        )

    @property
    def gemm_share(self) -> float | None:
        """Of the peak, over this attempt."""
        return self._share(self._clock.mean_rate)

    def _share(self, flops: float) -> float | None:
        peak = self._limits.peak_flops
        return flops / peak if self._is_counted and peak and flops else None

    def _of_machine(self, flops: float) -> dict[str, float]:
        share, planned = self._share(flops), self._limits.planned_memory_bytes
        found = {} if share is None else {"gemm_share": share}
        if self._memory_bytes:
            found["memory_bytes"] = self._memory_bytes
            if planned:
                found["planned_memory_bytes"] = float(planned)
        return found


def peak_of_all(
    measure: Callable[[], float | None], total: Callable[[list[float]], list[float]]
) -> float | None:
    """The processes' peaks together, measured at the same time as they will compute at the same time; None
    where one of them has none."""
    own = measure()
    peak, lacking = total([own or 0.0, float(own is None)])
    return None if lacking else peak
