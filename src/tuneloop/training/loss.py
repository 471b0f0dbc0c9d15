"""The loss of packed conversations: next-token cross-entropy in nats, of the learned tokens alone.

Packed conversations must not see each other. Nothing is passed but position ids that start afresh with each
conversation; transformers derives the block-diagonal mask from them. Whether a model really does so is
measured on that model before training (`isolates`), and where it does not, conversations run one by one
with an equal loss.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tuneloop.core.errors import Unsupported
from tuneloop.training.data import Batch, Conversation, pack


@dataclass(frozen=True)
class Packing:
    """How conversations may share a row of tokens."""

    is_isolated: bool
    """False: never more than one."""
    alone_above: int | None = None
    """A conversation longer than this goes alone, because its length changes the model's rotary
    frequencies."""

    def batches(self, conversations: Sequence[Conversation]) -> list[Batch]:
        """The micro-batch as one packed row, or as several whose losses add up to the same."""
        if not self.is_isolated:
            return [pack([each]) for each in conversations]
        limit = self.alone_above
        if limit is None:
            return [pack(conversations)]
        short = [each for each in conversations if len(each.input_ids) <= limit]
        long = [each for each in conversations if len(each.input_ids) > limit]
        return [*([pack(short)] if short else []), *(pack([each]) for each in long)]


def packing_of(model: nn.Module) -> Packing:
    """What `model` allows, by its configuration and by a measurement."""
    return Packing(is_isolated=isolates(model), alone_above=_rotary_limit(model.config))


def summed_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Negative log-likelihood of the batch's targets, summed, fp32. Logits exist at K positions only."""
    logits_KV = _logits(model, batch.input_ids, batch.position_ids, batch.predict_from)
    return functional.cross_entropy(logits_KV.float(), batch.targets, reduction="sum")


def _logits(
    model: nn.Module, input_ids: torch.Tensor, position_ids: torch.Tensor, keep: torch.Tensor
) -> torch.Tensor:
    output: Any = model(
        input_ids=input_ids, position_ids=position_ids, logits_to_keep=keep, use_cache=False, return_dict=True
    )
    logits: torch.Tensor = output.logits[0]
    return logits


def check_forward(model: nn.Module) -> None:
    """Raise `Unsupported` unless the model can be asked for the logits of chosen positions."""
    adapted: Any = model
    base = adapted.get_base_model() if hasattr(adapted, "get_base_model") else model
    missing = {"position_ids", "logits_to_keep"} - set(inspect.signature(base.forward).parameters)
    if missing:
        raise Unsupported(
            f"{type(base).__name__} cannot be trained: its forward has no "
            f"{' and no '.join(sorted(missing))}. Supported are decoder-only models of transformers that "
            "have both, such as Llama, Phi-3 and Qwen2."
        )


def vocabulary_size(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.get_text_config().vocab_size)


@torch.no_grad()
def isolates(model: nn.Module) -> bool:
    """Whether a packed conversation gives what it gives alone, whatever lies in front of it."""
    was_training = model.training
    model.eval()
    try:
        return _changes_little(model)
    finally:
        model.train(was_training)


def _changes_little(model: nn.Module) -> bool:
    device = next(model.parameters()).device
    size = vocabulary_size(model)
    second = torch.arange(11, 19, device=device)[None] % size
    keep = torch.arange(second.shape[1], device=device)
    alone = _logits(model, second, keep[None], keep)
    after = [
        _after(model, torch.arange(begin, begin + 6, device=device)[None] % size, second) for begin in (3, 40)
    ]
    scale = float(alone.abs().max())
    # Same shapes and kernels, so the tokens in front change nothing at all; alone, sums run in another order.
    is_independent = float((after[0] - after[1]).abs().max()) <= 1e-6 * scale
    tolerance = 1e-3 if alone.dtype == torch.float32 else 5e-2
    return is_independent and float((after[0] - alone).abs().max()) <= tolerance * scale


def _after(model: nn.Module, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Logits of `second` when packed behind `first`."""
    lengths = (first.shape[1], second.shape[1])
    positions = torch.cat([torch.arange(length, device=first.device) for length in lengths])
    keep = torch.arange(lengths[0], sum(lengths), device=first.device)
    return _logits(model, torch.cat([first, second], dim=1), positions[None], keep)


def _rotary_limit(config: Any) -> int | None:
    """The length above which the frequencies change: LongRoPE (arXiv:2402.13753) and dynamic NTK scaling."""
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    if parameters.get("rope_type") not in ("longrope", "dynamic"):
        return None
    original = parameters.get("original_max_position_embeddings")
    return int(
        original or getattr(text, "original_max_position_embeddings", 0) or text.max_position_embeddings
    )
