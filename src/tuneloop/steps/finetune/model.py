"""The model that the finetune step trains, and what it leaves of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tuneloop import lm, training
from tuneloop.core.errors import Internal
from tuneloop.core.process import write_atomically
from tuneloop.core.recipe import FinetuneParameters
from tuneloop.steps.context import StepContext

_NOT_REPEATABLE = {
    "seconds",
    "tokens_per_second",
    "gemm_share",
    "peak_memory_bytes",
    "resumed_from_step",
    "peak_device_memory_bytes",
    "weights",
}
_FULL_FROM_BASE = ("*.json", "*.jinja", "*.model", "*.txt")
_WRITTEN_BY_MODEL = {"config.json", "model.safetensors.index.json", lm.MODEL_NOTE}


def open_model(
    context: StepContext, parameters: FinetuneParameters, plan: training.Plan, *, is_first: bool = True
) -> Any:
    """What is trained is fp32 in any case; a frozen base may be bf16. `is_first`: of several processes, the
    one that tells."""
    folder = context.inputs["model"]
    if not parameters.apply_lora:
        return _open_whole(context, folder, parameters, is_first).requires_grad_(True)
    where = plan.device if parameters.quantization == "4bit" else "cpu"
    base = lm.load_model(folder, dtype=plan.base_dtype, device=where, quantization=parameters.quantization)
    return lm.add_lora(
        base,
        parameters.lora_r,
        parameters.lora_alpha,
        parameters.lora_dropout,
        parameters.lora_target_modules,
        seed=parameters.seed,
        use_rslora=parameters.lora_use_rslora,
        use_dora=parameters.lora_use_dora,
    )


def _open_whole(context: StepContext, folder: Path, parameters: FinetuneParameters, is_first: bool) -> Any:
    if not parameters.ignore_mismatched_sizes:
        return lm.load_model(folder)
    # Each process starts such weights at the same numbers.
    training.prepare(parameters)
    fresh: list[str] = []
    model = lm.load_model(folder, mismatched=fresh)
    if fresh and is_first:
        context.warn(
            f"ignore_mismatched_sizes is true: {len(fresh)} tensor(s) of another shape than the model's "
            f"start at random: {', '.join(fresh)}."
        )
    return model


def save_trained(
    context: StepContext, model: Any, parameters: FinetuneParameters, result: training.TrainingResult
) -> None:
    """Make the output `trained` of what the result says was trained, whatever the layout has left in
    `model`."""
    folder, model_folder = context.output("trained"), context.inputs["model"]
    base_model = lm.read_note(model_folder).get("base_model")
    unusable = lm.unusable_tensors(result.weights.items())
    if unusable or not result.weights:
        raise Internal(f"What was trained cannot be saved: {', '.join(unusable[:5]) or 'there is nothing'}.")
    folder.mkdir()
    if parameters.apply_lora:
        _save_adapter(folder, model, result, base_model)
    else:
        model.save_pretrained(folder, state_dict=result.weights)
        if lm.may_run_code(model_folder):
            write_atomically(folder / lm.MODEL_NOTE, json.dumps({"format": 1, "remote_code": True}))
        _copy_tokenizer(lm.resolve_folders(model_folder)[1], folder)
    repeatable = {name: value for name, value in vars(result).items() if name not in _NOT_REPEATABLE}
    about = {"format": 1, "mode": "lora" if parameters.apply_lora else "full", "base_model": base_model}
    write_atomically(folder / "trained.json", json.dumps({**about, **repeatable}, indent=1))


def _save_adapter(folder: Path, model: Any, result: training.TrainingResult, base_model: str | None) -> None:
    # Its embedding layers are frozen; "auto" would ask the hub about them.
    model.save_pretrained(folder, state_dict=result.weights, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # PEFT writes this machine's path, and its sets in an order that changes from process to process.
    config["base_model_name_or_path"] = base_model
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    write_atomically(path, json.dumps(config, indent=2, sort_keys=True))


def _copy_tokenizer(source: Path, target: Path) -> None:
    """As it is, byte for byte: the chat template's digest is part of the model."""
    for pattern in _FULL_FROM_BASE:
        for file in source.glob(pattern):
            if file.name not in _WRITTEN_BY_MODEL:
                shutil.copyfile(file, target / file.name)
