"""The key under which a step's outputs are remembered: equal key, equal outputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import JsonValue

from tuneloop.core.recipe.parameters import PARAMETERS
from tuneloop.core.types import Step, StepKind

STEP_VERSIONS: Mapping[StepKind, int] = {
    "model_import": 2,
    "preprocess": 2,
    "finetune": 2,
    "export": 1,
    "evaluate": 1,
}
"""Raise a kind's number when the same parameters and inputs lead to other outputs than before."""

_NOT_THE_OUTPUT = frozenset({"checkpoint_seconds", "checkpoint_steps"})
"""Parameters that say how often a run is saved on its way, and nothing about where it ends."""


def step_key(step: Step, input_digests: Mapping[str, str]) -> str:
    """`sha256:` of the kind, its version, the parameters that are not at their defaults, the inputs' digests.

    Names, computes and environments are left out; a parameter that is new and at its default changes nothing.
    """
    parameters = differing(step.kind, step.parameters)
    described = {
        "kind": step.kind,
        "version": STEP_VERSIONS[step.kind],
        "parameters": {name: value for name, value in parameters.items() if name not in _NOT_THE_OUTPUT},
        "inputs": dict(input_digests),
    }
    return "sha256:" + hashlib.sha256(canonical(described).encode()).hexdigest()


def differing(kind: StepKind, parameters: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """What is not at its default, in one spelling ("true" and True are the same)."""
    return PARAMETERS[kind].model_validate(parameters).model_dump(mode="json", exclude_defaults=True)


def canonical(value: Any) -> str:
    """JSON in one spelling."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
