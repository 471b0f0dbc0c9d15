"""The finetune step: what lies in `trained`, and that it is the same every time."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import load_file, save_file

from tests.conversations import write_dataset
from tests.models import tiny_model
from tuneloop import lm
from tuneloop.core.digest import of_path
from tuneloop.core.errors import ModelUnavailable, Unsupported
from tuneloop.core.types import StepFile, StepFileInput
from tuneloop.steps import finetune
from tuneloop.steps.context import StepContext
from tuneloop.steps.finetune.choice import carried_out
from tuneloop.training import Machine

MACHINE = Machine("cpu", 0, False)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_model(tmp_path_factory.mktemp("model"), "smollm2")
    note = {"format": 1, "base_model": "Tiny:1", "note": None, "template_digest": None, "parameters": 1}
    (folder / "tuneloop.json").write_text(json.dumps(note))
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


class Attempts:
    """Makes attempt folders, and closes what their contexts opened."""

    def __init__(self, root: Path, model_folder: Path, dataset: Path) -> None:
        self.root, self.model_folder, self.dataset = root, model_folder, dataset
        self.contexts: list[StepContext] = []

    def new(self, name: str = "a", previous: tuple[Path, ...] = (), **parameters: Any) -> StepContext:
        folder = self.root / name
        folder.mkdir()
        inputs = {"model": self.model_folder, "dataset": self.dataset}
        step = StepFile(
            attempt="job/finetune/1",
            attempt_id=name,
            kind="finetune",
            parameters={"learning_rate": 1e-3, "per_device_train_batch_size": 4, **parameters},
            inputs={role: StepFileInput(path=str(path), digest="sha256:0") for role, path in inputs.items()},
            outputs={"trained": "folder"},
            previous_attempts=tuple(str(each) for each in previous),
        )
        self.contexts.append(StepContext(folder, step))
        return self.contexts[-1]


@pytest.fixture
def attempts(tmp_path: Path, model_folder: Path, dataset: Path) -> Iterator[Attempts]:
    made = Attempts(tmp_path, model_folder, dataset)
    yield made
    for context in made.contexts:
        context.close()


def texts_of(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.rglob("*.json"))


def test_lora_gives_an_adapter_that_fits_the_base_and_names_no_path(
    attempts: Attempts, model_folder: Path
) -> None:
    context = attempts.new("a", apply_lora=True, lora_r=4)
    finetune.run(context)
    trained = context.output("trained")
    assert {path.name for path in trained.iterdir()} == {
        "trained.json",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    about = json.loads((trained / "trained.json").read_text())
    assert (about["format"], about["mode"], about["engine"], about["base_model"]) == (
        1,
        "lora",
        "packed/1",
        "Tiny:1",
    )
    assert about["steps"] == 4
    config = json.loads((trained / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "Tiny:1"
    assert str(model_folder.parent) not in texts_of(trained)
    model = lm.load_adapter(lm.load_model(model_folder), trained)
    assert any(bool(tensor.any()) for name, tensor in model.named_parameters() if "lora_B" in name)


def test_full_training_gives_a_model_folder_with_its_tokenizer(
    attempts: Attempts, model_folder: Path
) -> None:
    context = attempts.new("a")
    finetune.run(context)
    trained = context.output("trained")
    assert json.loads((trained / "trained.json").read_text())["mode"] == "full"
    assert str(model_folder.parent) not in texts_of(trained)
    assert lm.load_template(trained).digest == lm.load_template(model_folder).digest
    assert not (trained / "tuneloop.json").exists()
    tuned, base = lm.load_model(trained), lm.load_model(model_folder)
    assert tuned.dtype == torch.float32
    changed = [
        not torch.equal(mine, theirs)
        for mine, theirs in zip(tuned.parameters(), base.parameters(), strict=True)
    ]
    assert all(changed)


def test_an_equal_run_gives_an_equal_digest(attempts: Attempts, tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        context = attempts.new(name, apply_lora=True, lora_r=2)
        finetune.run(context)
        digests.add(of_path(context.output("trained")))
    assert len(digests) == 1


def test_an_attempt_after_a_lost_one_goes_on_and_gives_an_equal_digest(
    attempts: Attempts, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"apply_lora": True, "lora_dropout": 0.1, "num_train_epochs": 2}
    whole = attempts.new("whole", **settings)
    finetune.run(whole)
    lost = attempts.new("lost", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(lost, "metrics", lambda step, **_: 1 / 0 if step == 8 else None)
        with pytest.raises(ZeroDivisionError):
            finetune.run(lost)
    again = attempts.new("again", (lost.folder,), **settings)
    finetune.run(again)
    assert again.summary["resumed_from_step"] == 4
    assert of_path(again.output("trained")) == of_path(whole.output("trained"))


def test_progress_curves_and_summary_are_told(attempts: Attempts, tmp_path: Path) -> None:
    context = attempts.new("a", apply_lora=True, logging_steps=2)
    finetune.run(context)
    stages = [
        json.loads(line)["stage"] for line in (tmp_path / "a" / "progress.jsonl").read_text().splitlines()
    ]
    assert stages[0] == "loading the model"
    assert "training" in stages
    assert stages[-1] == "saving"
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line["values"]] == [2, 4]
    assert context.summary["loss"] == lines[-1]["values"].get("loss", lines[-2]["values"].get("loss"))
    assert context.summary["steps"] == 4
    assert context.summary["eval_loss"] > 0
    assert context.summary["peak_memory_bytes"] > 1e6


def test_refused_parameters_fail_before_the_model_is_loaded(attempts: Attempts, tmp_path: Path) -> None:
    attempts.model_folder = tmp_path / "no model"
    context = attempts.new(apply_ort="true")
    with pytest.raises(Unsupported, match="apply_ort is true"):
        finetune.run(context)


def test_tensors_of_another_shape_start_at_random_and_are_named_when_that_is_asked_for(
    attempts: Attempts, tmp_path: Path
) -> None:
    attempts.model_folder = _with_a_smaller_norm(attempts.model_folder, tmp_path / "odd")
    with pytest.raises(ModelUnavailable, match="cannot be loaded: You set `ignore_mismatched_sizes`"):
        finetune.run(attempts.new("refused"))
    context = attempts.new("a", ignore_mismatched_sizes=True)
    finetune.run(context)
    (warning,) = [each for each in context.warnings if "ignore_mismatched_sizes" in each]
    assert "1 tensor(s) of another shape" in warning
    assert warning.endswith("model.norm.weight.")


def _with_a_smaller_norm(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:8].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_lora_options_reach_the_adapter(attempts: Attempts) -> None:
    context = attempts.new("a", apply_lora=True, lora_use_rslora=True, lora_use_dora=True, max_steps=1)
    finetune.run(context)
    config = json.loads((context.output("trained") / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["use_dora"]) == (True, True)


def test_the_memory_that_there_is_decides_what_is_computed_at_a_time(attempts: Attempts) -> None:
    plenty, little = attempts.new("plenty"), attempts.new("little")
    roomy = carried_out(plenty.step, MACHINE)
    tight = carried_out(little.step.model_copy(update={"memory_bytes": 1}), MACHINE)
    assert (roomy.pack_tokens, roomy.is_checkpointed) == (1024, False)
    assert (tight.pack_tokens, tight.is_checkpointed) == (tight.longest, True)
    written = attempts.new("written", pack_tokens=77, activation_checkpointing="never")
    obeyed = carried_out(written.step.model_copy(update={"memory_bytes": 1}), MACHINE)
    assert (obeyed.pack_tokens, obeyed.is_checkpointed) == (77, False)


def test_one_process_is_planned_where_one_is_asked_for_and_no_other_process_is_started(
    attempts: Attempts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    context = attempts.new("a", apply_lora=True, max_steps=1, cpu_processes=2)
    finetune.run(context)
    assert context.summary["processes"] == 1
