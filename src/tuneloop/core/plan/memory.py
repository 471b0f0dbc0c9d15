"""Peak memory of a finetune step, by cause.

A step goes through moments: the weights are loaded; a pack's backward pass begins, with everything kept and
a chunk of logits beside it; it ends, with every gradient there; the optimiser steps; a validation pack runs.
Each is a sum of causes, and the largest sum is the peak. Model states of ZeRO are counted as DeepSpeed's own
estimators do (docs/code-docs/source/memory.rst of microsoft/DeepSpeed). What is counted and what is
measured: docs/explanation/memory.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from tuneloop.core.plan import shape
from tuneloop.core.plan.constants import (
    BUFFER_COPIES,
    CUDA_CONTEXT_BYTES,
    DEEPSPEED_BYTES,
    FOUR_BIT_BYTES,
    GPU_ALLOCATOR_SHARE,
    HOST_BUFFER_FACTOR,
    IMPORTED_BYTES,
    LAUNCHERS_BYTES,
    LIBRARY_BYTES,
    LIVE_NUMBERS,
    LOGITS_CHUNK_BYTES,
    LORA_SEVERAL_PACKS_SHARE,
    LORA_SLACK_LAYERS,
    SHARED_BYTES,
    SLACK_SHARE,
    SMALL_BLOCK_BYTES,
)
from tuneloop.core.plan.setup import Rows, Setup, evaluated_pack_of, has_several_packs, pack_of
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
Moment = Literal[
    "loading",
    "backward begins",
    "layers are computed again",
    "backward ends",
    "optimizer steps",
    "evaluating",
]


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
    """`file_bytes`: of the weights' file, which is mapped while it is read; None: two bytes a parameter.

    On a CPU `device` is the machine: all processes of a node together."""
    on_file = 2 * architecture.parameters if file_bytes is None else file_bytes
    moments = _moments(architecture, setup, rows, device, on_file)
    if device == "cpu" and setup.processes_here > 1:
        moments = {moment: _of_all(causes, moment, setup, on_file) for moment, causes in moments.items()}
    found = [_memory(moment, causes) for moment, causes in moments.items()]
    largest = max(found, key=lambda each: each.total_bytes)
    host = {} if device == "cpu" else _host(architecture, setup, on_file)
    return Peak(device=largest, host_bytes=sum(host.values()), host_causes=host)


def _of_all(causes: Mapping[Cause, float], moment: Moment, setup: Setup, on_file: int) -> dict[Cause, float]:
    """Of all processes of a node and their launchers; a file's pages are there once."""
    here = setup.processes_here
    found = {cause: here * size for cause, size in causes.items()}
    if moment == "loading":
        found["buffers"] -= (here - 1) * on_file
    found["process"] += LAUNCHERS_BYTES - (here - 1) * SHARED_BYTES
    if setup.sharding in ("zero2", "zero3"):
        found["process"] += here * DEEPSPEED_BYTES
    return found


def _memory(moment: Moment, causes: Mapping[Cause, float]) -> Memory:
    rounded = {name: round(causes.get(name, 0)) for name in CAUSES}
    return Memory(moment=moment, causes=rounded, total_bytes=sum(rounded.values()))


def _moments(
    architecture: Architecture, setup: Setup, rows: Rows, device: str, on_file: int
) -> dict[Moment, dict[Cause, float]]:
    """Of one process."""
    states = model_states(architecture, setup)
    always: dict[Cause, float] = {
        "weights": states["weights"],
        "optimizer": states["optimizer"],
        "lora": states["lora"],
        "buffers": _buffers(architecture, setup, device) + _casts(architecture, setup),
        "process": LIBRARY_BYTES if device == "cpu" else CUDA_CONTEXT_BYTES,
    }
    tokens = pack_of(setup, rows, device)
    # Where gradients add up over packs those of earlier ones are there while the next is computed; buckets
    # that are summed over processes are there always.
    is_added_to = setup.devices > 1 or has_several_packs(setup, rows, device)
    earlier = states["gradients"] if is_added_to else 0.0
    kept = kept_bytes(architecture, setup, rows, device)
    head, logits = _head(architecture, setup), logits_bytes(architecture, rows, tokens, device)
    slack = _slack(architecture, setup, rows, device, kept)
    layer = layer_bytes(architecture, setup, rows, device)
    left = 0.0
    if device == "cpu" and setup.sharding != "fsdp":
        # Small blocks do not go back to the system; gradients of layers are the first to use them again.
        used_again = 0.0 if setup.apply_lora or earlier else 4.0 * shape.layer_matrices(architecture)
        small = (1.0 - large_share(architecture, setup, rows)) * (kept - layer)
        left = max(0.0, small - used_again)
    found: dict[Moment, dict[Cause, float]] = {
        "backward begins": {
            **always,
            "gradients": earlier + head,
            "activations": kept,
            "logits": logits,
            "slack": slack,
        },
        "backward ends": {
            **always,
            "gradients": states["gradients"]
            + _tied(architecture, setup)
            + _whole_gradients(architecture, setup, device),
            "activations": layer,
            "slack": slack + left,
        },
        "optimizer steps": {
            **always,
            "gradients": states["gradients"] + _adafactor(architecture, setup),
            "slack": slack + left,
        },
    }
    if setup.is_checkpointed:
        found["layers are computed again"] = {
            **always,
            "gradients": earlier + head,
            "activations": kept + layer,
            "slack": slack,
        }
    if device == "cpu":
        found["loading"] = {**_loading(architecture, setup), "buffers": on_file, "process": IMPORTED_BYTES}
    if setup.evaluates:
        evaluated = evaluated_pack_of(setup, rows, device)
        found["evaluating"] = {
            **always,
            "activations": _evaluation(architecture, setup, evaluated),
            "logits": logits_bytes(architecture, rows, evaluated, device),
            "slack": slack,
        }
    return found


def _loading(architecture: Architecture, setup: Setup) -> dict[Cause, float]:
    """Weights are read whole, and sharded when they are there."""
    whole = setup.model_copy(update={"sharding": "none", "offload": "none"})
    return {"weights": model_states(architecture, whole)["weights"]}


# ---------------------------------------------------------------- model states


def model_states(architecture: Architecture, setup: Setup) -> dict[str, float]:
    """Bytes of `weights`, `gradients`, `optimizer` and `lora` on one device."""
    whole = _whole_states(architecture, setup) if setup.sharding == "none" else None
    return whole if whole is not None else _sharded_states(architecture, setup)


def _whole_states(architecture: Architecture, setup: Setup) -> dict[str, float]:
    """One copy per device: what is trained is in 32 bits."""
    trained = shape.trained_parameters(architecture, setup)
    return {
        "weights": _frozen_bytes(architecture, setup),
        "lora": 4 * trained if setup.apply_lora else 0,
        "gradients": 4 * trained,
        "optimizer": _optimizer_bytes(architecture, setup, trained) if setup.offload == "none" else 0,
    }


def _frozen_bytes(architecture: Architecture, setup: Setup) -> float:
    """Of the model's own weights, adapter left out."""
    each = 2 if setup.is_bf16 and setup.apply_lora else 4
    total = architecture.parameters
    if not setup.is_4bit:
        return float(each * total)
    packed = shape.layer_matrices(architecture)
    return each * (total - packed) + FOUR_BIT_BYTES * packed


def _sharded_states(architecture: Architecture, setup: Setup) -> dict[str, float]:
    """FSDP2 cuts everything as it is. ZeRO is DeepSpeed's arithmetic: mixed precision has 2 bytes of weights
    and of gradients for each parameter and 16 in 32 bits (weights, gradients, two moments); without it, 4 + 4
    and two moments, and a copy of this device's part of the weights that the optimiser steps on."""
    if setup.sharding == "fsdp":
        whole = _whole_states(architecture, setup.model_copy(update={"sharding": "none"}))
        return {name: size / setup.devices for name, size in whole.items()}
    trained = shape.trained_parameters(architecture, setup)
    count, low = setup.devices, 2 if setup.is_bf16 else 4
    # Of what is trained: the copy in 32 bits and, in 16 bits, gradients in 32.
    states = (8 if setup.is_bf16 else 4) * trained + _optimizer_bytes(architecture, setup, trained)
    base: float = low * architecture.parameters
    adapter: float = low * trained if setup.apply_lora else 0
    found = {"weights": base, "gradients": low * trained, "optimizer": states / count}
    if not setup.is_bf16:
        found["gradients"] = low * trained / count
    if setup.sharding == "zero3":
        found["weights"] = base / count + 2 * low * shape.largest_layer(architecture)
        found["gradients"] = 0.0 if setup.is_bf16 else low * trained / count
        adapter /= count
    if setup.offload != "none":
        # Gradients go to the host bucket by bucket, and the optimiser's step happens there.
        found["optimizer"] = found["gradients"] = 0.0
    if setup.offload == "all" and setup.sharding == "zero3":
        found["weights"] = 2.0 * low * shape.largest_layer(architecture)
    return {**found, "lora": adapter}


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


def _head(architecture: Architecture, setup: Setup) -> float:
    """The gradient of a trained head: the loss forms it in its forward pass."""
    return 0.0 if setup.apply_lora else 4.0 * shape.table(architecture)


def _tied(architecture: Architecture, setup: Setup) -> float:
    """The head's gradient waits for the embedding's, whose sum is a tied table's."""
    if setup.apply_lora or not architecture.tied_embeddings or setup.sharding == "fsdp":
        return 0.0
    return 4.0 * shape.table(architecture)


def _casts(architecture: Architecture, setup: Setup) -> float:
    """16-bit copies of 32-bit weights, which autocast keeps while it computes; a 4-bit matrix unpacked."""
    unpacked = 0.0
    if setup.is_4bit:
        largest = max(each.numbers for each in shape.linears(architecture))
        unpacked = (2.0 if setup.is_bf16 else 4.0) * largest
    if not setup.is_bf16 or setup.sharding != "none":
        return unpacked
    numbers = shape.lora_parameters(architecture, setup)
    return unpacked + 2.0 * (numbers if setup.apply_lora else shape.linear_parameters(architecture))


def _buffers(architecture: Architecture, setup: Setup, device: str) -> float:
    """What devices exchange, and weights that are gathered to compute with."""
    if setup.sharding == "none":
        return 0.0  # DDP sends gradients from where they lie
    low = 2 if setup.is_bf16 else 4
    if setup.sharding == "fsdp":
        # The root's tables stay gathered, of the layers the one that is computed and the next.
        layer = shape.layer_matrices(architecture) / architecture.layers
        return low * (shape.tables(architecture) + 2 * layer)
    trained_numbers = shape.trained_parameters(architecture, setup)
    bucket = min(setup.bucket_numbers or architecture.hidden_size**2, trained_numbers)
    copies = 2.0 if device == "cpu" else BUFFER_COPIES
    gathered = 0.0
    if setup.sharding == "zero3":
        # What is used again soon is not given up (stage3_max_live_parameters, stage3_max_reuse_distance).
        live = min(architecture.parameters, LIVE_NUMBERS) - 2 * shape.largest_layer(architecture)
        gathered = low * max(0.0, live)
    return copies * low * bucket + gathered


def _whole_gradients(architecture: Architecture, setup: Setup, device: str) -> float:
    """FSDP's of the root's tables, before each device has its part: the gradients, a copy to send and, on a
    CPU, gloo's own."""
    if setup.sharding != "fsdp" or setup.apply_lora:
        return 0.0
    return (3.0 if device == "cpu" else 2.0) * 4 * shape.tables(architecture)


# ---------------------------------------------------------------- what a pack takes


def layer_bytes(architecture: Architecture, setup: Setup, rows: Rows, device: str) -> float:
    """Bytes that one layer keeps of the longest pack for the backward pass."""
    tokens = pack_of(setup, rows, device)
    seam = shape.seam_bytes(architecture, setup) if tokens > rows.longest else 0
    return float(tokens * (shape.token_bytes(architecture, setup) + seam))


def kept_bytes(architecture: Architecture, setup: Setup, rows: Rows, device: str) -> float:
    """Bytes kept for the backward pass of the longest pack, from the embedding to what the head is given."""
    tokens = pack_of(setup, rows, device)
    low = 2 if setup.is_bf16 else 4
    ends = (4 * 2 * architecture.hidden_size + low * 2 * architecture.head_size) * tokens
    # The gradient of what the head is given, which the loss has formed already.
    ends += low * architecture.hidden_size * learned_of(rows, tokens)
    if not setup.is_checkpointed:
        return architecture.layers * layer_bytes(architecture, setup, rows, device) + ends
    return float(architecture.layers * shape.layer_inputs_bytes(architecture, setup) * tokens + ends)


def learned_of(rows: Rows, tokens: int) -> int:
    return max(1, min(tokens, round(tokens * rows.learned_share)))


def logits_bytes(architecture: Architecture, rows: Rows, tokens: int, device: str) -> float:
    """A chunk of positions at a time (`training.head`), in place turned into its gradient."""
    whole = 4.0 * architecture.vocabulary_size * learned_of(rows, tokens)
    return min(whole, LOGITS_CHUNK_BYTES[device])


def _evaluation(architecture: Architecture, setup: Setup, tokens: int) -> float:
    """Nothing is kept: the widest layer's numbers."""
    numbers = 3 * architecture.intermediate_size + 4 * architecture.hidden_size
    return float((2 if setup.is_bf16 else 4) * numbers * tokens)


def _slack(architecture: Architecture, setup: Setup, rows: Rows, device: str, kept: float) -> float:
    """What the allocator holds beyond what is in use. On a CPU these are holes between blocks that are not
    large: with adapters of the size of what a few layers work with, else a share of all that is kept."""
    if device == "cuda":
        logits = logits_bytes(architecture, rows, pack_of(setup, rows, device), device)
        return GPU_ALLOCATOR_SHARE * (kept + logits)
    small = 1.0 - large_share(architecture, setup, rows)
    if not setup.apply_lora:
        return small * SLACK_SHARE * kept
    between = LORA_SEVERAL_PACKS_SHARE * kept if has_several_packs(setup, rows, device) else 0.0
    return small * (LORA_SLACK_LAYERS * layer_bytes(architecture, setup, rows, device) + between)


def large_share(architecture: Architecture, setup: Setup, rows: Rows) -> float:
    """Of what a layer keeps on a CPU, the part in blocks above glibc's threshold: they are taken from the
    system and given back to it, and leave no holes."""
    tokens = pack_of(setup, rows, "cpu")
    size = (2 if setup.is_bf16 else 4) * tokens
    wide = size * architecture.intermediate_size
    # Fused, gate and up are one block; what follows has half of it.
    blocks = [2 * wide, wide, wide] if shape.is_fused(architecture) else [wide] * 4
    if size * architecture.hidden_size >= SMALL_BLOCK_BYTES:
        return 1.0
    large = sum(block for block in blocks if block >= SMALL_BLOCK_BYTES)
    return min(1.0, large / layer_bytes(architecture, setup, rows, "cpu"))


# ---------------------------------------------------------------- the host


def _host(architecture: Architecture, setup: Setup, on_file: int) -> dict[str, int]:
    """Of one node with accelerators: a process for each device, the weights on their way, what is
    offloaded."""
    here = setup.processes_here
    trained = shape.trained_parameters(architecture, setup)
    found = {
        "processes": here * IMPORTED_BYTES + (LAUNCHERS_BYTES if here > 1 else 0),
        # Every process reads them whole; what is packed into 4 bits goes to the device tensor by tensor.
        "weights on their way": on_file
        + (0 if setup.is_4bit else round(here * _loading(architecture, setup)["weights"])),
    }
    if setup.offload != "none":
        each = 16 + (2 if setup.offload == "all" else 0)
        found["offloaded states"] = round(HOST_BUFFER_FACTOR * max(4 * here, each / setup.nodes) * trained)
    return found
