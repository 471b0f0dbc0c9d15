"""The language-model head and the loss in one: logits exist for some positions at a time, never for a pack.

A vocabulary is wide: the logits of 1,000 positions over 128,000 tokens are 0.5 GB in fp32, and their gradient
as much again. The loss, though, needs only sums over each position's logits. So `ChunkedLoss` forms chunk
after chunk of them, takes the loss, and turns the chunk in place into its gradient, which it multiplies back
at once: two matrix products for a frozen weight (three for a trained one), and nothing is computed twice.

All of it happens inside the head's own forward (`attach`): whatever gathers sharded weights for a module has
gathered this one's. The head is called as always and computes a loss only under `Head.learning`.

Letters: K positions, H hidden size, V vocabulary, C positions of a chunk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
"""Most bytes of a chunk's fp32 logits. On a CPU, larger chunks were measured to bring no speed."""


def chunk_positions(vocabulary_size: int, device: torch.device) -> int:
    return max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // (4 * vocabulary_size))


class ChunkedLoss(torch.autograd.Function):
    """hidden (K, H), weight (V, H), targets (K,) -> cross-entropy in nats, summed over K, fp32.

    Products run in autocast's precision where it is on, else in that of `hidden`; softmax, loss and the
    weight's gradient are fp32. Gradients are formed in the forward pass, and only those asked for.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, positions: int
    ) -> torch.Tensor:
        """`positions`: C."""
        dtype = _product_dtype(hidden)
        ctx.grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        ctx.grad_weight = (
            torch.zeros_like(weight, dtype=_sum_dtype(weight)) if ctx.needs_input_grad[1] else None
        )
        ctx.weight_dtype = weight.dtype
        loss = torch.zeros((), dtype=_sum_dtype(hidden), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            low = weight.to(dtype)
            for begin in range(0, targets.shape[0], positions):
                chunk = slice(begin, begin + positions)
                states = hidden[chunk].to(dtype)
                loss += _chunk(states, low, targets[chunk], _row(ctx.grad_hidden, chunk), ctx.grad_weight)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.grad_hidden, ctx.grad_weight
        if ctx.weight_dtype is None:
            raise RuntimeError("the gradient of this loss was taken already; compute the loss again.")
        # Scaled in place, so they serve once: a copy of the weight's would be as large as the weight.
        ctx.grad_hidden = ctx.grad_weight = None
        dtype, ctx.weight_dtype = ctx.weight_dtype, None
        if grad_hidden is not None:
            grad_hidden.mul_(outputs[0])
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(outputs[0]).to(dtype)
        return grad_hidden, grad_weight, None, None


def _product_dtype(hidden: torch.Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _sum_dtype(hidden: torch.Tensor) -> torch.dtype:
    """fp32, but for those who work in fp64."""
    return torch.promote_types(hidden.dtype, torch.float32)


def _row(tensor: torch.Tensor | None, chunk: slice) -> torch.Tensor | None:
    return None if tensor is None else tensor[chunk]


def _chunk(
    states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    grad_states: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
) -> torch.Tensor:
    """The loss of C positions; their gradient is written to `grad_states`, the weight's added to
    `grad_weight`."""
    logits = (states @ weight.t()).to(_sum_dtype(states))
    rows = torch.arange(len(targets), device=targets.device)
    normalisers = torch.logsumexp(logits, dim=1)
    loss = (normalisers - logits[rows, targets]).sum()
    if grad_states is None and grad_weight is None:
        return loss
    # softmax - one_hot, in the place of the logits.
    logits.sub_(normalisers[:, None]).exp_()
    logits[rows, targets] -= 1
    slopes = logits.to(states.dtype)
    if grad_states is not None:
        grad_states.copy_(slopes @ weight)
    if grad_weight is not None:
        _add_product(grad_weight, slopes.t(), states)
    return loss


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def plain_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """logits (K, V) -> the same sum, for a head whose logits exist anyway."""
    return functional.cross_entropy(logits.to(_sum_dtype(logits)), targets, reduction="sum")


class Head:
    """A model's head that gives its logits or, under `learning`, the loss of targets. `detach` undoes it."""

    def __init__(self, model: Any) -> None:
        self._module: Any = base_model(model).get_output_embeddings()
        self._plain = self._module.forward
        self._targets: torch.Tensor | None = None
        self._module.forward = self._forward
        # An adapted, quantised or biased head computes its logits in its own way; then in chunks of that.
        self.is_fused = type(self._module) is nn.Linear and self._module.bias is None

    def detach(self) -> None:
        # What was written over the class's method; gone, the method is back.
        self._module.__dict__.pop("forward", None)

    @contextlib.contextmanager
    def learning(self, targets: torch.Tensor) -> Iterator[None]:
        """Within, the model's `logits` are the summed loss of `targets`, one for each position kept."""
        self._targets = targets
        try:
            yield
        finally:
            self._targets = None

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(1, K, H) -> (1, K, V), or the loss."""
        targets = self._targets
        if targets is None:
            plain: torch.Tensor = self._plain(hidden)
            return plain
        states = hidden.reshape(-1, hidden.shape[-1])
        return self._fused(states, targets) if self.is_fused else self._recomputed(states, targets)

    def _fused(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        weight = self._module.weight
        positions = chunk_positions(weight.shape[0], hidden.device)
        if torch.is_grad_enabled():
            loss: torch.Tensor = ChunkedLoss.apply(hidden, weight, targets, positions)
            return loss
        return ChunkedLoss.apply(hidden.detach(), weight.detach(), targets, positions)

    def _recomputed(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The module's own logits, chunk by chunk, and again in the backward pass."""
        size = int(getattr(self._module, "out_features", 0)) or self._plain(hidden[:1]).shape[-1]
        positions = chunk_positions(size, hidden.device)
        # A sum of nothing would have no graph.
        loss = hidden.sum() * 0 if not len(targets) else hidden.new_zeros((), dtype=_sum_dtype(hidden))
        for begin in range(0, len(targets), positions):
            chunk = slice(begin, begin + positions)
            part = checkpoint(self._chunk_loss, hidden[chunk], targets[chunk], use_reentrant=False)
            loss = loss + part
        return loss

    def _chunk_loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return plain_loss(self._plain(hidden), targets)


def base_model(model: Any) -> Any:
    """Under an adapter, the model that it adapts."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
