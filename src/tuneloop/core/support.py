"""What this version's training does with the parameters of the chat-completion component, before anything
runs.

Pure: a mapping of parameter names to values in, sentences out (types and ranges are the recipe's business).
`refusals` are errors, said all at once when a recipe is resolved and again by the step; `cautions` are
accepted, with what they do not do. What depends on the machine (GPUs that exist, fast 16-bit arithmetic) is
told by the step, in `training.plan`.
"""

from __future__ import annotations

from collections.abc import Mapping


def refusals(parameters: Mapping[str, object]) -> list[str]:
    """One sentence for each parameter that cannot be obeyed; it names the parameter, the value and the way
    out."""
    found = _refused_values(parameters)
    if _is_true(parameters.get("apply_early_stopping")) and _evaluation(parameters) == "disable":
        found.append(
            "apply_early_stopping is true while evaluation_strategy is 'disable': there would be no loss "
            "to watch. Set evaluation_strategy to 'epoch' or 'steps'."
        )
    return found


def _refused_values(parameters: Mapping[str, object]) -> list[str]:
    found = []
    if _is_true(parameters.get("apply_ort")):
        found.append(
            "apply_ort is true: ONNX Runtime training is not supported (the component switches it off "
            "for every task). Leave it out or set it to false."
        )
    if parameters.get("deepspeed") not in (None, ""):
        found.append(
            f"deepspeed is {parameters['deepspeed']!r}: a DeepSpeed configuration of your own is not "
            "supported yet. Leave it out."
        )
    if _is_true(parameters.get("auto_find_batch_size")):
        found.append(
            "auto_find_batch_size is true: the batch is never changed behind your back. Set it to false "
            "and lower per_device_train_batch_size, raising gradient_accumulation_steps by as much."
        )
    if _is_true(parameters.get("ignore_mismatched_sizes")):
        found.append(
            "ignore_mismatched_sizes is true: weights of another shape would be replaced by random ones. "
            "Set it to false."
        )
    metric = parameters.get("metric_for_best_model", "loss")
    if metric != "loss":
        found.append(
            f"metric_for_best_model is {metric!r}: it measures question answering and means nothing for "
            "chat. Use 'loss'."
        )
    return found


def cautions(parameters: Mapping[str, object]) -> list[str]:
    """One sentence for each parameter that is accepted and does less than its name says, on any machine."""
    found = []
    if _is_true(parameters.get("apply_deepspeed")):
        found.append(
            "apply_deepspeed is true: training runs plain, because ZeRO shards between processes and "
            "there is one; deepspeed_stage has no effect."
        )
    if _number(parameters.get("dataloader_num_workers", 0)) > 0:
        found.append(
            f"dataloader_num_workers is {parameters['dataloader_num_workers']}: no loader processes are "
            "started, since tokenised rows are read straight from a memory-mapped file."
        )
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


def _overruled(parameters: Mapping[str, object]) -> list[str]:
    found = []
    if parameters.get("optim") == "adafactor":
        found.append("optim is 'adafactor': adam_beta1, adam_beta2 and adam_epsilon have no effect.")
    if _number(parameters.get("max_steps", -1)) > 0:
        found.append(
            f"max_steps is {parameters['max_steps']}: it decides, and num_train_epochs has no effect."
        )
    return found


def _evaluation(parameters: Mapping[str, object]) -> str:
    return str(parameters.get("evaluation_strategy", "epoch"))


def _is_true(value: object) -> bool:
    return value is True or str(value).lower() == "true"


def _number(value: object) -> float:
    return float(str(value))
