"""What is refused, what is accepted with a warning, and how the effective batch is kept."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from tuneloop.core.errors import Unsupported
from tuneloop.core.recipe import FinetuneParameters
from tuneloop.core.support import cautions, refusals
from tuneloop.training.plan import Machine, plan

LAPTOP = Machine("cpu", 0, has_fast_bf16=False)
SERVER = Machine("cuda", 8, has_fast_bf16=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("apply_ort", True),
        ("apply_ort", "true"),
        ("deepspeed", "ds.json"),
        ("metric_for_best_model", "f1"),
        ("metric_for_best_model", "exact"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_by_name(name: str, value: Any) -> None:
    (sentence,) = refusals({name: value})
    assert sentence.startswith(f"{name} is ")


def test_early_stopping_without_evaluation_is_refused() -> None:
    assert refusals({"apply_early_stopping": "true"}) == []
    (sentence,) = refusals({"apply_early_stopping": "true", "evaluation_strategy": "disable"})
    assert "evaluation_strategy" in sentence


def test_all_refusals_come_at_once() -> None:
    parameters = FinetuneParameters(apply_ort=True, deepspeed="x.json", metric_for_best_model="f1")
    with pytest.raises(Unsupported) as caught:
        plan(parameters, LAPTOP)
    assert len(caught.value.details) == 3
    assert all(name in str(caught.value) for name in ("apply_ort", "deepspeed", "metric_for_best_model"))


def test_the_defaults_of_the_component_are_neither_refused_nor_warned_of() -> None:
    values = FinetuneParameters().model_dump()
    assert (refusals(values), cautions(values)) == ([], [])
    assert plan(FinetuneParameters(), LAPTOP).warnings == ()


@pytest.mark.parametrize(
    ("name", "value", "also"),
    [
        ("apply_deepspeed", True, {}),
        ("eval_accumulation_steps", 2, {}),
        ("merge_lora_weights", False, {"apply_lora": True}),
        ("optim", "adafactor", {}),
        ("max_steps", 5, {}),
    ],
)
def test_what_does_less_than_its_name_says_is_warned_of_by_name(name: str, value: Any, also: dict) -> None:
    (sentence,) = cautions({name: value, **also})
    assert sentence.startswith(f"{name} is ")


@pytest.mark.parametrize("machine", [LAPTOP, SERVER])
def test_the_effective_batch_is_kept_with_fewer_devices_than_asked(machine: Machine) -> None:
    parameters = FinetuneParameters(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        number_of_gpu_to_use_finetuning=4,
        num_nodes_finetune=2,
    )
    chosen = plan(parameters, machine)
    assert (chosen.effective_batch, chosen.processes_asked) == (48, 8)
    assert chosen.processes == (1 if machine is LAPTOP else 4)
    (warning,) = chosen.warnings
    assert "2 x 3 x 8 = 48 conversations" in warning


def test_fewer_devices_than_asked_are_refused_where_that_is_asked_for() -> None:
    parameters = FinetuneParameters(number_of_gpu_to_use_finetuning=2, fewer_devices="refuse")
    with pytest.raises(Unsupported, match="2 processes were asked for, and 1 can run here"):
        plan(parameters, LAPTOP)
    assert plan(parameters, SERVER).processes == 2


@pytest.mark.parametrize(
    ("changes", "strategy"),
    [
        ({}, "ddp"),
        ({"strategy": "fsdp"}, "fsdp"),
        ({"apply_deepspeed": True}, "zero2"),
        ({"apply_deepspeed": "true", "deepspeed_stage": 3}, "zero3"),
    ],
)
def test_several_processes_share_the_work_as_it_was_asked(changes: dict[str, Any], strategy: str) -> None:
    asked = FinetuneParameters.model_validate({"number_of_gpu_to_use_finetuning": 2, **changes})
    assert plan(asked, SERVER).strategy == strategy
    assert plan(asked, LAPTOP).strategy == "plain"
    on_cpu = asked.model_copy(update={"cpu_processes": 2})
    assert (plan(on_cpu, LAPTOP).strategy, plan(on_cpu, LAPTOP).processes) == (strategy, 2)
    assert plan(asked.model_copy(update={"num_nodes_finetune": 3}), SERVER, nodes=2).processes == 4


def test_precision_16_runs_as_32_with_a_warning_where_bf16_is_slow() -> None:
    chosen = plan(FinetuneParameters(precision="16"), LAPTOP)
    assert chosen.base_dtype is torch.float32
    assert "precision is 16" in chosen.warnings[0]


def test_precision_16_is_bf16_where_it_is_fast() -> None:
    chosen = plan(FinetuneParameters(precision="16"), SERVER)
    assert (chosen.base_dtype, chosen.warnings) == (torch.bfloat16, ())
