"""`python -m tuneloop.steps DIR`: run one attempt of one step, whoever asks for it.

Reads `DIR/step.json`; appends `progress.jsonl` and `metrics.jsonl`; writes `outputs/`; renames `result.json`
into place last. A folder without `result.json` is not finished. To repeat a step by hand, copy its
`step.json` into an empty folder and run this on it.

Exit codes: 0 succeeded, 1 failed (the reason is in result.json), 143 interrupted, 3 the folder has an owner.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType

from tuneloop.core.digest import of_path
from tuneloop.core.errors import DiskFull, Internal, TuneloopError
from tuneloop.core.machine import own_peak_resident_bytes
from tuneloop.core.process import claim, write_atomically
from tuneloop.core.types import ErrorInfo, ResultFile, ResultOutput, StepFile
from tuneloop.steps.context import Interrupted, Run, StepContext
from tuneloop.steps.failure import describe

EXIT_OWNED = 3
EXIT_INTERRUPTED = 143
RESERVE = ".reserve"
RESERVE_BYTES = 64 * 1024


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
    _reserve(folder)
    context = StepContext(folder, step)
    result = _run(context)
    context.close()
    _finish(folder, result)
    return {"succeeded": 0, "failed": 1, "interrupted": EXIT_INTERRUPTED}[result.status]


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Interrupted


def _run(context: StepContext) -> ResultFile:
    started_at = datetime.now(UTC)
    began = time.monotonic()
    status, error, outputs = "succeeded", None, {}
    try:
        error, outputs = _attempt(context)
        # From here on nothing takes long: the result is written rather than thrown away.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        status = "failed" if error else "succeeded"
    except Interrupted:
        status = "interrupted"
        _say("interrupted: the step goes on from its last checkpoint when it is started again")
    return ResultFile(
        attempt_id=context.step.attempt_id,
        status=status,  # type: ignore[arg-type]
        outputs=outputs,
        metrics=context.summary,
        warnings=tuple(context.warnings),
        is_repeatable=context.is_repeatable,
        error=error,
        started_at=started_at,
        # Not the clock's own reading: somebody may have set it while the step ran.
        finished_at=started_at + timedelta(seconds=time.monotonic() - began),
        peak_memory_bytes=max(context.peak_memory_bytes, _peak_memory_bytes()),
    )


def _attempt(context: StepContext) -> tuple[ErrorInfo | None, dict[str, ResultOutput]]:
    """Why it failed, or the outputs."""
    try:
        _load(context.step.kind)(context)
        return None, _digest_outputs(context)
    except Interrupted:
        raise
    except TuneloopError as mistake:
        _say(f"error: {mistake}")
        return ErrorInfo.model_validate(mistake.to_json()), {}
    except BaseException as defect:
        _say(traceback.format_exc())
        return describe(defect, context), {}


def _say(text: str) -> None:
    """Into the log. On a full disk the result matters more."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _reserve(folder: Path) -> None:
    """Room for result.json, put aside: on a full disk the reason could not be told otherwise."""
    with contextlib.suppress(OSError):
        (folder / RESERVE).write_bytes(bytes(RESERVE_BYTES))


def _finish(folder: Path, result: ResultFile) -> None:
    if result.status == "failed" and result.error is not None and result.error.code == DiskFull.code:
        # Half of an output helps nobody, and takes the room that the next attempt needs.
        shutil.rmtree(folder / "outputs", ignore_errors=True)
    (folder / RESERVE).unlink(missing_ok=True)
    _check_disk_order(folder)
    # result.json last: its presence is the only proof that outputs/ is whole.
    write_atomically(folder / "result.json", result.model_dump_json(indent=1, exclude_none=True))


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


def _peak_memory_bytes() -> int:
    """Of this process and of its ended children, the larger. A child is told no smaller than this process was
    when it started (see `core.machine`), which the larger of the two is not changed by."""
    unit = 1 if sys.platform == "darwin" else 1024
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    return max(own_peak_resident_bytes(), children)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    # Everything is on the disk: taking torch apart in good order would only hold memory that the next
    # step wants.
    os._exit(status)
