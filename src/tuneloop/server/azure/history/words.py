"""What the log of a job says, line by line: pure, but for records that are looked up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from pydantic import JsonValue

from tuneloop.core.states import JobState, StepState
from tuneloop.core.types import (
    ArtifactInput,
    ErrorInfo,
    Event,
    JobRecord,
    MetricLine,
    ProgressLine,
    StepRecord,
)
from tuneloop.server.parts import Parts

MOST_DETAILS = 20
"""Of an error: more are counted."""
_SHOWN = (
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "precision",
    "apply_lora",
    "lora_r",
    "lora_alpha",
    "apply_deepspeed",
    "deepspeed_stage",
)
_FIGURES = ("loss", "eval_loss", "learning_rate", "grad_norm", "epoch", "tokens_per_second")
"""Metrics that are told on the way, in this order."""

Told = tuple[str, str, bool]
"""Who, what, and whether it is a warning."""


def clean(text: str) -> str:
    """One line: `stream` counts lines as `str.splitlines` does, which splits at more than newlines."""
    return "".join(character if character.isprintable() else " " for character in text)


def of_event(parts: Parts, record: JobRecord, event: Event) -> Iterator[Told]:
    data = event.data
    if event.what == "submitted":
        yield from _submitted(record)
    elif event.what == "state":
        yield from _state(record, JobState(str(data["state"])))
    elif event.what == "attempt" and _number(data) > 1:
        yield str(data["step"]), f"attempt {_number(data)}: the one before was lost", False
    elif event.what == "step":
        step = parts.store.find(StepRecord, f"{record.key}/{data['step']}")
        if step is not None:
            yield from _step(record, step, StepState(str(data["state"])))
    elif event.what == "priority":
        yield "job", f"priority is {data.get('priority')} now", False


def _number(data: Mapping[str, JsonValue]) -> int:
    number = data.get("number")
    return number if isinstance(number, int) else 0


# ---------------------------------------------------------------- the job


def _submitted(record: JobRecord) -> Iterator[Told]:
    job = record.job
    yield "job", f"{job.name} was submitted: {job.display_name}, experiment {job.experiment}", False
    if job.base_model:
        yield "job", f"base model {job.base_model}", False
    if job.datasets:
        told = ", ".join(f"{role} {_file(record, role)}{name}" for role, name in job.datasets.items())
        yield "job", f"data: {told}", False
    yield from (("job", told, False) for told in _parameters(job.parameters))
    settings = job.settings
    yield (
        "job",
        f"force_rerun is {_flag(settings.force_rerun)}, "
        f"continue_on_step_failure is {_flag(settings.continue_on_step_failure)}",
        False,
    )
    yield from (("job", warning, True) for warning in job.warnings)


def _file(record: JobRecord, role: str) -> str:
    """`train_sft.jsonl, stored as `."""
    for step in record.job.steps:
        given = step.inputs.get(role)
        if isinstance(given, ArtifactInput) and given.name:
            return f"{given.name}, stored as "
    return ""


def _parameters(parameters: Mapping[str, JsonValue]) -> Iterator[str]:
    """What people ask about first: the effective batch, and what training does."""
    finetune = {
        name.removeprefix("finetune."): value
        for name, value in parameters.items()
        if name.startswith("finetune.")
    }
    factors = {
        "per device": finetune.get("per_device_train_batch_size"),
        "accumulation": finetune.get("gradient_accumulation_steps"),
        "devices": finetune.get("number_of_gpu_to_use_finetuning"),
        "nodes": finetune.get("num_nodes_finetune"),
    }
    if all(isinstance(factor, int) for factor in factors.values()):
        product = 1
        for factor in factors.values():
            product *= int(str(factor))
        told = " x ".join(f"{value} {name}" for name, value in factors.items())
        yield f"effective batch {product} ({told})"
    shown = [f"{name} {_value(finetune[name])}" for name in _SHOWN if name in finetune]
    if "preprocess.max_seq_length" in parameters:
        shown.append(f"max_seq_length {_value(parameters['preprocess.max_seq_length'])}")
    if shown:
        yield ", ".join(shown)


def _state(record: JobRecord, state: JobState) -> Iterator[Told]:
    if state is JobState.QUEUED:
        yield "job", "taken up again", False
    elif state is JobState.RUNNING:
        yield "job", "running", False
    elif state is JobState.CANCELING:
        yield "job", "it was asked to end", False
    else:
        taken = seconds(record.started_at or record.created_at, record.finished_at)
        yield "job", f"{state}{taken}", False
    if state is JobState.FAILED and record.error is not None:
        yield from (("job", told, False) for told in of_error(record.error))


# ---------------------------------------------------------------- steps


def _step(record: JobRecord, step: StepRecord, state: StepState) -> Iterator[Told]:
    name = step.step
    if state is StepState.RUNNING:
        yield name, f"started on {record.job.step(name).compute}", False
        return
    if state is StepState.PENDING:
        yield name, "waits to be run again", False
        return
    if state is StepState.REUSED:
        yield name, f"reused from {step.reused_from}: {step.reason}", False
    elif state is StepState.SUCCEEDED:
        yield name, f"succeeded{seconds(step.started_at, step.finished_at)}", False
    elif state is StepState.FAILED:
        yield name, f"failed{seconds(step.started_at, step.finished_at)}", False
        if step.error is not None:
            yield from ((name, told, False) for told in of_error(step.error))
    else:
        yield name, f"{state}: {step.reason}" if step.reason else str(state), False
    yield from ((name, warning, True) for warning in step.warnings)
    if step.metrics:
        yield name, "  ".join(f"{one} {_metric(value)}" for one, value in step.metrics.items()), False


def of_error(error: ErrorInfo) -> Iterator[str]:
    """The message, the next move, and each place that it names."""
    yield from (f"error: {line}" for line in error.message.splitlines())
    places = [told for told, _ in details(error)]
    yield from (f"  {place}" for place in places[:MOST_DETAILS])
    if len(places) > MOST_DETAILS:
        yield f"  and {len(places) - MOST_DETAILS} more"
    if error.next:
        yield from (f"next: {line}" for line in error.next.splitlines())


def details(error: ErrorInfo) -> Iterator[tuple[str, str]]:
    """What each finding of an error says, and where: `train_sft.jsonl line 112`."""
    for one in error.details if isinstance(error.details, list) else ():
        if not isinstance(one, dict):
            continue
        where = str(one.get("file") or one.get("field") or "")
        if where and one.get("line"):
            where += f" line {one['line']}"
        said = one.get("message") or _finding(one)
        yield f"{where}: {said}" if where else str(said), where


def _finding(one: Mapping[str, Any]) -> str:
    parts = [f"rule {one['rule']}" if one.get("rule") else "", str(one.get("fix") or "")]
    return ". ".join(part for part in parts if part)


# ---------------------------------------------------------------- progress and metrics


def of_progress(line: ProgressLine) -> str:
    parts = [line.stage]
    if line.done is not None:
        parts.append(_count(line.done, line.total, line.unit or ""))
    parts += _figures(line.values)
    if line.remaining_seconds is not None and line.remaining_seconds >= 1:
        parts.append(f"{_duration(line.remaining_seconds)} left")
    return "  ".join(parts)


def _count(done: float, total: float | None, unit: str) -> str:
    """`12/60 steps`, `31.4/98.4 MB`."""
    if unit == "bytes":
        done, unit = done / 1e6, "MB"
        return f"{done:.1f}/{total / 1e6:.1f} {unit}" if total else f"{done:.1f} {unit}"
    shown = f"{done:,.0f}" if done.is_integer() else f"{done:g}"
    if total:
        shown += f"/{total:,.0f}" if total.is_integer() else f"/{total:g}"
    return f"{shown} {unit}".strip()


def of_metrics(line: MetricLine) -> str:
    """Empty when it holds nothing to tell."""
    told = _figures(line.values)
    return f"step {line.step}  {'  '.join(told)}" if told else ""


def _figures(values: Mapping[str, float]) -> list[str]:
    return [f"{name} {values[name]:.5g}" for name in _FIGURES if name in values]


def seconds(start: datetime | None, end: datetime | None) -> str:
    """` in 12.3 s`; empty while one of them is not known."""
    if start is None or end is None:
        return ""
    return f" in {_duration(max(0.0, (end - start).total_seconds()))}"


def _duration(taken: float) -> str:
    if taken < 60:
        return f"{taken:.1f} s"
    minutes, rest = divmod(round(taken), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _value(value: JsonValue) -> str:
    if isinstance(value, bool):
        return _flag(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _metric(value: float) -> str:
    return str(int(value)) if value.is_integer() else format(value, ".5g")


def _flag(value: bool) -> str:
    return str(value).lower()
