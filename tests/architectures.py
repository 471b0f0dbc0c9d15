"""Tiny random models of the architectures that are trained, each with what is peculiar to it: windows and
original lengths are shorter than the conversations of the tests.

    model = build("phi3")
    plain_loss(model, conversations)     transformers' own, one conversation at a time
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers

from tuneloop.training.data import Conversation

VOCABULARY = 96
WINDOW = 6
ORIGINAL_LENGTH = 24
"""Of Phi-3's LongRoPE: longer conversations have other frequencies."""
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "attention_dropout": 0.0,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": ORIGINAL_LENGTH,
}
ARCHITECTURES = ("llama", "phi3", "qwen2", "qwen3", "mistral", "gemma3")


def build(name: str, attention: str = "sdpa", **changes: Any) -> Any:
    """In evaluation mode; equal arguments give equal weights."""
    config = _config(name, changes)
    config._attn_implementation = attention
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def _config(name: str, changes: dict[str, Any]) -> Any:
    kinds = ["sliding_attention", "full_attention"]
    if name == "llama":
        return transformers.LlamaConfig(**{**SHAPE, **changes})
    if name == "phi3":
        long = {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": ORIGINAL_LENGTH}
        return transformers.Phi3Config(**{**SHAPE, "sliding_window": WINDOW, **long, **changes})
    if name == "qwen2":
        windows = {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": kinds}
        return transformers.Qwen2Config(**{**SHAPE, **windows, "tie_word_embeddings": True, **changes})
    if name == "qwen3":
        return transformers.Qwen3Config(**{**SHAPE, "head_dim": 16, "tie_word_embeddings": True, **changes})
    if name == "mistral":
        return transformers.MistralConfig(**{**SHAPE, "head_dim": 8, "sliding_window": WINDOW, **changes})
    shape = {"head_dim": 16, "sliding_window": WINDOW, "layer_types": kinds, "query_pre_attn_scalar": 16}
    return transformers.Gemma3TextConfig(**{**SHAPE, **shape, "tie_word_embeddings": True, **changes})


def conversations(lengths: Sequence[int] = (9, 31, 4, 17), seed: int = 5) -> list[Conversation]:
    chance = np.random.default_rng(seed)
    return [
        Conversation(row, chance.integers(0, VOCABULARY, length), chance.random(length) < 0.6)
        for row, length in enumerate(lengths)
    ]


def plain_loss(model: Any, chosen: Sequence[Conversation]) -> torch.Tensor:
    """Summed, of transformers' own loss function over labels of -100, each conversation by itself."""
    total = torch.zeros(())
    for each in chosen:
        ids = torch.tensor(each.input_ids)[None]
        labels = torch.where(torch.tensor(each.learn)[None], ids, -100)
        total = total + model(input_ids=ids, labels=labels, num_items_in_batch=1, use_cache=False).loss
    return total
