"""Attention of packed conversations, each computed by itself.

transformers isolates the conversations of a row by a mask of T x T, and computes all that the mask then
hides. Here every conversation is a causal attention of its own: work and memory grow with the conversations,
not with the row, and no mask exists. Where conversations end is passed down the model's forward as the
keyword `boundaries`, so that a layer that is computed again in the backward pass gets it again.

Letters: T tokens of the pack, H heads, D their size, W the sliding window.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface

NAME = "tuneloop"
REPLACED = "sdpa"
"""What ours stands in for. A model that was loaded with another implementation keeps it."""
BLOCK = 128
"""Fewest positions of a windowed conversation that are computed at a time."""

Window = int | None


def implementation(model: Any) -> str:
    return str(_configs(model)[0]._attn_implementation)


def use(model: Any, name: str) -> None:
    """Have `model`, adapted or not, attend by the implementation `name` of transformers' registry."""
    for config in _configs(model):
        config._attn_implementation = name


def _configs(model: Any) -> list[Any]:
    """The model's configuration and that of its text part; attention asks either."""
    config = model.config
    text = config.get_text_config()
    return [text] if text is config else [text, config]


def windows(model: Any) -> set[Window] | None:
    """The sliding windows that the layers of `model` are said to have, None among them for a layer without
    one. None: it has layers of a kind that is not known here."""
    config = _configs(model)[0]
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return {window}
    known = {"full_attention": None, "sliding_attention": window}
    return {known[kind] for kind in kinds} if set(kinds) <= set(known) else None


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    boundaries: Sequence[int] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: Window = None,
    softcap: float | None = None,
    seen_windows: set[Window] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers asks of an attention: (1, H, T, D) in, (1, T, H, D) out, without weights.

    `seen_windows` collects the windows that layers ask for.
    """
    if boundaries is None or attention_mask is not None:
        raise RuntimeError(
            "the model is set up to be trained on packs: call it through training.loss.Objective, or close "
            "that objective first."
        )
    if seen_windows is not None:
        seen_windows.add(sliding_window)
    outputs = []
    for begin, end in itertools.pairwise(boundaries):
        part = slice(begin, end)
        parts = (query[:, :, part], key[:, :, part], value[:, :, part])
        outputs.extend(_conversation(*parts, scaling, dropout, sliding_window, softcap))
    whole = outputs[0] if len(outputs) == 1 else torch.cat([each.transpose(1, 2) for each in outputs], dim=1)
    return (whole.transpose(1, 2) if len(outputs) == 1 else whole).contiguous(), None


def _conversation(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    dropout: float,
    window: Window,
    softcap: float | None,
) -> list[torch.Tensor]:
    """One conversation's outputs, in pieces in their order: one, unless longer than a window."""
    length = query.shape[2]
    if window is None or length <= window:
        return [_attend(query, key, value, None, scaling, dropout, softcap)]
    pieces = []
    block = max(BLOCK, window // 4)
    for begin in range(0, length, block):
        end = min(begin + block, length)
        first = max(0, begin - window + 1)
        mask = _window_mask(begin, end, first, window, query.device)
        keys, values = key[:, :, first:end], value[:, :, first:end]
        pieces.append(_attend(query[:, :, begin:end], keys, values, mask, scaling, dropout, softcap))
    return pieces


def _window_mask(begin: int, end: int, first: int, window: int, device: torch.device) -> torch.Tensor:
    """(end - begin, end - first) whether a position sees another: itself and the window - 1 before it."""
    ahead = torch.arange(begin, end, device=device)[:, None] - torch.arange(first, end, device=device)
    return (ahead >= 0) & (ahead < window)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
) -> torch.Tensor:
    """(1, H, T, D); without a mask, causal."""
    if softcap is not None:
        return _attend_capped(query, key, value, mask, scaling, dropout, softcap)
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=mask is None,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _attend_capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float,
) -> torch.Tensor:
    """Scores squeezed into +-softcap before the softmax, as in Gemma 2 (arXiv:2408.00118): no fused kernel
    knows it."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if mask is None:
        mask = _window_mask(0, query.shape[2], 0, query.shape[2], query.device)
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~mask, float("-inf"))
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return functional.dropout(weights, dropout) @ value


# No mask is registered under the same name: transformers then builds none.
AttentionInterface.register(NAME, packed_attention)
