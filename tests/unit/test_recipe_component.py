"""The component's 69 inputs, walked against the models: none is forgotten, none has another default."""

from __future__ import annotations

import pytest

from tuneloop.core.recipe import INPUTS, FinetuneParameters, PreprocessParameters
from tuneloop.core.recipe.written import Recipe, all_keys

# Of chat_completion_pipeline 0.0.82, as its spec.yaml has them (typed: "true" is True, 16 is "16").
DEFAULTS = {
    "batch_size": 1000,
    "pad_to_max_length": False,
    "max_seq_length": -1,
    "num_nodes_finetune": 1,
    "number_of_gpu_to_use_finetuning": 1,
    "trust_remote_code": False,
    "apply_lora": False,
    "merge_lora_weights": True,
    "lora_alpha": 128,
    "lora_r": 8,
    "lora_dropout": 0.0,
    "num_train_epochs": 1,
    "max_steps": -1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "auto_find_batch_size": False,
    "optim": "adamw_torch",
    "learning_rate": 2e-05,
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "gradient_accumulation_steps": 1,
    "eval_accumulation_steps": -1,
    "lr_scheduler_type": "linear",
    "precision": "32",
    "seed": 42,
    "enable_full_determinism": False,
    "dataloader_num_workers": 0,
    "ignore_mismatched_sizes": False,
    "max_grad_norm": 1.0,
    "evaluation_strategy": "epoch",
    "evaluation_steps_interval": 0.0,
    "eval_steps": 500,
    "logging_strategy": "steps",
    "logging_steps": 10,
    "metric_for_best_model": "loss",
    "resume_from_checkpoint": False,
    "save_total_limit": -1,
    "apply_early_stopping": False,
    "early_stopping_patience": 1,
    "early_stopping_threshold": 0.0,
    "apply_deepspeed": False,
    "deepspeed": None,
    "deepspeed_stage": "2",
    "apply_ort": False,
}


def test_there_are_69_inputs() -> None:
    assert len(INPUTS) == 69


@pytest.mark.parametrize("name", sorted(INPUTS))
def test_an_input_has_a_place_in_the_recipe_or_a_reason(name: str) -> None:
    known = INPUTS[name]
    assert (known.place is None) != (known.reason is None)
    if known.place is not None:
        assert known.place in all_keys()


@pytest.mark.parametrize("name", sorted(DEFAULTS))
def test_a_default_is_the_components(name: str) -> None:
    place = INPUTS[name].place
    assert place is not None
    section, _, key = place.partition(".")
    parameters = getattr(Recipe.model_validate({"model": "m", "data": {"train": "t"}}), section)
    assert getattr(parameters, key) == DEFAULTS[name]
    assert type(getattr(parameters, key)) is type(DEFAULTS[name])


def test_finetune_holds_the_components_43_inputs_and_three_of_ours() -> None:
    ours = set(FinetuneParameters.model_fields) - set(INPUTS)
    assert ours == {"learning_rate_min", "learning_rate_max", "lora_target_modules"}
    assert len(FinetuneParameters.model_fields) == 41 + 2 + 3


def test_preprocess_holds_the_components_three_and_ours() -> None:
    component = {"batch_size", "pad_to_max_length", "max_seq_length"}
    ours = {"long_rows", "messages_column", "bad_rows", "split", "split_seed"}
    assert set(PreprocessParameters.model_fields) == component | ours
    assert all(PreprocessParameters.model_fields[name].description.startswith("Tuneloop: ") for name in ours)
