"""Precedence, origins, warnings, and what is refused before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tuneloop.core.errors import RecipeError, UsageError
from tuneloop.core.recipe import Resolved, parse, resolve
from tuneloop.core.types import Card
from tuneloop.workspace.catalog import shipped_cards

PHI = next(card for card in shipped_cards() if card.name == "Phi-3-mini-4k-instruct")
PLAIN = PHI.model_copy(update={"name": "Plain", "defaults": {}})
HEAD = "model: Phi-3-mini-4k-instruct\ndata: {train: ultrachat_200k_dataset/train_sft.jsonl}\n"


def resolved(text: str = "", card: Card = PHI, overrides: Mapping[str, str] | None = None) -> Resolved:
    return resolve(parse(HEAD + text, path="my.yaml", overrides=overrides), card)


def refused(text: str, card: Card = PLAIN) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        resolved(text, card)
    return caught.value


def test_the_models_defaults_go_over_the_built_in_ones() -> None:
    found = resolved()
    assert (found.finetune.learning_rate, found.finetune.apply_lora, found.finetune.precision) == (
        5e-6,
        True,
        "16",
    )
    assert found.origins["finetune.learning_rate"] == "model"
    assert found.origins["finetune.lora_r"] == "built-in"


def test_what_is_written_goes_over_the_models_defaults() -> None:
    found = resolved(
        "finetune: {learning_rate: 1e-5, num_train_epochs: 1}\n", overrides={"finetune.seed": "1"}
    )
    assert found.finetune.learning_rate == 1e-5
    assert found.origins["finetune.learning_rate"] == "recipe"
    assert found.origins["finetune.num_train_epochs"] == "recipe"
    assert found.origins["finetune.seed"] == "--set"


def test_override_is_the_documents_order_and_names_each_value_it_replaces() -> None:
    found = resolved(
        "model_defaults: override\nfinetune: {num_train_epochs: 3, seed: 7, learning_rate: 5e-6}\n"
    )
    assert (found.finetune.num_train_epochs, found.finetune.seed) == (1, 7)
    assert found.origins["finetune.num_train_epochs"] == "model"
    assert found.warnings[0].startswith(
        "Warning! Model specific defaults exist. The defaults could be overridden."
    )
    assert "finetune.num_train_epochs: the model's 1 replaces 3, which was written." in found.warnings[0]
    assert "learning_rate" not in found.warnings[0]
    assert "seed" not in found.warnings[0]


def test_override_that_replaces_nothing_says_nothing() -> None:
    assert not any("Warning!" in text for text in resolved("model_defaults: override\n").warnings)


def test_a_default_of_the_model_reaches_preprocess() -> None:
    card = PLAIN.model_copy(update={"defaults": {"max_seq_length": 2048}})
    found = resolved(card=card)
    assert found.preprocess.max_seq_length == 2048
    assert found.origins["preprocess.max_seq_length"] == "model"


def test_every_value_in_force_has_an_origin() -> None:
    found = resolved()
    assert set(found.parameters) == set(found.origins)
    assert set(found.origins.values()) <= {"built-in", "model", "recipe", "--set"}


@pytest.mark.parametrize("rate", ["1e-3", "1e-8"])
def test_a_learning_rate_outside_of_the_models_range_is_warned_of(rate: str) -> None:
    warnings = " ".join(resolved(f"finetune: {{learning_rate: {rate}}}\n").warnings)
    assert "outside of what is advised for Phi-3-mini-4k-instruct: 5e-07 to 5e-05" in warnings


def test_a_learning_rate_inside_of_the_range_is_not() -> None:
    assert "advised" not in " ".join(resolved().warnings)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{lora_r: 4}", "finetune.lora_r has no effect: apply_lora is false."),
        ("{eval_steps: 4}", "finetune.eval_steps has no effect: evaluation_strategy is epoch."),
        ("{logging_strategy: epoch, logging_steps: 4}", "finetune.logging_steps has no effect"),
        ("{early_stopping_patience: 2}", "apply_early_stopping is false"),
        ("{deepspeed_stage: 3}", "apply_deepspeed is false"),
        ("{packing: false, pack_tokens: 9}", "finetune.pack_tokens has no effect: packing is false."),
        ("{checkpoint_steps: 2, checkpoint_seconds: 9}", "finetune.checkpoint_seconds has no effect"),
        ("{strategy: fsdp}", "finetune.strategy has no effect: one process is asked for."),
        ("{apply_deepspeed: true}", "finetune.apply_deepspeed is true: training runs plain"),
    ],
)
def test_what_is_written_without_effect_is_warned_of(text: str, said: str) -> None:
    assert said in " ".join(resolved(f"finetune: {text}\n", PLAIN).warnings)


def test_what_nobody_wrote_is_not_warned_of() -> None:
    assert resolved(card=PLAIN).warnings == ()


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (
            "finetune:\n  apply_early_stopping: true\n  evaluation_strategy: disable\n",
            "finetune.apply_early_stopping",
        ),
        ("finetune:\n  apply_ort: true\n", "finetune.apply_ort"),
        ("finetune:\n  deepspeed: ds.json\n", "finetune.deepspeed"),
        ("finetune:\n  lora_use_dora: true\n", "finetune.lora_use_dora"),
        ("finetune:\n  quantization: 4bit\n", "finetune.quantization"),
        ("model_import:\n  trust_remote_code: true\n", "model_import.trust_remote_code"),
        ("preprocess:\n  max_seq_length: 4097\n", "preprocess.max_seq_length"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_by_name_and_line(text: str, field: str) -> None:
    error = refused(text)
    details: Any = error.details
    assert [(item["line"], item["field"]) for item in details] == [(4, field)]


def test_code_runs_only_if_the_card_and_the_recipe_both_say_so() -> None:
    card = PLAIN.model_copy(update={"remote_code": True})
    allowed = "model_import: {trust_remote_code: true}\n"
    assert "runs on this machine with your rights" in " ".join(resolved(allowed, card).warnings)
    assert "does not say remote_code" in str(refused(allowed))
    assert "cannot be loaded without code out of its repository" in str(refused("", card))


def test_all_that_cannot_be_obeyed_is_said_at_once() -> None:
    error = refused(
        "finetune: {apply_ort: true, deepspeed: ds.json, learning_rate_min: 2, learning_rate_max: 1}\n"
    )
    assert len(error.details or []) == 3


def test_a_default_of_the_card_that_cannot_be_obeyed_is_blamed_on_the_card() -> None:
    card = PLAIN.model_copy(update={"defaults": {"apply_ort": "true"}})
    assert "It is a default of Plain" in str(refused("", card))


def test_a_damaged_default_of_a_card_is_named() -> None:
    card = PLAIN.model_copy(update={"defaults": {"learning_rat": 1, "precision": 4}})
    with pytest.raises(
        UsageError, match=r"Did you mean 'learning_rate'.*precision is '4', must be '32' or '16'"
    ):
        resolved(card=card)


def test_evaluate_left_out_has_no_parameters() -> None:
    found = resolved("evaluate: false\n")
    assert found.evaluate is None
    assert not any(key.startswith("evaluate.") for key in found.parameters)
