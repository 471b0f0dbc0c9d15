"""The recipes that ship: every one resolves, is headed by its command, and explains its values."""

from __future__ import annotations

from pathlib import Path

import pytest

import tuneloop
from tuneloop.core.recipe import Resolved, display_name, parse, resolve
from tuneloop.workspace.catalog import shipped_cards

PACKAGE = Path(tuneloop.__path__[0])
RECIPES = sorted((PACKAGE / "recipes").glob("*.yaml"))
CARDS = {card.name: card for card in shipped_cards()}


def resolved(path: Path) -> Resolved:
    recipe = parse(path.read_text(encoding="utf-8"), path=path.name)
    return resolve(recipe, CARDS[recipe.model])


def test_two_recipes_ship() -> None:
    assert [path.name for path in RECIPES] == ["demo.yaml", "ultrachat-phi3.yaml"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_resolves(path: Path) -> None:
    resolved(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_headed_by_what_it_is_and_the_command_that_runs_it(path: Path) -> None:
    head = path.read_text(encoding="utf-8").split("\n\n", 1)[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"tuneloop run {path.stem}" in head
    assert "What to expect" in head


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_samples_that_a_recipe_names_ship(path: Path) -> None:
    for written in resolved(path).recipe.data.files().values():
        if written.startswith("samples:"):
            assert (PACKAGE / "samples" / written.removeprefix("samples:")).is_file()


def test_the_demo_warns_of_nothing() -> None:
    assert resolved(PACKAGE / "recipes" / "demo.yaml").warnings == ()


def test_the_documents_case_has_the_documents_name_and_order() -> None:
    found = resolved(PACKAGE / "recipes" / "ultrachat-phi3.yaml")
    expected = "Phi-3-mini-4k-instruct-ultrachat-bs1-cosine-ds2-lora-save_limit1-seqlen-1"
    assert display_name(found, gpus_per_node=1) == expected
    assert found.finetune.num_train_epochs == 1
    assert "the model's 1 replaces 3" in found.warnings[0]
