"""A step's key: what is in it, and what is not."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import Field

from tuneloop.core.recipe import FinetuneParameters, key, step_key
from tuneloop.core.types import Step

DIGESTS = {"model": "sha256:" + "1" * 64, "dataset": "sha256:" + "2" * 64}


def step(parameters: dict[str, Any] | None = None, **changes: Any) -> Step:
    return Step(**({"name": "finetune", "kind": "finetune", "parameters": parameters or {}} | changes))


def test_a_key_is_the_same_today_and_tomorrow() -> None:
    assert step_key(step({"lora_r": 16, "apply_lora": True}), DIGESTS) == (
        "sha256:dee037e6a92781c5333c968d9e8895d099dc482e551f5b586da3ef25704d2524"
    )


def test_a_parameter_at_its_default_changes_nothing() -> None:
    assert step_key(step({"lora_r": 8}), DIGESTS) == step_key(step(), DIGESTS)


def test_how_often_a_run_is_saved_is_not_in_it() -> None:
    saved = step({"checkpoint_seconds": 5, "checkpoint_steps": 7})
    assert step_key(saved, DIGESTS) == step_key(step(), DIGESTS)


def test_a_new_parameter_at_its_default_does_not_change_old_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    class Newer(FinetuneParameters):
        neftune_noise: float = Field(default=0.0)

    old = step_key(step({"lora_r": 16}), DIGESTS)
    monkeypatch.setattr(key, "PARAMETERS", {**key.PARAMETERS, "finetune": Newer})
    assert step_key(step({"lora_r": 16}), DIGESTS) == old
    assert step_key(step({"lora_r": 16, "neftune_noise": 0.0}), DIGESTS) == old
    assert step_key(step({"lora_r": 16, "neftune_noise": 5.0}), DIGESTS) != old


def test_a_new_version_of_the_kind_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    old = step_key(step(), DIGESTS)
    monkeypatch.setattr(key, "STEP_VERSIONS", {**key.STEP_VERSIONS, "finetune": 99})
    assert step_key(step(), DIGESTS) != old


def test_the_spelling_of_a_value_does_not_matter() -> None:
    one = step({"apply_lora": True, "precision": "16", "learning_rate": 5e-06})
    other = step({"learning_rate": "5e-6", "precision": 16, "apply_lora": "True"})
    assert step_key(one, DIGESTS) == step_key(other, DIGESTS)


@pytest.mark.parametrize("changes", [{"name": "other"}, {"compute": "gpu"}, {"deterministic": False}])
def test_name_and_compute_are_not_in_it(changes: dict[str, Any]) -> None:
    assert step_key(step(**changes), DIGESTS) == step_key(step(), DIGESTS)


@pytest.mark.parametrize(
    "digests", [{}, {"model": DIGESTS["model"]}, {**DIGESTS, "dataset": "sha256:" + "3" * 64}]
)
def test_inputs_are_in_it(digests: dict[str, str]) -> None:
    assert step_key(step(), digests) != step_key(step(), DIGESTS)


def test_the_kind_is_in_it() -> None:
    assert step_key(step(kind="export"), DIGESTS) != step_key(step(), DIGESTS)


def test_every_kind_has_a_version() -> None:
    assert set(key.STEP_VERSIONS) == set(key.PARAMETERS)
