"""The machine's clock, as the workspace reads it."""

from __future__ import annotations

import time
from datetime import UTC, datetime


class SystemClock:
    """UTC, as the machine tells it, and the seconds since it started."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()
