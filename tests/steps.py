"""A step's context over a folder, as `python -m tuneloop.steps` would give it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuneloop.core.types import StepFile, StepFileInput, StepKind
from tuneloop.steps.context import StepContext


def step_context(
    folder: Path,
    kind: StepKind,
    *,
    inputs: Mapping[str, Path] | None = None,
    outputs: Mapping[str, Any] | None = None,
    parameters: Mapping[str, Any] | None = None,
    cache_folder: Path | None = None,
) -> StepContext:
    """`folder` is made; inputs are called by their file names and have made-up digests."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {
        name: StepFileInput(path=str(path), digest=f"sha256:{name}", name=path.name)
        for name, path in (inputs or {}).items()
    }
    step = StepFile(
        attempt=f"job/{kind}/1",
        attempt_id="attempt",
        kind=kind,
        parameters=dict(parameters or {}),
        inputs=given,
        outputs=dict(outputs or {}),
        cache_folder=None if cache_folder is None else str(cache_folder),
    )
    return StepContext(folder, step)
