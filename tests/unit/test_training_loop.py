"""The loop against an independent one, against itself, and through its decisions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
import transformers
from safetensors.torch import load_file

from tests.conversations import Heard, write_dataset, write_split
from tests.models import tiny_model
from tests.unit.test_training_loss import padded_loss
from tuneloop import lm
from tuneloop.core.errors import DataError, Diverged, OutOfMemory, Unsupported
from tuneloop.core.recipe import FinetuneParameters
from tuneloop.training import Machine, TrainingInputs, TrainingResult, train
from tuneloop.training.course import Course
from tuneloop.training.data import Conversations
from tuneloop.training.loss import Objective

LAPTOP = Machine("cpu", 0, has_fast_bf16=False)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def parameters(**changes: Any) -> FinetuneParameters:
    chosen = {"learning_rate": 1e-3, "logging_steps": 1, "evaluation_strategy": "disable", **changes}
    return FinetuneParameters.model_validate(chosen)


def run(
    model: torch.nn.Module, dataset: Path, folder: Path, chosen: FinetuneParameters
) -> tuple[TrainingResult, Heard]:
    heard = Heard()
    inputs = TrainingInputs(dataset, chosen, folder / "checkpoints")
    return train(model, inputs, heard, LAPTOP), heard


def independent_losses(model: torch.nn.Module, dataset: Path, chosen: FinetuneParameters) -> list[float]:
    """transformers' own loss on padded batches, its scheduler, and torch's AdamW, written down plainly."""
    split = Conversations(dataset / "train.arrow")
    course = Course(len(split), chosen.per_device_train_batch_size, chosen.num_train_epochs, -1, chosen.seed)
    decaying = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decaying, "weight_decay": chosen.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=chosen.learning_rate,
        foreach=False,
    )
    scheduler = transformers.get_scheduler(
        chosen.lr_scheduler_type,
        optimizer,
        num_warmup_steps=chosen.warmup_steps,
        num_training_steps=course.total_steps,
    )
    losses = []
    for step in range(course.total_steps):
        conversations = [split[index] for index in course.rows_of(step)]
        learned = sum(int(each.learn[1:].sum()) for each in conversations)
        loss = padded_loss(model, conversations) / learned
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), chosen.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_losses_equal_those_of_an_independent_loop(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    chosen = parameters(
        per_device_train_batch_size=3,
        num_train_epochs=2,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        weight_decay=0.1,
    )
    _, heard = run(lm.load_model(model_folder).requires_grad_(True), dataset, tmp_path, chosen)
    expected = independent_losses(lm.load_model(model_folder), dataset, chosen)
    assert list(heard.curve("loss").values()) == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < expected[0] - 0.5


EXPECTED_LOSSES = [6.4699, 6.2773, 6.3093, 6.0869, 5.8152, 5.3991, 5.5422, 5.0664]
"""Full training of the tiny Llama at batch 4, linear, learning rate 1e-3; to 1e-3, across torch versions."""


def test_losses_are_the_expected_ones(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    chosen = parameters(per_device_train_batch_size=4, num_train_epochs=2)
    _, heard = run(lm.load_model(model_folder), dataset, tmp_path, chosen)
    assert list(heard.curve("loss").values()) == pytest.approx(EXPECTED_LOSSES, abs=1e-3)


def test_the_result_tells_the_device_and_the_memory_of_a_gpu_only_where_there_is_one(
    model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    result, _ = run(lm.load_model(model_folder), dataset, tmp_path, parameters(max_steps=1))
    assert (result.device, result.peak_device_memory_bytes) == ("cpu", None)


def test_a_pack_that_memory_does_not_hold_says_which_parameters_to_change(
    model_folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Objective, "summed_loss", lambda *_: torch.empty(1 << 50))
    with pytest.raises(OutOfMemory, match="activation_checkpointing: always"):
        run(lm.load_model(model_folder), dataset, tmp_path, parameters(max_steps=1))


@pytest.mark.parametrize("cut", [(1, 8), (2, 4), (4, 2)])
@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2"])
def test_how_the_effective_batch_is_cut_changes_nothing(
    tmp_path: Path, dataset: Path, family: Any, cut: tuple[int, int]
) -> None:
    folder = tiny_model(tmp_path / "model", family)

    def losses(batch_size: int, accumulation: int) -> list[float]:
        chosen = parameters(
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, max_steps=3
        )
        _, heard = run(lm.load_model(folder), dataset, tmp_path / f"{batch_size}", chosen)
        return list(heard.curve("loss").values())

    assert losses(*cut) == pytest.approx(losses(8, 1), abs=1e-5)


def test_devices_that_are_missing_are_made_up_for(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    alone, heard_alone = run(
        lm.load_model(model_folder), dataset, tmp_path / "a", parameters(gradient_accumulation_steps=4)
    )
    asked, heard_asked = run(
        lm.load_model(model_folder), dataset, tmp_path / "b", parameters(number_of_gpu_to_use_finetuning=4)
    )
    assert (asked.effective_batch, asked.processes, asked.processes_asked) == (4, 1, 4)
    assert heard_asked.curve("loss") == heard_alone.curve("loss")
    assert asked.steps == alone.steps


@pytest.mark.parametrize("changes", [{"pack_tokens": 40}, {"pack_tokens": 1}, {"packing": False}])
def test_how_many_tokens_are_computed_at_a_time_changes_nothing(
    model_folder: Path, dataset: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    chosen = {"per_device_train_batch_size": 8, "num_train_epochs": 2}
    budget = {"pack_tokens": changes.get("pack_tokens", 0)}
    whole = TrainingInputs(dataset, parameters(**chosen), tmp_path / "a")
    cut = TrainingInputs(dataset, parameters(**chosen, **changes), tmp_path / "b", **budget)
    curves = []
    for inputs in (whole, cut):
        heard = Heard()
        train(lm.load_model(model_folder), inputs, heard, LAPTOP)
        curves.append(list(heard.curve("loss").values()))
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)


def test_packs_get_smaller_when_memory_runs_out_and_that_is_asked_for(
    model_folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {"per_device_train_batch_size": 8, "num_train_epochs": 2}
    _, undisturbed = run(lm.load_model(model_folder), dataset, tmp_path / "a", parameters(**chosen))
    summed_loss, largest = Objective.summed_loss, 100

    def tight(self: Objective, batch: Any, *more: Any) -> torch.Tensor:
        if batch.tokens > largest:
            return torch.empty(1 << 50)
        return summed_loss(self, batch, *more)

    monkeypatch.setattr(Objective, "summed_loss", tight)
    result, heard = run(
        lm.load_model(model_folder), dataset, tmp_path / "b", parameters(**chosen, auto_find_batch_size=True)
    )
    assert result.pack_tokens == 64
    assert list(heard.curve("loss").values()) == pytest.approx(
        list(undisturbed.curve("loss").values()), abs=1e-5
    )
    assert any("at most 64 tokens" in warning for warning in heard.warnings)
    monkeypatch.setattr(Objective, "summed_loss", lambda *_: torch.empty(1 << 50))
    with pytest.raises(OutOfMemory):
        run(lm.load_model(model_folder), dataset, tmp_path / "c", parameters(auto_find_batch_size=True))


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_lora_trains_the_adapter_and_leaves_the_base_alone(
    model_folder: Path, dataset: Path, tmp_path: Path, optim: str
) -> None:
    model = lm.add_lora(lm.load_model(model_folder), 4, 8, 0.1, seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result, heard = run(
        model, dataset, tmp_path, parameters(optim=optim, num_train_epochs=4, per_device_train_batch_size=4)
    )
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert result.final_loss < heard.curve("loss")[1]


def test_metrics_tell_loss_rate_norm_epoch_and_speed(
    model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    chosen = parameters(per_device_train_batch_size=4, num_train_epochs=2, logging_steps=3)
    result, heard = run(lm.load_model(model_folder), dataset, tmp_path, chosen)
    assert [step for step, _ in heard.lines] == [3, 6, 8]
    assert set(heard.lines[0][1]) == {
        "loss",
        "learning_rate",
        "grad_norm",
        "epoch",
        "tokens_per_second",
        "tokens_seen",
        "gemm_share",
        "memory_bytes",
    }
    split = Conversations(dataset / "train.arrow")
    assert heard.curve("tokens_seen")[8] == result.tokens == 2 * split.tokens
    assert result.learned_tokens == 2 * split.learned_tokens
    assert (result.steps, result.epochs) == (8, 2.0)
    assert "training" in heard.stages


def test_logging_by_epoch_gives_the_mean_of_the_epoch(
    model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    chosen = {"per_device_train_batch_size": 4, "num_train_epochs": 2}
    _, each = run(lm.load_model(model_folder), dataset, tmp_path / "a", parameters(**chosen))
    _, means = run(
        lm.load_model(model_folder), dataset, tmp_path / "b", parameters(**chosen, logging_strategy="epoch")
    )
    losses = list(each.curve("loss").values())
    assert means.curve("loss") == pytest.approx({4: sum(losses[:4]) / 4, 8: sum(losses[4:]) / 4})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"evaluation_strategy": "epoch"}, [4, 8]),
        ({"evaluation_strategy": "steps", "eval_steps": 3}, [3, 6, 8]),
        ({"evaluation_strategy": "steps", "eval_steps": 3, "evaluation_steps_interval": 0.5}, [2, 4, 6, 8]),
        ({"evaluation_strategy": "disable"}, []),
    ],
)
def test_evaluations_come_when_asked_and_after_the_last_step(
    model_folder: Path, dataset: Path, tmp_path: Path, changes: dict[str, Any], expected: list[int]
) -> None:
    chosen = parameters(per_device_train_batch_size=4, num_train_epochs=2, **changes)
    _, heard = run(lm.load_model(model_folder), dataset, tmp_path, chosen)
    assert list(heard.curve("eval_loss")) == expected


def test_the_validation_loss_is_the_mean_of_learned_tokens_whatever_the_batch(
    model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    split = Conversations(dataset / "validation.arrow")
    expected = padded_loss(lm.load_model(model_folder), list(split)).item() / split.learned_tokens
    for batch_size in (1, 3):
        chosen = parameters(
            evaluation_strategy="epoch", per_device_eval_batch_size=batch_size, learning_rate=1e-12
        )
        result, _ = run(lm.load_model(model_folder), dataset, tmp_path / f"{batch_size}", chosen)
        assert result.eval_loss == pytest.approx(expected, abs=1e-5)


@pytest.fixture
def overfitting(tmp_path: Path) -> Path:
    """Validation asks for the opposite of what training teaches, so its loss only rises."""
    folder = tmp_path / "contrary"
    folder.mkdir()
    write_split(folder / "train.arrow", [[20, 30, 31, 32]] * 8, [[False, True, True, True]] * 8)
    write_split(folder / "validation.arrow", [[20, 40, 41, 42]] * 2, [[False, True, True, True]] * 2)
    return folder


def test_the_weights_with_the_lowest_validation_loss_are_kept(
    model_folder: Path, overfitting: Path, tmp_path: Path
) -> None:
    chosen = parameters(evaluation_strategy="epoch", num_train_epochs=3, per_device_train_batch_size=4)
    model = lm.load_model(model_folder)
    result, heard = run(model, overfitting, tmp_path, chosen)
    curve = heard.curve("eval_loss")
    best = min(curve, key=curve.__getitem__)
    assert best < result.steps
    assert (result.kept_step, result.eval_loss) == (best, curve[best])
    kept = load_file(tmp_path / "checkpoints" / f"checkpoint-{best}" / "weights.safetensors")
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in kept.items())
    assert any(f"the weights after step {best} are kept" in warning for warning in heard.warnings)


def test_the_best_weights_outlive_the_checkpoint_they_were_made_with(
    model_folder: Path, overfitting: Path, tmp_path: Path
) -> None:
    chosen = parameters(evaluation_strategy="epoch", num_train_epochs=5, save_total_limit=1)
    result, _ = run(lm.load_model(model_folder), overfitting, tmp_path, chosen)
    assert result.kept_step < result.steps
    (left,) = (tmp_path / "checkpoints").iterdir()
    assert left.name == f"checkpoint-{result.steps}"


def test_early_stopping_ends_training_after_its_patience(
    model_folder: Path, overfitting: Path, tmp_path: Path
) -> None:
    chosen = parameters(
        evaluation_strategy="epoch",
        num_train_epochs=20,
        apply_early_stopping=True,
        early_stopping_patience=2,
    )
    result, heard = run(lm.load_model(model_folder), overfitting, tmp_path, chosen)
    assert result.is_stopped_early
    assert result.steps == result.kept_step + 16
    assert len(heard.curve("eval_loss")) == result.steps // 8


def test_a_loss_that_is_not_a_number_names_step_and_rows(
    model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    model = lm.load_model(model_folder)
    with torch.no_grad():
        model.model.embed_tokens.weight[445] = math.nan
    folder = tmp_path / "poisoned"
    folder.mkdir()
    ids = [[20, 21, 22]] * 6
    ids[4] = [20, 445, 22]
    write_split(folder / "train.arrow", ids, [[False, True, True]] * 6)
    chosen = parameters(gradient_accumulation_steps=6)
    with pytest.raises(Diverged) as caught:
        run(model, folder, tmp_path, chosen)
    assert caught.value.details == {"step": 1, "rows": [5], "file": None}
    assert "step 1 of 1: the loss is nan, with training rows 5." in str(caught.value)


def test_a_missing_split_and_an_unsupported_parameter_are_said_before_training(
    model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "train.arrow").write_bytes((dataset / "train.arrow").read_bytes())
    chosen = parameters(evaluation_strategy="epoch")
    with pytest.raises(DataError, match=r"holds no split validation"):
        run(lm.load_model(model_folder), tmp_path / "half", tmp_path, chosen)
    with pytest.raises(Unsupported, match="apply_ort"):
        run(lm.load_model(model_folder), dataset, tmp_path, parameters(apply_ort=True))


def test_full_determinism_gives_equal_losses_twice(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    chosen = parameters(enable_full_determinism=True, max_steps=3)
    try:
        curves = [
            run(lm.load_model(model_folder), dataset, tmp_path / f"{turn}", chosen)[1].curve("loss")
            for turn in range(2)
        ]
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert curves[0] == curves[1]
