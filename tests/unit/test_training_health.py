"""What a run says of itself: arithmetic against torch's own counter, the divergence rule on made-up and on
real runs, the batch that is kept, memory against the plan, and the time left."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.conversations import Heard, write_dataset
from tests.models import Family, tiny_model
from tuneloop import lm
from tuneloop.core.errors import Diverged
from tuneloop.core.recipe import FinetuneParameters
from tuneloop.training import Machine, TrainingInputs, TrainingResult, flops, health, loop, train
from tuneloop.training.course import Course
from tuneloop.training.data import Conversations, pack
from tuneloop.training.divergence import blown_up
from tuneloop.training.loss import Objective
from tuneloop.training.pace import Pace
from tuneloop.training.tally import Tally

LAPTOP = Machine("cpu", 0, has_fast_bf16=False)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


class Watching(Heard):
    """Remembers the numbers of progress as well."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[dict[str, Any]] = []

    def progress(self, stage: str, *values: Any, **named: Any) -> None:
        super().progress(stage, *values, **named)
        self.shown.append({"stage": stage, **named})


def run(
    model: torch.nn.Module, dataset: Path, folder: Path, *, planned: int | None = None, **changes: Any
) -> tuple[TrainingResult, Watching]:
    chosen = {"learning_rate": 1e-3, "logging_steps": 1, "evaluation_strategy": "disable", **changes}
    heard = Watching()
    inputs = TrainingInputs(
        dataset,
        FinetuneParameters.model_validate(chosen),
        folder / "checkpoints",
        report_folder=folder,
        planned_memory_bytes=planned,
    )
    result = train(model, inputs, heard, LAPTOP)
    heard.warnings = [each for each in heard.warnings if not each.startswith("max_steps is")]
    return result, heard


# ---------------------------------------------------------------- arithmetic


def with_lora(folder: Path, **changes: Any) -> Any:
    chosen = FinetuneParameters(apply_lora=True, lora_r=4, **changes)
    return lm.add_lora(lm.load_model(folder), 4, 8, 0.0, chosen.lora_target_modules, seed=1)


def counted_by_torch(model: Any, conversations: Conversations) -> int:
    """FLOPs of a forward and a backward pass over all of it, as torch counts them, attention left out."""
    objective = Objective(model)
    model.train()
    batch = pack([conversations[index] for index in range(len(conversations))])
    with FlopCounterMode(display=False) as counter:
        objective.summed_loss(batch).backward()
    objective.close()
    products = {"mm", "addmm", "bmm", "baddbmm"}
    return sum(
        n for op, n in counter.get_flop_counts()["Global"].items() if str(op).split(".")[1] in products
    )


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2", "gemma3"])
@pytest.mark.parametrize("is_lora", [True, False])
def test_the_products_of_a_step_are_those_that_torch_counts(
    tmp_path: Path, dataset: Path, family: Family, is_lora: bool
) -> None:
    folder = tiny_model(tmp_path / "model", family)
    model = with_lora(folder) if is_lora else lm.load_model(folder).requires_grad_(True)
    split = Conversations(dataset / "train.arrow")
    work = flops.count(model)
    assert work is not None
    mine = work.per_token * split.tokens + work.per_learned * split.learned_tokens
    # torch's counter does not see the head's `addmm_`, which forms the gradient of its weights.
    unseen = 0 if is_lora else work.per_learned // 3 * split.learned_tokens
    assert mine == counted_by_torch(model, split) + unseen


def test_attention_counts_each_pair_of_tokens_that_see_each_other() -> None:
    work = flops.Work(per_token=0, per_learned=0, per_pair={None: 10, 3: 1})
    # 5 tokens: 1+2+3+4+5 pairs; with a window of 3: 1+2+3+3+3.
    assert work.of(np.array([5, 0]), np.array([1, 0])).tolist() == [150 + 12, 0]


def test_attention_is_six_products_of_heads_and_a_window_counts_where_it_is(tmp_path: Path) -> None:
    plain = flops.count(lm.load_model(tiny_model(tmp_path / "a")).requires_grad_(True))
    config = lm.load_model(tmp_path / "a").config
    assert plain is not None
    size = config.num_attention_heads * config.head_dim
    assert plain.per_pair == {None: config.num_hidden_layers * 6 * 2 * size}
    gemma = flops.count(lm.load_model(tiny_model(tmp_path / "b", "gemma3")).requires_grad_(True))
    kinds = lm.load_model(tmp_path / "b").config.get_text_config().layer_types
    assert gemma is not None
    assert (None in gemma.per_pair) == ("full_attention" in kinds)
    assert any(window is not None for window in gemma.per_pair) == ("sliding_attention" in kinds)


def test_a_model_whose_products_are_not_all_counted_has_no_share(model_folder: Path) -> None:
    model = lm.load_model(model_folder)
    model.experts = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(2, 3, 4))])
    assert flops.count(model) is None


def test_the_peak_is_measured_once_and_quickly() -> None:
    import time

    flops.peak.cache_clear()
    began = time.monotonic()
    first = flops.peak(torch.device("cpu"), torch.float32)
    assert time.monotonic() - began < 5
    assert first is not None
    assert first > 1e8
    assert flops.peak(torch.device("cpu"), torch.float32) is first


def test_where_one_process_has_no_peak_there_is_none_for_all() -> None:
    assert health.peak_of_all(lambda: 2.0, lambda own: [each * 3 for each in own]) == 6.0
    assert health.peak_of_all(lambda: 2.0, lambda own: [own[0], own[1] + 1]) is None


# ---------------------------------------------------------------- what is told


def test_metrics_and_progress_tell_share_memory_plan_and_time_left(
    model_folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.flops, "peak", lambda *_: 1e15)
    _, heard = run(lm.load_model(model_folder), dataset, tmp_path, planned=10**12, max_steps=3)
    told = heard.lines[-1][1]
    tokens = heard.lines[-1][1]["tokens_per_second"]
    assert 0 < told["gemm_share"] < 1e-3
    # A token of the tiny model takes some hundred thousand operations.
    assert told["gemm_share"] * 1e15 / tokens == pytest.approx(6e5, rel=0.9)
    assert told["memory_bytes"] > 5e7
    assert told["planned_memory_bytes"] == 1e12
    shown = heard.shown[-1]
    assert {"loss", "tokens_per_second", "gemm_share", "memory_bytes", "planned_memory_bytes"} <= shown.keys()
    assert shown["remaining_seconds"] == 0
    assert heard.warnings == []


def test_memory_above_the_plan_is_warned_of_once(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    _, heard = run(lm.load_model(model_folder), dataset, tmp_path, planned=10**6, max_steps=3)
    assert len(heard.warnings) == 1
    assert "more memory than the 0.0 GB that were planned" in heard.warnings[0]


def test_memory_a_little_above_the_plan_is_not_warned_of() -> None:
    heard = Heard()
    told = health.Health(heard, health.Limits(None, 100), False, None, 1)  # type: ignore[arg-type]
    told.count_memory(114)
    assert heard.warnings == []
    told.count_memory(116)
    told.count_memory(117)
    assert len(heard.warnings) == 1


# ---------------------------------------------------------------- the time left


def clock(
    dataset: Path, *, epochs: int = 2, batch: int = 4, evaluations: int = 0, **pace: Any
) -> tuple[health.Clock, health.Cost, Course]:
    split = Conversations(dataset / "train.arrow")
    course = Course(len(split), batch, epochs, -1, 7)
    cost = health.Cost(course, split, None)
    paced = Pace(**{"checkpoint_seconds": 1e9, **pace})
    told = health.Clock(course, cost, paced, health.Schedule(evaluations, course.steps_per_epoch), 90.0)
    return told, cost, course


def test_the_cost_of_steps_is_that_of_their_rows(dataset: Path) -> None:
    _, cost, course = clock(dataset, batch=3, epochs=3)
    lengths = Conversations(dataset / "train.arrow").lengths
    for step in range(course.total_steps):
        assert cost.of(step) == lengths[list(course.rows_of(step))].sum()
    assert cost.until(course.total_steps) == 3 * lengths.sum()


def test_time_left_follows_the_tokens_that_are_left_not_the_steps(dataset: Path) -> None:
    told, cost, course = clock(dataset)
    assert told.remaining_seconds(0) is None
    for step in range(5):
        told.count_step(cost.of(step), cost.of(step) * 0.1)
        left = sum(cost.of(later) for later in range(step + 1, course.total_steps))
        assert told.remaining_seconds(step + 1) == pytest.approx(0.1 * left)


def test_time_left_holds_evaluations_and_checkpoints(dataset: Path) -> None:
    told, cost, course = clock(dataset, evaluations=3)
    told.count_step(cost.of(0), cost.of(0) * 0.1)
    learning = 0.1 * (cost.until(8) - cost.until(1))
    # Evaluations after steps 3, 6 and 8: a third of learning from 90 tokens each, before one is seen.
    assert told.remaining_seconds(1) == pytest.approx(learning + 3 * 3.0)
    told.count_evaluation(5.0)
    assert told.remaining_seconds(1) == pytest.approx(learning + 3 * 5.0)
    told._pace.count_checkpoint(2.0)
    # And milestones after steps 3, 4, 6 and 8.
    assert told.remaining_seconds(1) == pytest.approx(learning + 3 * 5.0 + 4 * 2.0)
    assert course.total_steps == 8


@pytest.mark.parametrize("evaluations", [0, 1, 3, 4, 5, 9])
@pytest.mark.parametrize("epochs", [1, 4, 6])
@pytest.mark.parametrize("total", [1, 4, 8, 13])
def test_what_is_due_later_is_counted_as_the_loop_does(evaluations: int, epochs: int, total: int) -> None:
    def evaluates(step: int) -> bool:
        return bool(evaluations) and (step % evaluations == 0 or step == total)

    for step in range(total + 1):
        later = range(step + 1, total + 1)
        milestones = sum(evaluates(one) or one % epochs == 0 or one == total for one in later)
        expected = (sum(map(evaluates, later)), milestones)
        assert health.Schedule(evaluations, epochs).ahead(step, total) == expected


def test_checkpoints_in_between_are_rarer_where_they_take_long() -> None:
    pace = Pace(30.0)
    pace.count_checkpoint(3.0)
    # 3 s may be a twentieth: one each 60 s.
    assert pace.checkpoints_ahead_seconds(100, 600.0, 2) == pytest.approx(30.0)
    pace = Pace(30.0, 10)
    pace.count_checkpoint(3.0)
    assert pace.checkpoints_ahead_seconds(100, 600.0, 20) == pytest.approx(60.0)


# ---------------------------------------------------------------- divergence


def judged(losses: Any, vocabulary: int = 50_000) -> int | None:
    """The step at which the rule speaks, fed as the loop feeds it."""
    tally = Tally()
    for step, loss in enumerate(map(float, losses), 1):
        recent, early = [*tally.recent_losses, loss], [*tally.early_losses, loss][:20]
        if blown_up(early, recent, step, vocabulary) is not None:
            return step
        tally.count_step(loss, 1, 1, 1.0)
    return None


def test_a_loss_that_rises_to_that_of_a_model_which_knows_only_frequent_words_is_divergence() -> None:
    assert judged([2.0] * 60 + [7.5] * 60) in range(65, 81)


def test_a_loss_above_blind_guessing_is_divergence_even_when_it_came_at_once() -> None:
    assert judged([2.0, 2.5, 9.0] + [14.0] * 60) in range(20, 26)


def test_a_bad_batch_or_a_short_bump_is_none() -> None:
    assert judged([2.0] * 60 + [30.0] + [2.0] * 60) is None
    assert judged([2.0] * 60 + [6.0] * 6 + [2.0] * 60) is None


def test_a_random_model_that_learns_is_none_however_high_it_begins() -> None:
    assert judged(np.linspace(40, 5, 300)) is None
    assert judged([math.log(50_000)] * 300) is None


@pytest.mark.parametrize("mean", [0.05, 0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("kind", ["gamma", "exponential"])
def test_chance_alone_raises_no_alarm(mean: float, kind: str) -> None:
    """A flat loss of single conversations over 20,000 steps, 5 times: spread by half of the mean, and by all
    of it as where an answer is one word."""
    chance = np.random.default_rng(1)
    shape = 4.0 if kind == "gamma" else 1.0
    for _ in range(5):
        assert judged_fast(chance.gamma(shape, mean / shape, 20_000)) is None


def judged_fast(losses: np.ndarray, vocabulary: int = 50_000) -> int | None:
    """`judged`, by asking only where a mean of 20 is the highest so far."""
    means = np.convolve(losses, np.ones(20) / 20, "valid")
    for place in np.flatnonzero(means >= np.maximum.accumulate(means)):
        recent = losses[max(0, place - 30) : place + 20].tolist()
        if blown_up(losses[:20].tolist(), recent, int(place) + 20, vocabulary) is not None:
            return int(place) + 20
    return None


def test_too_high_a_learning_rate_stops_a_real_run_and_keeps_the_batch(
    model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    wild = {
        "learning_rate": 30.0,
        "max_grad_norm": 0,
        "num_train_epochs": 30,
        "lr_scheduler_type": "constant",
    }
    model = lm.load_model(model_folder).requires_grad_(True)
    with pytest.raises(Diverged, match=r"step \d+ of 120: the loss has blown up") as caught:
        run(model, dataset, tmp_path, per_device_train_batch_size=4, **wild)
    error = caught.value
    file = tmp_path / "diverged" / "batch.json"
    assert str(file) in error.message
    assert error.next_move is not None
    assert "learning_rate (it is 30)" in error.next_move
    assert "stop_on_divergence" in error.next_move
    kept = json.loads(file.read_text())
    assert kept["step"] == error.details["step"]
    assert [one["row"] for one in kept["conversations"]]
    split = Conversations(dataset / "train.arrow")
    for one in kept["conversations"]:
        (index,) = [i for i in range(len(split)) if split[i].row == one["row"]]
        assert one["input_ids"] == split[index].input_ids.tolist()
        assert one["learn"] == split[index].learn.astype(int).tolist()
    # The weights are those that gave the loss: its conversations give it again.
    learned = [sum(one["learn"][1:]) for one in kept["conversations"]]
    again = sum(one["loss"] * n for one, n in zip(kept["conversations"], learned, strict=True)) / sum(learned)
    assert again == pytest.approx(kept["loss"], rel=1e-4)
    assert kept["recent_losses"][-1] > 2 * kept["recent_losses"][0] or kept["loss"] > 8


def test_divergence_that_is_allowed_is_a_warning_and_training_ends(
    model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    model = lm.load_model(model_folder).requires_grad_(True)
    result, heard = run(
        model,
        dataset,
        tmp_path,
        learning_rate=30.0,
        max_grad_norm=0,
        max_steps=45,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        stop_on_divergence=False,
    )
    assert result.steps == 45
    assert sum("has blown up" in warning for warning in heard.warnings) == 1


def test_a_loss_that_is_no_number_names_its_rows_and_keeps_them(
    model_folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Objective.summed_loss

    def poisoned(self: Objective, batch: Any, model: Any = None) -> torch.Tensor:
        return real(self, batch, model) * (math.nan if 5 in batch.rows else 1.0)

    monkeypatch.setattr(Objective, "summed_loss", poisoned)
    with pytest.raises(Diverged, match=r"the loss is nan, with training rows 5\.") as caught:
        run(
            lm.load_model(model_folder).requires_grad_(True),
            dataset,
            tmp_path,
            per_device_train_batch_size=16,
        )
    kept = json.loads((tmp_path / "diverged" / "batch.json").read_text())
    # They share a pack; alone, the others are sound.
    assert len(kept["conversations"]) == 16
    assert [one["row"] for one in kept["conversations"] if one["loss"] == "nan"] == [5]
    assert caught.value.details["rows"] == [5]
    assert kept["loss"] == "nan"
    assert caught.value.details["file"] == str(tmp_path / "diverged" / "batch.json")


def test_a_steep_gradient_alone_is_a_warning_with_its_rows(
    model_folder: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuneloop.training.layout import Plain

    real, seen = Plain.clip, []

    def steep(self: Plain, limit: float) -> float:
        seen.append(real(self, limit))
        return seen[-1] * (1e4 if len(seen) in (25, 27) else 1.0)

    monkeypatch.setattr(Plain, "clip", steep)
    _, heard = run(lm.load_model(model_folder).requires_grad_(True), dataset, tmp_path, max_steps=28)
    (warning,) = heard.warnings
    assert warning.startswith("step 25: the gradient's norm is ")
    assert "it was clipped to 1. Training rows" in warning


def test_the_rule_remembers_over_an_interruption() -> None:
    tally = Tally()
    for step in range(70):
        tally.count_step(2.0 + step / 3, 1, 1, 1.0, 0.5)
    again = Tally.from_json(json.loads(json.dumps(tally.to_json())))
    assert again == tally
    assert (len(again.early_losses), len(again.recent_losses), len(again.recent_norms)) == (20, 50, 50)
    assert again.recent_losses[-1] == 2.0 + 69 / 3
