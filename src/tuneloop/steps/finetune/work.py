"""What each process of the finetune step does: open the model, train, and, where it is the first, save."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from tuneloop import lm, training
from tuneloop.core.recipe import FinetuneParameters
from tuneloop.steps.context import StepContext
from tuneloop.steps.finetune.choice import Carried, carried_out
from tuneloop.steps.finetune.model import open_model, save_trained
from tuneloop.steps.launch.reports import Run
from tuneloop.training.plan import Strategy


def train_alone(context: StepContext) -> None:
    """In this process, the only one."""
    lm.threads()
    lm.quiet()
    found = carried_out(context.step, training.Machine.detect())
    _train(context, found)


def train_together(context: StepContext, run: Run, rank: int) -> None:
    """In one of the processes that have formed a group."""
    lm.threads()
    lm.quiet()
    parameters = FinetuneParameters.model_validate(context.parameters)
    plan = training.plan(parameters, training.Machine(**run.machine), len(run.nodes))
    # Decided once, by who has started them all.
    plan = replace(plan, strategy=cast(Strategy, run.strategy))
    _train(context, Carried(plan, run.pack_tokens, run.is_checkpointed, run.longest, run.planned_bytes), rank)


def _train(context: StepContext, how: Carried, rank: int = 0) -> None:
    parameters = FinetuneParameters.model_validate(context.parameters)
    is_first = rank == 0
    if is_first:
        context.progress("loading the model")
    model = open_model(context, parameters, how.plan, is_first=is_first)
    result = training.train(model, _inputs(context, parameters, how), context, chosen=how.plan)
    if is_first:
        context.progress("saving")
        save_trained(context, model, parameters, result)
        context.summary.update(_summary(result))


def _inputs(context: StepContext, parameters: FinetuneParameters, how: Carried) -> training.TrainingInputs:
    return training.TrainingInputs(
        dataset_folder=context.inputs["dataset"],
        parameters=parameters,
        checkpoint_folder=context.folder / "checkpoints",
        previous_checkpoint_folders=tuple(attempt / "checkpoints" for attempt in context.previous_attempts),
        pack_tokens=how.pack_tokens,
        is_checkpointed=how.is_checkpointed,
        planned_memory_bytes=how.planned_bytes,
        report_folder=context.folder,
    )


def _summary(result: training.TrainingResult) -> dict[str, float]:
    values: dict[str, Any] = {
        "loss": result.final_loss,
        "mean_loss": result.mean_loss,
        "eval_loss": result.eval_loss,
        "steps": result.steps,
        "kept_step": result.kept_step,
        "epochs": result.epochs,
        "tokens": result.tokens,
        "learned_tokens": result.learned_tokens,
        "training_seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "gemm_share": result.gemm_share,
        "processes": result.processes,
        "peak_memory_bytes": result.peak_memory_bytes,
        "peak_device_memory_bytes": result.peak_device_memory_bytes,
        "resumed_from_step": result.resumed_from_step,
    }
    return {name: float(value) for name, value in values.items() if value is not None}
