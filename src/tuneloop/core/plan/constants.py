"""Numbers of the memory model that are measured or set, not counted.

The first block is fitted by `benchmarks/plan_fit.py` over configurations that
`benchmarks/plan_accuracy.py` does not use; run it again after an upgrade of torch or transformers. The
others are set elsewhere in this project, or come from documents.
"""

from __future__ import annotations

from collections.abc import Mapping

# Fitted on a CPU, with glibc as `adapters.local` sets it up for the steps.
LIBRARY_BYTES = 564_000_000
"""Python, torch, transformers and PEFT once a model has been trained: their pages and what they allocate."""
IMPORTED_BYTES = 440_000_000
"""The same before the first weight is read."""
SLACK_SHARE = 0.45
"""Holes that stay in the heap: a share of what is kept for the backward pass, blocks above the threshold left
out. All weights trained."""
LORA_SLACK_LAYERS = 2.67
"""The same with adapters, in units of what one layer keeps."""
LORA_SEVERAL_PACKS_SHARE = 0.41
"""And where a step has several packs, a share of all that is kept: what lives on between them makes holes."""
SMALL_BLOCK_BYTES = 32 * 1024 * 1024
"""glibc: DEFAULT_MMAP_THRESHOLD_MAX on 64 bits."""

LAUNCHERS_BYTES = 179_000_000
"""The step's process and torchrun's, which start the processes that train."""
SHARED_BYTES = 167_000_000
"""Pages of libraries' files: however many processes use them, they are there once."""
DEEPSPEED_BYTES = 129_000_000
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
