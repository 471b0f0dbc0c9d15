"""What an exception of a step is told as."""

from __future__ import annotations

import traceback

from tuneloop.core import disk
from tuneloop.core.errors import Internal, TuneloopError
from tuneloop.core.types import ErrorInfo
from tuneloop.steps.context import StepContext


def describe(defect: BaseException, context: StepContext) -> ErrorInfo:
    if isinstance(defect, TuneloopError):
        return ErrorInfo.model_validate(defect.to_json())
    job, step, _ = context.step.attempt.split("/")
    is_look = job == "look"
    if isinstance(defect, MemoryError):
        return ErrorInfo(
            code="out_of_memory",
            message=f"The machine has no memory left for this step: {defect or 'allocation failed'}.",
            next="Lower max_seq_length, write activation_checkpointing: always, or close other programs.",
        )
    again = "try again." if is_look else f"tuneloop jobs retry {job}"
    known = disk.explain(defect, context.folder, f"Free some space there, then: {again}")
    if known is not None:
        return ErrorInfo.model_validate(known.to_json())
    return ErrorInfo(
        code=Internal.code,
        message=f"{type(defect).__name__}: {defect}",
        next=f"The whole traceback is in {context.folder / 'log.txt'}"
        if is_look
        else f"The whole traceback is in the step's log: tuneloop jobs logs {job} --step {step}",
        details={"traceback": "".join(traceback.format_exception(defect))[-4000:]},
    )
