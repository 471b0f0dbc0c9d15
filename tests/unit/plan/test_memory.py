"""The memory model: what it is made of, and what must hold whatever is asked."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.unit.plan.shapes import architecture, architectures, devices, rows, setups
from tuneloop.core.plan import CAUSES, Rows, Setup, peak
from tuneloop.core.plan.memory import kept_bytes, large_bytes, model_states
from tuneloop.core.plan.shape import lora_parameters, token_bytes
from tuneloop.core.types import Architecture

GIB = 2**30


def total(architecture: Architecture, setup: Setup, rows: Rows, device: Any) -> int:
    return peak(architecture, setup, rows, device=device).device.total_bytes


def never_less(
    before: tuple[Architecture, Setup, Rows], after: tuple[Architecture, Setup, Rows], device: Any
) -> None:
    """But for one thing: on a CPU slack falls where blocks become so large that they leave no holes
    (`test_a_shape_that_is_wide_leaves_fewer_holes_than_one_of_many_small_blocks`)."""
    if device == "cpu":
        assume(large_bytes(*after, kept_bytes(*after)) == 0)
    assert total(*after, device) >= total(*before, device)


@settings(deadline=None)
@given(architectures(), setups(), rows(), devices)
def test_causes_add_up_to_the_total_and_none_is_negative(
    shape: Architecture, setup: Setup, lengths: Rows, device: Any
) -> None:
    found = peak(shape, setup, lengths, device=device)
    assert sum(found.device.causes.values()) == found.device.total_bytes
    assert tuple(found.device.causes) == CAUSES
    assert min(found.device.causes.values()) >= 0
    assert sum(found.host_causes.values()) == found.host_bytes
    assert bool(found.host_causes) == (device == "cuda")


@settings(deadline=None)
@given(architectures(), setups(), rows(), devices, st.integers(1, 8))
def test_a_larger_batch_never_takes_less(
    shape: Architecture, setup: Setup, lengths: Rows, device: Any, more: int
) -> None:
    larger = setup.model_copy(
        update={"batch_size": setup.batch_size + more, "eval_batch_size": setup.eval_batch_size + more}
    )
    never_less((shape, setup, lengths), (shape, larger, lengths), device)


@settings(deadline=None)
@given(architectures(), setups(), rows(), devices, st.integers(1, 4096))
def test_longer_rows_never_take_less(
    shape: Architecture, setup: Setup, lengths: Rows, device: Any, more: int
) -> None:
    longer = lengths.model_copy(update={"longest": lengths.longest + more})
    never_less((shape, setup, lengths), (shape, setup, longer), device)


@settings(deadline=None)
@given(architectures(), setups(), rows(), devices)
def test_more_layers_and_more_words_never_take_less(
    shape: Architecture, setup: Setup, lengths: Rows, device: Any
) -> None:
    deeper = shape.model_copy(update={"layers": shape.layers + 1})
    wordier = shape.model_copy(update={"vocabulary_size": shape.vocabulary_size + 1000})
    never_less((shape, setup, lengths), (deeper, setup, lengths), device)
    never_less((shape, setup, lengths), (wordier, setup, lengths), device)


@settings(deadline=None)
@given(architectures(), setups(), rows(), devices)
def test_checkpointing_keeps_no_more_than_everything(
    shape: Architecture, setup: Setup, lengths: Rows, device: Any
) -> None:
    deep = shape.model_copy(update={"layers": shape.layers + 1})
    plain = setup.model_copy(update={"checkpointing": False})
    again = setup.model_copy(update={"checkpointing": True})
    assert kept_bytes(deep, again, lengths) < kept_bytes(deep, plain, lengths)


@settings(deadline=None)
@given(architectures(), st.sampled_from([2, 4, 8, 64]))
def test_each_stage_of_zero_shards_what_it_says(shape: Architecture, count: int) -> None:
    def states(sharding: str, devices: int) -> dict[str, float]:
        setup = Setup(sharding=sharding, devices=devices, is_bf16=True)  # type: ignore[arg-type]
        return model_states(shape, setup)

    for stage in ("zero1", "zero2", "zero3"):
        few, many = states(stage, count), states(stage, 2 * count)
        assert many["optimizer"] == pytest.approx(few["optimizer"] / 2)
    gathered = states("zero3", 10**12)["weights"]
    assert states("zero3", 2 * count)["weights"] - gathered == pytest.approx(
        (states("zero3", count)["weights"] - gathered) / 2, rel=1e-6
    )
    assert states("zero2", count)["weights"] == states("zero2", 2 * count)["weights"] == 2 * shape.parameters
    ladder = [sum(states(stage, count).values()) for stage in ("zero1", "zero2")]
    assert ladder[1] <= ladder[0]


@settings(deadline=None)
@given(architectures(), rows(), st.sampled_from(["zero2", "zero3"]), st.sampled_from([2, 8]))
def test_what_is_offloaded_is_in_the_hosts_memory(
    shape: Architecture, lengths: Rows, stage: Any, count: int
) -> None:
    kept = Setup(sharding=stage, devices=count, is_bf16=True, batch_size=1)
    aside = kept.model_copy(update={"offload": "optimizer"})
    on, off = (peak(shape, setup, lengths, device="cuda") for setup in (kept, aside))
    assert off.device.total_bytes <= on.device.total_bytes
    assert off.device.causes["optimizer"] == 0
    assert off.host_bytes - on.host_bytes >= 16 * shape.parameters


# ---------------------------------------------------------------- published figures


def published(parameters: int) -> Architecture:
    """A shape with about so many parameters: the head and the embedding are nearly nothing."""
    found = architecture(
        hidden_size=64, intermediate_size=64, vocabulary_size=64, attention_heads=1, layers=1
    )
    each = (
        architecture(
            hidden_size=64, intermediate_size=64, vocabulary_size=64, attention_heads=1, layers=2
        ).parameters
        - found.parameters
    )
    return found.model_copy(update={"layers": parameters // each})


@pytest.mark.parametrize(
    ("stage", "offload", "gib"),
    [
        ("zero2", "none", 15.93),
        ("zero2", "optimizer", 5.31),
        ("zero3", "none", 5.97),
        ("zero3", "optimizer", 0.66),
    ],
)
def test_zero_counts_as_deepspeed_documents_it_for_t5_3b_on_eight_gpus(
    stage: Any, offload: Any, gib: float
) -> None:
    """docs/code-docs/source/memory.rst: 15.93, 5.31; and 6.10, 0.79 with 0.13 for the largest layer's 32M
    parameters, of which this shape has none. ZeRO-3's 18 bytes hold 2 for weights and 16 sharded."""
    shape = published(2_851_000_000)
    setup = Setup(sharding=stage, offload=offload, devices=8, is_bf16=True)
    assert sum(model_states(shape, setup).values()) / GIB == pytest.approx(gib, rel=0.01)


# ---------------------------------------------------------------- what is counted


@pytest.mark.parametrize(
    ("family", "lora", "numbers"),
    [
        ("llama", 0, 10250),
        ("llama", 8, 9282),
        ("phi3", 0, 11530),
        ("phi3", 8, 10538),
        ("qwen2", 0, 10250),
        ("qwen2", 8, 9282),
        ("qwen3", 0, 11798),
        ("qwen3", 8, 10062),
    ],
)
def test_a_layer_keeps_what_autograd_was_seen_to_save(family: str, lora: int, numbers: int) -> None:
    """Numbers for each token, counted with saved_tensors_hooks over transformers' own modules: hidden 512,
    wide 1408, eight heads of 64 over four of keys and values."""
    shape = architecture(family=family, key_value_heads=4, qk_norm=family == "qwen3")
    found = token_bytes(shape, Setup(apply_lora=lora > 0, lora_r=lora or 8)) / 4
    assert found == pytest.approx(numbers, rel=0.003)


@pytest.mark.parametrize(("lora", "seen"), [(8, 24_728), (0, 27_688)])
def test_in_16_bits_a_layer_keeps_what_autocast_was_seen_to_save(lora: int, seen: int) -> None:
    """Bytes for each token without the 16-bit copies of weights."""
    shape = architecture(key_value_heads=4)
    setup = Setup(apply_lora=lora > 0, lora_r=lora or 8, is_bf16=True)
    assert token_bytes(shape, setup) == pytest.approx(seen, rel=0.003)


def test_lora_counts_the_layers_that_it_is_put_on() -> None:
    shape = architecture()
    all_linear = lora_parameters(shape, Setup(apply_lora=True, lora_r=4))
    assert all_linear == 8 * 4 * (4 * (512 + 512) + 3 * (512 + 1408))
    two = Setup(apply_lora=True, lora_r=4, lora_targets=("q_proj", "v_proj"))
    assert lora_parameters(shape, two) == 8 * 4 * 2 * (512 + 512)
    pattern = Setup(apply_lora=True, lora_r=4, lora_targets=("some_pattern",))
    assert lora_parameters(shape, pattern) == all_linear


def test_grouped_query_attention_and_tied_embeddings_take_less() -> None:
    setup, lengths = Setup(), Rows(longest=1024, learned_share=0.5)
    plain = total(architecture(), setup, lengths, "cpu")
    assert total(architecture(key_value_heads=2), setup, lengths, "cpu") < plain
    assert total(architecture(tied_embeddings=True), setup, lengths, "cpu") < plain


def test_precision_16_and_lora_and_adafactor_take_less_where_they_should() -> None:
    shape, lengths = architecture(hidden_size=2048, attention_heads=32, key_value_heads=32), Rows(longest=512)
    full = Setup()
    lora = Setup(apply_lora=True)
    assert total(shape, lora, lengths, "cuda") < 0.5 * total(shape, full, lengths, "cuda")
    assert total(shape, lora.model_copy(update={"is_bf16": True}), lengths, "cuda") < total(
        shape, lora, lengths, "cuda"
    )
    adafactor = full.model_copy(update={"optimizer": "adafactor"})
    assert total(shape, adafactor, lengths, "cuda") < total(shape, full, lengths, "cuda")


def test_packing_several_rows_keeps_a_mask_that_grows_with_the_square() -> None:
    shape = architecture(key_value_heads=2)
    one = Setup(apply_lora=True, batch_size=1)
    two = Setup(apply_lora=True, batch_size=2)
    alone = kept_bytes(shape, one, Rows(longest=2048))
    packed = kept_bytes(shape, two, Rows(longest=1024))
    assert packed - alone == pytest.approx(8 * (4 * 2048**2 + 4 * 2 * (512 - 128) * 2048), rel=1e-6)


def test_a_batch_larger_than_the_longest_rows_together_is_not_counted() -> None:
    lengths = Rows(longest=1000, longest_batch=1500)
    assert (lengths.micro_batch(1), lengths.micro_batch(8)) == (1000, 1500)


@pytest.mark.parametrize("lora", [True, False])
def test_the_first_fitting_case_is_met(lora: bool) -> None:
    """Peaks of the real step, `benchmarks/plan_accuracy.py`."""
    seen = {True: 895_000_000, False: 1_516_000_000}[lora]
    lengths = Rows(longest=128, learned_share=0.6)
    setup = Setup(apply_lora=lora, evaluates=False)
    assert total(architecture(), setup, lengths, "cpu") == pytest.approx(seen, rel=0.1)
