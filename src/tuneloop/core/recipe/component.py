"""All 69 inputs of `chat_completion_pipeline` 0.0.82, and where each one stands in a recipe.

An input is either written somewhere in a recipe (`place`), or refused by name with the reason and what to do.
`tests/unit/test_recipe_component.py` walks the table against the models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Input(NamedTuple):
    place: str | None
    """Dotted place in the recipe; None: refused."""
    reason: str | None = None
    """Why it is refused, and what to write instead."""


def _refused(reason: str) -> Input:
    return Input(None, reason)


_SIZE = _refused("names a size of a cloud's machine; name a compute of yours under compute instead.")
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
    "instance_type_model_import": _SIZE,
    "instance_type_preprocess": _SIZE,
    "instance_type_finetune": _SIZE,
    "instance_type_model_evaluation": _SIZE,
    "shm_size_finetune": _refused(
        "sizes a container's shared memory; steps are plain processes: leave it out."
    ),
    "num_nodes_finetune": Input("finetune.num_nodes_finetune"),
    "number_of_gpu_to_use_finetuning": Input("finetune.number_of_gpu_to_use_finetuning"),
    "huggingface_id": _refused(
        "names a repository of the Hugging Face hub; write a card with a hub source "
        "(tuneloop catalog add card.yaml) and name it under model."
    ),
    "pytorch_model_path": _refused(
        "names a folder of weights; point a card at it (tuneloop catalog use NAME --source FOLDER) "
        "and name the card under model."
    ),
    "mlflow_model_path": Input("model"),
    "finetune_config_path": _refused("overrides a model's packaged configuration; a card holds it instead."),
    "trust_remote_code": Input("model_import.trust_remote_code"),
    "task_name": _refused("is always ChatCompletion: leave it out."),
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
