"""The component `chat_completion_pipeline` as its registry describes it: what the SDK makes a call out of.

Names, types, defaults and choices come from the recipe's own table and models, so the description says what a
job will accept. Source of the rest: `chat_completion_pipeline` 0.0.82 (Azure/azureml-assets 4b41f8cc).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from tuneloop.core.recipe.component import ADVISED, INPUTS, NO_COMPUTE, Input
from tuneloop.core.recipe.parameters import PARAMETERS

NAME = "chat_completion_pipeline"
VERSION = "0.0.82"
SCHEMA = "https://azuremlschemas.azureedge.net/latest/pipelineComponent.schema.json"
OUTPUTS: Mapping[str, str] = {
    "mlflow_model_folder": "mlflow_model",
    "pytorch_model_folder": "uri_folder",
    "evaluation_result": "uri_folder",
}
"""Name to type. The last comes and goes between the component's versions; here it is always there."""

_DESCRIPTION = (
    "Fine-tune a chat model on conversations: model import, preprocess, finetune, export and evaluation, "
    "each a process on this machine."
)
_OUTPUT_WORDS: Mapping[str, str] = {
    "mlflow_model_folder": "The tuned model as an MLflow model.",
    "pytorch_model_folder": "The tuned model in Hugging Face layout.",
    "evaluation_result": "Metrics of the base and the tuned model on the same rows, side by side.",
}


def _compute(stage: str) -> Mapping[str, Any]:
    return {
        "type": "string",
        "default": NO_COMPUTE,
        "description": f"Where {stage} runs: a compute of the workspace; {NO_COMPUTE}: this machine.",
    }


def _file(words: str) -> Mapping[str, Any]:
    return {"type": "uri_file", "description": words}


_ELSEWHERE: Mapping[str, Mapping[str, Any]] = {
    "instance_type_model_import": {"type": "string", "default": "Standard_d12_v2"},
    "instance_type_preprocess": {"type": "string", "default": "Standard_d12_v2"},
    "instance_type_finetune": {"type": "string", "default": "Standard_nc24rs_v3"},
    "instance_type_model_evaluation": {"type": "string", "default": "Standard_nc24rs_v3"},
    "shm_size_finetune": {"type": "string", "default": "5g"},
    "huggingface_id": {"type": "string", "description": "A repository of the hub that a base model names."},
    "pytorch_model_path": {"type": "custom_model"},
    "mlflow_model_path": {"type": "mlflow_model", "description": "A base model of this registry, by its id."},
    "finetune_config_path": {"type": "uri_file"},
    "task_name": {
        "type": "string",
        "default": "ChatCompletion",
        "enum": ["ChatCompletion"],
        "description": "What the model is tuned for.",
    },
    "train_file_path": _file("Conversations to learn from."),
    "validation_file_path": _file("Conversations for the loss while training; left out: carved from train."),
    "test_file_path": _file("Conversations for the evaluation; left out: carved from train."),
    "train_mltable_path": {"type": "mltable"},
    "validation_mltable_path": {"type": "mltable"},
    "test_mltable_path": {"type": "mltable"},
    "deepspeed": _file("A DeepSpeed configuration of your own, as JSON."),
    "evaluation_config": {"type": "uri_file"},
    "evaluation_config_params": {"type": "string"},
    "compute_model_import": _compute("model import"),
    "compute_preprocess": _compute("preprocess"),
    "compute_finetune": _compute("finetune"),
    "compute_model_evaluation": _compute("evaluation"),
}
"""Of the inputs that are no parameter of a step, or that are a file there."""
_COUNTS = frozenset(
    {
        "num_nodes_finetune",
        "number_of_gpu_to_use_finetuning",
        "batch_size",
        "num_train_epochs",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
    }
)
"""What the component bounds from below; other bounds are told when a job is submitted."""


@cache
def component_inputs() -> Mapping[str, Mapping[str, Any]]:
    """Name to `{type, optional, default, enum, min, description}` with the keys that an input has. Values are
    texts, as in the component's file; so are the choices true and false."""
    return {name: _described(name, known) for name, known in {**INPUTS, **ADVISED}.items()}


def component_spec() -> dict[str, Any]:
    """The component as its YAML file would have it."""
    return {
        "$schema": SCHEMA,
        "name": NAME,
        "version": VERSION,
        "type": "pipeline",
        "description": _DESCRIPTION,
        "inputs": {name: dict(described) for name, described in component_inputs().items()},
        "outputs": {
            name: {"type": kind, "description": _OUTPUT_WORDS[name]} for name, kind in OUTPUTS.items()
        },
        "jobs": {},
    }


def _described(name: str, known: Input) -> dict[str, Any]:
    found = _parameter(name, known)
    # The component asks for nothing: what it cannot do without is told when the job is submitted.
    if name != "task_name":
        found["optional"] = True
    if name in _COUNTS:
        found["min"] = 1
    told = known.reason or known.note
    if told:
        found["description"] = f"{'Refused' if known.reason else 'No effect'}: it {told}"
    return found


def _parameter(name: str, known: Input) -> dict[str, Any]:
    """Type, default and choices of an input, and what it means."""
    if name in _ELSEWHERE:
        return dict(_ELSEWHERE[name])
    field = _schemas()[str(known.place)]
    default = field.get("default")
    found: dict[str, Any] = {"type": _type(field), "description": field["description"]}
    if default is not None:
        found["default"] = _text(default)
    choices = ["true", "false"] if field.get("type") == "boolean" else field.get("enum")
    if choices:
        found["enum"] = [str(one) for one in choices]
    return found


@cache
def _schemas() -> Mapping[str, Mapping[str, Any]]:
    """JSON schemas of the parameters, by their dotted place in a recipe."""
    return dict(_places())


def _places() -> Iterator[tuple[str, Mapping[str, Any]]]:
    for step, model in PARAMETERS.items():
        for name, field in model.model_json_schema()["properties"].items():
            yield f"{step}.{name}", field


def _type(field: Mapping[str, Any]) -> str:
    """Azure's name of it: what is true or false is a text there."""
    kinds = [field, *field.get("anyOf", ())]
    kind = next(one["type"] for one in kinds if one.get("type") not in (None, "null"))
    return kind if kind in ("integer", "number") else "string"


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
