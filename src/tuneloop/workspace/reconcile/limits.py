"""How often, and for how long, something is tried."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    max_attempts: int = 3
    """Attempts of one step whose process vanished without a result."""
    max_crashes: int = 5
    """Replicas of one deployment in a row that ended before they answered."""
    stop_grace_seconds: float = 10.0
    """Between asking a process to end and ending it."""


def backoff_seconds(failures: int) -> float:
    """0 after none, then 1, 2, 4, ... at most 30."""
    return 0.0 if failures <= 0 else min(30.0, 2.0 ** (failures - 1))
