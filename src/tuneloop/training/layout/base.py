"""How the work of a run is laid out over processes: the seam between the loop and DDP, FSDP2 and ZeRO.

The loop knows no device and no collective: it hands packs to a layout and reads sums from it. Every method
is called by all processes, in the same order; `rank` 0 speaks and writes what is written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from tuneloop.core.errors import Unsupported
from tuneloop.core.recipe import FinetuneParameters
from tuneloop.training.checkpoint import Found
from tuneloop.training.data import Batch
from tuneloop.training.loss import Objective
from tuneloop.training.plan import Strategy


@dataclass(frozen=True)
class Dump:
    """What this process writes into a checkpoint."""

    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """Of each file, by its name without ending: `weights`, or a shard `weights-00001-of-00002`; and
    `optimizer` in the same way."""
    state: dict[str, Any] = field(default_factory=dict)
    """JSON; that of rank 0 is kept."""


class Layout(Protocol):
    strategy: Strategy
    rank: int
    world: int
    device: torch.device
    is_collective: bool
    """Whether a forward pass waits for the other processes, so that all need equally many packs."""

    def place(self, model: nn.Module) -> None:
        """Move the model to where it can be measured: to the device, unless it is to be sharded first."""

    def wrap(self, model: nn.Module, objective: Objective, parameters: FinetuneParameters) -> None:
        """Shard the model, build the optimiser. What requires a gradient is trained."""

    def loss(self, batch: Batch) -> torch.Tensor:
        """The pack's summed loss in fp32; a graph unless gradients are off."""

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        """Add this loss's gradient. After the last pack of a step, gradients are sums over all processes."""

    def clip(self, limit: float) -> float:
        """The norm of the whole gradient, before it is clipped to `limit` (infinity: not clipped)."""

    def step(self, rate: float) -> None:
        """One optimiser step at this learning rate; gradients are gone afterwards."""

    def discard(self) -> None:
        """Throw the gradients of an unfinished step away."""

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the processes, in 64 bits."""

    def gather(self, value: Any) -> list[Any]:
        """The values (JSON) of all processes, by rank, on every process."""

    def barrier(self) -> None: ...

    def dump(self) -> Dump: ...

    def load(self, found: Found) -> None:
        """Weights and optimiser of a checkpoint. Raises `Unsupported` when it was made by a layout or a
        number of processes that this one cannot continue."""

    def load_weights(self, files: Sequence[Path]) -> None:
        """The trained weights alone, from the weight files of a checkpoint."""

    def trained_weights(self) -> dict[str, torch.Tensor]:
        """All trained weights, whole, on the CPU, by the names that they had before `wrap`; on rank 0, and
        empty elsewhere."""


def refuse_what_cannot_be_cut(parameters: FinetuneParameters, strategy: Strategy) -> None:
    """Raise `Unsupported` for what needs whole matrices where a process holds parts of them."""
    if parameters.optim == "adafactor":
        raise Unsupported(
            f"optim is 'adafactor' and training is laid out by {strategy}: Adafactor needs whole rows and "
            "columns of a matrix, and a process holds a part.",
            next_move="Write optim: adamw_torch, or strategy: ddp without apply_deepspeed.",
        )
    if parameters.quantization == "4bit" and strategy != "zero2":
        raise Unsupported(
            f"quantization is '4bit' and training is laid out by {strategy}: 4-bit weights come in blocks "
            "with scales of their own, which cannot be cut.",
            next_move="Write strategy: ddp without apply_deepspeed, or deepspeed_stage: '2'.",
        )


def decoder_layers(model: Any) -> list[nn.Module]:
    """The blocks that a model repeats, by what its class says must stay together (`_no_split_modules`); where
    it says nothing, the longest list of modules."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = set(getattr(base, "_no_split_modules", None) or ())
    named = [module for module in base.modules() if type(module).__name__ in names]
    if named:
        return named
    lists = [list(module) for module in base.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def shard_suffix(rank: int, world: int) -> str:
    """Of a file that each process writes for itself; nothing when there is one."""
    return "" if world == 1 else f"-{rank + 1:05d}-of-{world:05d}"
