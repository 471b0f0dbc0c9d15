"""Text and `--set` to a `Recipe`, or to one error that names every mistake with its line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from tuneloop.core.errors import RecipeError
from tuneloop.core.names import did_you_mean, nearest
from tuneloop.core.recipe.component import INPUTS
from tuneloop.core.recipe.lined import Document, Mistake, dotted, mistakes_of, read, read_value, refuse
from tuneloop.core.recipe.lined import Path as Place
from tuneloop.core.recipe.pasted import unfold
from tuneloop.core.recipe.written import SECTIONS, STAGES, Recipe, all_keys

_SEE_KEYS = "Every key, with its value: tuneloop run demo --dry-run -v"


def parse(text: str, *, path: str = "recipe", overrides: Mapping[str, str] | None = None) -> Recipe:
    """`overrides` are what `--set key=value` gave: dotted keys and YAML values. Raises `RecipeError`."""
    document = read(text, "a recipe")
    if document.mistakes and not document.values:
        refuse(RecipeError, path, document.mistakes)
    notes = unfold(document)
    mistakes = list(document.mistakes)
    overridden = frozenset(_override(document, overrides or {}, mistakes))
    lines = {dotted(place): line for place, line in document.lines.items()}
    try:
        recipe = Recipe.read(document.values, path=path, lines=lines, overridden=overridden, notes=notes)
    except ValidationError as error:
        found = mistakes_of(error, document, unknown_key)
        refuse(RecipeError, path, mistakes + [_named(mistake, overridden) for mistake in found])
    if mistakes:
        refuse(RecipeError, path, mistakes)
    return recipe


def _named(mistake: Mistake, overridden: frozenset[str]) -> Mistake:
    if mistake.field not in overridden:
        return mistake
    return Mistake(None, f"--set {mistake.field}", mistake.message)


def unknown_key(place: Place) -> str:
    """What was probably meant by a key that does not exist at `place`."""
    name = str(place[-1])
    section = ".".join(str(part) for part in place[:-1])
    where = f"the section {section}" if section else "a recipe"
    return f"is not a key of {where}. {_hint(name, section)}".rstrip()


def _hint(name: str, section: str) -> str:
    known = INPUTS.get(name)
    if known is not None and (known.reason or known.note):
        return f"The component's {name} {known.reason or known.note}"
    if known is not None and known.place:
        return f"Write it as {known.place}."
    fields = SECTIONS[section].model_fields if section in SECTIONS else Recipe.model_fields
    near = nearest(name, fields)
    if near is None:
        elsewhere = {key.rsplit(".", 1)[-1]: key for key in all_keys()}
        other = nearest(name, elsewhere)
        near = elsewhere[other] if other else None
        return f"Did you mean {near}?" if near else (did_you_mean(name, fields) or _SEE_KEYS)
    return f"Did you mean {near}?"


def _override(document: Document, overrides: Mapping[str, str], mistakes: list[Mistake]) -> list[str]:
    """Lay `overrides` over the document; the keys that were taken."""
    known = set(all_keys())
    taken = []
    for key, text in overrides.items():
        if key not in known:
            section, _, name = key.rpartition(".")
            section = section if section in SECTIONS else ""
            mistakes.append(
                Mistake(None, f"--set {key}", f"is not a key of a recipe. {_hint(name, section)}".rstrip())
            )
            continue
        try:
            _put(document, key, read_value(text))
        except ValueError as error:
            mistakes.append(Mistake(None, f"--set {key}", f"cannot be read: {error}"))
        else:
            taken.append(key)
    return taken


def _put(document: Document, key: str, value: Any) -> None:
    section, _, name = key.rpartition(".")
    _forget_lines(document, tuple(key.split(".")))
    if not section:
        document.values[name] = value
        return
    inside = document.values.get(section)
    if section == "compute" and isinstance(inside, str):
        inside = dict.fromkeys(STAGES, inside)
    document.values[section] = {**(inside if isinstance(inside, dict) else {}), name: value}


def _forget_lines(document: Document, place: Place) -> None:
    """A value from the command line has no line, nor has what it replaced."""
    for known in [known for known in document.lines if known[: len(place)] == place]:
        del document.lines[known]
