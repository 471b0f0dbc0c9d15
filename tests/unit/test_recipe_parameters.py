"""Values as components, tags, wires and people write them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tuneloop.core.recipe import EvaluateParameters, FinetuneParameters, PreprocessParameters
from tuneloop.core.recipe.lined import explain


def said(model: type[FinetuneParameters] | type[PreprocessParameters], **values: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(values)
    return " ".join(explain(item) for item in caught.value.errors())


@pytest.mark.parametrize("written", ["true", True, "True", " TRUE "])
def test_true_may_be_a_boolean_or_a_word(written: object) -> None:
    assert FinetuneParameters.model_validate({"apply_lora": written}).apply_lora is True


@pytest.mark.parametrize("written", ["yes", 1, 0, "", None, "on"])
def test_nothing_else_is_a_boolean(written: object) -> None:
    assert "expected true or false" in said(FinetuneParameters, apply_lora=written)


@pytest.mark.parametrize("written", [16, "16"])
def test_precision_may_be_a_number_or_text(written: object) -> None:
    assert FinetuneParameters.model_validate({"precision": written}).precision == "16"


@pytest.mark.parametrize("written", [4, "8", True, 16.5])
def test_precision_is_one_of_two(written: object) -> None:
    assert "must be '32' or '16'" in said(FinetuneParameters, precision=written)


def test_deepspeed_stage_is_normalised_to_text() -> None:
    assert FinetuneParameters.model_validate({"deepspeed_stage": 3}).deepspeed_stage == "3"


def test_numbers_may_come_as_text_from_a_wire() -> None:
    read = FinetuneParameters.model_validate({"learning_rate": "5e-06", "num_train_epochs": "3", "seed": 7.0})
    assert (read.learning_rate, read.num_train_epochs, read.seed) == (5e-06, 3, 7)


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("learning_rate", 0, "is 0, must be greater than 0."),
        ("learning_rate", -1e-4, "must be greater than 0."),
        ("num_train_epochs", 0, "must be 1 or more."),
        ("num_train_epochs", 1.5, "is 1.5, expected a whole number."),
        ("num_train_epochs", True, "is true, expected a whole number."),
        ("lora_dropout", 1, "must be less than 1."),
        ("evaluation_steps_interval", 1.1, "must be 1 or less."),
        ("save_total_limit", -2, "must be -1 or more."),
        ("seed", 2**32, "must be less than 4294967296."),
        ("learning_rate", "fast", "is 'fast', expected a number."),
        ("learning_rate", float("nan"), "expected a number."),
        ("learning_rate", None, "is empty, expected a number."),
        ("optim", "sgd", "must be 'adamw_torch' or 'adafactor'."),
        ("lora_target_modules", "q_proj", "expected a list."),
    ],
)
def test_a_limit_is_named_with_the_value_seen(name: str, value: object, limit: str) -> None:
    assert limit in said(FinetuneParameters, **{name: value})


@pytest.mark.parametrize("length", [0, -2])
def test_a_sequence_has_a_length_or_the_models(length: int) -> None:
    assert "1 or more, or -1" in said(PreprocessParameters, max_seq_length=length)


def test_parameters_are_frozen() -> None:
    with pytest.raises(ValidationError):
        EvaluateParameters().samples = 3  # type: ignore[misc]


@pytest.mark.parametrize("model", [FinetuneParameters, PreprocessParameters, EvaluateParameters])
def test_every_parameter_is_described(model: type[FinetuneParameters]) -> None:
    assert all(field.description for field in model.model_fields.values())
