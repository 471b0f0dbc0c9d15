"""Inputs of a job and of its node, as they are written in a request: literals, assets, and bindings of the
one to the other (`${{parent.inputs.x}}`).

The job's own are written in camel case (`jobInputType`), the node's in snake case; both are read in both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tuneloop.core.names import did_you_mean
from tuneloop.server.azure.bodies import Body

LITERAL = "literal"
_BINDING = re.compile(r"\$\{\{\s*parent\.(inputs|outputs)\.([^}\s]+)\s*\}\}")
_MODES = ("ReadOnlyMount", "ro_mount", "ReadWriteMount", "rw_mount", "Download", "Direct")
LONGEST_VALUE = 10_000


@dataclass(frozen=True)
class Given:
    """An input whose binding is resolved."""

    kind: str
    """`literal`, or the type of an asset: `uri_file`, `mlflow_model`, ..."""
    value: str | bool | int | float
    """Of a literal its value, of an asset its address."""


def binding(value: object, of: str) -> str | None:
    """The name in `${{parent.inputs.name}}` (`of`: inputs or outputs); None when it is no binding."""
    found = _BINDING.fullmatch(value.strip()) if isinstance(value, str) else None
    return found.group(2) if found and found.group(1) == of else None


def job_inputs(properties: Body) -> dict[str, Given]:
    """The job's own, by name."""
    found = {}
    for name, written in properties.objects("inputs"):
        given = _read(written)
        if given is None:
            continue
        if isinstance(given.value, str) and "${{" in given.value:
            written.wrong(
                "value",
                f"is {given.value!r}: an input of the job is where bindings end; it cannot be one itself.",
            )
            continue
        found[name] = given
    return found


def node_inputs(node: Body, job: Mapping[str, Given], used: set[str]) -> dict[str, Given]:
    """The node's, with what they are bound to. Adds the job's inputs that are bound to `used`."""
    found = {}
    for name, written in node.objects("inputs"):
        given = _read(written)
        if given is None:
            continue
        bound = binding(given.value, "inputs")
        if bound is None and isinstance(given.value, str) and "${{" in given.value:
            written.wrong(
                "value",
                f"is {given.value!r}: the only expression that is read here is ${{{{parent.inputs.NAME}}}}, "
                "and it has to be the whole value.",
            )
        elif bound is not None and bound not in job:
            used.add(bound)
            hint = did_you_mean(bound, job) or "The job has no inputs."
            written.wrong("value", f"is bound to the job's input '{bound}', which there is not. {hint}")
        elif bound is not None:
            used.add(bound)
            found[name] = job[bound]
        else:
            found[name] = given
    return found


def _read(written: Body) -> Given | None:
    """None: it is wrong, and that is told."""
    key = "jobInputType" if "jobInputType" in written else "job_input_type"
    kind = written.text(key).lower()
    written.passed_over("description")
    if kind == LITERAL:
        value = written.raw("value")
        why = _why_no_literal(value)
        if why is not None:
            written.wrong("value", why)
            return None
        return Given(LITERAL, value)
    if not kind:
        written.wrong(key, "is missing; an input is a literal or an asset such as uri_file.")
        written.passed_over("value", "uri", "mode")
        return None
    written.expect("mode", *_MODES, why=f"is none of: {', '.join(_MODES)}.")
    uri = written.text("uri")
    if not uri:
        written.wrong("uri", "is missing.")
        return None
    return Given(kind, uri)


def _why_no_literal(value: Any) -> str | None:
    if value is None:
        return "is missing."
    if isinstance(value, float) and not math.isfinite(value):
        return "is not a finite number."
    if not isinstance(value, str | bool | int | float):
        return "is no text, number or boolean."
    if isinstance(value, str) and len(value) > LONGEST_VALUE:
        return f"is longer than {LONGEST_VALUE} characters."
    return None
