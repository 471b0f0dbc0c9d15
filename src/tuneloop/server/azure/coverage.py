"""What of Azure's SDK works here: its calls with what tests show of each, and the operations of the dialect.

The calls and what is shown of them lie in `coverage.json`, which `docs/azure_coverage.py` makes of the SDK's
own classes and of the marks of the contract tests; operations come from the route table. Nothing is typed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tuneloop.server.azure import table
from tuneloop.server.azure.routing import ANY

WORKS, REFUSED, ABSENT = "works", "refused", "not there"
STATES = (WORKS, REFUSED, ABSENT)
"""A test with the real SDK shows that a call works, or that a script is told why it does not; or neither."""
_REFUSED = "Refused"
"""How the docstring of a handler begins that only refuses."""
FILE = Path(__file__).parent / "coverage.json"


class Call(NamedTuple):
    """A public method of the SDK's client."""

    name: str
    """`jobs.create_or_update`; without a dot: of `MLClient` itself."""
    state: str
    tests: tuple[str, ...] = ()
    """What shows it: `test_jobs.py::test_it_runs`."""

    @property
    def group(self) -> str:
        return self.name.rpartition(".")[0]


class Spoken(NamedTuple):
    """An operation of the dialect."""

    module: str
    method: str
    address: str
    state: str
    summary: str


@cache
def _facts() -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def sdk() -> str:
    """Package and version whose calls these are."""
    return str(_facts()["sdk"])


def calls() -> tuple[Call, ...]:
    """Of a workspace's client, by name."""
    return _calls("calls")


def other_calls() -> tuple[Call, ...]:
    """What tests show beside them: calls of a registry's client (`registry.models.get`), and of MLflow."""
    return _calls("others")


def _calls(section: str) -> tuple[Call, ...]:
    return tuple(
        Call(name, known["state"], tuple(known["tests"])) for name, known in _facts()[section].items()
    )


def counts(found: Sequence[Call] | Sequence[Spoken]) -> dict[str, int]:
    """State to number, every state included."""
    counted = Counter(one.state for one in found)
    return {state: counted[state] for state in STATES}


def operations() -> tuple[Spoken, ...]:
    """In the order in which addresses are matched."""
    found = []
    for one in table.all_operations().operations:
        module = one.handler.__module__.removeprefix("tuneloop.server.azure.")
        method = "any" if one.method == ANY else one.method
        is_refused = one.summary.startswith(_REFUSED)
        summary = one.summary.removeprefix(_REFUSED).lstrip(".: ")
        found.append(Spoken(module, method, one.pattern, REFUSED if is_refused else WORKS, summary))
    return tuple(found)
