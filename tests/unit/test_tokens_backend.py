"""The tokenizer of a folder is the one that transformers would serve with, asked for without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import tiny_tokenizer
from tuneloop import lm
from tuneloop.core.errors import ModelUnavailable
from tuneloop.tokens import backend as backend_module
from tuneloop.tokens import load_backend


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(backend_module, "_known", {})
    made = tiny_tokenizer(tmp_path / "model", "phi3")
    (made / "config.json").write_text(json.dumps({"model_type": "phi3", "max_position_embeddings": 256}))
    return made


def test_it_is_what_transformers_builds_even_where_that_is_not_what_the_file_says(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    # transformers adds it to what tokenizer.json says.
    extra = {**config, "extra_special_tokens": ["<|extra|>"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(extra))
    found = load_backend(folder)
    theirs = lm.load_tokenizer(folder)
    assert json.loads(found.described) == json.loads(theirs.backend_tokenizer.to_str())
    assert json.loads(found.described) != json.loads((folder / "tokenizer.json").read_text())
    ours = found.tokenizer().encode("a <|extra|> b", add_special_tokens=False).ids
    assert ours == theirs.encode("a <|extra|> b", add_special_tokens=False)
    assert found.model_max_length == 256
    assert {"<|extra|>", "<|user|>", "<|end|>"} <= set(found.special_tokens)


def test_what_transformers_made_is_remembered_for_the_same_bytes_only(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    found = load_backend(folder, cache)
    backend_module._known.clear()
    with monkeypatch.context() as broken:
        broken.setattr(backend_module, "_ask_transformers", _must_not_be_asked)
        assert load_backend(folder, cache) == found
        backend_module._known.clear()
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 99}))
        with pytest.raises(AssertionError):
            load_backend(folder, cache)


def _must_not_be_asked(*_: object) -> None:
    raise AssertionError("transformers was asked again")


def test_a_cache_that_was_cut_short_is_not_believed(folder: Path, tmp_path: Path) -> None:
    found = load_backend(folder, tmp_path)
    backend_module._known.clear()
    (file,) = (tmp_path / "tokenizers").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    assert load_backend(folder, tmp_path) == found


def test_a_tokenizer_that_cannot_be_read_is_refused_with_the_reason(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ModelUnavailable, match="cannot be loaded"):
        load_backend(folder)


def test_tokenising_loads_neither_torch_nor_transformers() -> None:
    program = "import tuneloop.steps.preprocess, tuneloop.steps.tokenizer, sys; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert {"torch", "transformers", "mlflow", "pandas"}.isdisjoint(ran.stdout.split())
