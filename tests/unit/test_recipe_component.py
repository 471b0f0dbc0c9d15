"""The component's 69 inputs, walked against the models: none is forgotten, renamed, of another type or
default."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from tuneloop.core.errors import RecipeError
from tuneloop.core.recipe import INPUTS, FinetuneParameters, PreprocessParameters, Recipe, parse
from tuneloop.core.recipe.component import ADVISED, NO_COMPUTE
from tuneloop.core.recipe.written import all_keys

HEAD = "model: m\ndata: {train: t.jsonl}\n"
ANY: tuple[str, ...] = ()
BOOLEAN = ("true", "false")
SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


class Spec(NamedTuple):
    """One input as `spec.yaml` has it; its booleans and some numbers are strings."""

    type: str
    default: object = None
    allowed: tuple[str, ...] = ANY
    minimum: int | None = None


def flag(default: str = "false") -> Spec:
    return Spec("string", default, BOOLEAN)


def count(default: int) -> Spec:
    return Spec("integer", default, minimum=1)


SPECS = {
    "instance_type_model_import": Spec("string", "Standard_d12_v2"),
    "instance_type_preprocess": Spec("string", "Standard_d12_v2"),
    "instance_type_finetune": Spec("string", "Standard_nc24rs_v3"),
    "instance_type_model_evaluation": Spec("string", "Standard_nc24rs_v3"),
    "shm_size_finetune": Spec("string", "5g"),
    "num_nodes_finetune": count(1),
    "number_of_gpu_to_use_finetuning": count(1),
    "huggingface_id": Spec("string"),
    "pytorch_model_path": Spec("custom_model"),
    "mlflow_model_path": Spec("mlflow_model"),
    "finetune_config_path": Spec("uri_file"),
    "trust_remote_code": flag(),
    "task_name": Spec("string", "ChatCompletion", ("ChatCompletion",)),
    "batch_size": count(1000),
    "pad_to_max_length": flag(),
    "max_seq_length": Spec("integer", -1),
    "train_file_path": Spec("uri_file"),
    "validation_file_path": Spec("uri_file"),
    "test_file_path": Spec("uri_file"),
    "train_mltable_path": Spec("mltable"),
    "validation_mltable_path": Spec("mltable"),
    "test_mltable_path": Spec("mltable"),
    "apply_lora": flag(),
    "merge_lora_weights": flag("true"),
    "lora_alpha": Spec("integer", 128),
    "lora_r": Spec("integer", 8),
    "lora_dropout": Spec("number", 0.0),
    "num_train_epochs": count(1),
    "max_steps": Spec("integer", -1),
    "per_device_train_batch_size": count(1),
    "per_device_eval_batch_size": count(1),
    "auto_find_batch_size": flag(),
    "optim": Spec("string", "adamw_torch", ("adamw_torch", "adafactor")),
    "learning_rate": Spec("number", 2e-05),
    "warmup_steps": Spec("integer", 0),
    "weight_decay": Spec("number", 0.0),
    "adam_beta1": Spec("number", 0.9),
    "adam_beta2": Spec("number", 0.999),
    "adam_epsilon": Spec("number", 1e-8),
    "gradient_accumulation_steps": Spec("integer", 1),
    "eval_accumulation_steps": Spec("integer", -1),
    "lr_scheduler_type": Spec("string", "linear", SCHEDULERS),
    "precision": Spec("string", "32", ("32", "16")),
    "seed": Spec("integer", 42),
    "enable_full_determinism": flag(),
    "dataloader_num_workers": Spec("integer", 0),
    "ignore_mismatched_sizes": flag(),
    "max_grad_norm": Spec("number", 1.0),
    "evaluation_strategy": Spec("string", "epoch", ("epoch", "steps", "disable")),
    "evaluation_steps_interval": Spec("number", 0.0),
    "eval_steps": Spec("integer", 500),
    "logging_strategy": Spec("string", "steps", ("epoch", "steps")),
    "logging_steps": Spec("integer", 10),
    "metric_for_best_model": Spec("string", "loss", ("loss", "f1", "exact")),
    "resume_from_checkpoint": flag(),
    "save_total_limit": Spec("integer", -1),
    "apply_early_stopping": flag(),
    "early_stopping_patience": Spec("integer", 1),
    "early_stopping_threshold": Spec("number", 0.0),
    "apply_deepspeed": flag(),
    "deepspeed": Spec("uri_file"),
    "deepspeed_stage": Spec("string", "2", ("2", "3")),
    "apply_ort": flag(),
    "evaluation_config": Spec("uri_file"),
    "evaluation_config_params": Spec("string"),
    "compute_model_import": Spec("string", "serverless"),
    "compute_preprocess": Spec("string", "serverless"),
    "compute_finetune": Spec("string", "serverless"),
    "compute_model_evaluation": Spec("string", "serverless"),
}
"""The inputs of chat_completion_pipeline 0.0.82, in their order (Azure/azureml-assets 4b41f8cc)."""

REFUSED = {
    "pytorch_model_path",
    "finetune_config_path",
    "train_mltable_path",
    "validation_mltable_path",
    "test_mltable_path",
    "evaluation_config",
    "evaluation_config_params",
}
WITHOUT_EFFECT = {
    "instance_type_model_import",
    "instance_type_preprocess",
    "instance_type_finetune",
    "instance_type_model_evaluation",
    "shm_size_finetune",
}
PARAMETERS = {
    name
    for name, known in INPUTS.items()
    if known.place and known.place.split(".")[0] not in ("data", "model")
}
PYTHON = {"integer": int, "number": float, "string": str}


def pasted(**inputs: Any) -> Recipe:
    """A recipe whose component section holds these, as a script passes them."""
    lines = "".join(f"  {name}: {_yaml(value)}\n" for name, value in inputs.items())
    head = "" if {"train_file_path", "mlflow_model_path"} <= set(inputs) else HEAD
    return parse(f"{head}component:\n{lines}")


def _yaml(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def at(recipe: Recipe, place: str) -> Any:
    found: Any = recipe
    for part in place.split("."):
        found = getattr(found, part)
    return found


def refused(**inputs: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        pasted(**inputs)
    return str(caught.value)


# ---------------------------------------------------------------- the table


def test_the_69_inputs_are_the_components_in_its_order() -> None:
    assert list(INPUTS) == list(SPECS)
    assert len(INPUTS) == 69


@pytest.mark.parametrize("name", sorted(INPUTS))
def test_an_input_has_a_place_in_the_recipe_or_a_reason(name: str) -> None:
    known = INPUTS[name]
    assert sum(one is not None for one in (known.place, known.reason, known.note, known.only)) == 1
    if known.place is not None:
        assert known.place in all_keys()


def test_as_few_as_possible_are_refused_or_without_effect() -> None:
    assert {name for name, known in INPUTS.items() if known.reason} == REFUSED
    assert {name for name, known in INPUTS.items() if known.note} == WITHOUT_EFFECT


@pytest.mark.parametrize("name", sorted(name for name in PARAMETERS if SPECS[name].default is not None))
def test_a_default_is_the_components(name: str) -> None:
    """Written as the component has it, a default changes nothing; and it is what holds without it."""
    place = INPUTS[name].place
    assert place is not None
    kept = at(parse(HEAD), place)
    if SPECS[name].default == NO_COMPUTE:
        assert kept == "local"
    assert at(pasted(**{name: SPECS[name].default}), place) == kept
    if SPECS[name].default not in ("true", "false", NO_COMPUTE):
        assert kept == SPECS[name].default


@pytest.mark.parametrize("name", sorted(name for name in PARAMETERS if SPECS[name].default is not None))
def test_a_type_is_the_components(name: str) -> None:
    place, spec = INPUTS[name].place, SPECS[name]
    kept = at(parse(HEAD), place or "")
    assert type(kept) is (bool if spec.allowed == BOOLEAN else PYTHON[spec.type])


@pytest.mark.parametrize("name", sorted(name for name in PARAMETERS if SPECS[name].allowed))
def test_what_the_component_allows_is_allowed_and_nothing_else(name: str) -> None:
    place, spec = INPUTS[name].place, SPECS[name]
    assert place is not None
    for value in spec.allowed:
        kept = at(pasted(**{name: value}), place)
        assert (str(kept).lower() if isinstance(kept, bool) else kept) == value
    assert f"line 4: {place} is 'surely'" in refused(**{name: "surely", "seed": "no"})


@pytest.mark.parametrize("name", sorted(name for name in PARAMETERS if SPECS[name].minimum))
def test_a_minimum_is_the_components(name: str) -> None:
    assert at(pasted(**{name: 1}), INPUTS[name].place or "") == 1
    assert "must be 1 or more" in refused(**{name: 0})


@pytest.mark.parametrize(
    "name",
    sorted(name for name in PARAMETERS if SPECS[name].type in ("integer", "number") or name == "precision"),
)
def test_a_number_may_be_text_and_a_text_number(name: str) -> None:
    place = INPUTS[name].place
    assert place is not None
    value = {"precision": 16, "max_steps": 7, "save_total_limit": 7}.get(name, SPECS[name].default)
    assert value is not None
    assert at(pasted(**{name: str(value)}), place) == at(pasted(**{name: value}), place)


@pytest.mark.parametrize("name", sorted(name for name in PARAMETERS if SPECS[name].allowed == BOOLEAN))
@pytest.mark.parametrize("value", [True, False])
def test_a_flag_may_be_a_boolean_or_text(name: str, value: bool) -> None:
    place = INPUTS[name].place or ""
    assert at(pasted(**{name: value}), place) is at(pasted(**{name: str(value).lower()}), place) is value


def test_finetune_holds_the_components_43_inputs_and_ours() -> None:
    component = {name for name, known in INPUTS.items() if (known.place or "").startswith("finetune.")}
    ours = set(FinetuneParameters.model_fields) - component
    assert len(component) == 43
    fields = FinetuneParameters.model_fields
    assert ours - set(ADVISED) == {
        name for name, field in fields.items() if (field.description or "").startswith("Tuneloop: ")
    }


def test_preprocess_holds_the_components_three_and_ours() -> None:
    component = {"batch_size", "pad_to_max_length", "max_seq_length"}
    ours = {"long_rows", "messages_column", "bad_rows", "split", "split_seed"}
    assert set(PreprocessParameters.model_fields) == component | ours
    assert all(PreprocessParameters.model_fields[name].description.startswith("Tuneloop: ") for name in ours)


# ---------------------------------------------------------------- a script's call, pasted


def test_a_scripts_call_is_a_recipe() -> None:
    """The parameters of the Azure document, with the model's defaults spread over them."""
    recipe = pasted(
        mlflow_model_path="azureml://registries/azureml/models/Phi-3-mini-4k-instruct/versions/15",
        train_file_path="train_sft.jsonl",
        test_file_path="test_sft.jsonl",
        compute_model_import="cluster",
        compute_finetune="serverless",
        instance_type_finetune="Standard_NC24ads_A100_v4",
        number_of_gpu_to_use_finetuning=1,
        task_name="ChatCompletion",
        apply_lora="true",
        apply_deepspeed=True,
        deepspeed_stage=2,
        precision=16,
        learning_rate=5e-06,
        learning_rate_min=5e-07,
        learning_rate_max="5e-05",
        validation_file_path=None,
    )
    assert recipe.model.endswith("/versions/15")
    assert recipe.data.files() == {"train": "train_sft.jsonl", "test": "test_sft.jsonl"}
    assert (recipe.compute.model_import, recipe.compute.finetune) == ("cluster", "local")
    finetune = recipe.finetune
    assert (finetune.apply_lora, finetune.precision, finetune.deepspeed_stage) == (True, "16", "2")
    assert (finetune.learning_rate_min, finetune.learning_rate_max) == (5e-07, 5e-05)
    told = " ".join(recipe.notes)
    assert "component.compute_finetune is 'serverless': the step runs on compute.finetune" in told
    assert "tuneloop plan RECIPE --size Standard_NC24ads_A100_v4" in told


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_has_no_place_is_refused_with_its_reason_and_line(name: str) -> None:
    assert f"line 4: component.{name} {INPUTS[name].reason}" in refused(**{name: "x", "seed": "no"})


@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT))
def test_what_only_matters_in_a_cloud_is_accepted_and_told(name: str) -> None:
    recipe = pasted(**{name: SPECS[name].default})
    (note,) = recipe.notes
    assert note.startswith(f"component.{name} {INPUTS[name].note}")


def test_the_task_is_the_one_that_there_is() -> None:
    assert pasted(task_name="ChatCompletion").model_dump() == parse(HEAD).model_dump()
    assert "component.task_name is 'Summarization', must be 'ChatCompletion'." in refused(
        task_name="Summarization"
    )


def test_a_pasted_value_may_not_be_written_a_second_time() -> None:
    text = HEAD + "finetune:\n  seed: 1\ncomponent:\n  seed: 2\n"
    with pytest.raises(RecipeError, match=r"line 6: component.seed is written twice: .*, in line 4"):
        parse(text)
    with pytest.raises(RecipeError, match="compute says it for every stage"):
        parse(HEAD + "compute: gpu\ncomponent: {compute_finetune: other}\n")


def test_a_name_that_is_no_input_is_answered_with_the_nearest() -> None:
    assert "is not an input of the component. Did you mean 'learning_rate'?" in refused(learning_rat=1)


def test_the_source_of_a_model_that_loses_is_told() -> None:
    recipe = parse("data: {train: t}\ncomponent: {huggingface_id: a/b, mlflow_model_path: c}\n")
    assert recipe.model == "c"
    assert recipe.notes == (
        "component.huggingface_id has no effect: mlflow_model_path goes before it, as in the component.",
    )


@pytest.mark.parametrize("written", ["", "  ", "{}"])
def test_an_empty_section_is_nothing(written: str) -> None:
    assert parse(f"{HEAD}component: {written}\n").model_dump() == parse(HEAD).model_dump()


def test_a_section_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(RecipeError, match="line 3: component expected a mapping"):
        parse(f"{HEAD}component: [1]\n")


def test_set_goes_over_what_is_pasted() -> None:
    recipe = parse(HEAD + "component: {seed: 1}\n", overrides={"finetune.seed": "2"})
    assert recipe.finetune.seed == 2


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("seed", "'x'", "line 4: finetune.seed is 'x'"),
        ("deepspeed_stage", "4", "line 4: finetune.deepspeed_stage is '4', must be '2' or '3'"),
        ("max_seq_length", "0", "line 4: preprocess.max_seq_length is 0"),
        ("compute_finetune", "'a b'", "line 4: compute.finetune is 'a b'"),
    ],
)
def test_a_wrong_value_is_told_with_the_line_where_it_was_pasted(name: str, value: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(f"{HEAD}component:\n  {name}: {value}\n")
    assert said in str(caught.value)


def test_all_mistakes_of_a_pasted_call_are_said_at_once_with_those_beside_it() -> None:
    text = HEAD + "finetune: {lora_rr: 1}\ncomponent:\n  sed: 1\n  train_mltable_path: x\n  lora_r: no\n"
    with pytest.raises(RecipeError) as caught:
        parse(text)
    details: Any = caught.value.details
    assert [(item["line"], item["field"]) for item in details] == [
        (3, "finetune.lora_rr"),
        (5, "component.sed"),
        (6, "component.train_mltable_path"),
        (7, "finetune.lora_r"),
    ]


@pytest.mark.parametrize("section", ["finetune: [1]", "finetune: text", "data: 5"])
def test_a_section_that_is_no_mapping_is_told_once_and_as_such(section: str) -> None:
    name = section.partition(":")[0]
    head = "model: m\n" if name == "data" else HEAD
    with pytest.raises(RecipeError) as caught:
        parse(f"{head}{section}\ncomponent: {{seed: 1, validation_file_path: v}}\n")
    details: Any = caught.value.details
    assert [item["field"] for item in details] == [name]
    assert "written twice" not in str(caught.value)


def test_what_a_pasted_call_leaves_out_is_missing() -> None:
    with pytest.raises(RecipeError) as caught:
        parse("component: {seed: 1, mlflow_model_path: null, train_file_path: null}\n")
    details: Any = caught.value.details
    assert {item["field"] for item in details} == {"model", "data"}


def test_set_names_the_place_of_an_input_of_the_component() -> None:
    with pytest.raises(
        RecipeError, match=r"--set component\.seed is not a key .* Write it as finetune\.seed\."
    ):
        parse(HEAD, overrides={"component.seed": "1"})
