"""Data parallel: every process holds the whole model, computes its packs, and gradients are summed.

By hand, not by torch's `DistributedDataParallel`: that takes the mean, wants every process to run equally
many forward passes through a wrapper, and keeps gradients twice unless told otherwise. Here a pack more on
one process costs nothing, and what is sent overlaps with the last backward pass of a step in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import distributed, nn

from tuneloop.core.recipe import FinetuneParameters
from tuneloop.training.layout.base import Dump
from tuneloop.training.layout.plain import Plain
from tuneloop.training.layout.processes import Processes
from tuneloop.training.loss import Objective
from tuneloop.training.plan import Strategy

BUCKET_BYTES = 25 * 2**20
"""Of gradients sent at a time; the size that DistributedDataParallel settled on."""


class Ddp(Processes, Plain):
    strategy: Strategy = "ddp"
    is_collective = False

    def wrap(self, model: nn.Module, objective: Objective, parameters: FinetuneParameters) -> None:
        super().wrap(model, objective, parameters)
        for weight in self._trained.values():
            # Each has loaded the same file; what was drawn at random has to be the same too.
            distributed.broadcast(weight.detach(), src=0)
        self._buckets = [_Bucket(group) for group in grouped(list(self._trained.values()))]
        self._is_last = False
        for bucket in self._buckets:
            bucket.on_ready(self._reduce_what_is_ready)

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        self._is_last = is_last
        for bucket in self._buckets:
            bucket.expect()
        torch.autograd.backward(loss)
        if is_last:
            for bucket in self._buckets:
                bucket.reduce()
            for bucket in self._buckets:
                bucket.wait()
        self._is_last = False

    def step(self, rate: float) -> None:
        for bucket in self._buckets:
            bucket.leave_out_unused()
        super().step(rate)

    def discard(self) -> None:
        for bucket in self._buckets:
            bucket.clear()

    def dump(self) -> Dump:
        return super().dump() if self.rank == 0 else Dump()

    def trained_weights(self) -> dict[str, torch.Tensor]:
        return super().trained_weights() if self.rank == 0 else {}

    def load_weights(self, files: Sequence[Path]) -> None:
        super().load_weights(files)
        self.barrier()

    def _reduce_what_is_ready(self) -> None:
        """In the order of the buckets, which is the same on all processes."""
        if not self._is_last:
            return
        for bucket in self._buckets:
            if not bucket.is_ready:
                return
            bucket.reduce()


class _Bucket:
    """Gradients of some parameters end to end, behind them a mark for each that has had one."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        count = sum(each.numel() for each in self._parameters)
        first = self._parameters[0]
        self._flat = torch.zeros(count + len(self._parameters), dtype=first.dtype, device=first.device)
        self._marks = self._flat[count:]
        self._waiting: set[int] = set()
        self._work: distributed.Work | None = None
        self._point()

    @property
    def is_ready(self) -> bool:
        return not self._waiting

    def on_ready(self, tell: Callable[[], None]) -> None:
        """`tell` hears when every parameter has its gradient of this backward pass."""
        for place, parameter in enumerate(self._parameters):

            def mark(_: torch.Tensor, place: int = place) -> None:
                self._marks[place] = 1
                self._waiting.discard(place)
                if not self._waiting:
                    tell()

            parameter.register_post_accumulate_grad_hook(mark)

    def expect(self) -> None:
        """A backward pass begins."""
        self._waiting = set(range(len(self._parameters)))

    def reduce(self) -> None:
        """Begin to sum over the processes; nothing when that has begun."""
        if self._work is None:
            self._work = distributed.all_reduce(self._flat, async_op=True)

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()

    def leave_out_unused(self) -> None:
        """What no process has used gets no step, as with one process: not even of weight decay."""
        for parameter, mark in zip(self._parameters, self._marks.tolist(), strict=True):
            if not mark:
                parameter.grad = None

    def clear(self) -> None:
        self._flat.zero_()
        self._work = None
        self._point()

    def _point(self) -> None:
        start = 0
        for parameter in self._parameters:
            parameter.grad = self._flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()


def grouped(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Last ones first, as a backward pass comes to them; equal in precision, and up to `BUCKET_BYTES` unless
    one is larger."""
    group: list[nn.Parameter] = []
    size = 0
    for each in reversed(parameters):
        if group and (size + each.nbytes > BUCKET_BYTES or each.dtype != group[0].dtype):
            yield group
            group, size = [], 0
        group.append(each)
        size += each.nbytes
    if group:
        yield group
