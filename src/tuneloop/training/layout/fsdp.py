"""Fully sharded: every process holds a slice of each weight, of its gradient and of its optimiser state
(FSDP2, `torch.distributed.fsdp.fully_shard`), and gathers a layer's weights while it computes that layer.

A slice is a chunk along the first dimension, written as it is; so a checkpoint can be continued by any
number of processes, and by the layouts that hold everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from tuneloop.core.errors import Internal
from tuneloop.core.recipe import FinetuneParameters
from tuneloop.training import optimizer
from tuneloop.training.checkpoint import Found
from tuneloop.training.data import Batch
from tuneloop.training.layout.base import Dump, decoder_layers, refuse_what_cannot_be_cut, shard_suffix
from tuneloop.training.layout.plain import refuse_foreign
from tuneloop.training.layout.processes import Processes
from tuneloop.training.layout.shards import Shards
from tuneloop.training.loss import Objective
from tuneloop.training.plan import Strategy


class Fsdp(Processes):
    strategy: Strategy = "fsdp"
    is_collective = True

    def __init__(self, device: torch.device, *, is_bf16: bool) -> None:
        super().__init__(device)
        self._is_bf16 = is_bf16

    def place(self, model: nn.Module) -> None:
        """Nothing: layers move to the device one by one, each to be cut at once."""

    def wrap(self, model: nn.Module, objective: Objective, parameters: FinetuneParameters) -> None:
        refuse_what_cannot_be_cut(parameters, self.strategy)
        self._objective = objective
        mesh = init_device_mesh(self.device.type, (self.world,))
        _shard(model, mesh, self._policy())
        self._trained: dict[str, Any] = dict(optimizer.trainable(model))
        _check_sharded(model)
        self._optimizer = optimizer.of(parameters, self._trained)

    def loss(self, batch: Batch) -> torch.Tensor:
        return self._objective.summed_loss(batch.to(self.device))

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        # Each pack's gradient is summed and cut at once: a whole one is never kept.
        torch.autograd.backward(loss)

    def clip(self, limit: float) -> float:
        gradients = [each.grad.to_local() for each in self._trained.values() if each.grad is not None]
        return self.norm_and_clip([each for each in gradients if each.numel()], limit)

    def step(self, rate: float) -> None:
        optimizer.set_learning_rate(self._optimizer, rate)
        self._optimizer.step()
        self.discard()

    def discard(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def dump(self) -> Dump:
        suffix = shard_suffix(self.rank, self.world)
        tensors, scalars = optimizer.dump_state(self._optimizer, self._trained)
        return Dump(
            {
                f"weights{suffix}": {name: each.to_local() for name, each in self._trained.items()},
                f"optimizer{suffix}": {name: _local(each) for name, each in tensors.items()},
            },
            {"optimizer": scalars},
        )

    def load(self, found: Found) -> None:
        refuse_foreign(found, self.strategy, self.world)
        self.load_weights(found.files("weights"))
        with Shards(found.files("optimizer")) as whole:
            tensors = {path: self._own_state(path, whole) for path in whole}
            optimizer.load_state(self._optimizer, self._trained, tensors, found.state["optimizer"])

    def load_weights(self, files: Sequence[Path]) -> None:
        with torch.no_grad(), Shards(files) as whole:
            for name, weight in self._trained.items():
                weight.to_local().copy_(whole.rows(name, *_rows(weight)))

    def trained_weights(self) -> dict[str, torch.Tensor]:
        found = {}
        for name, weight in self._trained.items():
            whole = weight.detach().full_tensor()  # by all processes, one weight at a time
            if self.rank == 0:
                found[name] = whole.cpu()
            del whole
        return found

    def _policy(self) -> MixedPrecisionPolicy:
        """What is gathered to compute with; slices, their gradients and sums stay as they are."""
        if not self._is_bf16:
            return MixedPrecisionPolicy()
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def _own_state(self, path: str, whole: Shards) -> torch.Tensor:
        """This process's part of one of the optimiser's tensors: cut as its weight is, or a number."""
        weight = self._trained[path.rpartition("/")[0]]
        if not whole.shape(path):
            return whole[path]
        rows = whole.rows(path, *_rows(weight)).to(self.device)
        return DTensor.from_local(
            rows,
            weight.device_mesh,
            weight.placements,
            run_check=False,
            shape=weight.shape,
            stride=weight.stride(),
        )


def _shard(model: Any, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A sum in place of a mean, and by an operation that gloo has too.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _check_sharded(model: nn.Module) -> None:
    """Raise `Internal` rather than train unsharded, which would look the same until memory runs out."""
    whole = [name for name, each in model.named_parameters() if not isinstance(each, DTensor)]
    if whole:
        raise Internal(
            f"{len(whole)} weights are not sharded, {whole[0]} for one: this is a mistake of Tuneloop."
        )


def _rows(weight: DTensor) -> tuple[int, int]:
    """Which rows of the whole this process holds: chunks as `torch.chunk` makes them."""
    (placement,) = weight.placements
    assert isinstance(placement, Shard)
    assert placement.dim == 0
    mesh = weight.device_mesh
    size = -(-weight.shape[0] // mesh.size())
    begin = min(mesh.get_local_rank() * size, weight.shape[0])
    return begin, min(begin + size, weight.shape[0])


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
