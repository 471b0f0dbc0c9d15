"""Peak memory of a finetune step, by cause.

A step goes through moments: the weights are loaded; a micro-batch's backward pass begins, with everything
kept and the logits beside it; it ends, with every gradient there; the optimiser steps; a validation batch
runs. Each is a sum of causes, and the largest sum is the peak. Model states of ZeRO are counted as
DeepSpeed's own estimators do (docs/code-docs/source/memory.rst of microsoft/DeepSpeed). What is counted
and what is measured: docs/explanation/memory.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from tuneloop.core.plan import shape
from tuneloop.core.plan.constants import (
    ALLOCATOR_SHARE,
    BUCKET_NUMBERS,
    BUFFER_COPIES,
    CHECKPOINT_FACTOR,
    CUDA_CONTEXT_BYTES,
    GPU_ALLOCATOR_SHARE,
    HOST_BUFFER_FACTOR,
    IMPORTED_BYTES,
    LARGE_BLOCK_SHARE,
    LIBRARY_BYTES,
    LORA_ALLOCATOR_SHARE,
    SMALL_BLOCK_BYTES,
)
from tuneloop.core.plan.setup import Rows, Setup
from tuneloop.core.types import Architecture, Noun

Cause = Literal[
    "weights",
    "gradients",
    "optimizer",
    "lora",
    "activations",
    "logits",
    "buffers",
    "slack",
    "process",
]
CAUSES: tuple[Cause, ...] = get_args(Cause)
Moment = Literal["loading", "backward begins", "backward ends", "optimizer steps", "evaluating"]


class Memory(Noun):
    """Bytes by cause at the moment of the peak. `causes` add up to `total_bytes`."""

    moment: Moment
    causes: dict[Cause, int]
    total_bytes: int


class Peak(Noun):
    """Of one device, and of the host where the device is not its processor (per node)."""

    device: Memory
    host_bytes: int
    """0 where the device is the machine itself: it is all told by `device`."""
    host_causes: dict[str, int]


def peak(
    architecture: Architecture,
    setup: Setup,
    rows: Rows,
    *,
    device: Literal["cpu", "cuda"],
    file_bytes: int | None = None,
) -> Peak:
    """`file_bytes`: of the weights' file, which is mapped while it is read; None: two bytes a parameter."""
    on_file = 2 * architecture.parameters if file_bytes is None else file_bytes
    moments = [
        _memory(moment, causes)
        for moment, causes in _moments(architecture, setup, rows, device, on_file).items()
    ]
    largest = max(moments, key=lambda each: each.total_bytes)
    host = {} if device == "cpu" else _host(architecture, setup, on_file)
    return Peak(device=largest, host_bytes=sum(host.values()), host_causes=host)


def _memory(moment: Moment, causes: Mapping[Cause, float]) -> Memory:
    rounded = {name: round(causes.get(name, 0)) for name in CAUSES}
    return Memory(moment=moment, causes=rounded, total_bytes=sum(rounded.values()))


def _moments(
    architecture: Architecture, setup: Setup, rows: Rows, device: str, on_file: int
) -> dict[Moment, dict[Cause, float]]:
    states = model_states(architecture, setup)
    always: dict[Cause, float] = {
        "weights": states["weights"],
        "optimizer": states["optimizer"],
        "lora": states["lora"],
        "buffers": _buffers(architecture, setup) + _casts(architecture, setup),
        "process": LIBRARY_BYTES if device == "cpu" else CUDA_CONTEXT_BYTES,
    }
    embedding = architecture.vocabulary_size * architecture.hidden_size * 4.0
    # Where gradients add up over micro-batches those of earlier ones are there while the next is computed.
    earlier = states["gradients"] if setup.accumulation > 1 or setup.sharding != "none" else 0.0
    kept, logits = kept_bytes(architecture, setup, rows), _logits(architecture, setup, rows)
    slack = _slack(architecture, setup, rows, device, kept)
    head = 0.0 if setup.apply_lora else embedding
    one_layer = kept_bytes(architecture.model_copy(update={"layers": 1}), setup, rows)
    # The gradient of a tied embedding is the sum of the head's and the embedding's: autograd holds all three.
    tied = 2 * embedding if architecture.tied_embeddings and not setup.apply_lora else 0.0
    found: dict[Moment, dict[Cause, float]] = {
        "backward begins": {
            **always,
            "gradients": earlier + max(0.0, head - logits * 2 / 3),
            "activations": kept,
            "logits": logits,
            "slack": slack,
        },
        "backward ends": {
            **always,
            "gradients": states["gradients"] + tied,
            "activations": one_layer,
            "slack": slack,
        },
        "optimizer steps": {
            **always,
            "gradients": states["gradients"] + _adafactor(architecture, setup),
            "slack": slack,
        },
    }
    if device == "cpu":
        found["loading"] = {"weights": states["weights"], "buffers": on_file, "process": IMPORTED_BYTES}
    if setup.evaluates:
        forward, evaluated = _evaluation(architecture, setup, rows)
        found["evaluating"] = {**always, "activations": forward, "logits": evaluated, "slack": slack}
    return found


# ---------------------------------------------------------------- model states


def model_states(architecture: Architecture, setup: Setup) -> dict[str, float]:
    """Bytes of `weights`, `gradients`, `optimizer` and `lora` on one device."""
    whole = _whole_states(architecture, setup) if setup.sharding == "none" else None
    return whole if whole is not None else _sharded_states(architecture, setup)


def _whole_states(architecture: Architecture, setup: Setup) -> dict[str, float]:
    """One copy per device, as this version's own loop keeps them: what is trained is in 32 bits."""
    total, trained = architecture.parameters, shape.trained_parameters(architecture, setup)
    frozen = 2 if setup.is_bf16 and setup.apply_lora else 4
    on_device = setup.offload == "none"
    return {
        "weights": frozen * total,
        "lora": 4 * trained if setup.apply_lora else 0,
        "gradients": 4 * trained,
        "optimizer": _optimizer_bytes(architecture, setup, trained) if on_device else 0,
    }


def _sharded_states(architecture: Architecture, setup: Setup) -> dict[str, float]:
    """DeepSpeed's arithmetic. Mixed precision has 2 bytes of weights and of gradients for each parameter and
    16 in 32 bits (weights, gradients, two moments); without it, 4 + 4 and two moments."""
    total, trained = architecture.parameters, shape.trained_parameters(architecture, setup)
    count, low = setup.devices, 2 if setup.is_bf16 else 4
    moments = _optimizer_bytes(architecture, setup, trained)
    states = (8 * trained if setup.is_bf16 else 0) + moments
    gathered = 2 * low * shape.largest_layer(architecture)
    base = low * total
    frozen_adapter: float = low * trained if setup.apply_lora else 0
    if setup.sharding == "zero1" or setup.sharding == "zero2":
        found = {"weights": base, "gradients": low * trained, "optimizer": states / count}
    else:
        found = {"weights": base / count + gathered, "gradients": 0.0, "optimizer": states / count}
        if not setup.is_bf16:
            found["gradients"] = low * trained / count
        frozen_adapter /= count
    if setup.sharding == "zero2" and not setup.is_bf16:
        found["gradients"] = low * trained / count + low * min(trained, BUCKET_NUMBERS)
    if setup.offload != "none":
        # Gradients go to the host bucket by bucket, and the optimiser's step happens there.
        found["optimizer"] = 0.0
        found["gradients"] = 0.0
    if setup.offload == "all" and setup.sharding == "zero3":
        found["weights"] = gathered
    return {**found, "lora": frozen_adapter}


def _optimizer_bytes(architecture: Architecture, setup: Setup, trained: int) -> float:
    """AdamW: two moments in 32 bits. Adafactor (arXiv:1804.04235): a row and a column of each matrix."""
    if setup.optimizer == "adamw_torch":
        return 8.0 * trained
    if setup.apply_lora:
        sides = sum(
            each.inputs + each.outputs + 2 * setup.lora_r for each in shape.adapted(architecture, setup)
        )
        return 4.0 * architecture.layers * sides
    hidden = architecture.hidden_size
    sides = sum(each.inputs + each.outputs for each in shape.linears(architecture))
    tables = (1 if architecture.tied_embeddings else 2) * (architecture.vocabulary_size + hidden)
    norms = architecture.norms_per_layer * hidden
    return 4.0 * (architecture.layers * (sides + norms) + tables)


def _adafactor(architecture: Architecture, setup: Setup) -> float:
    """Its update of the largest tensor is computed in three copies of it."""
    if setup.optimizer != "adafactor":
        return 0.0
    if setup.apply_lora:
        return 12.0 * max(
            (each.outputs * setup.lora_r for each in shape.adapted(architecture, setup)), default=0
        )
    return 12.0 * shape.largest_layer(architecture)


def _casts(architecture: Architecture, setup: Setup) -> float:
    """16-bit copies of 32-bit weights, which autocast keeps while it computes."""
    if not setup.is_bf16 or setup.sharding != "none":
        return 0.0
    numbers = shape.lora_parameters(architecture, setup)
    return 2.0 * (numbers if setup.apply_lora else shape.linear_parameters(architecture))


def _buffers(architecture: Architecture, setup: Setup) -> float:
    """What devices exchange: DeepSpeed's buckets (at most as many numbers as are trained), or the copy of the
    gradients that data parallelism reduces."""
    if setup.devices <= 1:
        return 0.0
    low, trained = (2 if setup.is_bf16 else 4), shape.trained_parameters(architecture, setup)
    if setup.sharding == "none":
        return 4.0 * trained
    return BUFFER_COPIES * low * min(BUCKET_NUMBERS, trained)


# ---------------------------------------------------------------- what a batch takes


def kept_bytes(architecture: Architecture, setup: Setup, rows: Rows) -> float:
    """Bytes kept for the backward pass of the longest micro-batch, logits left out."""
    tokens = rows.micro_batch(setup.batch_size)
    low = 2 if setup.is_bf16 else 4
    each = shape.token_bytes(architecture, setup) * tokens + shape.mask_bytes(architecture, setup, tokens)
    ends = (4 * 2 * architecture.hidden_size + low * 2 * architecture.head_size) * tokens
    learned = _learned(rows, tokens)
    ends += low * architecture.hidden_size * learned
    if not setup.checkpointing:
        return float(architecture.layers * each + ends)
    inputs = shape.layer_inputs_bytes(architecture, setup) * tokens
    return float(architecture.layers * inputs + CHECKPOINT_FACTOR * each + ends)


def _learned(rows: Rows, tokens: int) -> int:
    return max(1, min(tokens, round(tokens * rows.learned_share)))


def _logits(architecture: Architecture, setup: Setup, rows: Rows) -> float:
    """Log-probabilities, the gradient of the loss and the gradient of the logits, in 32 bits, of the
    positions that are learned from: the head is computed nowhere else."""
    learned = _learned(rows, rows.micro_batch(setup.batch_size))
    return 3.0 * 4 * learned * architecture.vocabulary_size


def _evaluation(architecture: Architecture, setup: Setup, rows: Rows) -> tuple[float, float]:
    """Nothing is kept: the widest layer's numbers, and the logits twice."""
    longest = rows.longest if rows.longest_evaluated is None else rows.longest_evaluated
    tokens = longest * setup.eval_batch_size
    low = 2 if setup.is_bf16 else 4
    numbers = 3 * architecture.intermediate_size + 4 * architecture.hidden_size
    mask = low * tokens * tokens if setup.eval_batch_size > 1 else 0
    return float(low * numbers * tokens + mask), 8.0 * _learned(rows, tokens) * architecture.vocabulary_size


def _slack(architecture: Architecture, setup: Setup, rows: Rows, device: str, kept: float) -> float:
    """What the allocator holds beyond what is in use."""
    if device == "cuda":
        return GPU_ALLOCATOR_SHARE * (kept + _logits(architecture, setup, rows))
    share = LORA_ALLOCATOR_SHARE if setup.apply_lora else ALLOCATOR_SHARE
    large = large_bytes(architecture, setup, rows, kept)
    return share * (kept - large) + LARGE_BLOCK_SHARE * large


def large_bytes(architecture: Architecture, setup: Setup, rows: Rows, kept: float) -> float:
    """Of what is `kept`, the part in blocks above glibc's threshold: they are taken from the system and given
    back to it, and leave no holes."""
    size = (2 if setup.is_bf16 else 4) * rows.micro_batch(setup.batch_size)
    if size * architecture.hidden_size >= SMALL_BLOCK_BYTES:
        return kept
    if size * architecture.intermediate_size < SMALL_BLOCK_BYTES:
        return 0.0
    layers = CHECKPOINT_FACTOR if setup.checkpointing else architecture.layers
    return min(kept, 4.0 * size * architecture.intermediate_size * layers)


# ---------------------------------------------------------------- the host


def _host(architecture: Architecture, setup: Setup, on_file: int) -> dict[str, int]:
    """Of one node with accelerators: a process for each device, the weights on their way, what is
    offloaded."""
    here = max(1, setup.devices // setup.nodes)
    trained = shape.trained_parameters(architecture, setup)
    found = {
        "processes": here * IMPORTED_BYTES,
        "weights on their way": on_file + 2 * architecture.parameters,
    }
    if setup.offload != "none":
        each = 16 + (2 if setup.offload == "all" else 0)
        found["offloaded states"] = round(HOST_BUFFER_FACTOR * max(4 * here, each / setup.nodes) * trained)
    return found
