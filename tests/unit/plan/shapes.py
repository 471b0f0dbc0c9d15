"""Shapes and settings to draw from."""

from __future__ import annotations

from hypothesis import strategies as st

from tuneloop.core.plan import Place, Rows, Setup
from tuneloop.core.types import Architecture


def architecture(**changes: object) -> Architecture:
    values = {
        "family": "llama",
        "hidden_size": 512,
        "intermediate_size": 1408,
        "layers": 8,
        "attention_heads": 8,
        "key_value_heads": 8,
        "head_size": 64,
        "vocabulary_size": 32000,
        "tied_embeddings": False,
    }
    return Architecture.model_validate({**values, **changes})


def machine(memory: int, **changes: object) -> Place:
    values: dict[str, object] = {"name": "local", "device_memory_bytes": memory, "host_memory_bytes": memory}
    return Place.model_validate({**values, **changes})


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    head = draw(st.sampled_from([32, 64, 128]))
    groups = draw(st.sampled_from([1, 2, 4]))
    values = draw(st.integers(1, 8))
    family = draw(st.sampled_from(["llama", "phi3", "qwen2", "qwen3"]))
    return architecture(
        family=family,
        hidden_size=head * groups * values,
        intermediate_size=draw(st.integers(64, 8192)),
        layers=draw(st.integers(1, 48)),
        attention_heads=groups * values,
        key_value_heads=values,
        head_size=head,
        vocabulary_size=draw(st.integers(256, 150_000)),
        tied_embeddings=draw(st.booleans()),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    devices = draw(st.sampled_from([1, 2, 4, 8]))
    sharding = draw(st.sampled_from(["none", "fsdp", "zero2", "zero3"])) if devices > 1 else "none"
    apply_lora = draw(st.booleans())
    return Setup(
        apply_lora=apply_lora,
        lora_r=draw(st.integers(1, 64)),
        has_dropout=draw(st.booleans()),
        is_dora=apply_lora and draw(st.booleans()),
        is_4bit=apply_lora and draw(st.booleans()),
        effective_batch=draw(st.integers(1, 128)),
        is_packed=draw(st.booleans()),
        pack_tokens=draw(st.integers(0, 8192)),
        is_bf16=draw(st.booleans()),
        optimizer=draw(st.sampled_from(["adamw_torch", "adafactor"])),
        checkpointing=draw(st.sampled_from(["auto", "always", "never"])),
        sharding=sharding,
        may_shard=sharding == "none" and devices > 1 and draw(st.booleans()),
        offload=draw(st.sampled_from(["none", "optimizer", "all"])) if sharding[:4] == "zero" else "none",
        devices=devices,
        evaluates=draw(st.booleans()),
    )


@st.composite
def rows(draw: st.DrawFn) -> Rows:
    return Rows(
        longest=draw(st.integers(1, 8192)),
        learned_share=draw(st.floats(0.01, 1.0)),
        count=draw(st.integers(1, 100_000)),
        tokens=draw(st.integers(1, 10**9)),
    )


devices = st.sampled_from(["cpu", "cuda"])
