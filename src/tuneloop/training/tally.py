"""What a run has to remember between steps besides weights: counts, sums, and the best evaluation. JSON in
and out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Tally:
    step: int = 0
    """Optimiser steps done."""
    tokens: int = 0
    learned_tokens: int = 0
    total_loss: float = 0.0
    """Sum of the losses of all steps."""
    seconds: float = 0.0
    """Spent in steps, over all attempts; evaluations and checkpoints left out."""
    window_loss: float = 0.0
    """Since the last logged line, as are the next three."""
    window_steps: int = 0
    window_tokens: int = 0
    window_seconds: float = 0.0
    final_loss: float | None = None
    """Mean loss of the last logged window."""
    eval_loss: float | None = None
    """Of the latest evaluation."""
    best_loss: float | None = None
    best_step: int | None = None
    bad_evaluations: int = 0
    """In a row, none better than the best by more than the threshold."""
    is_stopped: bool = False
    """By early stopping."""

    def count_step(self, loss: float, tokens: int, learned_tokens: int, seconds: float) -> None:
        self.step += 1
        self.tokens += tokens
        self.learned_tokens += learned_tokens
        self.total_loss += loss
        self.seconds += seconds
        self.window_loss += loss
        self.window_steps += 1
        self.window_tokens += tokens
        self.window_seconds += seconds

    def close_window(self) -> tuple[float, float]:
        """Mean loss and tokens per second since the last call."""
        loss = self.window_loss / self.window_steps
        speed = self.window_tokens / max(self.window_seconds, 1e-9)
        self.final_loss = loss
        self.window_loss, self.window_steps, self.window_tokens, self.window_seconds = (0.0, 0, 0, 0.0)
        return loss, speed

    def count_evaluation(self, loss: float, threshold: float) -> bool:
        """Whether it is the best so far. A smaller improvement than `threshold` counts as bad for early
        stopping and yet becomes the best, as in transformers' `EarlyStoppingCallback`."""
        is_best = self.best_loss is None or loss < self.best_loss
        is_good = self.best_loss is None or self.best_loss - loss > threshold
        self.bad_evaluations = 0 if is_good else self.bad_evaluations + 1
        self.eval_loss = loss
        if is_best:
            self.best_loss, self.best_step = loss, self.step
        return is_best

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(state: dict[str, Any]) -> Tally:
        return Tally(**{name: state[name] for name in Tally.__dataclass_fields__})
