"""When training has gone wrong: the rule, the batch that is kept for a person, the error that names it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tuneloop.core.errors import Diverged
from tuneloop.core.process import write_atomically
from tuneloop.core.recipe import FinetuneParameters
from tuneloop.training.course import Course
from tuneloop.training.data import Batch, Conversations
from tuneloop.training.feed import Sharing
from tuneloop.training.layout import Layout
from tuneloop.training.seam import Events
from tuneloop.training.tally import EARLY, Tally

FOLDER = "diverged"
RECENT = 20
"""Steps whose mean loss is judged."""
FACTOR, NATS = 1.5, 1.0
DEVIATIONS = 6.0
"""A normal one beyond six is one in a thousand million; steps' losses have longer tails."""
FIRST = 3
"""Steps that say how a model began that knows less than nothing."""
STEEP = 100.0
"""Times the median of the norms before: worth a word."""


def blown_up(early: Sequence[float], recent: Sequence[float], steps: int, vocabulary: int) -> str | None:
    """Why the loss has blown up, or None.

    `early`: losses of the first steps, up to `EARLY`; `recent`: of the last ones; `steps`: all there were.
    The mean of the last 20 steps is judged, in two ways:

    - It is above 1.5 times the mean of the first 20 and 1 nat more, and further above it than chance would
      bring. Rows are shuffled, so without learning anything both means are drawn alike: where losses of
      single steps spread by s, their difference spreads by s sqrt(2/20), and six of these are asked for.
    - It is above ln(vocabulary) + 1 nat, and 1 nat above the very first steps. Who guesses blindly has
      ln(vocabulary): a model above that is sure of what is wrong. The first steps are there for models that
      begin so, with a random head, and get better.
    """
    if steps < RECENT or len(recent) < RECENT:
        return None
    mean, blind = statistics.fmean(recent[-RECENT:]), math.log(vocabulary)
    if steps >= EARLY + RECENT:
        first = statistics.fmean(early)
        by_chance = DEVIATIONS * statistics.stdev(early) * math.sqrt(2 / RECENT)
        if mean > max(FACTOR * first + NATS, first + by_chance):
            return f"{first:.3g} over the first {EARLY} steps"
    if mean > blind + NATS and mean > statistics.fmean(early[:FIRST]) + NATS:
        return f"{early[0]:.3g} at the first step; guessing blindly gives {blind:.3g}"
    return None


@dataclass(frozen=True)
class Computed:
    """An optimiser step before it is taken: the weights are those that gave the loss."""

    step: int
    """From 1."""
    loss: float
    norm: float
    rate: float
    batches: Sequence[Batch]
    """Of this process, with their share of the loss."""
    values: Sequence[float]


@dataclass(frozen=True)
class _Judged:
    """Conversations of a batch, one by one."""

    indices: Sequence[int]
    losses: dict[int, float]
    """Mean of each, by its row."""
    trouble: str | None
    """Why they could not be computed."""


class Guard:
    """Looks at every step; called by all processes alike."""

    def __init__(
        self,
        *,
        model: nn.Module,
        layout: Layout,
        sharing: Sharing,
        train: Conversations,
        course: Course,
        parameters: FinetuneParameters,
        vocabulary: int,
        precision: Callable[[], AbstractContextManager[Any]],
        folder: Path | None,
        events: Events,
    ) -> None:
        """`folder`: where `diverged/` is made."""
        self._model, self._layout, self._sharing = model, layout, sharing
        self._train, self._course, self._parameters = train, course, parameters
        self._vocabulary, self._precision = vocabulary, precision
        self._folder, self._events = folder, events
        self._told: set[str] = set()

    def check(self, done: Computed, tally: Tally) -> None:
        """Raises `Diverged`. `tally` holds the steps before this one."""
        if not math.isfinite(done.loss) or not math.isfinite(done.norm):
            self._refuse(done, tally)
        recent = [*tally.recent_losses, done.loss]
        early = [*tally.early_losses, done.loss][:EARLY]
        why = blown_up(early, recent, done.step, self._vocabulary)
        if why is not None:
            self._blown_up(done, tally, f"{statistics.fmean(recent[-RECENT:]):.3g}", why)
        self._look_at_norm(done, tally)

    def check_validation(self, loss: float, step: int) -> None:
        """Raises `Diverged`."""
        if not math.isfinite(loss):
            raise Diverged(
                f"step {step} of {self._course.total_steps}: the validation loss is {loss}.",
                next_move=self._calmer(),
                details={"step": step},
            )

    def _calmer(self) -> str:
        rate, warmup = self._parameters.learning_rate, self._parameters.warmup_steps
        return (
            f"Lower finetune.learning_rate (it is {rate:g}) or raise finetune.warmup_steps (it is {warmup}), "
            "and submit the recipe again; a retry of this job would end in the same way."
        )

    def _refuse(self, done: Computed, tally: Tally) -> None:
        pairs = zip(done.batches, done.values, strict=True)
        guilty = [batch for batch, value in pairs if not math.isfinite(value)]
        if math.isfinite(done.loss):
            guilty = list(done.batches)
        found = self._layout.gather([row for batch in guilty for row in batch.rows])
        rows = sorted(row for each in found for row in each)
        judged = self._judge(done, rows)
        # A pack is spoilt by one conversation: alone, each shows what it is.
        named = [row for row in rows if not math.isfinite(judged.losses.get(row, 0.0))] or rows
        is_loss = not math.isfinite(done.loss)
        what = f"loss is {done.loss}" if is_loss else f"gradient's norm is {done.norm}"
        next_move = self._calmer()
        if done.step == 1:
            next_move = f"At the first step the model or these rows are at fault: look at them. {next_move}"
        self._raise(
            done, tally, f"the {what}, with training rows {_listed(named)}.", named, judged, next_move
        )

    def _blown_up(self, done: Computed, tally: Tally, mean: str, why: str) -> None:
        said = f"the loss has blown up: {mean} over the last {RECENT} steps, {why}."
        if self._parameters.stop_on_divergence:
            rows = [self._train[index].row for index in self._course.rows_of(done.step - 1)]
            own = "If it is meant to be so: finetune.stop_on_divergence: false."
            rows.sort()
            self._raise(done, tally, said, rows, self._judge(done, rows), f"{self._calmer()} {own}")
        self._warn_once(
            "blown up", f"step {done.step}: {said} stop_on_divergence is false, so training goes on."
        )

    def _look_at_norm(self, done: Computed, tally: Tally) -> None:
        norms = tally.recent_norms
        if len(norms) < RECENT or done.norm <= STEEP * statistics.median(norms):
            return
        rows = sorted(self._train[index].row for index in self._course.rows_of(done.step - 1))
        limit = self._parameters.max_grad_norm
        clipped = f"it was clipped to {limit:g}" if limit else "max_grad_norm is 0, so it was not clipped"
        times = done.norm / (statistics.median(norms) or 1.0)
        self._warn_once(
            "steep",
            f"step {done.step}: the gradient's norm is {done.norm:.3g}, {times:.0f} times the median of the "
            f"{len(norms)} steps before; {clipped}. Training rows {_listed(rows)}.",
        )

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._told:
            self._told.add(what)
            self._events.warn(message)

    # ------------------------------------------------------------ what is kept

    def _raise(
        self,
        done: Computed,
        tally: Tally,
        said: str,
        rows: Sequence[int],
        judged: _Judged,
        next_move: str,
    ) -> None:
        file = self._save(done, tally, said, judged)
        kept = f" The batch is kept in {file}." if file else ""
        details = {"step": done.step, "rows": list(rows), "file": str(file) if file else None}
        where = f"step {done.step} of {self._course.total_steps}"
        raise Diverged(f"{where}: {said}{kept}", next_move=next_move, details=details)

    def _save(self, done: Computed, tally: Tally, said: str, judged: _Judged) -> Path | None:
        if self._folder is None:
            return None
        file = self._folder / FOLDER / "batch.json"
        if self._layout.rank == 0:
            told = {
                "step": done.step,
                "total_steps": self._course.total_steps,
                "what": said,
                "dataset": str(self._train.path),
                "loss": _spelled(done.loss),
                "grad_norm": _spelled(done.norm),
                "learning_rate": done.rate,
                "recent_losses": tally.recent_losses,
                "recent_grad_norms": tally.recent_norms,
                "losses_not_computed_because": judged.trouble,
                "conversations": [self._described(index, judged.losses) for index in judged.indices],
            }
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(told))
        return file

    def _described(self, index: int, losses: dict[int, float]) -> dict[str, Any]:
        one = self._train[index]
        return {
            "row": one.row,
            "loss": _spelled(losses.get(one.row)),
            "input_ids": one.input_ids.tolist(),
            "learn": one.learn.astype(int).tolist(),
        }

    def _judge(self, done: Computed, rows: Sequence[int]) -> _Judged:
        """Each of these conversations by itself, without dropout."""
        wanted = set(rows)
        indices = [i for i in self._course.rows_of(done.step - 1) if self._train[i].row in wanted]
        self._layout.discard()
        self._model.eval()
        own: dict[int, float] = {}
        trouble = None
        try:
            with torch.no_grad():
                for batch in self._sharing.batches(self._train, indices, 1):
                    with self._precision():
                        loss = float(self._layout.loss(batch))
                    own.update(dict.fromkeys(batch.rows, loss / batch.learned))
        except Exception as error:
            # What is wrong is told already: this would only tell more of it.
            trouble = f"{type(error).__name__}: {error}"
        found: dict[int, float] = {}
        for each in self._layout.gather([[row, _spelled(loss)] for row, loss in own.items()]):
            found.update({row: float(loss) for row, loss in each})
        return _Judged(indices, found, trouble)


def _spelled(value: float | None) -> float | str | None:
    """JSON has no word for what is no number; Python's float() reads these."""
    return value if value is None or math.isfinite(value) else str(value)


def _listed(rows: Sequence[int], limit: int = 50) -> str:
    text = ", ".join(map(str, rows[:limit]))
    return text if len(rows) <= limit else f"{text} and {len(rows) - limit} more"
