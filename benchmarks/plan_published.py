"""The planner beside published figures for GPUs and large models. Nothing is run but arithmetic.

    .venv/bin/python benchmarks/plan_published.py

Sources (all in docs/explanation/memory.md too):
[D] microsoft/DeepSpeed 077e6740, docs/code-docs/source/memory.rst (model states alone)
[F] hiyouga/LLaMA-Factory 00409ff2, README.md, Hardware Requirement ("estimated")
[T] pytorch/torchtune 0031bfb0, README.md, Memory and training speed (batch 2, packed to 2048, compiled)
"""

from __future__ import annotations

from tuneloop.core.plan import Rows, Setup, peak
from tuneloop.core.plan.memory import HOST_BUFFER_FACTOR, model_states
from tuneloop.core.types import Architecture

GIB = 2**30
GB = 10**9


def _shape(hidden: int, wide: int, layers: int, heads: int, kv: int, words: int, family: str) -> Architecture:
    return Architecture(
        family=family,
        hidden_size=hidden,
        intermediate_size=wide,
        layers=layers,
        attention_heads=heads,
        key_value_heads=kv,
        head_size=hidden // heads,
        vocabulary_size=words,
        tied_embeddings=False,
    )


LLAMA2_7B = _shape(4096, 11008, 32, 32, 32, 32000, "llama")
QWEN_14B = _shape(5120, 13824, 48, 40, 8, 152064, "qwen2")
LLAMA3_8B = _shape(4096, 14336, 32, 32, 8, 128256, "llama")
LLAMA3_70B = _shape(8192, 28672, 80, 64, 8, 128256, "llama")


def _of(parameters: int, largest: int) -> Architecture:
    """So many parameters, of which the largest matrix has so many: what DeepSpeed's estimators ask for."""
    side = 512
    one = _shape(side, side, 1, 8, 8, largest // side, "llama").model_copy(update={"tied_embeddings": True})
    each = one.model_copy(update={"layers": 2}).parameters - one.parameters
    return one.model_copy(update={"layers": round((parameters - largest) / each)})


T5_3B = _of(2_851_000_000, 32_000_000)


def _states(sharding: str, offload: str = "none") -> float:
    setup = Setup(sharding=sharding, offload=offload, devices=8, is_bf16=True)  # type: ignore[arg-type]
    return sum(model_states(T5_3B, setup).values())


def _total(shape: Architecture, length: int, **setup: object) -> float:
    chosen = Setup.model_validate({"is_bf16": True, "evaluates": False, **setup})
    return peak(shape, chosen, Rows(longest=length), device="cuda").device.total_bytes


TORCHTUNE_8B = {
    "apply_lora": True,
    "lora_r": 8,
    "lora_targets": ("q_proj", "v_proj", "o_proj"),
    "checkpointing": "always",
}
TORCHTUNE_70B = {
    "apply_lora": True,
    "lora_r": 16,
    "lora_targets": ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "checkpointing": "always",
    "sharding": "fsdp",
    "devices": 8,
}


def rows() -> list[tuple[str, str, float, float]]:
    """(source, case, published GiB, planned GiB)."""
    offloaded = HOST_BUFFER_FACTOR * max(4 * 8, 16) * T5_3B.parameters
    short = {"apply_lora": True, "lora_r": 8, "checkpointing": "always"}
    full = {"checkpointing": "always"}
    return [
        ("D", "T5-3B, 8 GPUs, ZeRO-2", 15.93, _states("zero2") / GIB),
        ("D", "T5-3B, 8 GPUs, ZeRO-2, optimiser offloaded", 5.31, _states("zero2", "optimizer") / GIB),
        ("D", "T5-3B, 8 GPUs, ZeRO-3", 6.10, _states("zero3") / GIB),
        ("D", "T5-3B, 8 GPUs, ZeRO-3, optimiser offloaded", 0.79, _states("zero3", "optimizer") / GIB),
        ("D", "T5-3B, 8 GPUs, ZeRO-3, all offloaded", 0.12, _states("zero3", "all") / GIB),
        ("D", "T5-3B, 8 GPUs, ZeRO-2 offloaded: main memory", 127.48, offloaded / GIB),
        (
            "F",
            "7B, all weights, bf16 (18 GB per billion)",
            120 * GB / GIB,
            _total(LLAMA2_7B, 1024, **full) / GIB,
        ),
        ("F", "7B, LoRA, 16 bits", 16 * GB / GIB, _total(LLAMA2_7B, 512, **short) / GIB),
        ("F", "14B, LoRA, 16 bits", 32 * GB / GIB, _total(QWEN_14B, 512, **short) / GIB),
        ("F", "70B, LoRA, 16 bits", 160 * GB / GIB, _total(LLAMA3_70B, 512, **short) / GIB),
        ("T", "Llama 3.1 8B, LoRA, one A6000", 30.3, _total(LLAMA3_8B, 4096, **TORCHTUNE_8B) / GIB),
        ("T", "Llama 3.1 70B, LoRA, 8 A100", 27.6, _total(LLAMA3_70B, 4096, **TORCHTUNE_70B) / GIB),
    ]


def main() -> None:
    print(f"{'':3} {'case':48} {'published':>11} {'planned':>11} {'difference':>10}")
    for source, case, published, planned in rows():
        difference = 100 * (planned / published - 1)
        print(f"[{source}] {case:48} {published:7.2f} GiB {planned:7.2f} GiB {difference:+9.1f}%")


if __name__ == "__main__":
    main()
