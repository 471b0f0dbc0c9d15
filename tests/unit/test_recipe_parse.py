"""Recipes as people write them, well and badly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneloop.core.errors import RecipeError
from tuneloop.core.recipe import Recipe, parse

SMALL = "model: SmolLM2-135M-Instruct\ndata:\n  train: train.jsonl\n"


def refused(text: str, overrides: Mapping[str, str] | None = None) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        parse(text, path="my.yaml", overrides=overrides)
    return caught.value


def places(error: RecipeError) -> list[tuple[int | None, str | None]]:
    details: Any = error.details
    return [(mistake["line"], mistake["field"]) for mistake in details]


def test_a_small_recipe_needs_a_model_and_training_data() -> None:
    recipe = parse(SMALL)
    assert (recipe.model, recipe.data.train, recipe.experiment) == (
        "SmolLM2-135M-Instruct",
        "train.jsonl",
        "default",
    )


def test_what_is_missing_is_said_with_the_line_it_is_missing_from() -> None:
    error = refused("model: x\ndata:\n  test: t.jsonl\n")
    assert places(error) == [(2, "data.train")]
    assert "my.yaml line 2: data.train is missing." in str(error)


def test_all_mistakes_are_said_at_once_in_the_order_of_the_file() -> None:
    error = refused(
        "model: x\n"
        "data: {train: t.jsonl}\n"
        "finetune:\n"
        "  learning_rte: 1e-4\n"
        "  num_train_epochs: many\n"
        "  lora_r: 0\n"
        "settngs: {}\n"
    )
    assert places(error) == [
        (4, "finetune.learning_rte"),
        (5, "finetune.num_train_epochs"),
        (6, "finetune.lora_r"),
        (7, "settngs"),
    ]
    assert "Did you mean learning_rate?" in str(error)
    assert "is 'many', expected a whole number." in str(error)
    assert "is 0, must be 1 or more." in str(error)
    assert "Did you mean settings?" in str(error)


def test_a_key_in_the_wrong_section_is_sent_to_its_own() -> None:
    error = refused(SMALL + "finetune:\n  max_seq_length: 5\nlearning_rate: 1\n")
    assert "Write it as preprocess.max_seq_length." in str(error)
    assert "Write it as finetune.learning_rate." in str(error)


def test_an_input_of_the_component_that_has_no_place_is_refused_with_its_reason() -> None:
    assert "give a .jsonl file under data instead" in str(refused(SMALL + "train_mltable_path: folder\n"))


def test_a_key_written_twice_is_a_mistake() -> None:
    error = refused(SMALL + "finetune:\n  lora_r: 4\n  lora_r: 8\n")
    assert places(error) == [(6, "finetune.lora_r")]
    assert "written twice, first in line 5" in str(error)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("", None, "is empty"),
        ("# only a comment\n", None, "is empty"),
        ("- a\n- b\n", 1, "is a list"),
        ("just words\n", 1, "is text"),
        ("model: x\nfinetune:\n\tlora_r: 1\n", 3, "there is a tab"),
        ("model: [x\n", 2, "is not YAML"),
        ("model: x\n  data: y\n", 2, "is not YAML"),
        ("model: x\n---\nmodel: y\n", 2, "second document"),
        ("model: &m x\n", 1, "anchors and aliases"),
        ("a: 1\nb: *a\n", 2, "anchors and aliases"),
        ("model: !!python/object:os.system x\n", 1, "the tag"),
        ("a: 1\nmodel: \x00\n", 2, "holds the character"),
        ("[" * 5000, 1, "nested more than 50 levels deep"),
        ("a: " + "x" * 1_000_001, None, "is longer than"),
        ("PK\x03\x04 zip", 1, "is not YAML"),
    ],
)
def test_what_is_no_recipe_is_one_clear_error(text: str, line: int | None, said: str) -> None:
    error = refused(text)
    assert places(error) == [(line, None)]
    assert said in str(error)


def test_1e_4_is_a_number() -> None:
    assert parse(SMALL + "finetune: {learning_rate: 1e-4}\n").finetune.learning_rate == 1e-4


def test_a_number_where_text_belongs_asks_for_quotes() -> None:
    assert "experiment is 2024, expected text (put it in quotes)." in str(
        refused(SMALL + "experiment: 2024\n")
    )


def test_an_empty_section_is_an_empty_section() -> None:
    assert parse(SMALL + "finetune:\ncompute:\nsettings:\nevaluate:\n").finetune.model_fields_set == set()


def test_what_was_written_is_known_from_what_is_a_default() -> None:
    recipe = parse(SMALL + "finetune: {lora_r: 8}\n")
    assert recipe.finetune.model_fields_set == {"lora_r"}


def test_compute_is_one_name_or_one_per_stage() -> None:
    assert parse(SMALL + "compute: box\n").compute.of("export") == "box"
    some = parse(SMALL + "compute: {finetune: box}\n").compute
    assert (some.of("finetune"), some.of("export")) == ("box", "local")


def test_evaluate_can_be_left_out() -> None:
    assert parse(SMALL + "evaluate: false\n").evaluate is None
    assert parse(SMALL + "evaluate: true\n").evaluate is not None


def test_a_name_that_no_folder_could_bear_is_refused() -> None:
    assert "beginning with a letter or digit" in str(refused(SMALL + "experiment: ../up\n"))


# ---------------------------------------------------------------- --set


def test_set_goes_over_what_is_written() -> None:
    recipe = parse(SMALL + "finetune: {learning_rate: 1}\n", overrides={"finetune.learning_rate": "1e-4"})
    assert recipe.finetune.learning_rate == 1e-4
    assert recipe.overridden == {"finetune.learning_rate"}


def test_set_makes_a_section_that_is_not_written() -> None:
    recipe = parse(
        SMALL, overrides={"evaluate.samples": "2", "finetune.lora_target_modules": "[q_proj, v_proj]"}
    )
    assert recipe.evaluate is not None
    assert recipe.evaluate.samples == 2
    assert recipe.finetune.lora_target_modules == ("q_proj", "v_proj")


def test_set_of_one_compute_keeps_the_others() -> None:
    compute = parse(SMALL + "compute: box\n", overrides={"compute.finetune": "gpu"}).compute
    assert (compute.finetune, compute.export) == ("gpu", "box")


def test_set_can_leave_evaluate_out() -> None:
    assert parse(SMALL, overrides={"evaluate": "false"}).evaluate is None


def test_set_of_an_unknown_key_names_the_nearest() -> None:
    error = refused(SMALL, {"finetune.learning_rat": "1", "lora_r": "1", "modle": "x"})
    assert places(error) == [
        (None, "--set finetune.learning_rat"),
        (None, "--set lora_r"),
        (None, "--set modle"),
    ]
    assert "Did you mean learning_rate?" in str(error)
    assert "Write it as finetune.lora_r." in str(error)
    assert "Did you mean model?" in str(error)


def test_a_wrong_value_of_set_is_blamed_on_set_and_not_on_a_line() -> None:
    error = refused(SMALL + "finetune: {lora_r: 1}\n", {"finetune.lora_r": "none of them"})
    assert places(error) == [(None, "--set finetune.lora_r")]


def test_a_value_of_set_that_is_not_yaml_is_refused() -> None:
    assert "put it in quotes" in str(refused(SMALL, {"data.name": "[x"}))


def is_answered(text: str) -> bool:
    """With a recipe, or with an error that names its mistakes."""
    try:
        return isinstance(parse(text), Recipe)
    except RecipeError as error:
        return bool(error.details)


@given(st.text(max_size=200))
def test_any_text_is_a_recipe_or_a_recipe_error(text: str) -> None:
    assert is_answered(text)


_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(list(Recipe.model_fields)), _ANY))
def test_any_values_under_the_right_keys_are_a_recipe_or_a_recipe_error(values: dict[str, Any]) -> None:
    assert is_answered(json.dumps(values))
