"""`transformers.Trainer` as an independent witness: the same rows in the same order, padded batches, its own
loss, optimiser, scheduler, clipping and callbacks. Nothing of Tuneloop's arithmetic is in it.

Where it differs on purpose: rows come in Tuneloop's order, since the Trainer's is a shuffle of its own; and
the validation split is one batch, since the Trainer takes the mean of its batches' means.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from tuneloop.training.course import epoch_order
from tuneloop.training.data import Conversations

IGNORED = -100


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Conversations as the Trainer wants them: labels, with what does not count ignored."""

    def __init__(self, path: Path) -> None:
        split = Conversations(path)
        self.items = [
            {
                "input_ids": each.input_ids.tolist(),
                "labels": [
                    int(token) if counts else IGNORED
                    for token, counts in zip(each.input_ids, each.learn, strict=True)
                ],
            }
            for each in (split[index] for index in range(len(split)))
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.items[index]


class Order(torch.utils.data.Sampler):  # type: ignore[type-arg]
    """Epoch after epoch, the rows as Tuneloop draws them."""

    def __init__(self, seed: int, rows: int) -> None:
        self.seed, self.rows, self.epoch = seed, rows, 0

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(epoch_order(self.seed, self.epoch - 1, self.rows))


@dataclass
class Run:
    losses: list[float] = field(default_factory=list)
    """Of each optimiser step."""
    rates: list[float] = field(default_factory=list)
    evaluated: dict[int, float] = field(default_factory=dict)
    logged: list[int] = field(default_factory=list)
    steps: int = 0
    epochs: float = 0.0
    best_step: int | None = None
    model: Any = None


class _Trainer(transformers.Trainer):
    def __init__(self, *arguments: Any, order: Order, seen: Run, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._order, self._seen = order, seen

    def _get_train_sampler(self, *_: Any) -> Order:
        return self._order

    def training_step(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        step = self.state.global_step
        loss = super().training_step(*arguments, **keywords)
        if len(self._seen.losses) == step:
            self._seen.losses.append(0.0)
            self._seen.rates.append(self.optimizer.param_groups[0]["lr"])
        self._seen.losses[step] += float(loss)
        return loss

    def log(self, logs: dict[str, float], *_: Any, **__: Any) -> None:
        step = self.state.global_step
        if "eval_loss" in logs:
            self._seen.evaluated[step] = logs["eval_loss"]
        elif "loss" in logs:
            self._seen.logged.append(step)


def padded(rows: list[dict[str, list[int]]], length: int = 0) -> dict[str, torch.Tensor]:
    """To the longest row, or to `length`."""
    length = max(length, *(len(row["input_ids"]) for row in rows))
    found = {"input_ids": [], "labels": [], "attention_mask": []}  # type: dict[str, list[list[int]]]
    for row in rows:
        missing = length - len(row["input_ids"])
        found["input_ids"].append(row["input_ids"] + [0] * missing)
        found["labels"].append(row["labels"] + [IGNORED] * missing)
        found["attention_mask"].append([1] * len(row["input_ids"]) + [0] * missing)
    return {name: torch.tensor(values) for name, values in found.items()}


def run(
    model: Any,
    dataset: Path,
    folder: Path,
    *,
    pad_to: int = 0,
    patience: tuple[int, float] | None = None,
    **chosen: Any,
) -> Run:
    """`chosen` are `TrainingArguments`."""
    train, seen = Rows(dataset / "train.arrow"), Run()
    validation = Rows(dataset / "validation.arrow")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        save_strategy=chosen.pop("save_strategy", "no"),
        per_device_eval_batch_size=len(validation),
        remove_unused_columns=False,
        **{"logging_steps": 1, "learning_rate": 1e-3, **chosen},
    )
    stop = [] if patience is None else [transformers.EarlyStoppingCallback(*patience)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = _Trainer(
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=validation,
            data_collator=lambda rows: padded(rows, pad_to),
            callbacks=stop,
            order=Order(arguments.seed, len(train)),
            seen=seen,
        )
        trainer.train()
    seen.steps, seen.epochs, seen.model = trainer.state.global_step, trainer.state.epoch, trainer.model
    if trainer.state.best_model_checkpoint:
        seen.best_step = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    return seen
