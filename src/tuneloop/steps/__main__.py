"""`python -m tuneloop.steps DIR`: run one attempt of one step, whoever asks for it.

Reads `DIR/step.json`; appends `progress.jsonl` and `metrics.jsonl`; writes `outputs/`; renames `result.json`
into place last. A folder without `result.json` is not finished. To repeat a step by hand, copy its
`step.json` into an empty folder and run this on it.

Exit codes: 0 succeeded, 1 failed (the reason is in result.json), 143 interrupted, 3 the folder has an owner.
"""

from __future__ import annotations

import importlib
import os
import resource
import signal
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from tuneloop.core.digest import of_path
from tuneloop.core.errors import Internal, TuneloopError
from tuneloop.core.process import claim, write_atomically
from tuneloop.core.types import ErrorInfo, ResultFile, ResultOutput, StepFile
from tuneloop.steps.context import Interrupted, Run, StepContext

EXIT_OWNED = 3
EXIT_INTERRUPTED = 143


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(arguments[0]).resolve()
    step = StepFile.model_validate_json((folder / "step.json").read_text(encoding="utf-8"))
    if not claim(folder, step.attempt_id):
        print(f"{folder} belongs to another process; nothing was started.", file=sys.stderr)
        return EXIT_OWNED
    signal.signal(signal.SIGTERM, _interrupt)
    context = StepContext(folder, step)
    result = _run(context)
    context.close()
    _check_disk_order(folder)
    # result.json last: its presence is the only proof that outputs/ is whole.
    write_atomically(folder / "result.json", result.model_dump_json(indent=1, exclude_none=True))
    return {"succeeded": 0, "failed": 1, "interrupted": EXIT_INTERRUPTED}[result.status]


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Interrupted


def _run(context: StepContext) -> ResultFile:
    started_at = datetime.now(UTC)
    status, error, outputs = "succeeded", None, {}
    try:
        _load(context.step.kind)(context)
        outputs = _digest_outputs(context)
    except Interrupted:
        status = "interrupted"
        print("interrupted: the step goes on from its last checkpoint when it is started again", flush=True)
    except TuneloopError as mistake:
        status, error = "failed", ErrorInfo.model_validate(mistake.to_json())
        print(f"error: {mistake}", file=sys.stderr, flush=True)
    except BaseException as defect:
        status, error = "failed", _describe(defect, context.step.attempt)
        traceback.print_exc()
    return ResultFile(
        attempt_id=context.step.attempt_id,
        status=status,  # type: ignore[arg-type]
        outputs=outputs,
        metrics=context.summary,
        warnings=tuple(context.warnings),
        error=error,
        started_at=started_at,
        finished_at=datetime.now(UTC),
        peak_memory_bytes=_peak_memory_bytes(),
    )


def _load(kind: str) -> Run:
    """Imported here, not above: torch and MLflow come only with the steps that need them."""
    run: Run = importlib.import_module(f"tuneloop.steps.{kind}").run
    return run


def _digest_outputs(context: StepContext) -> dict[str, ResultOutput]:
    outputs = {}
    for name, kind in context.step.outputs.items():
        path = context.output(name)
        if not path.exists():
            raise Internal(f"step {context.step.attempt} ended without its output {name!r}.")
        context.progress(f"sealing {name}")
        digest, size_bytes = of_path(path)
        outputs[name] = ResultOutput(digest=digest, size_bytes=size_bytes, type=kind)
    return outputs


def _check_disk_order(folder: Path) -> None:
    """Outputs reach the disk before result.json says that they are whole."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _describe(defect: BaseException, attempt: str) -> ErrorInfo:
    job, step, _ = attempt.split("/")
    lines = traceback.format_exception(defect)
    if isinstance(defect, MemoryError):
        return ErrorInfo(
            code="out_of_memory",
            message=f"The machine has no memory left for this step: {defect or 'allocation failed'}.",
            next="Lower max_seq_length or per_device_train_batch_size, or close other programs.",
        )
    if isinstance(defect, OSError) and defect.errno == 28:
        return ErrorInfo(
            code="disk_full",
            message=f"No space left on the disk while writing {defect.filename or 'a file'}.",
            next=f"Free some space, then: tuneloop jobs retry {job}",
        )
    return ErrorInfo(
        code=Internal.code,
        message=f"{type(defect).__name__}: {defect}",
        next=f"The whole traceback is in the step's log: tuneloop jobs logs {job} --step {step}",
        details={"traceback": "".join(lines)[-4000:]},
    )


def _peak_memory_bytes() -> int:
    """Of this process and of its ended children, the larger (Linux counts in KiB, macOS in bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return max(own, children) * unit


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is on the disk: taking torch apart in good order would only hold memory that the next
    # step wants.
    os._exit(status)
