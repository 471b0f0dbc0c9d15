"""One process, one device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tuneloop.core.errors import Unsupported
from tuneloop.core.recipe import FinetuneParameters
from tuneloop.training import optimizer
from tuneloop.training.checkpoint import Found
from tuneloop.training.data import Batch
from tuneloop.training.layout.base import Dump
from tuneloop.training.layout.shards import Shards
from tuneloop.training.loss import Objective
from tuneloop.training.plan import Strategy


class Plain:
    strategy: Strategy = "plain"
    rank, world = 0, 1
    is_collective = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def place(self, model: nn.Module) -> None:
        model.to(self.device)

    def wrap(self, model: nn.Module, objective: Objective, parameters: FinetuneParameters) -> None:
        self._objective = objective
        self._trained = optimizer.trainable(model)
        self._optimizer = optimizer.of(parameters, self._trained)

    def loss(self, batch: Batch) -> torch.Tensor:
        return self._objective.summed_loss(batch.to(self.device))

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        torch.autograd.backward(loss)

    def clip(self, limit: float) -> float:
        return float(nn.utils.clip_grad_norm_(list(self._trained.values()), limit))

    def step(self, rate: float) -> None:
        optimizer.set_learning_rate(self._optimizer, rate)
        self._optimizer.step()
        self.discard()

    def discard(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def sum(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        pass

    def dump(self) -> Dump:
        tensors, scalars = optimizer.dump_state(self._optimizer, self._trained)
        return Dump({"weights": dict(self._trained), "optimizer": tensors}, {"optimizer": scalars})

    def load(self, found: Found) -> None:
        refuse_foreign(found, self.strategy, self.world)
        self.load_weights(found.files("weights"))
        with Shards(found.files("optimizer")) as tensors:
            optimizer.load_state(self._optimizer, self._trained, tensors, found.state["optimizer"])

    def load_weights(self, files: Sequence[Path]) -> None:
        with torch.no_grad(), Shards(files) as whole:
            for name, tensor in whole.items():
                self._trained[name].copy_(tensor)

    def trained_weights(self) -> dict[str, torch.Tensor]:
        return {name: weight.detach().cpu() for name, weight in self._trained.items()}


WHOLE: tuple[Strategy, ...] = ("plain", "ddp", "fsdp")
"""Layouts whose checkpoints hold weights as they are, whole or as rows: each reads those of the others."""


def refuse_foreign(found: Found, strategy: Strategy, world: int) -> None:
    """Raise `Unsupported` when `world` processes with `strategy` cannot read what the checkpoint's layout
    has written."""
    made_by, processes = found.state["strategy"], found.state["processes"]
    if (made_by, processes) == (strategy, world) or (made_by in WHOLE and strategy in WHOLE):
        return
    raise Unsupported(
        f"{found.folder.name} was made by {_number(processes)} with {made_by}, and {_number(world)} with "
        f"{strategy} cannot continue it: what ZeRO writes is read by the same stage with equally many "
        "processes alone.",
        next_move=f"Train with {made_by} and {_number(processes)} as before; or start from the beginning: "
        "submit the recipe as a new job.",
    )


def _number(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"
