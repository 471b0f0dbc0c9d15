"""Attempts that came to no end of their own: tried again from their checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

from tuneloop.core.errors import RankLost
from tuneloop.core.types import AttemptRecord, ErrorInfo, ResultFile


def is_lost(result: ResultFile) -> bool:
    """Whether it only says that the step did not come to an end: it was interrupted, or one of several
    processes died."""
    if result.status == "interrupted":
        return True
    return result.status == "failed" and result.error is not None and result.error.code == RankLost.code


def vanished(attempt: AttemptRecord, last_lines: Sequence[str]) -> ErrorInfo:
    return ErrorInfo(
        code="step_vanished",
        message=f"The process of {attempt.key} left no result: killed from outside, or out of memory.",
        next=f"Look at: tuneloop jobs logs {attempt.job} --step {attempt.step}",
        details={"last_lines": "\n".join(last_lines)},
    )
