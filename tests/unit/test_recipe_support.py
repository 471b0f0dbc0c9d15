"""Parameters that cannot be obeyed together: each refusal says which, and its own way out is one."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from tuneloop.core.errors import RecipeError
from tuneloop.core.recipe import FinetuneParameters, parse, resolve
from tuneloop.core.support import cautions, refusals
from tuneloop.workspace.catalog import shipped_cards

CARD = shipped_cards()[0].model_copy(update={"defaults": {}})


class Case(NamedTuple):
    written: dict[str, Any]
    said: str
    """How the sentence begins; the rest of it names the ways out."""
    ways_out: tuple[dict[str, Any], ...]


FOUR_BITS = {"quantization": "4bit", "apply_lora": True, "number_of_gpu_to_use_finetuning": 2}
CASES = [
    Case(
        {"apply_early_stopping": True, "evaluation_strategy": "disable"},
        "apply_early_stopping is true while evaluation_strategy is 'disable': ",
        ({"evaluation_strategy": "epoch"}, {"evaluation_strategy": "steps"}),
    ),
    Case(
        {"auto_find_batch_size": True, "apply_deepspeed": True},
        "auto_find_batch_size is true while apply_deepspeed is true: ",
        ({"auto_find_batch_size": False}, {"apply_deepspeed": False}),
    ),
    Case(
        {"ignore_mismatched_sizes": True, "apply_lora": True},
        "ignore_mismatched_sizes is true while apply_lora is true: ",
        ({"ignore_mismatched_sizes": False}, {"apply_lora": False}),
    ),
    Case(
        {"strategy": "fsdp", "apply_deepspeed": True},
        "strategy is 'fsdp' while apply_deepspeed is true: ",
        ({"apply_deepspeed": False}, {"strategy": "auto"}),
    ),
    Case(
        {**FOUR_BITS, "strategy": "fsdp"},
        "quantization is '4bit' while strategy is 'fsdp': ",
        ({"strategy": "ddp"}, {"quantization": "none"}),
    ),
    Case(
        {**FOUR_BITS, "apply_deepspeed": True, "deepspeed_stage": 3},
        "quantization is '4bit' while deepspeed_stage is 3: ",
        ({"deepspeed_stage": 2}, {"quantization": "none"}),
    ),
    Case(
        {"lora_use_rslora": True},
        "lora_use_rslora is true while apply_lora is false: ",
        ({"apply_lora": True}, {"lora_use_rslora": False}),
    ),
    Case(
        {"lora_use_dora": True},
        "lora_use_dora is true while apply_lora is false: ",
        ({"apply_lora": True}, {"lora_use_dora": False}),
    ),
    Case(
        {"quantization": "4bit"},
        "quantization is '4bit' while apply_lora is false: ",
        ({"apply_lora": True}, {"quantization": "none"}),
    ),
]


def told(values: dict[str, Any]) -> list[str]:
    return refusals(FinetuneParameters.model_validate(values).model_dump())


def name_of(case: Case) -> str:
    return "-".join(case.said.removesuffix(": ").replace("'", "").split())


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_what_cannot_be_obeyed_together_is_refused_and_its_way_out_is_one(case: Case) -> None:
    (sentence,) = told(case.written)
    assert sentence.startswith(case.said)
    for way_out in case.ways_out:
        ((name, _),) = way_out.items()
        assert name in sentence
        assert told({**case.written, **way_out}) == []


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_refusal_stands_at_its_parameters_line_in_a_recipe(case: Case) -> None:
    """Text and numbers as a recipe and a step file have them: "true" and true are the same."""
    first = case.said.split(" ", 1)[0]
    others = {name: value for name, value in case.written.items() if name != first}
    lines = [
        f"  {name}: {str(value).lower()}\n" for name, value in [*others.items(), (first, case.written[first])]
    ]
    text = "model: m\ndata: {train: t}\nfinetune:\n" + "".join(lines)
    with pytest.raises(RecipeError) as caught:
        resolve(parse(text), CARD)
    details: Any = caught.value.details
    assert [(item["line"], item["field"]) for item in details] == [(3 + len(lines), f"finetune.{first}")]
    assert refusals({name: str(value).lower() for name, value in case.written.items()}) == told(case.written)


@pytest.mark.parametrize(
    "values",
    [
        {**FOUR_BITS, "strategy": "fsdp", "number_of_gpu_to_use_finetuning": 1},
        {**FOUR_BITS, "strategy": "ddp"},
        {**FOUR_BITS, "apply_deepspeed": True},
        {**FOUR_BITS, "apply_deepspeed": False, "deepspeed_stage": 3},
        {"apply_lora": True, "lora_use_rslora": True, "lora_use_dora": True},
        {"ignore_mismatched_sizes": True},
        {"auto_find_batch_size": True, "number_of_gpu_to_use_finetuning": 2},
    ],
)
def test_what_can_be_obeyed_together_is_not_refused(values: dict[str, Any]) -> None:
    assert told(values) == []


def test_several_nodes_are_several_processes_too() -> None:
    values = {**FOUR_BITS, "number_of_gpu_to_use_finetuning": 1, "num_nodes_finetune": 2, "strategy": "fsdp"}
    assert len(told(values)) == 1


def test_a_step_whose_stage_and_configuration_differ_is_refused() -> None:
    """A recipe never comes so far: the configuration decides there."""
    own = {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}}
    assert told({"apply_deepspeed": True, "deepspeed": own}) == [
        "deepspeed_stage is 2, and deepspeed says 3: write the same."
    ]
    assert told({"apply_deepspeed": True, "deepspeed": own, "deepspeed_stage": 3}) == []


def test_a_configuration_is_read_even_where_it_is_switched_off() -> None:
    (sentence,) = told({"deepspeed": {"zero_optimization": {"stage": 2, "overlap": True}}})
    assert sentence.startswith("deepspeed zero_optimization.overlap is not obeyed")


def test_zero_between_one_process_and_keys_that_print_are_warned_of() -> None:
    own = {"zero_optimization": {"stage": 2}, "steps_per_print": 5, "wall_clock_breakdown": False}
    values = FinetuneParameters(apply_deepspeed=True, deepspeed=own).model_dump()
    (alone,) = cautions(values)
    assert "deepspeed_stage and deepspeed have no effect" in alone
    (several,) = cautions(values, processes=2)
    assert several.startswith("deepspeed holds steps_per_print: nothing is printed for it")
    assert cautions(FinetuneParameters(apply_deepspeed=True).model_dump(), processes=2) == []
