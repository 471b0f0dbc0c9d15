"""What exactly is said about a job, a step, an attempt or a model: tags, parameters and points. All pure."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from pydantic import JsonValue

from tuneloop.core.ports import DatasetUse, Measurement, ModelEntry
from tuneloop.core.states import ModelState, StepState
from tuneloop.core.types import (
    AttemptRecord,
    Dataset,
    Job,
    Lineage,
    ModelRecord,
    StepFile,
    StepRecord,
)

# MLflow 3.17, mlflow/utils/validation.py.
LONGEST_NAME = 250
LONGEST_PARAMETER = 6000
LONGEST_TAG = 8000
POINTS_PER_CALL = 1000

_OURS = "tuneloop."
_METRIC = "tuneloop.metric."
_DATASET = "tuneloop.dataset."


def clean_name(name: str) -> str:
    """A name that MLflow takes for a parameter, metric or tag: word characters, dots, dashes and blanks."""
    cleaned = re.sub(r"[^A-Za-z0-9_.\- ]", "_", name).lstrip(".")
    return cleaned[:LONGEST_NAME] or "_"


def shorten(text: str, longest: int = LONGEST_TAG) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def flat(parameters: Mapping[str, JsonValue]) -> dict[str, str]:
    """Nested parameters under dotted names, with values as text: `finetune.learning_rate` to `2e-05`."""
    found: dict[str, str] = {}
    for name, value in parameters.items():
        if isinstance(value, Mapping) and value:
            found.update({clean_name(f"{name}.{key}"): text for key, text in flat(value).items()})
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            found[clean_name(name)] = shorten(text, LONGEST_PARAMETER)
    return found


def _tags(tags: Mapping[str, str | None]) -> dict[str, str]:
    return {clean_name(name): shorten(value) for name, value in tags.items() if value is not None}


def job_tags(job: Job) -> dict[str, str]:
    """The person's own tags under their names; ours win where both write."""
    return _tags(
        {
            **job.tags,
            "tuneloop.job": job.name,
            "tuneloop.base_model": job.base_model,
            **{f"{_DATASET}{role}": key for role, key in job.datasets.items()},
            "tuneloop.recipe_digest": job.recipe_digest,
            "tuneloop.warnings": "\n".join(job.warnings) or None,
            "mlflow.source.name": "tuneloop",
            "mlflow.source.type": "LOCAL",
        }
    )


def attempt_tags(
    attempt: AttemptRecord, kind: str, given: StepFile | None, parent_run: str
) -> dict[str, str]:
    inputs = {} if given is None else given.inputs
    return _tags(
        {
            "tuneloop.attempt": attempt.key,
            "tuneloop.step": attempt.step,
            "tuneloop.step_kind": kind,
            "tuneloop.compute": attempt.compute,
            **{f"tuneloop.input.{name}": found.digest for name, found in inputs.items()},
            "mlflow.parentRunId": parent_run,
            "mlflow.source.name": "tuneloop",
            "mlflow.source.type": "LOCAL",
        }
    )


def dataset_uses(datasets: Mapping[str, Dataset | None]) -> list[DatasetUse]:
    """One per version, with all of its roles: a file that is train and test at once shows both."""
    roles: dict[str, list[str]] = {}
    known: dict[str, Dataset] = {}
    for role, dataset in datasets.items():
        if dataset is not None:
            known[dataset.key] = dataset
            roles.setdefault(dataset.key, []).append(role)
    return [
        DatasetUse(
            name=key,
            digest=dataset.artifact,
            roles=tuple(roles[key]),
            source_path=dataset.source_path,
            rows=dataset.rows,
        )
        for key, dataset in known.items()
    ]


def summary(step: StepRecord) -> list[Measurement]:
    """The step's final metrics and its duration, named after the step: `evaluate.tuned_loss`."""
    # The step's own time: said twice, it is the same point.
    at_ms = _milliseconds(step.finished_at or step.created_at)
    values = dict(step.metrics)
    if step.started_at is not None and step.finished_at is not None:
        # The machine's clock may have been set back meanwhile.
        values["seconds"] = max(0.0, (step.finished_at - step.started_at).total_seconds())
    return [
        Measurement(name=clean_name(f"{step.step}.{name}"), value=value, at_ms=at_ms)
        for name, value in values.items()
    ]


def summary_tags(step: StepRecord) -> dict[str, str]:
    """Where a reused step's results come from, and what a step warned of."""
    return _tags(
        {
            f"tuneloop.reused.{step.step}": step.reused_from if step.state is StepState.REUSED else None,
            f"tuneloop.warnings.{step.step}": "\n".join(step.warnings) or None,
        }
    )


def system_facts(attempt: AttemptRecord, prefix: str = "") -> list[Measurement]:
    if attempt.peak_memory_bytes is None:
        return []
    return [
        Measurement(
            name=clean_name(f"{prefix}peak_memory_bytes"),
            value=float(attempt.peak_memory_bytes),
            at_ms=_milliseconds(attempt.finished_at or attempt.created_at),
            step=attempt.number,
        )
    ]


# ---------------------------------------------------------------- curves


@dataclass
class Batch:
    """Points of whole lines; `end` is the offset behind the last of them."""

    end: int
    points: list[Measurement] = field(default_factory=list)


def read_curves(path: Path, offset: int, limit_bytes: int) -> Iterator[Batch]:
    """About `limit_bytes` of whole lines from `offset`, in batches that MLflow takes at once.

    A line that is still being written waits; one that is no metrics line (a full disk) is passed over.
    """
    batch = Batch(end=offset)
    for line in _whole_lines(path, offset, limit_bytes):
        points = _points(line)
        if batch.points and len(batch.points) + len(points) > POINTS_PER_CALL:
            yield batch
            batch = Batch(end=batch.end)
        batch.points.extend(points)
        batch.end += len(line)
    if batch.end > offset:
        yield batch


def pictures_of(folder: Path) -> list[Path]:
    """What a step has drawn, in `pictures/` of its attempt."""
    return sorted((folder / "pictures").glob("*.png"))


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _whole_lines(path: Path, offset: int, limit_bytes: int) -> list[bytes]:
    try:
        with path.open("rb") as handle:
            handle.seek(offset)
            lines = handle.readlines(limit_bytes)
    except FileNotFoundError:
        return []
    return lines[:-1] if lines and not lines[-1].endswith(b"\n") else lines


def _points(line: bytes) -> list[Measurement]:
    try:
        found = json.loads(line)
        at_ms, step, values = int(found["at_ms"]), int(found["step"]), dict(found["values"])
        # JSON has no NaN: a loss that is not a number was written as null.
        return [
            Measurement(clean_name(name), math.nan if value is None else float(value), at_ms, step)
            for name, value in values.items()
        ]
    except (ValueError, TypeError, KeyError):
        return []


def _milliseconds(at: datetime) -> int:
    return round(at.timestamp() * 1000)


# ---------------------------------------------------------------- models


def model_tags(record: ModelRecord) -> dict[str, str]:
    """Everything from which `model_of` makes the record again."""
    lineage = record.lineage
    return _tags(
        {
            **record.tags,
            "tuneloop.version": record.model_version,
            "tuneloop.digest": record.artifact,
            "tuneloop.template_digest": record.template_digest,
            "tuneloop.base_model": lineage.base_model,
            "tuneloop.job": lineage.job,
            "tuneloop.output": lineage.output,
            "tuneloop.attempt": lineage.attempt,
            "tuneloop.recipe_digest": lineage.recipe_digest,
            "tuneloop.code_version": lineage.code_version,
            **{f"{_DATASET}{role}": text for role, text in lineage.datasets.items()},
            **{f"{_METRIC}{name}": repr(value) for name, value in record.metrics.items()},
        }
    )


def model_of(entry: ModelEntry, now: datetime) -> ModelRecord:
    """The record that `model_tags` described."""
    tags = entry.tags
    return ModelRecord(
        created_at=now,
        name=entry.name,
        model_version=entry.version,
        state=ModelState.REGISTERED,
        description=entry.description,
        tags={name: value for name, value in tags.items() if not name.startswith(_OURS)},
        artifact=entry.digest,
        template_digest=tags.get("tuneloop.template_digest"),
        lineage=Lineage(
            job=tags.get("tuneloop.job"),
            output=tags.get("tuneloop.output"),
            attempt=tags.get("tuneloop.attempt"),
            base_model=tags.get("tuneloop.base_model"),
            datasets=_under(tags, _DATASET),
            recipe_digest=tags.get("tuneloop.recipe_digest"),
            code_version=tags.get("tuneloop.code_version"),
        ),
        metrics={name: float(value) for name, value in _under(tags, _METRIC).items()},
        mlflow_version=entry.number,
    )


def _under(tags: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {name.removeprefix(prefix): value for name, value in tags.items() if name.startswith(prefix)}
