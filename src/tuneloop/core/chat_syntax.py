"""The jinja2 in which chat templates are written, as transformers runs it: sandboxed, trimmed blocks, loop
controls, `tojson` without HTML escapes, `raise_exception`, `strftime_now`, and the `generation` tag.

`core.chat` is its only user. Templates come from model hubs and are not trusted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

GENERATION_START, GENERATION_END = "\uf8f0", "\uf8f1"
"""Private-use characters around what `{% generation %}` holds, written by the tracking form only."""

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_MARKER = re.compile(r"\s*(?:<[^<>\s]+>|\[[^\[\]\s]+\]|\S+)")


@lru_cache(maxsize=32)
def compile_template(source: str, track: bool) -> jinja2.Template:
    """Raises `jinja2.TemplateError`. With `track`, `{% generation %}` blocks come out between markers."""
    return _environment(track).from_string(source)


@lru_cache(maxsize=32)
def variables_of(source: str) -> frozenset[str]:
    """Names that the template takes from outside."""
    environment = _environment(False)
    return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))


def marks_generation(source: str) -> bool:
    """Whether the template itself says what is learned."""
    return _GENERATION_TAG.search(source) is not None


def end_marker(tails: Sequence[str], eos: str) -> str:
    """The end-of-turn marker that begins each of `tails` (what a template writes after an answer when the
    conversation ends, goes on, or waits): the first tag or word common to all; empty when there is none."""
    common = _common_start(tails)
    indent = common[: len(common) - len(common.lstrip())]
    if eos and common.startswith(indent + eos):
        return indent + eos
    found = _MARKER.match(common)
    return found.group() if found else ""


def _common_start(texts: Sequence[str]) -> str:
    least, most = min(texts), max(texts)
    for place, (one, other) in enumerate(zip(least, most, strict=False)):
        if one != other:
            return least[:place]
    return least


def _environment(track: bool) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_TrackedGeneration if track else _Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
    )
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: the body as it is."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: Callable[[], str]) -> str:
        return caller()


class _TrackedGeneration(_Generation):
    """The same, between markers, so that nothing has to be remembered while a template runs."""

    def _write(self, caller: Callable[[], str]) -> str:
        return f"{GENERATION_START}{caller()}{GENERATION_END}"


class _Dict:
    """`dict` without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """jinja's namespace, closed to names that lead to the interpreter's insides."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that namespace(self=...) works
        this, given = args[0], args[1:]
        values = dict(*given, **kwargs)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(this, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a template may not store {name!r} on a namespace")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
