"""The file that a recipe is read from: a path, or the name of one that ships."""

from __future__ import annotations

from pathlib import Path

from tuneloop.cli import shipped
from tuneloop.core.errors import NotFound, UsageError
from tuneloop.core.names import did_you_mean


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a text file: {error.reason} at byte {error.start}.") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error


def path_of(recipe: str) -> Path:
    path = Path(recipe)
    # Whatever can be read is taken, a pipe such as <(...) too; a folder is looked for among the shipped ones.
    if recipe and path.exists() and not path.is_dir():
        return path
    found = shipped.find(recipe)
    if found is not None:
        return found
    if recipe and path.is_dir():
        raise UsageError(f"{recipe!r} is a folder; a recipe is a YAML file.", next_move=_recipes_in(path))
    near = did_you_mean(recipe.removesuffix(".yaml"), shipped.names()) or ""
    raise NotFound(
        f"There is no recipe file {recipe!r}, and none of that name ships with Tuneloop. {near}".rstrip(),
        next_move=_files_beside(path) or "See the shipped ones with: tuneloop recipes list",
    )


def _files_beside(path: Path) -> str | None:
    """The recipe that was probably meant, of those in the folder; None without any."""
    there = sorted(str(one) for one in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    return (
        (did_you_mean(str(path), there) or f"In that folder there is: {', '.join(there[:5])}.")
        if there
        else None
    )


def _recipes_in(folder: Path) -> str:
    found = sorted(str(path) for path in folder.glob("*.y*ml"))
    return (
        f"In it there is: {', '.join(found[:5])}."
        if found
        else "Start from: tuneloop recipes show demo > my.yaml"
    )
