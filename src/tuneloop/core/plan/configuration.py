"""The shape of a model, read off its `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuneloop.core.types import Architecture

_NORMALISED = {"qwen3", "gemma3", "gemma3_text", "olmo2"}
"""Families whose queries and keys are normalised head by head."""
_TWICE_NORMALISED = {"gemma2", "gemma3", "gemma3_text"}
"""Families whose layers normalise their outputs as well."""


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Raises `KeyError` for a model that is no decoder of gated layers: it cannot be planned."""
    text: Mapping[str, Any] = config.get("text_config") or config
    family = str(text.get("model_type", config.get("model_type")))
    heads, hidden = text["num_attention_heads"], text["hidden_size"]
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    return Architecture(
        family=family,
        hidden_size=hidden,
        intermediate_size=text["intermediate_size"],
        layers=text["num_hidden_layers"],
        attention_heads=heads,
        key_value_heads=text.get("num_key_value_heads") or heads,
        head_size=text.get("head_dim") or hidden // heads,
        vocabulary_size=text["vocab_size"],
        tied_embeddings=bool(family.startswith("gemma") if tied is None else tied),
        qkv_bias=family == "qwen2",
        qk_norm=family in _NORMALISED,
        norms_per_layer=4 if family in _TWICE_NORMALISED else 2,
    )
