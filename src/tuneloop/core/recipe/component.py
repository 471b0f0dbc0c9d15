"""All 69 inputs of `chat_completion_pipeline` 0.0.82, and where each one stands in a recipe.

An input is written somewhere in a recipe (`place`), or accepted and told that it does nothing here (`note`),
or refused by name with the reason and what to do. A script's call can be pasted whole into the section
`component` of a recipe (`pasted`).
`tests/unit/test_recipe_component.py` walks the table against the models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Input(NamedTuple):
    place: str | None
    """Dotted place in the recipe; None: it has none."""
    reason: str | None = None
    """Why it is refused, and what to write instead."""
    note: str | None = None
    """Why it changes nothing here; it is accepted with this warning."""
    only: str | None = None
    """The one value that it may have; it says nothing then."""


def _refused(reason: str) -> Input:
    return Input(None, reason)


NO_COMPUTE = "serverless"
"""What the component takes for a compute that the cloud chooses."""


def _size(stage: str) -> Input:
    note = (
        "names a size of the cloud's machines, which the component reads only where the compute is "
        f"{NO_COMPUTE!r}: the step runs on compute.{stage}."
    )
    return Input(None, note=note)


_MLTABLE = _refused("is an MLTable, which is not read; give a .jsonl file under data instead.")
_METRICS = _refused("configures text-overlap metrics; what is measured is set under evaluate instead.")

_PREPROCESS = ("batch_size", "pad_to_max_length", "max_seq_length")
_FINETUNE = (
    "apply_lora",
    "merge_lora_weights",
    "lora_alpha",
    "lora_r",
    "lora_dropout",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "auto_find_batch_size",
    "optim",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "gradient_accumulation_steps",
    "eval_accumulation_steps",
    "lr_scheduler_type",
    "precision",
    "seed",
    "enable_full_determinism",
    "dataloader_num_workers",
    "ignore_mismatched_sizes",
    "max_grad_norm",
    "evaluation_strategy",
    "evaluation_steps_interval",
    "eval_steps",
    "logging_strategy",
    "logging_steps",
    "metric_for_best_model",
    "resume_from_checkpoint",
    "save_total_limit",
    "apply_early_stopping",
    "early_stopping_patience",
    "early_stopping_threshold",
    "apply_deepspeed",
    "deepspeed",
    "deepspeed_stage",
    "apply_ort",
)

INPUTS: Mapping[str, Input] = {
    "instance_type_model_import": _size("model_import"),
    "instance_type_preprocess": _size("preprocess"),
    "instance_type_finetune": _size("finetune"),
    "instance_type_model_evaluation": _size("evaluate"),
    "shm_size_finetune": Input(
        None,
        note="sizes the shared memory of a container: steps are plain processes and share this machine's.",
    ),
    "num_nodes_finetune": Input("finetune.num_nodes_finetune"),
    "number_of_gpu_to_use_finetuning": Input("finetune.number_of_gpu_to_use_finetuning"),
    "huggingface_id": Input("model"),
    "pytorch_model_path": _refused(
        "names a folder of weights; point a card at it (tuneloop catalog use NAME --source FOLDER) "
        "and name the card under model."
    ),
    "mlflow_model_path": Input("model"),
    "finetune_config_path": _refused("overrides a model's packaged configuration; a card holds it instead."),
    "trust_remote_code": Input("model_import.trust_remote_code"),
    "task_name": Input(None, only="ChatCompletion"),
    **{name: Input(f"preprocess.{name}") for name in _PREPROCESS},
    "train_file_path": Input("data.train"),
    "validation_file_path": Input("data.validation"),
    "test_file_path": Input("data.test"),
    "train_mltable_path": _MLTABLE,
    "validation_mltable_path": _MLTABLE,
    "test_mltable_path": _MLTABLE,
    **{name: Input(f"finetune.{name}") for name in _FINETUNE},
    "evaluation_config": _METRICS,
    "evaluation_config_params": _METRICS,
    "compute_model_import": Input("compute.model_import"),
    "compute_preprocess": Input("compute.preprocess"),
    "compute_finetune": Input("compute.finetune"),
    "compute_model_evaluation": Input("compute.evaluate"),
}

ADVISED: Mapping[str, Input] = {
    name: Input(f"finetune.{name}") for name in ("learning_rate_min", "learning_rate_max")
}
"""Not inputs of the component, but among the defaults of models that scripts hand to it (azure-ai-ml refuses
them as unexpected keywords)."""
