"""A resolved recipe to a job: model_import, preprocess, finetune, export, evaluate."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from pydantic import JsonValue

from tuneloop.core.fit import finetune_memory_bytes, rows_expected, step_memory_bytes
from tuneloop.core.machine import this_machine
from tuneloop.core.plan import Rows
from tuneloop.core.recipe.key import differing
from tuneloop.core.recipe.parameters import ImportedCard, ModelImportParameters
from tuneloop.core.recipe.resolve import Resolved
from tuneloop.core.recipe.written import STAGES, Recipe
from tuneloop.core.types import (
    ArtifactInput,
    Card,
    CardSource,
    HubSource,
    Job,
    JobOutput,
    JobSettings,
    PackageSource,
    Priority,
    Step,
    StepInput,
    StepOutputInput,
)

ADVICE = ("learning_rate_min", "learning_rate_max")
"""Used when a recipe is resolved; no step reads them, so no step's key holds them."""


# ---------------------------------------------------------------- names


def dataset_label(recipe: Recipe) -> str:
    """`data.name`, or the name of the folder of the training file, or of the file, without what says little.

    `ultrachat_200k_dataset/train_sft.jsonl` and `ultrachat_200k.jsonl` both give `ultrachat`.
    """
    if recipe.data.name is not None:
        return recipe.data.name
    path = PurePosixPath(recipe.data.train.removeprefix("samples:").replace("\\", "/"))
    return _core(path.parent.name) or _core(path.stem) or path.stem or "data"


def _core(name: str) -> str:
    """Words such as `dataset`, `train` and `200k` are dropped from the end."""
    words = [word for word in re.split(r"[^A-Za-z0-9]+", name) if word]
    while words and re.fullmatch(r"data|datasets?|train|training|sft|gen|jsonl?|\d+[kKmM]?", words[-1]):
        words.pop()
    return "-".join(words)


def display_name(resolved: Resolved, train_name: str | None = None, gpus_per_node: int | None = None) -> str:
    """As the Azure document's `get_pipeline_display_name` builds it (section 5), or the recipe's own.

    The batch size is devices x accumulation x per-device batch; `gpus_per_node` is what the recipe asks for
    when it is not given.
    """
    if resolved.recipe.display_name is not None:
        return resolved.recipe.display_name
    finetune = resolved.finetune
    gpus = finetune.number_of_gpu_to_use_finetuning if gpus_per_node is None else gpus_per_node
    batch_size = (
        finetune.per_device_train_batch_size
        * finetune.gradient_accumulation_steps
        * gpus
        * finetune.num_nodes_finetune
    )
    parts = [
        resolved.card.name,
        train_name or dataset_label(resolved.recipe),
        f"bs{batch_size}",
        finetune.lr_scheduler_type,
        f"ds{finetune.deepspeed_stage}" if finetune.apply_deepspeed else "nods",
        "lora" if finetune.apply_lora else "nolora",
        f"save_limit{finetune.save_total_limit}",
        f"seqlen{resolved.preprocess.max_seq_length}",
    ]
    return "-".join(parts)


# ---------------------------------------------------------------- the job


def compile_job(
    resolved: Resolved,
    *,
    name: str,
    card: Card,
    inputs: Mapping[str, ArtifactInput],
    dataset_names: Mapping[str, str],
    experiment: str | None = None,
    environment: Mapping[str, str] | None = None,
    force_rerun: bool = False,
    priority: Priority | None = None,
    gpus_per_node: int | None = None,
    rows: Rows | None = None,
    gpus: int = 0,
    memory_bytes: int | None = None,
) -> Job:
    """`inputs`: role (train, validation, test, questions) to artifact; `dataset_names`: role to dataset.
    `rows` are the expected lengths of the training rows (left out: the longest that are let in); `gpus` are
    this machine's, `memory_bytes` what may be claimed of it. They decide what the finetune step claims."""
    recipe = resolved.recipe
    text = dump_resolved(resolved)
    return Job(
        name=name,
        display_name=display_name(resolved, gpus_per_node=gpus_per_node),
        experiment=experiment or recipe.experiment,
        steps=tuple(
            _sized(step, resolved, card, rows, gpus, memory_bytes) for step in _steps(resolved, card, inputs)
        ),
        outputs=_outputs(resolved),
        settings=JobSettings(
            force_rerun=force_rerun or recipe.settings.force_rerun,
            continue_on_step_failure=recipe.settings.continue_on_step_failure,
            priority=priority or recipe.settings.priority,
        ),
        environment=dict(environment or {}),
        recipe=text,
        recipe_digest="sha256:" + hashlib.sha256(text.encode()).hexdigest(),
        parameters=resolved.parameters,
        origins=resolved.origins,
        warnings=resolved.warnings,
        base_model=f"{card.name}:{card.version}",
        datasets=dict(dataset_names),
    )


def _sized(
    step: Step, resolved: Resolved, card: Card, rows: Rows | None, gpus: int, available: int | None
) -> Step:
    """With the memory that it is expected to take."""
    if step.kind == "finetune":
        known = rows or rows_expected(None, resolved.preprocess.max_seq_length, card)
        finetune = resolved.finetune.model_dump()
        expected = finetune_memory_bytes(card, finetune, known, gpus=gpus, available_bytes=available)
    else:
        expected = step_memory_bytes(step.kind, card.parameters, this_machine().cores)
    return step.model_copy(update={"memory_bytes": expected})


def is_reproducible(source: CardSource) -> bool:
    """Whether the source names bytes, not a place whose bytes may change."""
    if isinstance(source, HubSource):
        return source.is_pinned
    return isinstance(source, PackageSource)


def _steps(resolved: Resolved, card: Card, inputs: Mapping[str, ArtifactInput]) -> tuple[Step, ...]:
    model = StepOutputInput(step="model_import", output="model")
    dataset = StepOutputInput(step="preprocess", output="dataset")
    trained = StepOutputInput(step="finetune", output="trained")
    splits = {role: inputs[role] for role in ("train", "validation", "test") if role in inputs}
    compute = resolved.recipe.compute
    found = [
        _model_import(resolved, card),
        Step(
            name="preprocess",
            kind="preprocess",
            parameters=differing("preprocess", _dump(resolved, "preprocess")),
            inputs={"model": model, **splits},
            outputs={"dataset": "dataset_folder"},
            compute=compute.preprocess,
        ),
        Step(
            name="finetune",
            kind="finetune",
            parameters=differing("finetune", _dump(resolved, "finetune")),
            inputs={"model": model, "dataset": dataset},
            outputs={"trained": "adapter_folder" if resolved.finetune.apply_lora else "model_folder"},
            compute=compute.finetune,
        ),
        Step(
            name="export",
            kind="export",
            parameters=differing("export", _dump(resolved, "export")),
            inputs={"model": model, "trained": trained},
            outputs={"mlflow_model": "mlflow_model"},
            compute=compute.export,
        ),
    ]
    if resolved.evaluate is not None:
        found.append(_evaluate(resolved, model, dataset, inputs))
    return tuple(found)


def _model_import(resolved: Resolved, card: Card) -> Step:
    parameters = ModelImportParameters(
        card=ImportedCard.of(card),
        trust_remote_code=resolved.model_import.trust_remote_code,
    )
    return Step(
        name="model_import",
        kind="model_import",
        parameters=differing("model_import", parameters.model_dump(mode="json")),
        outputs={"model": "model_folder"},
        compute=resolved.recipe.compute.model_import,
        # What may have changed is read again; the steps after it are reused when it has not.
        deterministic=is_reproducible(card.sources[0]),
    )


def _evaluate(
    resolved: Resolved,
    model: StepOutputInput,
    dataset: StepOutputInput,
    inputs: Mapping[str, ArtifactInput],
) -> Step:
    given: dict[str, StepInput] = {
        "base": model,
        "model": StepOutputInput(step="export", output="mlflow_model"),
        "dataset": dataset,
    }
    if "questions" in inputs:
        given["questions"] = inputs["questions"]
    if "test" in inputs:
        given["test_file"] = inputs["test"]
    return Step(
        name="evaluate",
        kind="evaluate",
        parameters=differing("evaluate", _dump(resolved, "evaluate")),
        inputs=given,
        outputs={"evaluation": "folder"},
        compute=resolved.recipe.compute.evaluate,
    )


def _outputs(resolved: Resolved) -> dict[str, JobOutput]:
    trained = "adapter" if resolved.finetune.apply_lora else "pytorch_model_folder"
    found = {
        "trained_model": JobOutput(step="export", output="mlflow_model"),
        trained: JobOutput(step="finetune", output="trained"),
    }
    if resolved.evaluate is not None:
        found["evaluation_result"] = JobOutput(step="evaluate", output="evaluation")
    return found


def _dump(resolved: Resolved, stage: str) -> dict[str, JsonValue]:
    values = resolved.sections[stage].model_dump(mode="json")
    return {key: value for key, value in values.items() if key not in ADVICE}


# ---------------------------------------------------------------- the resolved copy


def dump_resolved(resolved: Resolved) -> str:
    """The recipe with every value written out and its origin; `parse` reads it back to the same job."""
    recipe = resolved.recipe
    lines = [
        "# Every value as it was used; after # stands where it came from.",
        *([f"display_name: {_yaml(recipe.display_name)}"] if recipe.display_name else []),
        f"experiment: {_yaml(recipe.experiment)}",
        f"model: {_yaml(f'{resolved.card.name}:{resolved.card.version}')}",
        "model_defaults: fill",
        "data:",
        *[f"  {key}: {_yaml(value)}" for key, value in recipe.data.model_dump(exclude_none=True).items()],
        "compute:",
        *[f"  {stage}: {_yaml(recipe.compute.of(stage))}" for stage in STAGES],
    ]
    for name, section in resolved.sections.items():
        lines.append(f"{name}:")
        for key, value in section.model_dump(mode="json", exclude_none=True).items():
            lines.append(f"  {key}: {_yaml(value)}  # {resolved.origins[f'{name}.{key}']}")
    if resolved.evaluate is None:
        lines.append("evaluate: false")
    lines.append("settings:")
    lines.extend(f"  {key}: {_yaml(value)}" for key, value in recipe.settings.model_dump().items())
    return "\n".join(lines) + "\n"


def _yaml(value: JsonValue) -> str:
    """JSON is YAML; a number gets the dot that YAML 1.1 needs to see it as one."""
    if isinstance(value, float):
        return re.sub(r"^(-?\d+)e", r"\1.0e", repr(value))
    return json.dumps(value, ensure_ascii=False)
