"""What training chooses for itself: the fastest way that fits."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.plan.shapes import architecture, architectures, devices, rows, setups
from tuneloop.core.fit import finetune_memory_bytes
from tuneloop.core.plan import Choice, Rows, Setup, architecture_of, choose, peak
from tuneloop.core.recipe import FinetuneParameters
from tuneloop.core.types import Architecture, Card
from tuneloop.workspace.catalog import CARDS

SHORT = Rows(longest=200, count=1000)
MANY = Setup(apply_lora=True, effective_batch=64, evaluates=False)


def chosen(setup: Setup, available: int | None, lengths: Rows = SHORT, device: Any = "cpu") -> Choice:
    return choose(architecture(), setup, lengths, device=device, available_bytes=available)


def needed(setup: Setup, lengths: Rows = SHORT) -> int:
    return peak(architecture(), setup, lengths, device="cpu").device.total_bytes


@settings(deadline=None)
@given(architectures(), setups(), rows(), devices, st.floats(0.1, 1.2))
def test_what_is_planned_is_what_was_chosen_and_fits_when_it_says_so(
    shape: Architecture, setup: Setup, lengths: Rows, device: Any, share: float
) -> None:
    whole = peak(shape, setup, lengths, device=device).device.total_bytes
    found = choose(shape, setup, lengths, device=device, available_bytes=round(share * whole))
    again = peak(shape, found.setup, lengths, device=device).device.total_bytes
    assert found.planned_bytes == again
    assert found.is_fit == (again <= round(share * whole))
    assert (found.pack_tokens, found.is_checkpointed) == (
        found.setup.pack_tokens,
        found.setup.is_checkpointed,
    )
    # Chosen again, nothing moves: the claim's choice is the step's.
    settled = choose(shape, found.setup, lengths, device=device, available_bytes=round(share * whole))
    assert settled.planned_bytes == found.planned_bytes


@settings(deadline=None)
@given(architectures(), setups(), rows(), devices)
def test_what_a_recipe_says_is_obeyed_however_short_memory_is(
    shape: Architecture, setup: Setup, lengths: Rows, device: Any
) -> None:
    found = choose(shape, setup, lengths, device=device, available_bytes=1)
    assert not found.is_fit
    if setup.pack_tokens:
        assert found.pack_tokens == setup.pack_tokens
    if setup.checkpointing != "auto":
        assert found.is_checkpointed == (setup.checkpointing == "always")
    if not setup.may_shard:
        assert found.setup.sharding == setup.sharding


def test_with_room_everything_is_kept_and_packs_are_those_of_the_device() -> None:
    found = chosen(MANY, None)
    assert (found.pack_tokens, found.is_checkpointed, found.strategy) == (1024, False, "plain")
    assert chosen(MANY, None, device="cuda").pack_tokens == 8192
    long = chosen(MANY, None, Rows(longest=3000))
    assert long.pack_tokens == 3000


def test_packs_shrink_before_anything_is_computed_again() -> None:
    full = chosen(MANY, None).planned_bytes
    smaller = chosen(MANY, full - 1)
    assert (smaller.pack_tokens, smaller.is_checkpointed, smaller.is_fit) == (200, False, True)
    least = chosen(MANY, smaller.planned_bytes - 1)
    assert (least.pack_tokens, least.is_checkpointed, least.is_fit) == (200, True, True)
    assert not chosen(MANY, least.planned_bytes - 1).is_fit


def test_where_nothing_fits_the_least_is_taken_and_not_the_last_that_was_tried() -> None:
    """Two rows in one pack need no gradient of an earlier one beside them; packs of one row would."""
    setup = Setup(effective_batch=2, checkpointing="never", evaluates=False)
    found = chosen(setup, 1, Rows(longest=64))
    assert (found.pack_tokens, found.is_fit) == (1024, False)
    smaller = found.setup.model_copy(update={"pack_tokens": 64})
    assert found.planned_bytes < needed(smaller, Rows(longest=64))


def test_with_strategy_auto_processes_shard_before_anything_is_computed_again() -> None:
    full = Setup(effective_batch=64, devices=2, may_shard=True, evaluates=False)
    deep = architecture(layers=48)

    def within(setup: Setup, available: int | None) -> Choice:
        return choose(deep, setup, SHORT, device="cpu", available_bytes=available)

    whole = within(full, None)
    assert whole.strategy == "ddp"
    short = whole.setup.model_copy(update={"pack_tokens": 200})
    smaller = peak(deep, short, SHORT, device="cpu").device.total_bytes
    sharded = within(full, smaller - 1)
    assert (sharded.strategy, sharded.is_checkpointed, sharded.pack_tokens) == ("fsdp", False, 200)
    assert within(full.model_copy(update={"may_shard": False}), smaller - 1).strategy == "ddp"
    assert within(full, sharded.planned_bytes - 1).is_checkpointed


@pytest.mark.parametrize("changes", [{"optimizer": "adafactor"}, {"apply_lora": True, "is_4bit": True}])
def test_what_cannot_be_cut_is_not_sharded(changes: dict[str, Any]) -> None:
    setup = Setup.model_validate({"effective_batch": 64, "devices": 2, "may_shard": True, **changes})
    assert chosen(setup, 1).strategy == "ddp"


@pytest.mark.parametrize(("sharding", "strategy"), [("zero2", "zero2"), ("zero3", "zero3"), ("fsdp", "fsdp")])
def test_a_strategy_that_was_asked_for_is_named(sharding: Any, strategy: str) -> None:
    assert chosen(Setup(devices=2, sharding=sharding), None).strategy == strategy


def test_a_claim_is_what_the_step_will_choose_within_the_same_memory() -> None:
    card = Card.model_validate(yaml.safe_load((CARDS / "SmolLM2-135M-Instruct.yaml").read_text("utf-8")))
    parameters = FinetuneParameters(per_device_train_batch_size=16).model_dump()
    lengths = Rows(longest=700, count=100)
    whole = finetune_memory_bytes(card, parameters, lengths)
    claimed = finetune_memory_bytes(card, parameters, lengths, available_bytes=whole - 1)
    setup = Setup.of(parameters, has_fast_bf16=False)
    step = choose(card.architecture, setup, lengths, device="cpu", available_bytes=whole - 1)
    assert claimed == step.planned_bytes < whole


# ---------------------------------------------------------------- the shape of a model


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2", "qwen3", "gemma3_text", "mistral"])
def test_the_shape_is_read_off_a_config_with_the_parameters_that_transformers_counts(family: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 128,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config: Any = AutoConfig.for_model(family, **values)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    assert architecture_of(config.to_dict()).parameters == model.num_parameters()


def test_a_model_that_is_no_gated_decoder_has_no_shape() -> None:
    with pytest.raises(KeyError):
        architecture_of({"model_type": "t5", "d_model": 64})
