"""Learning rates as a pure function of the step, equal to `transformers.get_scheduler`'s traces.

There is no scheduler object and so no state of one: a resumed run asks for the next step's rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable

POLYNOMIAL_END = 1e-7
"""The final rate of "polynomial" with power 1, as transformers has it."""


def learning_rate(name: str, step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """The rate of the optimiser step that follows `step` finished ones. Raises `KeyError` for an unknown
    name."""
    decay = _DECAYS[name]
    if name != "constant" and step < warmup_steps:
        return peak * step / max(1, warmup_steps)
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return decay(peak, done)


def _linear(peak: float, done: float) -> float:
    return peak * max(0.0, 1.0 - done)


def _cosine(peak: float, done: float) -> float:
    return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))


def _cosine_with_restarts(peak: float, done: float) -> float:
    """One cycle, transformers' default."""
    if done >= 1.0:
        return 0.0
    return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * (done % 1.0))))


def _polynomial(peak: float, done: float) -> float:
    if done > 1.0:
        return POLYNOMIAL_END
    return (peak - POLYNOMIAL_END) * (1.0 - done) + POLYNOMIAL_END


def _constant(peak: float, done: float) -> float:
    return peak


_DECAYS: dict[str, Callable[[float, float], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
    "constant": _constant,
    "constant_with_warmup": _constant,
}
NAMES = tuple(_DECAYS)
