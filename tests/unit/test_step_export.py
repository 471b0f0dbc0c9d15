"""The export step: an MLflow model that answers as what was trained, and loads without Tuneloop."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("mlflow")

from safetensors.torch import load_file, save_file  # noqa: E402

from tests.models import tiny_model  # noqa: E402
from tests.steps import step_context  # noqa: E402
from tuneloop import lm  # noqa: E402
from tuneloop.core.digest import of_path  # noqa: E402
from tuneloop.core.errors import ExportMismatch, ModelUnavailable  # noqa: E402
from tuneloop.steps import export  # noqa: E402
from tuneloop.steps.context import StepContext  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)

LOADED_ELSEWHERE = """
import json, os, socket, sys
sys.modules["tuneloop"] = None  # importing it fails
def refuse(*given):
    raise OSError("this test has no network")
socket.socket.connect = refuse
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
question = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
(reply,) = model.predict(question)
pipeline = mlflow.transformers.load_model(sys.argv[1])
assert sys.modules["tuneloop"] is None
print(json.dumps({"reply": reply, "kind": type(pipeline).__name__, "left": os.listdir(".")}))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_model(tmp_path_factory.mktemp("base"), "smollm2")
    note = {
        "format": 1,
        "base_model": "Tiny:1",
        "note": "made up",
        "license": "mit",
        "template_digest": lm.load_template(folder).digest,
        "parameters": 106_816,
    }
    (folder / "tuneloop.json").write_text(json.dumps(note))
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    model = lm.add_lora(lm.load_model(base), 4, 8, seed=1)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "trained.json").write_text(json.dumps({"format": 1, "mode": "lora"}))
    return folder


def run(folder: Path, base: Path, trained: Path, **parameters: Any) -> StepContext:
    context = step_context(
        folder,
        "export",
        inputs={"model": base, "trained": trained},
        outputs={"mlflow_model": "mlflow_model"},
        parameters=parameters,
    )
    try:
        export.run(context)
    finally:
        context.close()
    return context


@pytest.fixture(scope="module")
def exported(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("step"), base, adapter).output("mlflow_model")


def test_the_exported_model_answers_as_the_adapter_does(base: Path, adapter: Path, exported: Path) -> None:
    ids = torch.arange(20, 60).unsqueeze(0)
    with torch.no_grad():
        expected = lm.load_adapter(lm.load_model(base), adapter).eval()(ids).logits
        seen = lm.load_model(exported)(ids).logits
        untouched = lm.load_model(base)(ids).logits
    assert (seen - expected).abs().max() < 2e-5
    assert (untouched - expected).abs().max() > 0.1


def test_the_exported_tokenizer_and_template_are_those_of_the_base(base: Path, exported: Path) -> None:
    assert lm.load_template(exported).digest == lm.load_template(base).digest
    text = "Hello <|im_end|> world"
    assert lm.load_tokenizer(exported).encode(text) == lm.load_tokenizer(base).encode(text)


def test_the_exported_model_says_where_it_comes_from(base: Path, exported: Path) -> None:
    note = lm.read_note(exported)
    assert note["base_model"] == "Tiny:1"
    assert note["template_digest"] == lm.load_template(base).digest
    assert note["lineage"]["mode"] == "lora"
    assert note["lineage"]["inputs"] == {"model": "sha256:model", "trained": "sha256:trained"}
    assert note["checked"]["reloaded"] <= note["checked"]["tolerance"]
    written = (exported / "MLmodel").read_text()
    assert "inference_task: llm/v1/chat" in written
    assert "license: mit" in written
    assert note["template_digest"] in written
    assert "mit" in (exported / "LICENSE.txt").read_text()
    assert "+cpu" not in (exported / "requirements.txt").read_text()


def test_mlflow_loads_it_without_tuneloop_and_without_network(exported: Path, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LOADED_ELSEWHERE, str(exported)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    seen = json.loads(ended.stdout.splitlines()[-1])
    assert seen["reply"]["object"] == "chat.completion"
    assert seen["reply"]["choices"][0]["message"]["role"] == "assistant"
    assert seen["reply"]["usage"]["completion_tokens"] <= 4
    assert seen["kind"] == "TextGenerationPipeline"
    assert seen["left"] == []


def test_exporting_speaks_to_nobody_and_leaves_nothing_behind(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    tried = []

    def refuse(_socket: socket.socket, address: Any) -> None:
        tried.append(address)
        raise OSError("this test has no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run(tmp_path / "step", base, adapter)
    assert list((tmp_path / "here").iterdir()) == []
    assert tried == []


def test_equal_inputs_give_equal_bytes(base: Path, adapter: Path, exported: Path, tmp_path: Path) -> None:
    assert of_path(run(tmp_path, base, adapter).output("mlflow_model")) == of_path(exported)


def test_a_fully_trained_model_is_exported_as_it_is(base: Path, tmp_path: Path) -> None:
    trained = tiny_model(tmp_path / "trained", "smollm2", seed=5)
    (trained / "trained.json").write_text(json.dumps({"format": 1, "mode": "full"}))
    target = run(tmp_path / "step", base, trained).output("mlflow_model")
    ids = torch.arange(20, 60).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(lm.load_model(target)(ids).logits, lm.load_model(trained)(ids).logits)
    assert lm.read_note(target)["lineage"]["mode"] == "full"


# ---------------------------------------------------------------- refusals


def test_a_lost_adapter_is_refused(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm, "merge", lambda adapted: adapted.unload())
    with pytest.raises(ExportMismatch, match="merged weights do not answer as the trained ones do"):
        run(tmp_path, base, adapter)


def test_weights_that_change_on_the_disk_are_refused(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = export._save

    def save_and_spoil(model: Any, tokenizer: Any, target: Path, about: dict[str, Any]) -> None:
        save(model, tokenizer, target, about)
        file = target / "model" / "model.safetensors"
        weights = load_file(file)
        weights["model.layers.1.mlp.up_proj.weight"] += 0.05
        save_file(weights, file, metadata={"format": "pt"})

    monkeypatch.setattr(export, "_save", save_and_spoil)
    with pytest.raises(ExportMismatch, match="reloaded weights"):
        run(tmp_path, base, adapter)


@pytest.mark.parametrize(
    ("value", "reason"), [(float("nan"), "not a finite number"), (float("inf"), "finite")]
)
def test_an_adapter_with_a_value_that_is_not_finite_is_refused_by_name(
    base: Path, adapter: Path, tmp_path: Path, value: float, reason: str
) -> None:
    spoiled = tmp_path / "adapter"
    spoiled.mkdir()
    for file in adapter.iterdir():
        (spoiled / file.name).write_bytes(file.read_bytes())
    weights = load_file(spoiled / "adapter_model.safetensors")
    name = next(name for name in weights if "layers.1.mlp.down_proj.lora_B" in name)
    weights[name][0, 0] = value
    save_file(weights, spoiled / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportMismatch, match=rf"layers\.1\.mlp\.down_proj\.lora_B.*{reason}"):
        run(tmp_path / "step", base, spoiled)


def test_an_empty_tensor_is_refused_by_name() -> None:
    model = torch.nn.Module()
    model.register_parameter("hollow", torch.nn.Parameter(torch.empty(0, 4)))
    with pytest.raises(ExportMismatch, match="hollow: no elements"):
        export.refuse_unusable(model)


def test_a_tolerance_below_rounding_refuses_every_merge(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportMismatch) as caught:
        run(tmp_path, base, adapter, logits_tolerance=1e-12)
    assert caught.value.details["share"] > 1e-12


def test_a_folder_that_no_finetune_step_made_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "trained").mkdir()
    with pytest.raises(ModelUnavailable, match=r"holds no trained\.json"):
        run(tmp_path / "step", base, tmp_path / "trained")
