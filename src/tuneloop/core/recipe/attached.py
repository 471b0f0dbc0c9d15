"""Files that a recipe names beside its data: what stands in them becomes part of the recipe, so that a job,
its record and its steps' keys hold it."""

from __future__ import annotations

from pathlib import Path

from tuneloop.core import deepspeed
from tuneloop.core.errors import RecipeError, UsageError
from tuneloop.core.recipe.lined import Mistake, refuse
from tuneloop.core.recipe.written import Recipe

_FIELD = "finetune.deepspeed"


def attach(recipe: Recipe, folder: Path) -> Recipe:
    """With the object in the file that `finetune.deepspeed` names; relative paths start at `folder`. Raises
    `RecipeError` when it cannot be read."""
    written = recipe.finetune.deepspeed
    if not isinstance(written, str):
        return recipe
    try:
        config = deepspeed.load(_path(written, folder))
    except UsageError as error:
        refuse(
            RecipeError,
            recipe.path,
            [Mistake(recipe.lines.get(_FIELD), _FIELD, f"is {written!r}: {error.message}")],
        )
    finetune = recipe.finetune.model_copy(update={"deepspeed": config})
    return recipe.model_copy(update={"finetune": finetune})


def _path(written: str, folder: Path) -> Path:
    try:
        return Path(folder, Path(written).expanduser())
    except RuntimeError:
        raise UsageError(f"{written} names the home of a user that there is not.") from None
