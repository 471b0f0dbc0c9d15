"""The finetune step: what lies in `trained`, and that it is the same every time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from tests.conversations import write_dataset
from tests.models import tiny_model
from tuneloop import lm
from tuneloop.core.digest import of_path
from tuneloop.core.errors import Unsupported
from tuneloop.core.types import StepFile, StepFileInput
from tuneloop.steps import finetune
from tuneloop.steps.context import StepContext


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
        "plain/1",
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
