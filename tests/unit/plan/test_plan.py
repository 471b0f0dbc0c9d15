"""Changes that fit, verdicts, time, disk, and recommendations."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.plan.shapes import architecture, architectures, machine, rows, setups
from tuneloop.core import sizes
from tuneloop.core.errors import Unsupported
from tuneloop.core.plan import (
    Place,
    Plan,
    Rate,
    Rows,
    Setup,
    constants,
    pack_of,
    peak,
    place_of_size,
    plan,
    recommend,
    rows_by_characters,
    setup_at,
    smallest_changes,
)
from tuneloop.core.plan.cost import time
from tuneloop.core.plan.setup import PACK_TOKENS
from tuneloop.core.recipe import FinetuneParameters
from tuneloop.core.types import Architecture, Card
from tuneloop.workspace.catalog import CARDS

GB = 10**9


def card(name: str = "SmolLM2-135M-Instruct") -> Card:
    return Card.model_validate(yaml.safe_load((CARDS / f"{name}.yaml").read_text("utf-8")))


def finetune(**changes: Any) -> dict[str, Any]:
    return FinetuneParameters.model_validate(changes).model_dump()


LENGTHS = Rows(longest=1024, count=1000, tokens=400_000, learned_share=0.5, known_by="tokens")


# ---------------------------------------------------------------- changes


@settings(max_examples=60, deadline=None)
@given(architectures(), setups(), rows(), st.sampled_from(["cpu", "cuda"]), st.floats(0.3, 0.99))
def test_every_change_that_is_offered_really_fits(
    shape: Architecture, setup: Setup, lengths: Rows, device: Any, share: float
) -> None:
    whole = peak(shape, setup, lengths, device=device)
    setup = setup.model_copy(update={"offload": "none"})
    place = machine(
        round(share * whole.device.total_bytes), device=device, host_memory_bytes=10**15, has_fast_bf16=True
    )
    for change in smallest_changes(shape, setup, lengths, place):
        assert change.total_bytes <= place.device_memory_bytes
        assert change.what


def test_a_change_applied_as_it_is_written_gives_the_peak_that_was_promised() -> None:
    model = card()
    parameters = finetune(
        per_device_train_batch_size=16, apply_lora=True, pack_tokens=4096, activation_checkpointing="never"
    )
    here = machine(6 * GB)
    found = plan(model, parameters, LENGTHS, here)
    assert found.verdict == "does not fit"
    assert found.changes
    for change in found.changes:
        if not change.is_supported:
            continue
        own = {key.partition(".")[2]: value for key, value in change.settings.items() if "finetune" in key}
        length = change.settings.get("preprocess.max_seq_length")
        cut = LENGTHS if length is None else LENGTHS.cut_to(length)  # type: ignore[arg-type]
        again = plan(model, finetune(**{**parameters, **own}), cut, here)
        assert again.is_fit, change.what
        assert again.peak.device.total_bytes == change.total_bytes


def test_what_a_recipe_has_fixed_is_what_may_change() -> None:
    parameters = finetune(
        per_device_train_batch_size=16, apply_lora=True, pack_tokens=8192, activation_checkpointing="never"
    )
    found = plan(card(), parameters, LENGTHS, machine(8 * GB))
    settings = [change.settings for change in found.changes if change.is_supported]
    assert {"finetune.activation_checkpointing": "always"} in settings
    packs = next(each["finetune.pack_tokens"] for each in settings if "finetune.pack_tokens" in each)
    assert 1024 <= packs < 8192  # type: ignore[operator]
    assert not any("batch" in key for each in settings for key in each)


def test_several_devices_may_shard_where_the_recipe_does_not() -> None:
    parameters = finetune(number_of_gpu_to_use_finetuning=8, strategy="ddp", activation_checkpointing="never")
    place = machine(40 * GB, device="cuda", gpus=8, host_memory_bytes=10**15)
    phi = card("Phi-3-mini-4k-instruct")
    found = plan(phi, parameters, LENGTHS, place)
    assert found.verdict == "does not fit"
    ways = {change.what: change.is_supported for change in found.changes}
    assert any(what.startswith("strategy fsdp") and done for what, done in ways.items())
    assert ways["ZeRO-2"]


def test_a_base_in_four_bits_is_offered_on_a_gpu_alone() -> None:
    phi, parameters = card("Phi-3-mini-4k-instruct"), finetune(apply_lora=True)
    gpu = machine(10 * GB, device="cuda", gpus=1, host_memory_bytes=10**15, has_fast_bf16=True)
    offered = {key for each in plan(phi, parameters, LENGTHS, gpu).changes for key in each.settings}
    assert "finetune.quantization" in offered
    here = plan(phi, parameters, LENGTHS, machine(10 * GB)).changes
    assert "finetune.quantization" not in {key for each in here for key in each.settings}


def test_where_no_single_change_suffices_several_together_are_offered() -> None:
    parameters = finetune(per_device_train_batch_size=16, pack_tokens=8192, activation_checkpointing="never")
    found = plan(card(), parameters, Rows(longest=4096), machine(3 * GB))
    best = found.changes[0]
    assert best.is_supported
    assert len(best.settings) >= 3
    assert best.total_bytes <= 3 * GB


def test_what_fits_has_nothing_to_change() -> None:
    found = plan(card(), finetune(apply_lora=True), LENGTHS, machine(100 * GB))
    assert (found.verdict, found.reasons, found.changes, found.sizes) == ("fits", (), (), ())


def test_what_nearly_fills_the_memory_is_called_tight() -> None:
    parameters = finetune(activation_checkpointing="never", pack_tokens=1024)
    needed = plan(card(), parameters, LENGTHS, machine(100 * GB)).peak.device.total_bytes
    assert plan(card(), parameters, LENGTHS, machine(round(needed * 1.05))).verdict == "tight"
    assert plan(card(), parameters, LENGTHS, machine(needed - 1)).verdict == "does not fit"


def test_too_little_disk_is_a_reason_by_itself() -> None:
    found = plan(card(), finetune(), LENGTHS, machine(100 * GB, disk_bytes=GB))
    assert found.verdict == "does not fit"
    assert found.reasons == ("5.1 GB of disk would be needed, 1.0 GB are free",)


# ---------------------------------------------------------------- places


def test_phi_3_with_lora_fits_the_smallest_size_of_its_allow_list_and_not_a_v100() -> None:
    phi = card("Phi-3-mini-4k-instruct")
    parameters = finetune(apply_lora=True, precision="16", apply_deepspeed=True)
    lengths = Rows(longest=2048)
    a100 = plan(phi, parameters, lengths, place_of_size(sizes.get("nc24ads_a100_v4")))
    v100 = plan(phi, parameters, lengths, place_of_size(sizes.get("nc6s_v3")))
    assert a100.verdict == "fits"
    assert a100.setup.is_bf16
    assert "steps run on this machine" in a100.unsupported[0]
    assert v100.verdict == "does not fit"
    assert not v100.setup.is_bf16
    assert [each.place for each in v100.sizes] == ["Standard_NC24ads_A100_v4", "Standard_ND96asr_v4"]


def test_a_size_is_planned_with_the_devices_that_are_asked_for() -> None:
    place = place_of_size(sizes.get("nd96asr_v4"), nodes=4)
    parameters = finetune(
        number_of_gpu_to_use_finetuning=8, num_nodes_finetune=2, apply_deepspeed=True, deepspeed_stage="3"
    )
    found = setup_at(parameters, place)
    assert (found.devices, found.nodes, found.sharding, found.effective_batch) == (16, 2, "zero3", 16)
    told = plan(card("Phi-3-mini-4k-instruct"), parameters, LENGTHS, place)
    assert told.setup.devices == 16
    assert len(told.unsupported) == 1


def test_more_processes_than_a_size_has_gpus_are_refused_and_fewer_warned_of() -> None:
    place = place_of_size(sizes.get("nc48ads_a100_v4"))
    with pytest.raises(Unsupported, match="has 2 GPUs"):
        plan(card(), finetune(number_of_gpu_to_use_finetuning=4), LENGTHS, place)
    assert "idle" in plan(card(), finetune(), LENGTHS, place).warnings[0]


def test_a_size_outside_of_the_models_allow_list_is_warned_of() -> None:
    phi = card("Phi-3-mini-4k-instruct")
    place = place_of_size(sizes.get("nc64as_t4_v3"))
    told = plan(phi, finetune(number_of_gpu_to_use_finetuning=4), LENGTHS, place).warnings
    assert len(told) == 1
    assert "not in the model's finetune_compute_allow_list" in told[0]
    allowed = place_of_size(sizes.get("nc24ads_a100_v4"))
    assert plan(phi, finetune(), LENGTHS, allowed).warnings == ()


def test_devices_that_are_missing_leave_the_rows_of_a_step_as_they_were_asked_for() -> None:
    asked = finetune(number_of_gpu_to_use_finetuning=4, apply_deepspeed=True, per_device_train_batch_size=2)
    found = setup_at(asked, machine(GB))
    assert (found.devices, found.effective_batch, found.sharding) == (1, 8, "none")


def test_processes_are_counted_as_training_counts_them() -> None:
    """`training.plan.processes_of` and `strategy_of`, which core cannot import."""
    from tuneloop.training.plan import processes_of, strategy_of

    for gpus in (0, 2, 8):
        for asked, nodes, cpus in ((1, 1, 1), (4, 2, 2), (8, 1, 4)):
            for changes in ({}, {"strategy": "fsdp"}, {"apply_deepspeed": True, "deepspeed_stage": "3"}):
                values = finetune(
                    number_of_gpu_to_use_finetuning=asked,
                    num_nodes_finetune=nodes,
                    cpu_processes=cpus,
                    **changes,
                )
                place = machine(GB, gpus=gpus, device="cuda" if gpus else "cpu", nodes=2)
                found = setup_at(values, place)
                parameters = FinetuneParameters.model_validate(values)
                assert found.devices == processes_of(parameters, gpus, 2)
                named = {"none": "ddp" if found.devices > 1 else "plain"}.get(found.sharding, found.sharding)
                assert named == strategy_of(parameters, found.devices)


def test_precision_16_runs_as_32_where_16_is_slow() -> None:
    assert not setup_at(finetune(precision="16"), machine(GB)).is_bf16
    assert setup_at(finetune(precision="16"), machine(GB, has_fast_bf16=True)).is_bf16


# ---------------------------------------------------------------- rows, time, disk


def test_a_step_has_no_more_rows_than_there_are_and_no_more_tokens_than_the_longest_of_them() -> None:
    assert Rows(longest=100, count=3).step(8) == 300
    assert Rows(longest=100).step(8) == 800
    assert Rows(longest=1000, longest_step=1500).step(8) == 1500
    assert Rows(longest=1000, longest_step=1500).step(1) == 1000


def test_rows_that_are_tokenised_are_counted_exactly() -> None:
    found = Rows.counted([10, 400, 30, 60], 250, effective_batch=2, validation_lengths=[5, 7])
    assert (found.longest, found.longest_step, found.count, found.tokens) == (400, 460, 4, 500)
    assert (found.learned_share, found.validation_tokens, found.longest_evaluated) == (0.625, 12, 7)


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({}, 1024),
        ({"effective_batch": 2}, 600),
        ({"pack_tokens": 2000}, 2000),
        ({"pack_tokens": 64}, 300),
        ({"is_packed": False, "pack_tokens": 2000}, 300),
        ({"devices": 16}, 600),
    ],
)
def test_a_pack_is_what_training_computes_at_a_time(changes: dict[str, Any], tokens: int) -> None:
    setup = Setup.model_validate({"effective_batch": 16, **changes})
    assert pack_of(setup, Rows(longest=300), "cpu") == tokens


def test_constants_that_are_set_elsewhere_are_those() -> None:
    from tuneloop.training import head, loop

    assert dict(PACK_TOKENS) == loop.PACK_TOKENS
    assert dict(constants.LOGITS_CHUNK_BYTES) == head.CHUNK_BYTES


def test_rows_cut_to_a_length_are_no_longer_than_it() -> None:
    cut = LENGTHS.model_copy(update={"longest_evaluated": 900}).cut_to(300)
    assert (cut.longest, cut.longest_evaluated) == (300, 300)
    assert cut.tokens is not None
    assert cut.tokens <= 300 * 1000
    assert LENGTHS.cut_to(5000) is LENGTHS


def test_lengths_are_guessed_from_characters_within_the_limit() -> None:
    facts = {
        "most_messages": 2,
        "characters": 100_000,
        "learned_characters": 60_000,
        "messages": 200,
        "count": 100,
    }
    found = rows_by_characters(most_characters=32_000, limit=4096, **facts)
    assert (found.longest, found.known_by) == (4096, "characters")
    assert rows_by_characters(most_characters=320, limit=4096, **facts).longest == 100 + 8 * 3


def test_time_is_steps_and_tokens_over_the_rate() -> None:
    lengths = Rows(longest=100, count=10, tokens=1000, validation_tokens=300)
    rate = Rate(tokens_per_second=50.0, how="measured")
    found = time(Setup(effective_batch=4, epochs=3), lengths, rate)
    assert (found.steps_per_epoch, found.steps) == (3, 9)
    assert found.seconds_per_epoch == pytest.approx(20 + 2)
    assert found.seconds == pytest.approx(60 + 3 * 2)
    stopped = time(Setup(effective_batch=4, max_steps=3, evaluates=False), lengths, rate)
    assert stopped.seconds == pytest.approx(20)
    again = time(Setup(effective_batch=10, checkpointing="always", evaluates=False), lengths, rate)
    assert again.seconds == pytest.approx(20 * 4 / 3)


def test_without_a_rate_or_data_the_time_is_said_to_be_unknown() -> None:
    assert time(Setup(), Rows(longest=9), Rate(tokens_per_second=1, how="x")).seconds is None
    assert "no data" in time(Setup(), Rows(longest=9), None).how
    assert "not measured" in time(Setup(), LENGTHS, None).how


def test_disk_counts_checkpoints_that_are_kept() -> None:
    many = plan(card(), finetune(num_train_epochs=5), LENGTHS, machine(100 * GB)).disk
    few = plan(card(), finetune(num_train_epochs=5, save_total_limit=1), LENGTHS, machine(100 * GB)).disk
    assert many.parts["checkpoints"] == 5 * 12 * card().architecture.parameters
    assert few.parts["checkpoints"] == 2 * 12 * card().architecture.parameters
    assert sum(many.parts.values()) == many.total_bytes


# ---------------------------------------------------------------- recommendations


def test_three_ways_are_recommended_and_each_fits_with_room_to_spare() -> None:
    parameters = finetune(per_device_train_batch_size=8)
    found = recommend(card(), parameters, LENGTHS, machine(8 * GB))
    assert len(found) == 3
    assert [each.settings.get("finetune.apply_lora") for each in found[:2]] == [False, True]
    assert all(each.total_bytes <= 0.9 * each.limit_bytes for each in found)
    for each in found[:2]:
        own = {key.removeprefix("finetune."): value for key, value in each.settings.items()}
        again = plan(card(), finetune(**{**parameters, **own}), LENGTHS, machine(8 * GB))
        assert again.peak.device.total_bytes == each.total_bytes


def test_where_nothing_fits_here_sizes_are_recommended() -> None:
    found = recommend(card("Phi-3-mini-4k-instruct"), finetune(), LENGTHS, machine(2 * GB))
    assert [each.place for each in found] == ["Standard_NC24ads_A100_v4"]
    assert not found[0].is_supported


def test_a_plan_is_json_and_back() -> None:
    found = plan(card(), finetune(), LENGTHS, Place(name="l", device_memory_bytes=GB, host_memory_bytes=GB))
    assert Plan.model_validate_json(found.model_dump_json()) == found


def test_a_shape_that_is_wide_leaves_fewer_holes_than_one_of_many_small_blocks() -> None:
    """glibc gives blocks of 32 MiB and more back at once."""
    setup, lengths = Setup(apply_lora=True, evaluates=False), Rows(longest=2048)
    small = peak(architecture(intermediate_size=4095), setup, lengths, device="cpu").device.causes
    large = peak(architecture(intermediate_size=4096), setup, lengths, device="cpu").device.causes
    assert large["slack"] < 0.6 * small["slack"]
