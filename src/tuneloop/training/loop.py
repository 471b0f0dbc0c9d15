"""The plain loop: forward, backward, step; log, evaluate, checkpoint; and the same again after an
interruption.

Everything that decides the next step is in the model, the optimiser, the generators and the `Tally`, and a
checkpoint holds them all: a resumed run continues as if nothing had happened.
"""

from __future__ import annotations

import math
import os
import random
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from tuneloop import lm
from tuneloop.core import digest
from tuneloop.core.errors import Diverged
from tuneloop.core.recipe import FinetuneParameters
from tuneloop.training import checkpoint, optimizer
from tuneloop.training.data import Batch, Conversations, Course, in_order, split_path
from tuneloop.training.loss import check_forward, packing_of, summed_loss, vocabulary_size
from tuneloop.training.plan import Machine, Plan, plan
from tuneloop.training.schedule import learning_rate
from tuneloop.training.tally import Tally

ENGINE = "plain/1"
_LESS_MEMORY = (
    "Lower finetune.per_device_train_batch_size (and raise gradient_accumulation_steps by as much: the "
    "result is the same) or preprocess.max_seq_length; use apply_lora, precision '16', or a smaller model."
)
PROGRESS_SECONDS = 0.3
"""Least time between two progress lines."""
CHECKPOINT_SHARE = 0.05
"""Most of the time that checkpoints in between may cost: where one takes long, they get rarer."""
_NOT_THE_RESULT = {"logging_strategy", "logging_steps", "save_total_limit", "resume_from_checkpoint"}
"""Parameters under which a checkpoint may be continued with another value."""


class Events(Protocol):
    """Where a run tells what happens. A step's context is one."""

    def progress(
        self,
        stage: str,
        done: float | None = None,
        total: float | None = None,
        unit: str | None = None,
        remaining_seconds: float | None = None,
        **values: float,
    ) -> None: ...

    def metrics(self, step: int, **values: float) -> None: ...

    def warn(self, message: str) -> None: ...


@dataclass(frozen=True)
class TrainingInputs:
    dataset_folder: Path
    """Holds the split `train` and, unless evaluation is off, `validation`."""
    parameters: FinetuneParameters
    checkpoint_folder: Path
    previous_checkpoint_folders: tuple[Path, ...] = ()
    """Of earlier attempts at the same thing."""
    checkpoint_interval_seconds: float = 30.0
    """A killed run loses at most about this much; 0: a checkpoint after every step."""


@dataclass(frozen=True)
class TrainingResult:
    """What was done, over all attempts. The model holds the weights after `kept_step` steps."""

    engine: str
    steps: int
    epochs: float
    kept_step: int
    tokens: int
    learned_tokens: int
    final_loss: float
    """Mean loss of the last logged steps."""
    mean_loss: float
    eval_loss: float | None
    """Of the weights that were kept."""
    seconds: float
    tokens_per_second: float
    effective_batch: int
    accumulation: int
    processes_asked: int
    precision: str
    device: str
    """`cpu` or `cuda`."""
    is_packed: bool
    is_stopped_early: bool
    resumed_from_step: int | None
    peak_memory_bytes: int
    peak_device_memory_bytes: int | None
    """Of the accelerator, tensors and their cache; None without one."""


def prepare(parameters: FinetuneParameters) -> None:
    """Seed everything random; call it before a new adapter gets its first weights."""
    random.seed(parameters.seed)
    np.random.seed(parameters.seed)
    torch.manual_seed(parameters.seed)
    if parameters.enable_full_determinism:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        torch.use_deterministic_algorithms(True)


def train(
    model: nn.Module, inputs: TrainingInputs, events: Events, machine: Machine | None = None
) -> TrainingResult:
    """Train what requires a gradient in `model`, which ends up holding the weights to keep: with evaluation
    on, those with the lowest validation loss; otherwise the last ones.

    Raises `Unsupported` (parameters or a model that this engine refuses), `DataError`, `OutOfMemory`, and
    `Diverged`.
    """
    chosen = plan(inputs.parameters, machine or Machine.detect())
    for warning in chosen.warnings:
        events.warn(warning)
    check_forward(model)
    prepare(inputs.parameters)
    with lm.memory_errors(chosen.device, _LESS_MEMORY):
        return _Run(model, inputs, events, chosen).go()


class _Run:
    def __init__(self, model: nn.Module, inputs: TrainingInputs, events: Events, chosen: Plan) -> None:
        self._parameters = parameters = inputs.parameters
        self._inputs, self._events, self._plan = inputs, events, chosen
        self._train = _split(inputs.dataset_folder, "train", model)
        self._validation = None
        if parameters.evaluation_strategy != "disable":
            self._validation = _split(inputs.dataset_folder, "validation", model)
        self._course = Course(
            rows=len(self._train),
            batch_size=parameters.per_device_train_batch_size,
            accumulation=chosen.accumulation,
            epochs=parameters.num_train_epochs,
            max_steps=parameters.max_steps,
            seed=parameters.seed,
        )
        self._model = model.to(chosen.device)
        with self._precision():
            self._packing = packing_of(model)
        if not self._packing.is_isolated:
            events.warn(
                "this model does not keep packed conversations apart, so they are computed one by one: "
                "equal losses, less speed."
            )
        self._trained = optimizer.trainable(model)
        self._optimizer = optimizer.build(
            parameters.optim,
            self._trained,
            weight_decay=parameters.weight_decay,
            betas=(parameters.adam_beta1, parameters.adam_beta2),
            epsilon=parameters.adam_epsilon,
        )
        self._tally = Tally()
        self._best_weights: Path | None = None
        self._resumed_from: int | None = None
        self._fits = self._fingerprint()
        self._pace = _Pace(inputs.checkpoint_interval_seconds)

    # ------------------------------------------------------------ the loop

    def go(self) -> TrainingResult:
        self._resume()
        self._model.train()
        tally, total = self._tally, self._course.total_steps
        while tally.step < total and not tally.is_stopped:
            started = time.monotonic()
            loss, norm, rate, batches = self._learn(tally.step)
            seconds = time.monotonic() - started
            tally.count_step(loss, sum(b.tokens for b in batches), sum(b.learned for b in batches), seconds)
            self._pace.count_step()
            is_evaluated = self._is_evaluation_due()
            if is_evaluated:
                self._evaluate()
            self._log(norm, rate)
            self._save(
                is_milestone=is_evaluated or self._course.ends_epoch(tally.step) or tally.step == total
            )
            self._tell(loss)
        return self._finish()

    def _learn(self, step: int) -> tuple[float, float, float, list[Batch]]:
        """One optimiser step; its loss, gradient norm, learning rate and batches."""
        batches = self._batches(step)
        # One divisor for the whole effective batch: how it is cut into micro-batches changes nothing.
        learned = sum(batch.learned for batch in batches)
        losses = []
        for batch in batches:
            with self._precision():
                loss = summed_loss(self._model, batch.to(self._plan.device)) / learned
            torch.autograd.backward(loss)
            losses.append(loss.detach())
        values = torch.stack(losses).tolist()
        norm = self._clip()
        self._check_finite(values, norm, batches)
        rate = self._rate(step)
        optimizer.set_learning_rate(self._optimizer, rate)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return sum(values), norm, rate, batches

    def _batches(self, step: int) -> list[Batch]:
        return [
            batch
            for indices in self._course.micro_batches(step)
            for batch in self._packing.batches([self._train[index] for index in indices])
        ]

    def _clip(self) -> float:
        """The norm of the gradient before clipping; a limit of 0 does not clip."""
        limit = self._parameters.max_grad_norm or math.inf
        return float(nn.utils.clip_grad_norm_(list(self._trained.values()), limit))

    def _rate(self, step: int) -> float:
        return learning_rate(
            self._parameters.lr_scheduler_type,
            step,
            peak=self._parameters.learning_rate,
            warmup_steps=self._parameters.warmup_steps,
            total_steps=self._course.total_steps,
        )

    def _check_finite(self, losses: Sequence[float], norm: float, batches: Sequence[Batch]) -> None:
        if math.isfinite(sum(losses)) and math.isfinite(norm):
            return
        guilty = [b for loss, b in zip(losses, batches, strict=True) if not math.isfinite(loss)] or batches
        rows = sorted(row for batch in guilty for row in batch.rows)
        what = f"loss is {sum(losses)}" if not math.isfinite(sum(losses)) else f"gradient's norm is {norm}"
        raise Diverged(
            f"step {self._tally.step + 1} of {self._course.total_steps}: the {what}, with training rows "
            f"{', '.join(map(str, rows))}.",
            next_move="Lower finetune.learning_rate or raise finetune.warmup_steps; when it happens at "
            "step 1, look at those rows.",
            details={"step": self._tally.step + 1, "rows": rows},
        )

    # ------------------------------------------------------------ evaluation

    def _is_evaluation_due(self) -> bool:
        if self._validation is None:
            return False
        step = self._tally.step
        if step == self._course.total_steps:
            return True
        if self._parameters.evaluation_strategy == "epoch":
            return self._course.ends_epoch(step)
        return step % self._steps_between_evaluations() == 0

    def _steps_between_evaluations(self) -> int:
        share = self._parameters.evaluation_steps_interval
        if share > 0:
            return max(1, int(share * self._course.steps_per_epoch))
        return self._parameters.eval_steps

    def _evaluate(self) -> None:
        loss = self._validation_loss()
        if not math.isfinite(loss):
            raise Diverged(
                f"step {self._tally.step} of {self._course.total_steps}: the validation loss is {loss}.",
                next_move="Lower finetune.learning_rate or raise finetune.warmup_steps.",
                details={"step": self._tally.step},
            )
        is_best = self._tally.count_evaluation(loss, self._parameters.early_stopping_threshold)
        if is_best:
            self._best_weights = None  # The checkpoint that follows holds them.
        patience = self._parameters.early_stopping_patience
        if self._parameters.apply_early_stopping and self._tally.bad_evaluations >= patience:
            self._tally.is_stopped = True
        # The loss alone: where this step is logged too, its other values stand there already.
        self._events.metrics(self._tally.step, eval_loss=loss)

    @torch.no_grad()
    def _validation_loss(self) -> float:
        """Mean over all learned tokens of the split, whatever the batch size."""
        assert self._validation is not None
        total = 0.0
        self._model.eval()
        for indices in in_order(len(self._validation), self._parameters.per_device_eval_batch_size):
            for batch in self._packing.batches([self._validation[index] for index in indices]):
                with self._precision():
                    total += float(summed_loss(self._model, batch.to(self._plan.device)))
            if self._pace.may_tell():
                self._events.progress("evaluating", indices.stop, len(self._validation), "rows")
        self._model.train()
        return total / self._validation.learned_tokens

    # ------------------------------------------------------------ telling

    def _log(self, norm: float, rate: float) -> None:
        step = self._tally.step
        is_due = (
            self._course.ends_epoch(step)
            if self._parameters.logging_strategy == "epoch"
            else step % self._parameters.logging_steps == 0
        )
        if not is_due and step != self._course.total_steps and not self._tally.is_stopped:
            return
        loss, speed = self._tally.close_window()
        self._events.metrics(
            step,
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            epoch=self._epoch(),
            tokens_per_second=speed,
            tokens_seen=self._tally.tokens,
        )

    def _tell(self, loss: float) -> None:
        step, total = self._tally.step, self._course.total_steps
        if step < total and not self._pace.may_tell():
            return
        self._events.progress(
            "training",
            step,
            total,
            "steps",
            remaining_seconds=self._pace.seconds_per_step() * (total - step),
            loss=loss,
            tokens_per_second=self._tally.tokens / max(self._tally.seconds, 1e-9),
            epoch=self._epoch(),
        )

    def _epoch(self) -> float:
        return self._tally.step / self._course.steps_per_epoch

    # ------------------------------------------------------------ checkpoints

    def _fingerprint(self) -> str:
        shapes = {name: list(parameter.shape) for name, parameter in self._trained.items()}
        return digest.of_json(
            {
                "engine": ENGINE,
                "parameters": self._parameters.model_dump(mode="json", exclude=_NOT_THE_RESULT),
                "rows": [len(self._train), self._train.tokens, self._train.learned_tokens],
                "trained": shapes,
                "is_bf16": self._plan.is_bf16,
            }
        )

    def _save(self, *, is_milestone: bool) -> None:
        if not is_milestone and not self._pace.is_checkpoint_due():
            return
        started = time.monotonic()
        tensors, scalars = optimizer.dump_state(self._optimizer, self._trained)
        random_tensors, random_state = checkpoint.dump_random(self._plan.device)
        folder = checkpoint.save(
            self._inputs.checkpoint_folder,
            state={**self._tally.to_json(), "optimizer": scalars, "random": random_state},
            tensors={"weights": self._trained, "optimizer": tensors, "random": random_tensors},
            best_weights=self._best_weights,
            fits=self._fits,
            is_milestone=is_milestone,
        )
        if self._tally.best_step is not None:
            best = "weights" if self._tally.best_step == self._tally.step else "best"
            self._best_weights = folder / f"{best}.safetensors"
        checkpoint.prune(self._inputs.checkpoint_folder, self._parameters.save_total_limit, is_finished=False)
        self._pace.count_checkpoint(time.monotonic() - started)

    def _resume(self) -> None:
        roots = (self._inputs.checkpoint_folder, *self._inputs.previous_checkpoint_folders)
        found = checkpoint.find(roots, self._fits, self._events.warn)
        if found is None:
            if self._parameters.resume_from_checkpoint:
                self._events.warn(
                    "resume_from_checkpoint is true: there is no checkpoint of an earlier attempt of "
                    "this step, so training starts at the beginning. (Attempts of one step always "
                    "resume.)"
                )
            return
        self._load_weights(found.folder / "weights.safetensors")
        optimizer.load_state(
            self._optimizer, self._trained, found.tensors("optimizer"), found.state["optimizer"]
        )
        checkpoint.load_random(found.tensors("random"), found.state["random"], self._plan.device)
        self._tally = Tally.from_json(found.state)
        self._best_weights = found.best_weights()
        self._resumed_from = found.step

    def _load_weights(self, path: Path) -> None:
        with torch.no_grad():
            for name, tensor in load_file(path).items():
                self._trained[name].copy_(tensor)

    # ------------------------------------------------------------ the end

    def _finish(self) -> TrainingResult:
        tally = self._tally
        kept_step = tally.best_step or tally.step
        if kept_step != tally.step:
            assert self._best_weights is not None
            self._load_weights(self._best_weights)
            self._events.warn(
                f"the weights after step {kept_step} are kept, where the validation loss was lowest "
                f"({tally.best_loss:.4f}); after the last step, {tally.step}, it was {tally.eval_loss:.4f}. "
                "Set finetune.evaluation_strategy to 'disable' to keep the last ones."
            )
        checkpoint.prune(self._inputs.checkpoint_folder, self._parameters.save_total_limit, is_finished=True)
        self._model.eval()
        return TrainingResult(
            engine=ENGINE,
            steps=tally.step,
            epochs=self._epoch(),
            kept_step=kept_step,
            tokens=tally.tokens,
            learned_tokens=tally.learned_tokens,
            final_loss=tally.final_loss if tally.final_loss is not None else tally.total_loss / tally.step,
            mean_loss=tally.total_loss / tally.step,
            eval_loss=tally.best_loss,
            seconds=tally.seconds,
            tokens_per_second=tally.tokens / max(tally.seconds, 1e-9),
            effective_batch=self._course.effective_batch,
            accumulation=self._plan.accumulation,
            processes_asked=self._plan.processes_asked,
            precision="bf16" if self._plan.is_bf16 else "fp32",
            device=self._plan.device.type,
            is_packed=self._packing.is_isolated,
            is_stopped_early=tally.is_stopped,
            resumed_from_step=self._resumed_from,
            peak_memory_bytes=_peak_memory_bytes(),
            peak_device_memory_bytes=lm.peak_device_memory_bytes(self._plan.device),
        )

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._plan.device.type, dtype=torch.bfloat16, enabled=self._plan.is_bf16)


class _Pace:
    """When to speak and when to save, by the clock; what is computed never depends on it."""

    def __init__(self, checkpoint_interval_seconds: float) -> None:
        self._interval = checkpoint_interval_seconds
        self._started = self._saved_at = time.monotonic()
        self._told_at = -math.inf
        self._checkpoint_seconds = 0.0
        self._steps = 0

    def count_step(self) -> None:
        self._steps += 1

    def count_checkpoint(self, seconds: float) -> None:
        self._saved_at = time.monotonic()
        self._checkpoint_seconds = seconds

    def is_checkpoint_due(self) -> bool:
        if self._interval <= 0:
            return True
        wait = max(self._interval, self._checkpoint_seconds / CHECKPOINT_SHARE)
        return time.monotonic() - self._saved_at >= wait

    def may_tell(self) -> bool:
        now = time.monotonic()
        if now - self._told_at < PROGRESS_SECONDS:
            return False
        self._told_at = now
        return True

    def seconds_per_step(self) -> float:
        """Evaluations and checkpoints included."""
        return (time.monotonic() - self._started) / max(1, self._steps)


def _split(folder: Path, name: str, model: nn.Module) -> Conversations:
    split = Conversations(split_path(folder, name))
    split.check(vocabulary_size(model))
    return split


def _peak_memory_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
