"""What one layer of a decoder keeps and holds, counted from its shape.

The counts are those of transformers' eager modules (Llama, Qwen, Mistral, Gemma; Phi-3 with its fused
projections) with `training.attention` under autograd, read off with
`torch.autograd.graph.saved_tensors_hooks`. "Numbers" are elements, not bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from tuneloop.core.plan.setup import GEMM_TARGETS, Setup
from tuneloop.core.types import Architecture

FUSED = frozenset({"phi3"})
"""Families with one matrix for queries, keys and values, and one for gate and up."""


@dataclass(frozen=True)
class Linear:
    """A matrix of a layer."""

    name: str
    inputs: int
    outputs: int

    @property
    def numbers(self) -> int:
        return self.inputs * self.outputs


def linears(architecture: Architecture) -> list[Linear]:
    """The matrices of one layer, by the names that LoRA's targets use."""
    hidden, wide = architecture.hidden_size, architecture.intermediate_size
    queries, values = _widths(architecture)
    if is_fused(architecture):
        return [
            Linear("qkv_proj", hidden, queries + 2 * values),
            Linear("o_proj", queries, hidden),
            Linear("gate_up_proj", hidden, 2 * wide),
            Linear("down_proj", wide, hidden),
        ]
    return [
        Linear("q_proj", hidden, queries),
        Linear("k_proj", hidden, values),
        Linear("v_proj", hidden, values),
        Linear("o_proj", queries, hidden),
        Linear("gate_proj", hidden, wide),
        Linear("up_proj", hidden, wide),
        Linear("down_proj", wide, hidden),
    ]


def is_fused(architecture: Architecture) -> bool:
    return architecture.family in FUSED


def _widths(architecture: Architecture) -> tuple[int, int]:
    head = architecture.head_size
    return architecture.attention_heads * head, architecture.key_value_heads * head


def adapted(architecture: Architecture, setup: Setup) -> list[Linear]:
    """The matrices of a layer that get an adapter."""
    if not setup.apply_lora:
        return []
    found = linears(architecture)
    if setup.lora_targets is None:
        return found
    named = [each for each in found if any(target.endswith(each.name) for target in setup.lora_targets)]
    # Names that are not a layer's (a pattern, say) cannot be counted: all of them is the upper bound.
    return named if all(target in GEMM_TARGETS for target in setup.lora_targets) else found


def lora_parameters(architecture: Architecture, setup: Setup) -> int:
    """DoRA (arXiv:2402.09353) has a magnitude for each output beside."""
    each = sum(
        setup.lora_r * (one.inputs + one.outputs) + (one.outputs if setup.is_dora else 0)
        for one in adapted(architecture, setup)
    )
    return architecture.layers * each


def layer_matrices(architecture: Architecture) -> int:
    """Parameters of all layers' matrices: what 4-bit quantisation packs."""
    return architecture.layers * sum(each.numbers for each in linears(architecture))


def trained_parameters(architecture: Architecture, setup: Setup) -> int:
    return lora_parameters(architecture, setup) if setup.apply_lora else architecture.parameters


def linear_parameters(architecture: Architecture) -> int:
    """Of all layers' matrices and the head: what 16-bit arithmetic casts."""
    return layer_matrices(architecture) + table(architecture)


def table(architecture: Architecture) -> int:
    """Numbers of the embedding, and of the head."""
    return architecture.vocabulary_size * architecture.hidden_size


def tables(architecture: Architecture) -> int:
    """Numbers of the embedding and the head, which may be one."""
    return (1 if architecture.tied_embeddings else 2) * table(architecture)


def largest_layer(architecture: Architecture) -> int:
    """The most parameters that ZeRO-3 gathers at once: a matrix of a layer, or the embedding."""
    matrices = [each.numbers for each in linears(architecture)]
    return max(*matrices, architecture.vocabulary_size * architecture.hidden_size)


def token_bytes(architecture: Architecture, setup: Setup) -> int:
    """Bytes that one layer keeps for the backward pass, for each token of a pack of one conversation."""
    hidden, wide = architecture.hidden_size, architecture.intermediate_size
    queries, values = _widths(architecture)
    names = {each.name for each in adapted(architecture, setup)} if setup.apply_lora else None

    def keeps(*wanted: str) -> bool:
        return names is None or bool(names & set(wanted))

    norms = architecture.norms_per_layer
    attention_in = keeps("q_proj", "k_proj", "v_proj", "qkv_proj")
    wide_in = keeps("gate_proj", "up_proj", "gate_up_proj")
    # A norm keeps its input in 32 bits, and its output before the weight where that weight is trained.
    full = norms * hidden + (0 if setup.apply_lora else norms * hidden)
    full += 2 * (queries + values) if architecture.qk_norm and not setup.apply_lora else 0
    full += (queries + values) if architecture.qk_norm and setup.apply_lora else 0
    full += architecture.attention_heads + 2
    inputs = hidden * (_casts(architecture, setup, names) if setup.is_bf16 else attention_in + wide_in)
    low = inputs + 2 * queries + 2 * values + 3 * wide + (wide if keeps("down_proj") else 0)
    if is_fused(architecture):
        # The values are a view of the fused projection, which stays whole; the attended values are copied.
        low += queries + values + queries
    if setup.apply_lora:
        low += sum(setup.lora_r for _ in adapted(architecture, setup))
        low += queries if setup.is_bf16 and keeps("o_proj") else 0
        if setup.has_dropout:
            low += 2 * sum(each.inputs for each in adapted(architecture, setup))
        if setup.is_dora:
            # What the base and the adapter gave, for the magnitude's gradient.
            low += 2 * sum(each.outputs for each in adapted(architecture, setup))
    return 4 * full + (2 if setup.is_bf16 else 4) * low


def _casts(architecture: Architecture, setup: Setup, names: set[str] | None) -> int:
    """Under autocast every matrix product casts its input anew."""
    wanted = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "qkv_proj", "gate_up_proj"}
    there = {each.name for each in linears(architecture)} & wanted
    return len(there if names is None else there & names)


def seam_bytes(architecture: Architecture, setup: Setup) -> int:
    """What a layer keeps more of each token where a pack holds several conversations: what they attended to
    is put together anew. Fused projections keep that copy in any case."""
    queries, _ = _widths(architecture)
    return 0 if is_fused(architecture) else (2 if setup.is_bf16 else 4) * queries


def layer_inputs_bytes(architecture: Architecture, setup: Setup) -> int:
    """What is kept of a layer for each token when the rest is computed again."""
    return (2 if setup.is_bf16 else 4) * architecture.hidden_size
