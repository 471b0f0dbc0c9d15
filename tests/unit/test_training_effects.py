"""What each parameter does, held against an independent `transformers.Trainer` run: losses and rates per
step, evaluations, files, the step where it stops; never the configuration. Losses agree to 1e-4."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import numpy as np
import peft
import torch
import transformers
from transformers.integrations.neftune import activate_neftune

from tests.conversations import Heard, write_dataset
from tests.models import tiny_model
from tests.unit import trainer_reference as reference
from tuneloop import lm
from tuneloop.core.errors import ModelUnavailable
from tuneloop.core.recipe import FinetuneParameters
from tuneloop.steps.finetune.model import open_model
from tuneloop.training import Machine, TrainingInputs, TrainingResult, plan, train
from tuneloop.training.data import Conversation, pack
from tuneloop.training.loss import Objective

LAPTOP = Machine("cpu", 0, has_fast_bf16=False)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def ours(
    model: Any,
    dataset: Path,
    folder: Path,
    heard: Heard | None = None,
    machine: Machine = LAPTOP,
    **chosen: Any,
) -> tuple[TrainingResult, Heard]:
    heard = heard or Heard()
    values = {
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "evaluation_strategy": "disable",
        "per_device_train_batch_size": 4,
        **chosen,
    }
    inputs = TrainingInputs(dataset, FinetuneParameters.model_validate(values), folder / "checkpoints")
    return train(model, inputs, heard, machine), heard


def theirs(model: Any, dataset: Path, folder: Path, **chosen: Any) -> reference.Run:
    return reference.run(
        model,
        dataset,
        folder / "theirs",
        **{"per_device_train_batch_size": 4, "num_train_epochs": 1, **chosen},
    )


def losses(heard: Heard) -> list[float]:
    return list(heard.curve("loss").values())


@pytest.fixture(scope="module")
def plain(folder: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> reference.Run:
    """The Trainer's two epochs, nothing changed."""
    place = tmp_path_factory.mktemp("plain")
    return theirs(lm.load_model(folder), dataset, place, num_train_epochs=2)


def differ(some: list[float], others: list[float]) -> bool:
    pairs = zip(some, others, strict=False)
    return len(some) != len(others) or any(abs(a - b) > 10 * TOLERANCE for a, b in pairs)


def test_losses_and_rates_are_the_trainers(
    folder: Path, dataset: Path, tmp_path: Path, plain: reference.Run
) -> None:
    result, heard = ours(lm.load_model(folder), dataset, tmp_path, num_train_epochs=2)
    assert len(plain.losses) == 8
    assert losses(heard) == pytest.approx(plain.losses, abs=TOLERANCE)
    assert list(heard.curve("learning_rate").values()) == pytest.approx(plain.rates, rel=1e-9)
    assert (result.steps, result.epochs) == (plain.steps, plain.epochs) == (8, 2.0)


CHANGES: list[dict[str, Any]] = [
    {"optim": "adafactor"},
    {"weight_decay": 5.0, "learning_rate": 1e-2},
    {"adam_beta1": 0.5},
    {"adam_beta2": 0.9},
    {"adam_epsilon": 1e-3},
    {"max_grad_norm": 0.01, "adam_epsilon": 1e-3},
    {"max_grad_norm": 0.0, "adam_epsilon": 1e-3},
    {"gradient_accumulation_steps": 2},
    {"per_device_train_batch_size": 3},
    {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
    {"learning_rate": 5e-3},
    {"seed": 7},
    {"max_steps": 6},
    {"max_steps": 8, "per_device_train_batch_size": 3},
    {"warmup_steps": 3},
]


@pytest.mark.parametrize(
    "change", CHANGES, ids=lambda change: "-".join(f"{k}={v}" for k, v in change.items())
)
def test_a_parameter_does_what_it_does_in_the_trainer(
    folder: Path, dataset: Path, tmp_path: Path, plain: reference.Run, change: dict[str, Any]
) -> None:
    both = {"num_train_epochs": 2, **change}
    expected = theirs(lm.load_model(folder), dataset, tmp_path, **both)
    result, heard = ours(lm.load_model(folder), dataset, tmp_path, **both)
    assert losses(heard) == pytest.approx(expected.losses, abs=TOLERANCE)
    assert list(heard.curve("learning_rate").values()) == pytest.approx(expected.rates, rel=1e-9)
    assert result.steps == expected.steps
    assert result.epochs == pytest.approx(expected.epochs)
    assert differ(losses(heard), plain.losses)


@pytest.mark.parametrize(
    "scheduler",
    ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"],
)
def test_a_schedule_is_the_trainers(folder: Path, dataset: Path, tmp_path: Path, scheduler: str) -> None:
    both = {"lr_scheduler_type": scheduler, "warmup_steps": 2, "max_steps": 6}
    expected = theirs(lm.load_model(folder), dataset, tmp_path, **both)
    _, heard = ours(lm.load_model(folder), dataset, tmp_path, **both)
    assert list(heard.curve("learning_rate").values()) == pytest.approx(expected.rates, rel=1e-9)
    assert losses(heard) == pytest.approx(expected.losses, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("own", "trainer"),
    [
        ({"evaluation_strategy": "epoch"}, {"eval_strategy": "epoch"}),
        ({"evaluation_strategy": "steps", "eval_steps": 2}, {"eval_strategy": "steps", "eval_steps": 2}),
        # Half of an epoch of four steps.
        (
            {"evaluation_strategy": "steps", "evaluation_steps_interval": 0.5},
            {"eval_strategy": "steps", "eval_steps": 2},
        ),
        ({"evaluation_strategy": "disable"}, {"eval_strategy": "no"}),
    ],
)
def test_evaluations_come_when_they_come_in_the_trainer(
    folder: Path, dataset: Path, tmp_path: Path, own: dict[str, Any], trainer: dict[str, Any]
) -> None:
    expected = theirs(lm.load_model(folder), dataset, tmp_path, num_train_epochs=2, **trainer)
    _, heard = ours(lm.load_model(folder), dataset, tmp_path, num_train_epochs=2, **own)
    assert heard.curve("eval_loss") == pytest.approx(expected.evaluated, abs=TOLERANCE)


@pytest.mark.parametrize(
    "change", [{"logging_strategy": "epoch"}, {"logging_strategy": "steps", "logging_steps": 4}]
)
def test_steps_are_logged_where_the_trainer_logs_them(
    folder: Path, dataset: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    expected = theirs(lm.load_model(folder), dataset, tmp_path, num_train_epochs=2, **change)
    _, heard = ours(lm.load_model(folder), dataset, tmp_path, num_train_epochs=2, **change)
    assert list(heard.curve("loss")) == expected.logged == [4, 8]


@pytest.mark.parametrize(("patience", "threshold"), [(1, 0.0), (2, 0.0), (1, 0.5)])
def test_early_stopping_stops_where_the_trainer_does(
    folder: Path, dataset: Path, tmp_path: Path, patience: int, threshold: float
) -> None:
    """At a rate so high that the validation loss turns. The weights kept are those of the best evaluation on
    both sides (`load_best_model_at_end`)."""
    both = {"num_train_epochs": 6, "learning_rate": 2e-2}
    expected = theirs(
        lm.load_model(folder),
        dataset,
        tmp_path,
        **both,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        patience=(patience, threshold),
    )
    result, heard = ours(
        lm.load_model(folder),
        dataset,
        tmp_path,
        **both,
        evaluation_strategy="steps",
        eval_steps=2,
        apply_early_stopping=True,
        early_stopping_patience=patience,
        early_stopping_threshold=threshold,
    )
    assert heard.curve("eval_loss") == pytest.approx(expected.evaluated, rel=1e-3)
    assert (result.steps, result.kept_step) == (expected.steps, expected.best_step)
    assert result.is_stopped_early
    assert result.steps < 24


@pytest.mark.parametrize("limit", [-1, 1, 2])
def test_as_many_checkpoints_remain_as_the_limit_says(
    folder: Path, dataset: Path, tmp_path: Path, limit: int
) -> None:
    ours(lm.load_model(folder), dataset, tmp_path, num_train_epochs=3, save_total_limit=limit, max_steps=12)
    kept = sorted((tmp_path / "checkpoints").iterdir())
    assert len(kept) == {-1: 3, 1: 1, 2: 2}[limit]


def test_a_seed_repeats_to_the_bit_and_another_differs(folder: Path, dataset: Path, tmp_path: Path) -> None:
    """With dropout in the adapter, so that the seed decides more than the order."""

    def weights(seed: int, place: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(1234)
        model = lm.add_lora(lm.load_model(folder), 4, 8, 0.2, seed=seed)
        try:
            result, _ = ours(
                model, dataset, tmp_path / place, apply_lora=True, seed=seed, enable_full_determinism=True
            )
        finally:
            torch.use_deterministic_algorithms(False)
        return result.weights

    first, again, other = weights(1, "a"), weights(1, "b"), weights(2, "c")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    folder: Path, dataset: Path, tmp_path: Path
) -> None:
    both = {"num_train_epochs": 2, "lr_scheduler_type": "cosine"}
    expected = theirs(lm.load_model(folder), dataset, tmp_path, **both)

    def interrupt(step: int, values: dict[str, float]) -> None:
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ours(lm.load_model(folder), dataset, tmp_path, Heard(interrupt), checkpoint_steps=1, **both)
    result, heard = ours(lm.load_model(folder), dataset, tmp_path, resume_from_checkpoint=True, **both)
    assert result.resumed_from_step == 5
    assert losses(heard) == pytest.approx(expected.losses[5:], abs=TOLERANCE)


def test_padding_changes_no_loss_and_is_not_counted(
    folder: Path, dataset: Path, tmp_path: Path, plain: reference.Run
) -> None:
    """`pad_to_max_length`: the Trainer pads every row to 64, and Tuneloop, which packs, pads none."""
    expected = theirs(lm.load_model(folder), dataset, tmp_path, num_train_epochs=2, pad_to=64)
    result, heard = ours(lm.load_model(folder), dataset, tmp_path, num_train_epochs=2)
    assert losses(heard) == pytest.approx(expected.losses, abs=TOLERANCE)
    assert expected.losses == pytest.approx(plain.losses, abs=TOLERANCE)
    rows = reference.Rows(dataset / "train.arrow").items
    assert result.tokens == 2 * sum(len(row["input_ids"]) for row in rows)
    learned = sum(label != reference.IGNORED for row in rows for label in row["labels"][1:])
    assert result.learned_tokens == 2 * learned


@pytest.mark.parametrize(
    "change",
    [{"dataloader_num_workers": 3}, {"pack_tokens": 40}, {"packing": False}, {"eval_accumulation_steps": 2}],
)
def test_how_a_step_is_computed_changes_no_loss(
    folder: Path, dataset: Path, tmp_path: Path, plain: reference.Run, change: dict[str, Any]
) -> None:
    _, heard = ours(lm.load_model(folder), dataset, tmp_path, num_train_epochs=2, **change)
    assert losses(heard) == pytest.approx(plain.losses, abs=TOLERANCE)


def test_memory_that_runs_out_changes_no_loss(
    folder: Path,
    dataset: Path,
    tmp_path: Path,
    plain: reference.Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`auto_find_batch_size`: every pack above 40 tokens fails; the effective batch stays. (The Trainer
    halves the batch itself, and so learns from other batches than it was told.)"""
    from tuneloop.training.layout.plain import Plain

    loss, failures = Plain.loss, []

    def full(self: Plain, batch: Any) -> torch.Tensor:
        if batch.input_ids.shape[1] > 40:
            failures.append(batch.input_ids.shape[1])
            torch.empty(1 << 50)
        return loss(self, batch)

    monkeypatch.setattr(Plain, "loss", full)
    both = {"num_train_epochs": 2, "auto_find_batch_size": True}
    result, heard = ours(lm.load_model(folder), dataset, tmp_path, **both)
    assert failures
    assert result.pack_tokens <= 64
    assert losses(heard) == pytest.approx(plain.losses, abs=TOLERANCE)


def peft_model(folder: Path, r: int, alpha: int, **flags: bool) -> Any:
    """The same adapter made by PEFT alone."""
    config = peft.LoraConfig(
        r=r, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM", **flags
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(base, config)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(torch.arange(20, 44)[None]).logits
    return found


@pytest.fixture(scope="module")
def lora(folder: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> reference.Run:
    place = tmp_path_factory.mktemp("lora")
    return theirs(peft_model(folder, 4, 8), dataset, place, num_train_epochs=2, learning_rate=1e-2)


@pytest.mark.parametrize(
    "change",
    [{}, {"lora_r": 2}, {"lora_alpha": 64}, {"lora_use_rslora": True}, {"lora_use_dora": True}],
    ids=lambda change: next(iter(change), "plain"),
)
def test_an_adapter_learns_as_pefts_in_the_trainer_and_merges_into_the_same(
    folder: Path, dataset: Path, tmp_path: Path, lora: reference.Run, change: dict[str, Any]
) -> None:
    chosen = FinetuneParameters.model_validate({"apply_lora": True, "lora_r": 4, "lora_alpha": 8, **change})
    flags = {"use_rslora": chosen.lora_use_rslora, "use_dora": chosen.lora_use_dora}
    both = {"num_train_epochs": 2, "learning_rate": 1e-2}
    expected = lora
    if change:
        adapter = peft_model(folder, chosen.lora_r, chosen.lora_alpha, **flags)
        expected = theirs(adapter, dataset, tmp_path, **both)
        assert differ(expected.losses, lora.losses)
    own = chosen.model_copy(update={"seed": 5})
    model = open_model(inputs_of(folder), own, plan(own, LAPTOP))
    untrained = logits(model)
    _, heard = ours(model, dataset, tmp_path, apply_lora=True, **both, **change)
    assert losses(heard) == pytest.approx(expected.losses, abs=TOLERANCE)
    trained = logits(model)
    assert (trained - untrained).abs().max() > 0.1
    assert torch.allclose(trained, logits(expected.model), atol=0.02)
    assert torch.allclose(logits(lm.merge(model)), trained, atol=1e-4)


def inputs_of(folder: Path, heard: Heard | None = None) -> Any:
    """As much of a step's context as opening a model needs."""
    return SimpleNamespace(inputs={"model": folder}, warn=(heard or Heard()).warn)


def test_dropout_of_an_adapter_is_there_in_training_and_not_in_evaluation(
    folder: Path, dataset: Path, tmp_path: Path
) -> None:
    """At a rate that moves nothing, so that the dropout alone makes losses differ, to both sides."""

    def run(name: str, dropout: float) -> tuple[Heard, list[float]]:
        model = lm.add_lora(lm.load_model(folder), 4, 8, dropout, seed=5)
        with torch.random.fork_rng():
            torch.manual_seed(6)
            for name_of, weight in model.named_parameters():
                if "lora_B" in name_of:
                    torch.nn.init.normal_(weight, std=0.05)
        dropped: list[float] = []
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.register_forward_hook(lambda it, given, out: dropped.append(_share(it, given[0], out)))
        _, heard = ours(
            model,
            dataset,
            tmp_path / name,
            apply_lora=True,
            lora_dropout=dropout,
            learning_rate=1e-12,
            num_train_epochs=6,
            evaluation_strategy="epoch",
        )
        return heard, [share for share in dropped if share >= 0]

    quiet, _ = run("quiet", 0.0)
    noisy, shares = run("noisy", 0.25)
    again, _ = run("again", 0.25)
    off = [a - b for a, b in zip(losses(noisy), losses(quiet), strict=True)]
    assert min(map(abs, off)) > 0
    assert min(off) < 0 < max(off)
    assert abs(sum(off) / len(off)) < 0.1 * max(map(abs, losses(quiet)))
    assert sum(shares) / len(shares) == pytest.approx(0.25, abs=0.01)
    assert noisy.curve("eval_loss") == pytest.approx(quiet.curve("eval_loss"), abs=1e-6)
    assert losses(again) == losses(noisy)


def _share(module: Any, given: torch.Tensor, out: torch.Tensor) -> float:
    """What a dropout layer dropped; -1 in evaluation, where it drops nothing."""
    if not module.training:
        assert torch.equal(given, out)
        return -1.0
    kept = out != 0
    assert torch.allclose(out[kept], given[kept] / (1 - module.p))
    return float((~kept).float().mean())


def test_every_token_may_count(folder: Path, dataset: Path, tmp_path: Path) -> None:
    _, assistant = ours(lm.load_model(folder), dataset, tmp_path / "a", max_steps=1)
    _, everything = ours(lm.load_model(folder), dataset, tmp_path / "b", max_steps=1, loss_tokens="all")
    rows = [
        {"input_ids": row["input_ids"], "labels": list(row["input_ids"])}
        for row in reference.Rows(dataset / "train.arrow").items
    ]
    chosen = [rows[index] for index in reference.epoch_order(42, 0, len(rows))[:4]]
    with torch.no_grad():
        expected = float(lm.load_model(folder)(**reference.padded(chosen)).loss)
    assert losses(everything) == pytest.approx([expected], abs=TOLERANCE)
    assert abs(losses(assistant)[0] - expected) > 10 * TOLERANCE


def test_noise_on_embeddings_is_there_in_training_and_not_in_evaluation(
    folder: Path, dataset: Path, tmp_path: Path
) -> None:
    chosen = {"max_steps": 1, "evaluation_strategy": "epoch", "learning_rate": 1e-12}
    _, quiet = ours(lm.load_model(folder), dataset, tmp_path / "a", **chosen)
    _, noisy = ours(lm.load_model(folder), dataset, tmp_path / "b", neftune_noise_alpha=10, **chosen)
    assert abs(losses(noisy)[0] - losses(quiet)[0]) > 1e-3
    assert noisy.curve("eval_loss") == pytest.approx(quiet.curve("eval_loss"), abs=1e-5)


def test_noise_on_embeddings_has_the_size_that_it_has_in_transformers(folder: Path) -> None:
    """alpha / sqrt(L d) on either side of nothing, L of each conversation by itself."""
    alpha, lengths = 10.0, (5, 40, 12)
    model = lm.load_model(folder)
    objective = Objective(model, noise_alpha=alpha)
    embeddings, seen = model.get_input_embeddings(), []
    embeddings.register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
    rows = [Conversation(0, np.arange(20, 20 + length), np.ones(length, dtype=bool)) for length in lengths]
    model.train()
    objective.summed_loss(pack(rows))
    ids, found = seen.pop()
    noise = (found - embeddings.weight[ids])[0].detach()
    for own in noise.split(lengths):
        reach = alpha / math.sqrt(own.numel())
        assert 0.95 * reach < float(own.abs().max()) <= reach * (1 + 1e-4)
        assert float(own.std()) == pytest.approx(reach / math.sqrt(3), rel=0.1)
        assert abs(float(own.mean())) < 5 * reach / math.sqrt(3 * own.numel())
    torch.manual_seed(3)
    objective.summed_loss(pack(rows[1:2]))
    (_, alone) = seen.pop()
    other = lm.load_model(folder).train()
    activate_neftune(other, alpha)
    torch.manual_seed(3)
    assert torch.allclose(alone, other.get_input_embeddings()(torch.from_numpy(rows[1].input_ids)[None]))
    model.eval()
    objective.summed_loss(pack(rows))
    ids, still = seen.pop()
    assert torch.equal(still, embeddings.weight[ids])


def test_weights_of_another_shape_start_at_random_and_are_trained_as_in_the_trainer(
    folder: Path, dataset: Path, tmp_path: Path
) -> None:
    """`ignore_mismatched_sizes`: a wider second half of the layers than the file holds."""
    changed = tmp_path / "model"
    shutil.copytree(folder, changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, "intermediate_size": 160}))
    parameters = FinetuneParameters(ignore_mismatched_sizes=True)
    chosen, heard = plan(parameters, LAPTOP), Heard()
    with pytest.raises(ModelUnavailable):
        open_model(inputs_of(changed), FinetuneParameters(), chosen)
    model = open_model(inputs_of(changed, heard), parameters, chosen)
    (said,) = heard.warnings
    assert "6 tensor(s) of another shape" in said
    assert "model.layers.1.mlp.up_proj.weight" in said
    torch.manual_seed(parameters.seed)
    witness = transformers.AutoModelForCausalLM.from_pretrained(
        changed, dtype=torch.float32, ignore_mismatched_sizes=True
    )
    expected = theirs(witness, dataset, tmp_path)
    _, told = ours(model, dataset, tmp_path, ignore_mismatched_sizes=True)
    assert losses(told) == pytest.approx(expected.losses, abs=TOLERANCE)
    assert losses(told)[-1] < losses(told)[0]


def test_precision_16_computes_in_bf16_and_keeps_what_is_trained_in_32_bits(
    folder: Path, dataset: Path, tmp_path: Path, plain: reference.Run
) -> None:
    expected = theirs(lm.load_model(folder), dataset, tmp_path, num_train_epochs=2, bf16=True)
    model = lm.load_model(folder)
    fast = Machine("cpu", 0, has_fast_bf16=True)
    result, heard = ours(model, dataset, tmp_path, machine=fast, num_train_epochs=2, precision="16")
    assert result.precision == "bf16"
    # bf16 has 8 bits: 0.4 % of rounding in each product.
    assert losses(heard) == pytest.approx(expected.losses, rel=5e-3)
    assert losses(heard) == pytest.approx(plain.losses, rel=1e-2)
    assert max(abs(a - b) for a, b in zip(losses(heard), plain.losses, strict=True)) > 1e-5
    assert {weight.dtype for weight in result.weights.values()} == {torch.float32}
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    # A step of 1e-4 of a weight would be lost in bf16: some weights lie between its numbers.
    assert any(not torch.equal(each, each.bfloat16().float()) for each in result.weights.values())


def test_precision_16_keeps_a_frozen_base_in_16_bits_and_the_adapter_in_32(
    folder: Path, dataset: Path, tmp_path: Path, lora: reference.Run
) -> None:
    fast = Machine("cpu", 0, has_fast_bf16=True)
    chosen = {"apply_lora": True, "lora_r": 4, "lora_alpha": 8, "precision": "16"}
    parameters = FinetuneParameters.model_validate({**chosen, "seed": 5})
    model = open_model(inputs_of(folder), parameters, plan(parameters, fast))
    frozen = {weight.dtype for weight in model.parameters() if not weight.requires_grad}
    assert frozen == {torch.bfloat16}
    both = {"num_train_epochs": 2, "learning_rate": 1e-2}
    result, heard = ours(model, dataset, tmp_path, machine=fast, **chosen, **both)
    assert losses(heard) == pytest.approx(lora.losses, rel=2e-2)
    assert {weight.dtype for weight in result.weights.values()} == {torch.float32}
