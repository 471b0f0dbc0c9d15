"""Numbers of the memory model that are measured or set, not counted.

The first block is fitted by `benchmarks/plan_fit.py` over configurations that
`benchmarks/plan_accuracy.py` does not use; run it again after an upgrade of torch or transformers. The
second comes from documents.
"""

from __future__ import annotations

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
LARGE_BLOCK_SHARE = 0.10
"""The same of blocks that are returned to the system as soon as they are free."""
SMALL_BLOCK_BYTES = 32 * 1024 * 1024
"""glibc: DEFAULT_MMAP_THRESHOLD_MAX on 64 bits."""

# From documents; not measured here.
GPU_ALLOCATOR_SHARE = 0.10
"""Of a batch's memory: what PyTorch's caching allocator holds beyond what is in use."""
CUDA_CONTEXT_BYTES = 600_000_000
"""CUDA's context and libraries on each GPU."""
BUCKET_NUMBERS = 200_000_000
"""DeepSpeed's buckets in the component's zero2.json (2e8)."""
BUFFER_COPIES = 4.5
"""With overlap_comm: "4.5x" of a bucket (transformers, docs/source/en/deepspeed.md)."""
HOST_BUFFER_FACTOR = 1.5
"""`additional_buffer_factor` of DeepSpeed's estimators."""
CHECKPOINT_FACTOR = 1.0
"""Layers whose activations are there at once when they are computed again."""
