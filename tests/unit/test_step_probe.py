"""The probe: the rate of this machine for layers of a shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.steps import step_context
from tuneloop.core.errors import Unsupported
from tuneloop.steps import probe

SHAPE = {
    "family": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "layers": 12,
    "attention_heads": 2,
    "key_value_heads": 1,
    "head_size": 16,
    "vocabulary_size": 128,
    "tied_embeddings": True,
}


def probed(folder: Path, **parameters: Any) -> dict[str, Any]:
    given = {"architecture": SHAPE, "tokens": 32, "seconds": 0.05, **parameters}
    context = step_context(folder, "probe", outputs={"rate": "file"}, parameters=given)  # type: ignore[arg-type]
    probe.run(context)
    said: dict[str, Any] = json.loads((folder / "outputs" / "rate").read_text(encoding="utf-8"))
    assert context.summary["tokens_per_second"] == said["tokens_per_second"]
    return said


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2", "qwen3", "mistral", "gemma3_text"])
def test_every_family_of_the_catalogue_is_measured(family: str, tmp_path: Path) -> None:
    said = probed(tmp_path, architecture={**SHAPE, "family": family}, apply_lora=family == "phi3")
    assert said["tokens_per_second"] > 0
    assert said["tokens"] == 32


def test_the_time_of_all_layers_follows_from_one_and_three(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_micro_batch_seconds", lambda _, layers: 0.5 + 0.25 * layers)
    said = probed(tmp_path)
    assert said["seconds_per_layer"] == pytest.approx(0.25)
    assert said["seconds_besides"] == pytest.approx(0.5)
    assert said["tokens_per_second"] == pytest.approx(32 / (0.5 + 12 * 0.25))


def test_a_micro_batch_of_several_rows_is_packed(tmp_path: Path) -> None:
    parameters = probe.ProbeParameters.model_validate({"architecture": SHAPE, "tokens": 40, "rows": 4})
    batch = probe._batch(parameters)
    assert batch.tokens == 40
    assert batch.position_ids[0].tolist() == [*range(10)] * 4
    assert batch.learned == 4 * 6


def test_a_family_that_cannot_be_built_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="no-such") as refused:
        probed(tmp_path, architecture={**SHAPE, "family": "no-such"})
    assert "--no-probe" in str(refused.value.next_move)
