"""What this version's training does with the parameters of the chat-completion component, before anything
runs.

Pure: a mapping of parameter names to values in, sentences out (types and ranges are the recipe's business).
`refusals` are errors, said all at once when a recipe is resolved and again by the step; `cautions` are
accepted, with what they do not do. What depends on the machine (GPUs that exist, fast 16-bit arithmetic) is
told by the step, in `training.plan`.
"""

from __future__ import annotations

from collections.abc import Mapping

from tuneloop.core import deepspeed


def refusals(parameters: Mapping[str, object]) -> list[str]:
    """One sentence for each parameter that cannot be obeyed; it names the parameter, the value and the way
    out."""
    return [*_refused_values(parameters), *_refused_together(parameters), *_without_lora(parameters)]


def cautions(parameters: Mapping[str, object], processes: int | None = None) -> list[str]:
    """One sentence for each parameter that is accepted and does less than its name says. `processes` that
    train, once they are known; until then as many as are asked for."""
    found = []
    if _is_true(parameters.get("apply_deepspeed")):
        found += _about_deepspeed(parameters, _asked(parameters) if processes is None else processes)
    if _number(parameters.get("eval_accumulation_steps", -1)) > 0:
        found.append(
            f"eval_accumulation_steps is {parameters['eval_accumulation_steps']}: evaluation keeps sums "
            "only, so there is nothing to move off the accelerator."
        )
    if _is_true(parameters.get("apply_lora")) and not _is_true(parameters.get("merge_lora_weights", True)):
        found.append(
            "merge_lora_weights is false: the adapter is kept by itself either way, and the exported "
            "model holds merged weights all the same, because that is what is evaluated and served."
        )
    return [*found, *_overruled(parameters)]


# ---------------------------------------------------------------- refused


def _refused_values(parameters: Mapping[str, object]) -> list[str]:
    found = []
    if _is_true(parameters.get("apply_ort")):
        found.append(
            "apply_ort is true: ONNX Runtime training is not supported (the component switches it off "
            "for every task). Leave it out or set it to false."
        )
    metric = parameters.get("metric_for_best_model", "loss")
    if metric != "loss":
        found.append(
            f"metric_for_best_model is {metric!r}: it measures question answering and means nothing for "
            "chat. Use 'loss'."
        )
    own = parameters.get("deepspeed")
    if isinstance(own, str):
        found.append(
            f"deepspeed is {own!r}: a file is read when a job is submitted, and a step takes what stands in "
            "it. Write the JSON object itself."
        )
    elif isinstance(own, Mapping):
        found += [f"deepspeed {text}" for text in deepspeed.mistakes(own, parameters)]
        stage, asked = deepspeed.stage_of(own), str(parameters.get("deepspeed_stage", "2"))
        if stage is not None and _is_true(parameters.get("apply_deepspeed")) and str(stage) != asked:
            found.append(f"deepspeed_stage is {asked}, and deepspeed says {stage}: write the same.")
    return found


def _refused_together(parameters: Mapping[str, object]) -> list[str]:
    found = []
    uses_deepspeed = _is_true(parameters.get("apply_deepspeed"))
    if _is_true(parameters.get("apply_early_stopping")) and _evaluation(parameters) == "disable":
        found.append(
            "apply_early_stopping is true while evaluation_strategy is 'disable': there would be no loss "
            "to watch. Set evaluation_strategy to 'epoch' or 'steps'."
        )
    if _is_true(parameters.get("auto_find_batch_size")) and uses_deepspeed:
        found.append(
            "auto_find_batch_size is true while apply_deepspeed is true: the component refuses the two "
            "together. Set one of them to false; a smaller pack_tokens takes less memory too."
        )
    if _is_true(parameters.get("ignore_mismatched_sizes")) and _is_true(parameters.get("apply_lora")):
        found.append(
            "ignore_mismatched_sizes is true while apply_lora is true: weights that start at random would "
            "be frozen. Set it to false, or apply_lora to false to train them."
        )
    strategy = parameters.get("strategy", "auto")
    if strategy != "auto" and uses_deepspeed:
        found.append(
            f"strategy is {strategy!r} while apply_deepspeed is true: ZeRO shares the work then. Set "
            "apply_deepspeed to false, or leave strategy out."
        )
    return [*found, *_quantised_and_sharded(parameters)]


def _quantised_and_sharded(parameters: Mapping[str, object]) -> list[str]:
    if not _is_quantised(parameters) or _asked(parameters) == 1:
        return []
    if parameters.get("strategy") == "fsdp":
        sharding, way_out = "strategy is 'fsdp'", "Use strategy: ddp"
    elif _is_true(parameters.get("apply_deepspeed")) and str(parameters.get("deepspeed_stage", "2")) == "3":
        sharding, way_out = "deepspeed_stage is 3", "Use deepspeed_stage: 2"
    else:
        return []
    return [
        f"quantization is {parameters['quantization']!r} while {sharding}: weights in 4 bits are not cut "
        f"into pieces. {way_out}, or quantization: none."
    ]


def _without_lora(parameters: Mapping[str, object]) -> list[str]:
    """What needs an adapter and would do nothing without one; sizes of it are warned of."""
    if _is_true(parameters.get("apply_lora")):
        return []
    found = [
        f"{name} is true while apply_lora is false: there is no adapter. Set apply_lora to true, or leave "
        "it out."
        for name in ("lora_use_rslora", "lora_use_dora")
        if _is_true(parameters.get(name))
    ]
    if _is_quantised(parameters):
        found.append(
            f"quantization is {parameters['quantization']!r} while apply_lora is false: weights in 4 bits "
            "cannot be trained. Set apply_lora to true, or quantization to 'none'."
        )
    return found


# ---------------------------------------------------------------- warned of


def _about_deepspeed(parameters: Mapping[str, object], processes: int) -> list[str]:
    own = parameters.get("deepspeed")
    if processes == 1:
        which = "deepspeed_stage has" if own is None else "deepspeed_stage and deepspeed have"
        return [
            "apply_deepspeed is true: training runs plain, because ZeRO shards between processes and "
            f"there is one; {which} no effect."
        ]
    unheard = deepspeed.unheard(own) if isinstance(own, Mapping) else []
    if not unheard:
        return []
    return [
        f"deepspeed holds {' and '.join(unheard)}: nothing is printed for it; finetune.logging_steps says "
        "what is told."
    ]


def _overruled(parameters: Mapping[str, object]) -> list[str]:
    found = []
    if parameters.get("optim") == "adafactor":
        found.append("optim is 'adafactor': adam_beta1, adam_beta2 and adam_epsilon have no effect.")
    if _number(parameters.get("max_steps", -1)) > 0:
        found.append(
            f"max_steps is {parameters['max_steps']}: it decides, and num_train_epochs has no effect."
        )
    return found


# ---------------------------------------------------------------- values as they come


def _asked(parameters: Mapping[str, object]) -> int:
    names = ("number_of_gpu_to_use_finetuning", "num_nodes_finetune")
    return int(_number(parameters.get(names[0], 1)) * _number(parameters.get(names[1], 1)))


def _is_quantised(parameters: Mapping[str, object]) -> bool:
    return parameters.get("quantization", "none") != "none"


def _evaluation(parameters: Mapping[str, object]) -> str:
    return str(parameters.get("evaluation_strategy", "epoch"))


def _is_true(value: object) -> bool:
    return value is True or str(value).lower() == "true"


def _number(value: object) -> float:
    return float(str(value))
