"""Numbers of the memory model that are measured or set, not counted.

The first block is fitted by `benchmarks/plan_fit.py` over configurations that
`benchmarks/plan_accuracy.py` does not use; run it again after an upgrade of torch or transformers. The
second comes from documents.
"""

from __future__ import annotations

from collections.abc import Mapping

# Fitted on a CPU.
LIBRARY_BYTES = 527_000_000
"""Python, torch, transformers and PEFT once a model has been trained: their pages and what they allocate."""
IMPORTED_BYTES = 440_000_000
"""The same before the first weight is read."""
ALLOCATOR_SHARE = 0.73
"""Of what is kept for the backward pass in blocks below the threshold: holes that glibc keeps when blocks of
many sizes come and go. All weights trained."""
LORA_ALLOCATOR_SHARE = 1.13
"""The same with adapters, whose small matrices leave holes between large ones."""
SEVERAL_PACKS_FACTOR = 1.6
"""Both, where a step has several packs: what lives on between them leaves more holes."""
LARGE_BLOCK_SHARE = 0.10
"""The same of blocks that are returned to the system as soon as they are free."""
SMALL_BLOCK_BYTES = 32 * 1024 * 1024
"""glibc: DEFAULT_MMAP_THRESHOLD_MAX on 64 bits."""

TIED_TABLES = 1.0
"""Tables of gradients beside the one that is kept, while a tied embedding's two are added."""
FSDP_TABLES = 4.5
"""Copies of the gradients of embedding and head, on their way from each process to all of them by gloo."""
LOGITS_COPIES = 1.0
"""Of a chunk of logits at once."""
LAUNCHERS_BYTES = 185_000_000
"""The step's process and torchrun's, which start the processes that train."""
SHARED_BYTES = 167_000_000
"""Pages of libraries' files: however many processes use them, they are there once."""
DEEPSPEED_BYTES = 120_000_000
"""What DeepSpeed adds to a process."""

# Set elsewhere in this project.
LOGITS_CHUNK_BYTES: Mapping[str, int] = {"cpu": 64 << 20, "cuda": 256 << 20}
"""`training.head.CHUNK_BYTES`."""

# From documents; not measured here.
GPU_ALLOCATOR_SHARE = 0.10
"""Of a pack's memory: what PyTorch's caching allocator holds beyond what is in use."""
CUDA_CONTEXT_BYTES = 600_000_000
"""CUDA's context and libraries on each GPU."""
BUFFER_COPIES = 4.5
"""With overlap_comm: "4.5x" of a bucket (transformers, docs/source/en/deepspeed.md)."""
LIVE_NUMBERS = 1_000_000_000
"""`stage3_max_live_parameters` and `stage3_max_reuse_distance`, at DeepSpeed's default (config-json.md)."""
HOST_BUFFER_FACTOR = 1.5
"""`additional_buffer_factor` of DeepSpeed's estimators."""
FOUR_BIT_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""NF4 with double quantisation: 8 bits for 64 numbers, 32 for 256 of those (arXiv:2305.14314, section 3)."""
