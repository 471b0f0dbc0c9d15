"""What a run has to remember between steps besides weights: counts, sums, and the best evaluation. JSON in
and out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

EARLY, REMEMBERED = 20, 50
"""Steps whose losses are kept: the first ones, and the last ones."""


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
    """Since the last logged line, as are the next four."""
    window_steps: int = 0
    window_tokens: int = 0
    window_seconds: float = 0.0
    window_flops: float = 0.0
    early_losses: list[float] = field(default_factory=list)
    """Of the first `EARLY` steps."""
    recent_losses: list[float] = field(default_factory=list)
    """Of the last `REMEMBERED` steps, as are the next."""
    recent_norms: list[float] = field(default_factory=list)
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
    pack_tokens: int = 0
    """Most tokens of a pack since memory ran out; 0: it never did."""

    def count_step(
        self,
        loss: float,
        tokens: int,
        learned_tokens: int,
        seconds: float,
        norm: float = 0.0,
        flops: float = 0.0,
    ) -> None:
        self.step += 1
        self.tokens += tokens
        self.learned_tokens += learned_tokens
        self.total_loss += loss
        self.seconds += seconds
        self.window_loss += loss
        self.window_steps += 1
        self.window_tokens += tokens
        self.window_seconds += seconds
        self.window_flops += flops
        self.early_losses = [*self.early_losses, loss][:EARLY]
        self.recent_losses = [*self.recent_losses, loss][-REMEMBERED:]
        self.recent_norms = [*self.recent_norms, norm][-REMEMBERED:]

    def close_window(self) -> tuple[float, float, float]:
        """Since the last call: mean loss, tokens per second, FLOPs per second."""
        loss = self.window_loss / self.window_steps
        seconds = max(self.window_seconds, 1e-9)
        speed, flops = self.window_tokens / seconds, self.window_flops / seconds
        self.final_loss = loss
        self.window_loss, self.window_steps, self.window_tokens = 0.0, 0, 0
        self.window_seconds, self.window_flops = 0.0, 0.0
        return loss, speed, flops

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
