"""The tokenizer look: what an import would write, without the weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from tests.hub import Hub
from tests.models import tiny_model
from tests.steps import step_context
from tuneloop.core.errors import ModelUnavailable
from tuneloop.core.types import StepFile
from tuneloop.steps import model_import, tokenizer
from tuneloop.steps.context import StepContext
from tuneloop.steps.hub import fetch
from tuneloop.tokens import load_backend, load_template

SAME = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json")


def look(folder: Path, source: dict[str, Any], cache: Path | None = None) -> Path:
    folder.mkdir()
    step = StepFile.model_validate(
        {
            "attempt": "look/tokenizer/1",
            "attempt_id": "look",
            "kind": "tokenizer",
            "parameters": {"card": {"name": "Tiny", "version": "1", "source": source}},
            "outputs": {"tokenizer": "folder"},
            "cache_folder": None if cache is None else str(cache),
        }
    )
    context = StepContext(folder, step)
    try:
        tokenizer.run(context)
    finally:
        context.close()
    return context.output("tokenizer")


def imported(folder: Path, source: dict[str, Any]) -> Path:
    card = {"name": "Tiny", "version": "1", "source": source}
    context = step_context(
        folder, "model_import", outputs={"model": "model_folder"}, parameters={"card": card}
    )
    try:
        model_import.run(context)
    finally:
        context.close()
    return context.output("model")


def test_it_is_the_tokenizer_that_an_import_writes(tmp_path: Path) -> None:
    given = tiny_model(tmp_path / "source", "phi3")
    config = json.loads((given / "tokenizer_config.json").read_text())
    del config["model_max_length"]
    (given / "tokenizer_config.json").write_text(json.dumps({**config, "auto_map": {"AutoTokenizer": "x.Y"}}))
    source = {"type": "folder", "path": str(given)}
    found = look(tmp_path / "look", source)
    model = imported(tmp_path / "import", source)
    assert [(found / name).read_bytes() for name in SAME] == [(model / name).read_bytes() for name in SAME]
    assert load_template(found).digest == load_template(model).digest
    assert load_backend(found) == load_backend(model)
    assert not list(found.glob("*.safetensors"))


@pytest.mark.hub
def test_the_hub_is_asked_for_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    given = tiny_model(tmp_path / "source", "llama")
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(fetch, "RETRY_SECONDS", (0.0,))
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        commit = hub.publish("maker/tiny", given)
        source = {"type": "hub", "repository": "maker/tiny", "revision": commit}
        found = look(tmp_path / "look", source, tmp_path / "cache")
        assert not any("safetensors" in request.path for request in hub.requests)
    assert (found / "tokenizer.json").read_bytes() == (given / "tokenizer.json").read_bytes()


def test_a_folder_without_a_tokenizer_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    given = tiny_model(tmp_path / "source", "llama")
    (given / "tokenizer.json").unlink()
    with pytest.raises(ModelUnavailable, match=r"holds no tokenizer\.json"):
        look(tmp_path / "look", {"type": "folder", "path": str(given)})
