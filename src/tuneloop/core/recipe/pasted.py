"""The section `component`: a script's call of Azure's component, pasted into a recipe as it stands.

Each input goes to its place in the recipe, as if it had been written there; what has no place here is refused
by name, and what only matters in a cloud is told. Run by `parse`, before a recipe's types are checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tuneloop.core import sizes
from tuneloop.core.names import did_you_mean
from tuneloop.core.recipe.component import ADVISED, INPUTS, NO_COMPUTE, Input
from tuneloop.core.recipe.lined import Document, Mistake

SECTION = "component"
_SOURCES = ("pytorch_model_path", "mlflow_model_path", "huggingface_id")
"""Where the component takes a model from, in its order of precedence."""


def unfold(document: Document) -> list[str]:
    """Move every input of the section to its place; what has to be said about them. Mistakes are added to the
    document's."""
    if SECTION not in document.values:
        return []
    inputs = document.values.pop(SECTION)
    if not isinstance(inputs, dict):
        if inputs is not None:
            _complain(document, None, "expected a mapping of the component's inputs.")
        return []
    # A script passes None for what it leaves out.
    given = {name: value for name, value in inputs.items() if value is not None}
    notes = list(_overruled(given))
    for name, value in given.items():
        known = ADVISED.get(name) or INPUTS.get(name)
        if known is None:
            hint = did_you_mean(name, INPUTS) or ""
            _complain(document, name, f"is not an input of the component. {hint}".rstrip())
        else:
            notes += _take(document, name, value, known)
    return notes


def _overruled(given: dict[str, Any]) -> Iterator[str]:
    """The component takes one source of a model and drops the others without a word."""
    named = [name for name in _SOURCES if name in given]
    for name in named[1:]:
        del given[name]
        yield f"{SECTION}.{name} has no effect: {named[0]} goes before it, as in the component."


def _take(document: Document, name: str, value: Any, known: Input) -> Iterator[str]:
    if known.reason is not None:
        _complain(document, name, known.reason)
    elif known.only is not None and value != known.only:
        _complain(document, name, f"is {value!r}, must be {known.only!r}.")
    elif known.note is not None:
        yield f"{SECTION}.{name} {known.note}{_about_size(name, value)}"
    elif known.place is not None and known.place.startswith("compute.") and value == NO_COMPUTE:
        yield f"{SECTION}.{name} is {NO_COMPUTE!r}: the step runs on {known.place}, this machine by default."
    elif known.place is not None:
        _put(document, name, known.place, value)


def _about_size(name: str, value: Any) -> str:
    size = sizes.find(str(value)) if name.startswith("instance_type_") else None
    return f" To see whether it would fit there: tuneloop plan RECIPE --size {size.name}" if size else ""


def _put(document: Document, name: str, place: str, value: Any) -> None:
    *sections, key = place.split(".")
    inside = document.values
    for section in sections:
        if inside.get(section) is None:
            inside[section] = {}
        inside = inside[section]
        if isinstance(inside, str) and section == "compute":
            return _complain(document, name, f"is written twice: {section} says it for every stage.")
        if not isinstance(inside, dict):
            return None  # The section is no mapping, which is told where its types are checked.
    path = tuple(place.split("."))
    if key in inside:
        line = document.lines.get(path)
        where = f", in line {line}" if line else ""
        return _complain(document, name, f"is written twice: {place} says it too{where}.")
    inside[key] = value
    if (SECTION, name) in document.lines:
        document.lines[path] = document.lines[SECTION, name]
    return None


def _complain(document: Document, name: str | None, message: str) -> None:
    field = SECTION if name is None else f"{SECTION}.{name}"
    line = document.line_of((SECTION,) if name is None else (SECTION, name))
    document.mistakes.append(Mistake(line, field, message))
