"""Checkpoints are whole or passed over, few enough, and enough to go on as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import tuneloop
from tests.conversations import Heard, write_dataset
from tests.models import tiny_model
from tuneloop import lm
from tuneloop.core.recipe import FinetuneParameters
from tuneloop.training import Machine, TrainingInputs, TrainingResult, checkpoint, layout, train

LAPTOP = Machine("cpu", 0, has_fast_bf16=False)
CPU = torch.device("cpu")


class Killed(BaseException):
    pass


def save(
    root: Path, step: int, *, is_milestone: bool = False, best: tuple[Path, ...] = (), **state: Any
) -> Path:
    return checkpoint.save(
        root,
        state={"step": step, **state},
        tensors={"weights": {"w": torch.full((3,), float(step))}},
        best_weights=best,
        fits="this",
        is_milestone=is_milestone,
        writers=layout.Plain(CPU),
    )


def find(*roots: Path) -> tuple[checkpoint.Found | None, list[str]]:
    skipped: list[str] = []
    return checkpoint.find(roots, "this", skipped.append), skipped


# ---------------------------------------------------------------- the files


def test_the_furthest_checkpoint_of_all_attempts_is_found(tmp_path: Path) -> None:
    save(tmp_path / "1", 9)
    save(tmp_path / "1", 10)
    save(tmp_path / "2", 2)
    found, skipped = find(tmp_path / "2", tmp_path / "1", tmp_path / "none")
    assert found is not None
    assert (found.step, skipped) == (10, [])
    assert found.tensors("weights")["w"].tolist() == [10.0] * 3


def tear(folder: Path) -> None:
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder: Path) -> None:
    path = folder / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def lose(folder: Path) -> None:
    (folder / "state.json").unlink()


def blank(folder: Path) -> None:
    (folder / "manifest.json").write_text("")


@pytest.mark.parametrize("damage", [tear, flip, lose, blank])
def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(tmp_path: Path, damage: Any) -> None:
    save(tmp_path, 4)
    damage(save(tmp_path, 8))
    found, skipped = find(tmp_path)
    assert found is not None
    assert found.step == 4
    assert len(skipped) == 1
    assert skipped[0].startswith("checkpoint checkpoint-8 is passed over")


def test_a_checkpoint_of_another_run_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 4)
    skipped: list[str] = []
    assert checkpoint.find([tmp_path], "another", skipped.append) is None
    assert "other parameters, data or another engine" in skipped[0]


def test_a_checkpoint_that_was_never_finished_does_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 4)

    def no_rename(_old: Path, _new: Path) -> None:
        raise Killed

    monkeypatch.setattr(os, "rename", no_rename)
    with pytest.raises(Killed):
        save(tmp_path, 8)
    found, skipped = find(tmp_path)
    assert found is not None
    assert (found.step, skipped) == (4, [])


def test_best_weights_go_along_with_every_checkpoint(tmp_path: Path) -> None:
    first = save(tmp_path, 1, best_step=1)
    second = save(tmp_path, 2, best=(first / "weights.safetensors",), best_step=1)
    checkpoint.prune(tmp_path, 1, is_finished=False)
    found, _ = find(tmp_path)
    assert found is not None
    assert found.best_weights() == [second / "best.safetensors"]
    assert (second / "best.safetensors").read_bytes() == (first / "weights.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("limit", "is_finished", "left"),
    [
        (-1, False, {2, 4, 6, 7}),
        (-1, True, {2, 4, 6}),
        (1, False, {6, 7}),
        (1, True, {6}),
        (2, True, {4, 6}),
    ],
)
def test_milestones_are_kept_up_to_the_limit_and_the_newest_two_while_training(
    tmp_path: Path, limit: int, is_finished: bool, left: set[int]
) -> None:
    for step in range(1, 8):
        save(tmp_path, step, is_milestone=step in (2, 4, 6))
    checkpoint.prune(tmp_path, limit, is_finished=is_finished)
    assert {int(folder.name.rpartition("-")[2]) for folder in tmp_path.iterdir()} == left


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(1)), random.gauss(0, 1)

    random.seed(3)
    draw()
    tensors, state = checkpoint.dump_random(CPU)
    state = json.loads(json.dumps(state))
    expected = draw()
    draw()
    checkpoint.load_random(tensors, state, CPU)
    assert draw() == expected


def test_nothing_in_a_checkpoint_is_a_pickle(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    run(model_folder, dataset, tmp_path, parameters(max_steps=1))
    names = {path.name for path in (tmp_path / "checkpoints" / "checkpoint-1").iterdir()}
    assert names == {
        "weights.safetensors",
        "optimizer.safetensors",
        "random.safetensors",
        "state.json",
        "manifest.json",
    }


# ---------------------------------------------------------------- going on


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"), train=10)


def parameters(**changes: Any) -> FinetuneParameters:
    return FinetuneParameters.model_validate({"learning_rate": 1e-3, "logging_steps": 1, **changes})


LORA = {
    "apply_lora": True,
    "lora_dropout": 0.2,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.1,
    "logging_steps": 2,
}
FULL = {"optim": "adafactor", "num_train_epochs": 2, "per_device_train_batch_size": 2, "max_steps": 9}
STOPPING = {
    "apply_lora": True,
    "num_train_epochs": 4,
    "evaluation_strategy": "steps",
    "eval_steps": 2,
    "apply_early_stopping": True,
    "early_stopping_patience": 3,
    "early_stopping_threshold": 0.02,
    "per_device_train_batch_size": 2,
    "save_total_limit": 1,
}


def run(
    model_folder: Path,
    dataset: Path,
    folder: Path,
    chosen: FinetuneParameters,
    *,
    previous: tuple[Path, ...] = (),
    kill_at: int | None = None,
    seconds: int = 0,
) -> tuple[TrainingResult, Heard, torch.nn.Module]:
    def at_metrics(step: int, values: dict[str, float]) -> None:
        if kill_at is not None and step >= kill_at:
            raise Killed

    model: Any = lm.load_model(model_folder)
    if chosen.apply_lora:
        model = lm.add_lora(model, 4, 8, chosen.lora_dropout, seed=chosen.seed)
    heard = Heard(at_metrics)
    chosen = chosen.model_copy(update={"checkpoint_seconds": seconds})
    inputs = TrainingInputs(
        dataset, chosen, folder / "checkpoints", tuple(each / "checkpoints" for each in previous)
    )
    return train(model, inputs, heard, LAPTOP), heard, model


@pytest.fixture(scope="module", params=[LORA, FULL, STOPPING], ids=["lora", "full", "stopping"])
def undisturbed_run(
    request: pytest.FixtureRequest,
    model_folder: Path,
    dataset: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[FinetuneParameters, TrainingResult, Heard, torch.nn.Module]:
    chosen = parameters(**request.param)
    return chosen, *run(model_folder, dataset, tmp_path_factory.mktemp("whole"), chosen)


@pytest.mark.parametrize("kill_at", [1, 3, 4, 7])
def test_an_interrupted_run_ends_with_the_losses_and_weights_of_an_undisturbed_one(
    undisturbed_run: tuple[FinetuneParameters, TrainingResult, Heard, torch.nn.Module],
    model_folder: Path,
    dataset: Path,
    tmp_path: Path,
    kill_at: int,
) -> None:
    chosen, whole, undisturbed, expected = undisturbed_run
    with pytest.raises(Killed):
        run(model_folder, dataset, tmp_path / "1", chosen, kill_at=kill_at)
    result, resumed, model = run(model_folder, dataset, tmp_path / "2", chosen, previous=(tmp_path / "1",))
    for name in ("loss", "eval_loss", "grad_norm", "learning_rate"):
        curve = undisturbed.curve(name)
        assert resumed.curve(name) == pytest.approx(
            {step: curve[step] for step in resumed.curve(name)}, abs=1e-6
        )
    assert max(resumed.curve("loss")) == max(undisturbed.curve("loss"))
    assert (result.steps, result.kept_step, result.tokens) == (whole.steps, whole.kept_step, whole.tokens)
    assert result.is_stopped_early == whole.is_stopped_early
    assert result.mean_loss == pytest.approx(whole.mean_loss, abs=1e-6)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_attempts_that_die_again_and_again_still_get_there(
    model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    chosen = parameters(**LORA)
    _, undisturbed, _ = run(model_folder, dataset, tmp_path / "whole", chosen)
    attempts: list[Path] = []
    for number, kill_at in enumerate([2, 4, 8], 1):
        folder = tmp_path / str(number)
        with pytest.raises(Killed):
            run(model_folder, dataset, folder, chosen, previous=tuple(attempts), kill_at=kill_at)
        attempts.insert(0, folder)
    _, last, _ = run(model_folder, dataset, tmp_path / "4", chosen, previous=tuple(attempts))
    assert min(last.curve("loss")) == 8
    final = max(undisturbed.curve("loss"))
    assert last.curve("loss")[final] == pytest.approx(undisturbed.curve("loss")[final], abs=1e-6)


def test_a_run_that_had_finished_is_not_trained_again(
    model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    chosen = parameters(**STOPPING)
    first, _, model = run(model_folder, dataset, tmp_path / "1", chosen)
    again, heard, same = run(model_folder, dataset, tmp_path / "2", chosen, previous=(tmp_path / "1",))
    assert heard.lines == []
    assert again.resumed_from_step == first.steps
    assert (again.kept_step, again.final_loss) == (first.kept_step, first.final_loss)
    assert all(torch.equal(same.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_where_checkpoints_fall_changes_no_loss(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    chosen = parameters(**LORA)
    _, often, _ = run(model_folder, dataset, tmp_path / "often", chosen, seconds=0)
    _, seldom, _ = run(model_folder, dataset, tmp_path / "seldom", chosen, seconds=3600)
    assert often.curve("loss") == seldom.curve("loss")


def test_changed_parameters_start_from_the_beginning_and_say_so(
    model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    run(model_folder, dataset, tmp_path / "1", parameters(**FULL))
    result, heard, _ = run(
        model_folder,
        dataset,
        tmp_path / "2",
        parameters(**{**FULL, "learning_rate": 2e-3}),
        previous=(tmp_path / "1",),
    )
    assert result.resumed_from_step is None
    assert any("other parameters" in warning for warning in heard.warnings)


def test_asking_to_resume_with_nothing_to_resume_from_is_said(
    model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    _, heard, _ = run(model_folder, dataset, tmp_path, parameters(max_steps=1, resume_from_checkpoint=True))
    assert any("there is no checkpoint" in warning for warning in heard.warnings)


KILLED_WHILE_ACCUMULATING = """
import os, signal, sys
from pathlib import Path
from tests.unit import test_training_checkpoint as here
from tuneloop.training.loss import Objective

calls = 0
summed_loss = Objective.summed_loss

def deadly(*arguments, **named):
    global calls
    calls += 1
    if calls == 18:  # the second pack of the fifth step, of four conversations each
        os.kill(os.getpid(), signal.SIGKILL)
    return summed_loss(*arguments, **named)

Objective.summed_loss = deadly
changes = {**here.LORA, "evaluation_strategy": "disable", "packing": False}
here.run(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), here.parameters(**changes))
"""


def test_a_process_killed_between_two_micro_batches_loses_only_that_step(
    model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{Path(tuneloop.__file__).parents[1]}"}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_ACCUMULATING, model_folder, dataset, tmp_path / "1"],
        env=environment,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    chosen = parameters(**LORA, evaluation_strategy="disable", packing=False)
    _, undisturbed, _ = run(model_folder, dataset, tmp_path / "whole", chosen)
    result, resumed, _ = run(model_folder, dataset, tmp_path / "2", chosen, previous=(tmp_path / "1",))
    assert result.resumed_from_step == 4
    curve = undisturbed.curve("loss")
    assert resumed.curve("loss") == pytest.approx(
        {step: curve[step] for step in resumed.curve("loss")}, abs=1e-6
    )
    assert max(resumed.curve("loss")) == max(curve)
