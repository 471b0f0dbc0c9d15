"""What goes into training and what comes out of it: the words of `train(model, inputs, events)`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from tuneloop.core.recipe import FinetuneParameters


class Events(Protocol):
    """Where a run tells what happens. A step's context is one."""

    def progress(
        self,
        stage: str,
        done: float | None = None,
        total: float | None = None,
        unit: str | None = None,
        remaining_seconds: float | None = None,
        **values: float,
    ) -> None: ...

    def metrics(self, step: int, **values: float) -> None: ...

    def warn(self, message: str) -> None: ...


@dataclass(frozen=True)
class TrainingInputs:
    dataset_folder: Path
    """Holds the split `train` and, unless evaluation is off, `validation`."""
    parameters: FinetuneParameters
    checkpoint_folder: Path
    """One folder for all processes."""
    previous_checkpoint_folders: tuple[Path, ...] = ()
    """Of earlier attempts at the same thing."""
    pack_tokens: int = 0
    """Most tokens of a pack; 0: as the parameters say, or `PACK_TOKENS`. Longer conversations go alone."""
    is_checkpointed: bool = False
    """Whether activations are computed again in the backward pass in place of being kept."""
    planned_memory_bytes: int | None = None
    """What the planner expects: of the accelerators of all processes together, or of the machine without."""
    report_folder: Path | None = None
    """Where `diverged/` is made when training goes wrong; None: nothing is kept."""


@dataclass(frozen=True)
class TrainingResult:
    """What was done, over all attempts. The model holds the weights after `kept_step` steps."""

    engine: str
    steps: int
    epochs: float
    kept_step: int
    tokens: int
    learned_tokens: int
    final_loss: float
    """Mean loss of the last logged steps."""
    mean_loss: float
    eval_loss: float | None
    """Of the weights that were kept."""
    seconds: float
    tokens_per_second: float
    gemm_share: float | None
    """Of the machine's peak at matrix products, in this attempt; None where it cannot be counted."""
    effective_batch: int
    processes: int
    processes_asked: int
    strategy: str
    pack_tokens: int
    """Most tokens computed at a time by a process."""
    precision: str
    device: str
    """`cpu` or `cuda`."""
    is_packed: bool
    is_checkpointed: bool
    is_stopped_early: bool
    resumed_from_step: int | None
    peak_memory_bytes: int
    """Of all processes together."""
    peak_device_memory_bytes: int | None
    """Of the accelerator, tensors and their cache; None without one."""
    weights: dict[str, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)
    """What was trained, whole, on the CPU, by its names in the model; on rank 0, empty elsewhere."""


class Mute:
    """Tells nobody: of several processes, those that are not the first."""

    def progress(self, *_: Any, **__: Any) -> None:
        pass

    def metrics(self, *_: Any, **__: Any) -> None:
        pass

    def warn(self, message: str) -> None:
        pass
