"""The loop: forward, backward, step; log, evaluate, checkpoint; and the same again after an interruption.

Everything that decides the next step is in the model, the optimiser, the generators and the `Tally`, and a
checkpoint holds them all: a resumed run continues as if nothing had happened. The loop knows no device and
no process but through its `Layout`; with several processes each runs it, and rank 0 speaks.
"""

from __future__ import annotations

import math
import os
import random
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tuneloop import lm
from tuneloop.core import digest
from tuneloop.core.errors import OutOfMemory
from tuneloop.core.machine import own_peak_resident_bytes
from tuneloop.core.recipe import FinetuneParameters
from tuneloop.training import checkpoint, flops, health, layout, optimizer
from tuneloop.training.course import Course
from tuneloop.training.data import Conversations, split_path
from tuneloop.training.divergence import Computed, Guard
from tuneloop.training.evaluation import Validation
from tuneloop.training.feed import Feed, Sharing
from tuneloop.training.health import Health
from tuneloop.training.layout import Layout
from tuneloop.training.loss import Objective, vocabulary_size
from tuneloop.training.pace import Pace
from tuneloop.training.plan import Machine, Plan, plan
from tuneloop.training.schedule import learning_rate
from tuneloop.training.seam import Events, Mute, TrainingInputs, TrainingResult
from tuneloop.training.tally import Tally

ENGINE = "packed/1"
PACK_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Most tokens of a pack, unless the longest conversation has more: where longer ones were measured to bring
no speed on a CPU; enough to fill a GPU."""
_LESS_MEMORY = (
    "Lower preprocess.max_seq_length, or finetune.pack_tokens where it was set; write "
    "finetune.activation_checkpointing: always; use apply_lora, precision '16', or a smaller model. The "
    "batch size takes no memory."
)
_NOT_THE_RESULT = {
    "logging_strategy",
    "logging_steps",
    "save_total_limit",
    "resume_from_checkpoint",
    "checkpoint_seconds",
    "checkpoint_steps",
    "dataloader_num_workers",
    "fewer_devices",
    "cpu_processes",
    "strategy",
    "apply_deepspeed",
    "deepspeed",
    "deepspeed_stage",
    "stop_on_divergence",
    "packing",
    "pack_tokens",
    "activation_checkpointing",
    "auto_find_batch_size",
}
"""Parameters under which a checkpoint may be continued with another value: what they change is told, or
lost in rounding. How many processes share the work, and how, is the layouts' own check: they know whose files
they can read."""


def prepare(parameters: FinetuneParameters, rank: int = 0) -> None:
    """Seed everything random; call it before a new adapter gets its first weights. Each process draws its own
    dropout."""
    seed = parameters.seed + rank
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if parameters.enable_full_determinism:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        torch.use_deterministic_algorithms(True)


def train(
    model: nn.Module,
    inputs: TrainingInputs,
    events: Events,
    machine: Machine | None = None,
    chosen: Plan | None = None,
) -> TrainingResult:
    """Train what requires a gradient in `model`, which ends up holding the weights to keep: with evaluation
    on, those with the lowest validation loss; otherwise the last ones. With several processes each calls
    this with the same arguments, and `chosen` says how they share the work.

    Raises `Unsupported` (parameters or a model that this engine refuses), `DataError`, `OutOfMemory`, and
    `Diverged`.
    """
    chosen = chosen or plan(inputs.parameters, machine or Machine.detect())
    laid_out = layout.of(chosen)
    told = events if laid_out.rank == 0 else Mute()
    for warning in chosen.warnings:
        told.warn(warning)
    prepare(inputs.parameters)
    with lm.memory_errors(laid_out.device, _LESS_MEMORY):
        run = _Run(model, inputs, told, chosen, laid_out)
        with run.feed:
            return run.go()


@dataclass(frozen=True)
class _Learned:
    """What an optimiser step did, over all processes."""

    loss: float
    norm: float
    rate: float
    is_checkpoint_due: bool
    memory_bytes: float
    """The most that they have held together so far."""


class _Run:
    def __init__(
        self, model: nn.Module, inputs: TrainingInputs, events: Events, chosen: Plan, laid_out: Layout
    ) -> None:
        self._parameters = parameters = inputs.parameters
        self._inputs, self._events, self._plan, self._layout = inputs, events, chosen, laid_out
        self._train = self._split("train", model)
        self._course = Course(
            rows=len(self._train),
            effective_batch=chosen.effective_batch,
            epochs=parameters.num_train_epochs,
            max_steps=parameters.max_steps,
            seed=parameters.seed,
        )
        self._fits = self._fingerprint(model)
        if inputs.is_checkpointed:
            checkpoint_activations(model)
        laid_out.place(model)
        work = flops.count(model)
        with self._precision():
            objective = Objective(
                model, is_packing_allowed=parameters.packing, noise_alpha=parameters.neftune_noise_alpha
            )
        for remark in objective.remarks:
            events.warn(remark)
        laid_out.wrap(model, objective, parameters)
        prepare(parameters, laid_out.rank)
        self._model, self._objective = model, objective
        sharing = Sharing(objective, laid_out.rank, laid_out.world, laid_out.is_collective)
        budget = inputs.pack_tokens or parameters.pack_tokens or PACK_TOKENS[laid_out.device.type]
        self.feed = Feed(
            self._course, self._train, sharing, budget, workers=parameters.dataloader_num_workers
        )
        self._validation = None
        if parameters.evaluation_strategy != "disable":
            self._validation = Validation(
                self._split("validation", model), sharing, laid_out, self._precision
            )
        self._tally = Tally()
        self._best_weights: list[Path] = []
        self._resumed_from: int | None = None
        self._pace = Pace(parameters.checkpoint_seconds, parameters.checkpoint_steps)
        self._guard = Guard(
            model=model,
            layout=laid_out,
            sharing=sharing,
            train=self._train,
            course=self._course,
            parameters=parameters,
            vocabulary=vocabulary_size(model),
            precision=self._precision,
            folder=inputs.report_folder,
            events=events,
        )
        self._watch(work)

    def _watch(self, work: flops.Work | None) -> None:
        self._cost = health.Cost(self._course, self._train, work)
        validated = None if self._validation is None else self._validation.conversations
        self._clock = health.Clock(
            self._course,
            self._cost,
            self._pace,
            health.Schedule(self._steps_between_evaluations(), self._course.steps_per_epoch),
            0.0 if validated is None else float(health.cost_of(validated, work).sum()),
        )
        peak = None
        if work is not None:
            dtype, device = self._plan.base_dtype, self._layout.device
            peak = health.peak_of_all(lambda: flops.peak(device, dtype), self._layout.sum)
        self._health = Health(
            self._events,
            health.Limits(peak, self._inputs.planned_memory_bytes),
            work is not None,
            self._clock,
            self._course.steps_per_epoch,
        )

    def _split(self, name: str, model: nn.Module) -> Conversations:
        path = split_path(self._inputs.dataset_folder, name)
        split = Conversations(path, learns_all=self._parameters.loss_tokens == "all")
        split.check(vocabulary_size(model))
        return split

    # ------------------------------------------------------------ the loop

    def go(self) -> TrainingResult:
        self._resume()
        self._model.train()
        tally, total = self._tally, self._course.total_steps
        while tally.step < total and not tally.is_stopped:
            started = time.monotonic()
            done = self._learn(tally.step)
            seconds = time.monotonic() - started
            self._count(done, seconds)
            is_evaluated = self._is_evaluation_due()
            if is_evaluated:
                self._evaluate()
            self._log(done)
            is_milestone = is_evaluated or self._course.ends_epoch(tally.step) or tally.step == total
            if is_milestone or done.is_checkpoint_due:
                self._save(is_milestone=is_milestone)
            self._tell(done.loss)
        return self._finish()

    def _count(self, done: _Learned, seconds: float) -> None:
        step, cost = self._tally.step, self._cost.of(self._tally.step)
        tokens, learned = self.feed.tokens(step), self.feed.learned(step)
        self._tally.count_step(done.loss, tokens, learned, seconds, done.norm, cost)
        self._clock.count_step(cost, seconds)
        self._health.count_memory(done.memory_bytes)

    def _learn(self, step: int) -> _Learned:
        """One optimiser step, with smaller packs when memory runs out and that is allowed."""
        while True:
            try:
                with lm.memory_errors(self._layout.device, _LESS_MEMORY):
                    return self._compute(step)
            except OutOfMemory as error:
                if not self._may_lower_packs(step):
                    raise
                told = str(error)
            self._lower_packs(step, told)

    def _compute(self, step: int) -> _Learned:
        batches = self.feed.batches(step)
        # One divisor for the whole effective batch: how it is cut into packs changes nothing.
        learned = self.feed.learned(step)
        losses = []
        for place, batch in enumerate(batches):
            with self._precision():
                loss = self._layout.loss(batch) * (batch.weight / learned)
            self._layout.backward(loss, is_last=place == len(batches) - 1)
            losses.append(loss.detach())
        values = torch.stack(losses).tolist()
        # A limit of 0 does not clip.
        norm = self._layout.clip(self._parameters.max_grad_norm or math.inf)
        # The clock of rank 0 decides for all, on the way of the loss.
        is_due = self._layout.rank == 0 and self._pace.is_checkpoint_due(step + 1)
        memory = health.memory_bytes(self._layout.device)
        loss_sum, due, memory_sum = self._layout.sum([sum(values), float(is_due), memory])
        rate = self._rate(step)
        self._guard.check(Computed(step + 1, loss_sum, norm, rate, batches, values), self._tally)
        self._layout.step(rate)
        return _Learned(loss_sum, norm, rate, due > 0, memory_sum)

    def _rate(self, step: int) -> float:
        return learning_rate(
            self._parameters.lr_scheduler_type,
            step,
            peak=self._parameters.learning_rate,
            warmup_steps=self._parameters.warmup_steps,
            total_steps=self._course.total_steps,
        )

    def _may_lower_packs(self, step: int) -> bool:
        longest = int(self._train.lengths[list(self._course.rows_of(step))].max())
        return (
            self._parameters.auto_find_batch_size
            and self._layout.world == 1
            and self.feed.pack_tokens > longest
        )

    def _lower_packs(self, step: int, told: str) -> None:
        self._layout.discard()
        if self._layout.device.type == "cuda":
            torch.cuda.empty_cache()
        self.feed.lower(self.feed.pack_tokens // 2)
        self._tally.pack_tokens = self.feed.pack_tokens
        self._events.warn(
            f"step {step + 1}: {told} auto_find_batch_size is true, so at most {self.feed.pack_tokens} "
            "tokens are computed at a time from here on. The effective batch stays as it was."
        )

    # ------------------------------------------------------------ evaluation

    def _is_evaluation_due(self) -> bool:
        if self._validation is None:
            return False
        step = self._tally.step
        if step == self._course.total_steps:
            return True
        return step % self._steps_between_evaluations() == 0

    def _steps_between_evaluations(self) -> int:
        """0: they are off."""
        if self._validation is None:
            return 0
        if self._parameters.evaluation_strategy == "epoch":
            return self._course.steps_per_epoch
        share = self._parameters.evaluation_steps_interval
        if share > 0:
            return max(1, int(share * self._course.steps_per_epoch))
        return self._parameters.eval_steps

    def _evaluate(self) -> None:
        assert self._validation is not None
        self._model.eval()
        started = time.monotonic()
        loss = self._validation.loss(self.feed.pack_tokens, self._tell_rows)
        self._clock.count_evaluation(time.monotonic() - started)
        self._model.train()
        self._guard.check_validation(loss, self._tally.step)
        is_best = self._tally.count_evaluation(loss, self._parameters.early_stopping_threshold)
        if is_best:
            self._best_weights = []  # The checkpoint that follows holds them.
        patience = self._parameters.early_stopping_patience
        if self._parameters.apply_early_stopping and self._tally.bad_evaluations >= patience:
            self._tally.is_stopped = True
        # The loss alone: where this step is logged too, its other values stand there already.
        self._events.metrics(self._tally.step, eval_loss=loss)

    def _tell_rows(self, done: int, total: int) -> None:
        if self._pace.may_tell():
            self._events.progress("evaluating", done, total, "rows")

    # ------------------------------------------------------------ telling

    def _log(self, done: _Learned) -> None:
        step = self._tally.step
        is_due = (
            self._course.ends_epoch(step)
            if self._parameters.logging_strategy == "epoch"
            else step % self._parameters.logging_steps == 0
        )
        if not is_due and step != self._course.total_steps and not self._tally.is_stopped:
            return
        self._health.log(self._tally, rate=done.rate, norm=done.norm)

    def _tell(self, loss: float) -> None:
        total = self._course.total_steps
        if self._tally.step == total or self._pace.may_tell():
            self._health.tell(self._tally, total, loss)

    def _epoch(self) -> float:
        return self._tally.step / self._course.steps_per_epoch

    # ------------------------------------------------------------ checkpoints

    def _fingerprint(self, model: nn.Module) -> str:
        trained = optimizer.trainable(model)
        return digest.of_json(
            {
                "engine": ENGINE,
                "parameters": self._parameters.model_dump(mode="json", exclude=_NOT_THE_RESULT),
                "rows": [len(self._train), self._train.tokens, self._train.learned_tokens],
                "trained": {name: list(parameter.shape) for name, parameter in trained.items()},
                "is_bf16": self._plan.is_bf16,
            }
        )

    def _save(self, *, is_milestone: bool) -> None:
        started = time.monotonic()
        dump = self._layout.dump()
        random_tensors, random_state = checkpoint.dump_random(self._layout.device)
        suffix = layout.shard_suffix(self._layout.rank, self._layout.world)
        folder = checkpoint.save(
            self._inputs.checkpoint_folder,
            state={
                **self._tally.to_json(),
                **dump.state,
                "strategy": self._layout.strategy,
                "processes": self._layout.world,
                "random": self._layout.gather(random_state),
            },
            tensors={**dump.tensors, f"random{suffix}": random_tensors},
            best_weights=self._best_weights,
            fits=self._fits,
            is_milestone=is_milestone,
            writers=self._layout,
        )
        if self._tally.best_step is not None:
            best = "weights" if self._tally.best_step == self._tally.step else "best"
            self._best_weights = checkpoint.shards(folder, best)
        if self._layout.rank == 0:
            limit = self._parameters.save_total_limit
            checkpoint.prune(self._inputs.checkpoint_folder, limit, is_finished=False)
        self._layout.barrier()
        self._pace.count_checkpoint(time.monotonic() - started)

    def _resume(self) -> None:
        found = self._find_checkpoint()
        if found is None:
            if self._parameters.resume_from_checkpoint:
                self._events.warn(
                    "resume_from_checkpoint is true: there is no checkpoint of an earlier attempt of "
                    "this step, so training starts at the beginning. (Attempts of one step always "
                    "resume.)"
                )
            return
        self._layout.load(found)
        self._load_random(found)
        self._tally = Tally.from_json(found.state)
        if 0 < self._tally.pack_tokens < self.feed.pack_tokens:
            self.feed.lower(self._tally.pack_tokens)
        self._best_weights = found.best_weights()
        self._resumed_from = found.step

    def _find_checkpoint(self) -> checkpoint.Found | None:
        """The same for all processes: rank 0 looks and verifies."""
        roots = (self._inputs.checkpoint_folder, *self._inputs.previous_checkpoint_folders)
        found = checkpoint.find(roots, self._fits, self._events.warn) if self._layout.rank == 0 else None
        chosen = self._layout.gather(str(found.folder) if found else None)[0]
        if found is None and chosen is not None:
            found = checkpoint.reopen(Path(chosen))
        return found

    def _load_random(self, found: checkpoint.Found) -> None:
        rank, processes = self._layout.rank, found.state["processes"]
        if rank >= processes:
            return  # More processes than before: this one draws from its seed.
        stem = f"random{layout.shard_suffix(rank, processes)}"
        checkpoint.load_random(found.tensors(stem), found.state["random"][rank], self._layout.device)

    # ------------------------------------------------------------ the end

    def _finish(self) -> TrainingResult:
        tally = self._tally
        kept_step = tally.best_step or tally.step
        if kept_step != tally.step:
            self._layout.load_weights(self._best_weights)
            self._events.warn(
                f"the weights after step {kept_step} are kept, where the validation loss was lowest "
                f"({tally.best_loss:.4f}); after the last step, {tally.step}, it was {tally.eval_loss:.4f}. "
                "Set finetune.evaluation_strategy to 'disable' to keep the last ones."
            )
        self._layout.barrier()
        if self._layout.rank == 0:
            limit = self._parameters.save_total_limit
            checkpoint.prune(self._inputs.checkpoint_folder, limit, is_finished=True)
        self._objective.close()
        self._model.eval()
        (memory,) = self._layout.sum([own_peak_resident_bytes()])
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
            gemm_share=self._health.gemm_share,
            effective_batch=self._course.effective_batch,
            processes=self._layout.world,
            processes_asked=self._plan.processes_asked,
            strategy=self._layout.strategy,
            pack_tokens=self.feed.pack_tokens,
            precision="bf16" if self._plan.is_bf16 else "fp32",
            device=self._layout.device.type,
            is_packed=self._objective.is_packed,
            is_checkpointed=self._inputs.is_checkpointed,
            is_stopped_early=tally.is_stopped,
            resumed_from_step=self._resumed_from,
            peak_memory_bytes=int(memory),
            peak_device_memory_bytes=lm.peak_device_memory_bytes(self._layout.device),
            weights=self._layout.trained_weights(),
        )

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._layout.device.type, dtype=torch.bfloat16, enabled=self._plan.is_bf16)


def checkpoint_activations(model: Any) -> None:
    """Keep the inputs of each layer only and compute the rest again in the backward pass
    (arXiv:1604.06174)."""
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
