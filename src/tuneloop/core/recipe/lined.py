"""YAML as people write it, with the line of everything: what recipes and cards are read with.

Scalars follow YAML 1.2: `1e-4` is a number, `yes` is text, `0123` is 123. Anchors, aliases and tags are
refused, a key written twice is a mistake.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from yaml.composer import Composer
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from tuneloop.core.errors import UsageError

Path = tuple[str | int, ...]

LARGEST_CHARACTERS = 1_000_000
DEEPEST = 50
_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


@dataclass(frozen=True)
class Mistake:
    line: int | None
    field: str | None
    message: str

    def to_json(self) -> dict[str, Any]:
        return {"line": self.line, "field": self.field, "message": self.message}

    def __str__(self) -> str:
        place = f"line {self.line}: " if self.line else ""
        return f"{place}{self.field + ' ' if self.field else ''}{self.message}"


@dataclass
class Document:
    """A mapping of plain values; `lines` knows where each key or item stands."""

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[Path, int] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)

    def line_of(self, path: Path) -> int | None:
        """Of the place itself, or of what it is missing from."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return self.lines[path[:length]]
        return None


class _Refused(Exception):
    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


class _Loader(Reader, Scanner, Parser, Composer, BaseResolver):
    """Composes nodes and resolves nothing: every scalar is text until `scalar` reads it."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if getattr(event, "anchor", None):
            raise _Refused(line, "anchors and aliases (& and *) are not read here: write the value out.")
        if getattr(event, "tag", None):
            raise _Refused(line, f"the tag {event.tag!r} is not read here: leave it out.")
        if self.depth >= DEEPEST:
            raise _Refused(line, f"is nested more than {DEEPEST} levels deep.")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read(text: str, what: str) -> Document:
    """`what` is written there ("a recipe"). Whatever is wrong is among `mistakes`; nothing is raised."""
    document = Document()
    if len(text) > LARGEST_CHARACTERS:
        document.mistakes.append(Mistake(None, None, f"is longer than {LARGEST_CHARACTERS} characters."))
        return document
    try:
        node = _Loader(text).get_single_node()
        if isinstance(node, yaml.MappingNode):
            document.values = _value(node, (), document)
        else:
            document.mistakes.append(_not_a_mapping(node, what))
    except _Refused as error:
        document.mistakes.append(Mistake(error.line, None, str(error)))
    except yaml.YAMLError as error:
        document.mistakes.append(_not_yaml(error, text))
    return document


def read_value(text: str) -> Any:
    """One value as it would stand after `key: `. Raises `ValueError`."""
    try:
        node = _Loader(text).get_single_node()
    except (_Refused, yaml.YAMLError) as error:
        raise ValueError(f"{text!r} is not a YAML value; put it in quotes.") from error
    return None if node is None else _value(node, (), Document())


def scalar(text: str) -> Any:
    """A value that was written without quotes."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text.lower() in ("true", "false") and text in (text.lower(), text.upper(), text.capitalize()):
        return text.lower() == "true"
    if _INTEGER.fullmatch(text):
        # 4,300 digits is where int() gives up; no parameter is near it.
        return int(text) if len(text) < 100 else text
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def _value(node: yaml.Node, path: Path, document: Document) -> Any:
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, document)
    if isinstance(node, yaml.SequenceNode):
        items = []
        for number, item in enumerate(node.value):
            document.lines[(*path, number)] = item.start_mark.line + 1
            items.append(_value(item, (*path, number), document))
        return items
    text = str(node.value)
    return text if isinstance(node, yaml.ScalarNode) and node.style else scalar(text)


def _mapping(node: yaml.MappingNode, path: Path, document: Document) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            document.mistakes.append(Mistake(line, dotted(path) or None, "has a key that is not a word."))
            continue
        key = str(key_node.value)
        place = (*path, key)
        if key in found:
            first = document.lines[place]
            document.mistakes.append(
                Mistake(line, dotted(place), f"is written twice, first in line {first}.")
            )
            continue
        document.lines[place] = line
        found[key] = _value(value_node, place, document)
    return found


def _not_a_mapping(node: yaml.Node | None, what: str) -> Mistake:
    if node is None:
        return Mistake(None, None, f"is empty; {what} is a mapping of keys and values.")
    kind = "a list" if isinstance(node, yaml.SequenceNode) else "text"
    return Mistake(node.start_mark.line + 1, None, f"is {kind}; {what} is a mapping of keys and values.")


def _not_yaml(error: yaml.YAMLError, text: str) -> Mistake:
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return Mistake(line, None, f"is not YAML: it holds the character {chr(int(error.character))!r}.")
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or "it cannot be read"
    if "'\\t'" in problem:
        problem = "there is a tab; indent with spaces"
    elif "expected a single document" in str(getattr(error, "context", "")):
        problem = "there is a second document; everything stands in one"
    return Mistake(mark.line + 1 if mark else None, None, f"is not YAML: {problem}.")


def dotted(path: Sequence[str | int]) -> str:
    """`sources[0].sha256`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else part)
    return text


def refuse(error: type[UsageError], path: str, mistakes: Sequence[Mistake]) -> NoReturn:
    """Raises `error` with all of them; the message has one line each, in the order of the file."""
    ordered = sorted(mistakes, key=lambda mistake: mistake.line or 0)
    if len(ordered) == 1:
        only = ordered[0]
        place = f"{path} line {only.line}" if only.line else path
        message = f"{place}: {only.field + ' ' if only.field else ''}{only.message}"
    else:
        message = f"{path} has {len(ordered)} mistakes:\n" + "\n".join(f"  {mistake}" for mistake in ordered)
    raise error(message, details=[mistake.to_json() for mistake in ordered])


def mistakes_of(
    error: ValidationError, document: Document, unknown: Callable[[Path], str], tags: Iterable[str] = ()
) -> list[Mistake]:
    """Pydantic's findings in our words. `unknown` explains a key that does not exist; `tags` are words that
    pydantic adds to a place to say which member of a union it means."""
    skipped = set(tags)
    found = []
    for item in error.errors(include_url=False):
        place: Path = tuple(part for part in item["loc"] if part not in skipped or item["loc"][-1] == part)
        message = unknown(place) if item["type"] == "extra_forbidden" else explain(item)
        found.append(Mistake(document.line_of(place), dotted(place) or None, message))
    return found


def explain(item: ErrorDetails) -> str:
    """`is 0, must be greater than 0.`"""
    limits = item.get("ctx", {})
    wanted = {
        "missing": "is missing.",
        "string_type": "expected text (put it in quotes).",
        "string_too_short": "must not be empty.",
        "tuple_type": "expected a list.",
        "list_type": "expected a list.",
        "dict_type": "expected a mapping.",
        "model_type": "expected a mapping.",
        "model_attributes_type": "expected a mapping.",
        "int_type": "expected a whole number.",
        "int_parsing": "expected a whole number.",
        "bool_type": "expected true or false.",
        "bool_parsing": "expected true or false.",
        "greater_than": f"must be greater than {limits.get('gt')}.",
        "greater_than_equal": f"must be {limits.get('ge')} or more.",
        "less_than": f"must be less than {limits.get('lt')}.",
        "less_than_equal": f"must be {limits.get('le')} or less.",
        "literal_error": f"must be {limits.get('expected')}.",
        "union_tag_invalid": f"must be {limits.get('expected_tags')}.",
        "union_tag_not_found": "needs a type.",
    }.get(item["type"], item["msg"].rstrip(".") + ".")
    return wanted if item["type"] == "missing" else f"is {show(item['input'])}, {wanted}"


def show(value: object) -> str:
    """As it was written, shortened."""
    if value is None:
        return "empty"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
