"""What a DeepSpeed configuration says about ZeRO: the built-in one, or a JSON object of a person's own.

Pure. Keys that are obeyed are in `DeepSpeedSettings`; keys that say what a parameter says must agree with it
or be "auto"; every other key is refused by name, all at once. The JSON's keys and defaults: DeepSpeed,
docs/_pages/config-json.md. What "auto" becomes: transformers, integrations/deepspeed.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import JsonValue

from tuneloop.core.errors import UsageError
from tuneloop.core.names import did_you_mean
from tuneloop.core.types import Noun

Stage = Literal[2, 3]
AUTO = "auto"
LARGEST_BYTES = 1_000_000

_COUNTS = (
    "reduce_bucket_size",
    "allgather_bucket_size",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
)
_FLAGS = (
    "overlap_comm",
    "contiguous_gradients",
    "reduce_scatter",
    "allgather_partitions",
    "round_robin_gradients",
)
_GATHER = (
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
)
"""The second is the older spelling."""
_FILLED: Mapping[str, Callable[[int], int]] = {
    "reduce_bucket_size": lambda hidden: hidden * hidden,
    "stage3_prefetch_bucket_size": lambda hidden: int(0.9 * hidden * hidden),
    "stage3_param_persistence_threshold": lambda hidden: 10 * hidden,
}
"""What "auto" is for a model of this hidden size; for other keys it is DeepSpeed's default."""
_PRINTS = ("steps_per_print", "wall_clock_breakdown", "dump_state")
_AGREE = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}
_OPTIMIZER = {"lr": "learning_rate", "eps": "adam_epsilon", "weight_decay": "weight_decay"}
_REASONS = {
    "scheduler": (
        "is not read: finetune.lr_scheduler_type and warmup_steps set the learning rate. Leave it out."
    ),
    "activation_checkpointing": "is not read: use finetune.activation_checkpointing. Leave it out.",
    "amp": "is not supported: use finetune.precision. Leave it out.",
    "data_types": "is not supported: gradients are summed in 32 bits. Leave it out.",
    "communication_data_type": "is not supported: gradients are summed in 32 bits. Leave it out.",
}
_OFFLOAD = (
    "is not supported: DeepSpeed compiles an optimiser of its own for it on the machine. Leave it out; "
    "stage 3, quantization: 4bit or apply_lora save memory too."
)


class DeepSpeedSettings(Noun):
    """How ZeRO (arXiv:1910.02054) shards: what is obeyed of a configuration."""

    stage: Stage
    """2: optimiser state and gradients; 3: weights as well."""
    zero: dict[str, int | bool | Literal["auto"]] = {}
    """Keys of `zero_optimization`, in DeepSpeed's own names; what is missing is at DeepSpeed's default."""
    gradient_clipping: float = 1.0
    """0: not clipped."""

    def block(self, hidden_size: int) -> dict[str, JsonValue]:
        """The `zero_optimization` block with every "auto" filled in for a model of this hidden size."""
        filled: dict[str, JsonValue] = {"stage": self.stage}
        for key, value in self.zero.items():
            if value != AUTO:
                filled[key] = value
            elif key in _FILLED:
                filled[key] = _FILLED[key](hidden_size)
        return filled


def settings_of(parameters: Mapping[str, Any]) -> DeepSpeedSettings | None:
    """Of a finetune step's parameters (`model_dump()`); None when `apply_deepspeed` is false. Raises
    `UsageError` for an own configuration that cannot be obeyed."""
    if not parameters.get("apply_deepspeed"):
        return None
    own = parameters.get("deepspeed")
    if own is not None:
        return read(own, parameters)
    zero: dict[str, Any] = {"reduce_bucket_size": AUTO}
    if _stage_asked(parameters) == 3:
        zero.update(stage3_prefetch_bucket_size=AUTO, stage3_param_persistence_threshold=AUTO)
    return DeepSpeedSettings(
        stage=_stage_asked(parameters), zero=zero, gradient_clipping=parameters.get("max_grad_norm", 1.0)
    )


def _stage_asked(parameters: Mapping[str, Any]) -> Stage:
    return 3 if str(parameters.get("deepspeed_stage", "2")) == "3" else 2


def load(path: Path) -> dict[str, JsonValue]:
    """The JSON object in a file. Raises `UsageError` when there is none."""
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise UsageError(f"{path.name} is larger than {LARGEST_BYTES:,} bytes.")
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise UsageError(f"{path.name} is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path.name} is not a JSON object.")
    return found


def read(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> DeepSpeedSettings:
    """What `config` says, "auto" left where a model's size decides. Raises `UsageError` with all mistakes."""
    found = mistakes(config, parameters)
    if found:
        raise UsageError("deepspeed " + "; ".join(found), details=found)
    zero = {key: _obeyed(value) for key, value in _zero(config).items() if key in (*_COUNTS, *_FLAGS)}
    return DeepSpeedSettings(
        stage=config["zero_optimization"]["stage"],
        zero=zero,
        gradient_clipping=parameters.get("max_grad_norm", 1.0),
    )


def stage_of(config: object) -> Stage | None:
    """The stage that a configuration names, when it is one that is obeyed."""
    if not isinstance(config, Mapping):
        return None
    stage = _zero(config).get("stage")
    if not isinstance(stage, int) or isinstance(stage, bool):
        return None
    return 2 if stage == 2 else 3 if stage == 3 else None


def mistakes(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> list[str]:
    """Why `config` cannot be obeyed under `parameters`: one sentence each, which begins with the key."""
    return [*_zero_mistakes(config), *_top_mistakes(config, parameters)]


def unheard(config: Mapping[str, Any]) -> list[str]:
    """Keys that are let in and change nothing here."""
    return [key for key in _PRINTS if config.get(key)]


def _zero(config: Mapping[str, Any]) -> Mapping[str, Any]:
    block = config.get("zero_optimization")
    return block if isinstance(block, Mapping) else {}


def _obeyed(value: Any) -> Any:
    return value if isinstance(value, bool | str) else int(value)


# ---------------------------------------------------------------- zero_optimization


def _zero_mistakes(config: Mapping[str, Any]) -> Iterator[str]:
    zero = _zero(config)
    stage = zero.get("stage")
    if stage_of(config) is None:
        yield (
            "zero_optimization.stage is missing: write 2 or 3."
            if stage is None
            else f"zero_optimization.stage is {stage!r}: write 2 or 3."
        )
    if stage == 3 and not any(zero.get(key) is True for key in _GATHER):
        yield (
            f"zero_optimization.{_GATHER[0]} is not true: with stage 3 the weights lie in pieces, and saving "
            "has to gather them. Set it to true."
        )
    for key, value in zero.items():
        wrong = _wrong_in_zero(key, value)
        if wrong is not None:
            yield f"zero_optimization.{key} {wrong}"


def _wrong_in_zero(key: str, value: Any) -> str | None:
    if key in ("stage", *_GATHER):
        return None
    if key in ("offload_optimizer", "offload_param"):
        is_off = isinstance(value, Mapping) and value.get("device", "none") in (None, "none")
        return None if value is None or is_off else _OFFLOAD
    if key in _COUNTS:
        is_count = not isinstance(value, bool) and isinstance(value, int | float) and value >= 0
        return None if value == AUTO or is_count else f'is {value!r}: write a number of elements or "auto".'
    if key in _FLAGS:
        return None if value == AUTO or isinstance(value, bool) else f"is {value!r}: write true or false."
    return f"is not obeyed: leave it out. {did_you_mean(key, ('stage', *_COUNTS, *_FLAGS)) or ''}".rstrip()


# ---------------------------------------------------------------- what stands beside it


def _top_mistakes(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> Iterator[str]:
    for key, value in config.items():
        if key in _AGREE:
            yield from _agrees(key, value, _AGREE[key], parameters)
        elif key == "train_batch_size":
            yield from _same(key, value, _effective_batch(parameters), "the effective batch of the recipe")
        elif key in ("bf16", "fp16"):
            yield from _precision(key, value, parameters)
        elif key == "optimizer":
            yield from _optimizer(value, parameters)
        elif key in _REASONS:
            yield f"{key} {_REASONS[key]}"
        elif key not in ("zero_optimization", "zero_allow_untested_optimizer", *_PRINTS):
            yield f"{key} is not obeyed: leave it out."


def _agrees(key: str, value: Any, name: str, parameters: Mapping[str, Any]) -> Iterator[str]:
    if name in parameters:
        yield from _same(key, value, parameters[name], f"finetune.{name}")


def _same(key: str, value: Any, wanted: Any, what: str) -> Iterator[str]:
    if value != AUTO and value != wanted:
        yield f'{key} is {value!r}, and {what} is {wanted!r}: write "auto", or the same in both places.'


def _effective_batch(parameters: Mapping[str, Any]) -> int:
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    devices = ("number_of_gpu_to_use_finetuning", "num_nodes_finetune")
    total = 1
    for name in (*names, *devices):
        total *= int(parameters.get(name, 1))
    return total


def _precision(key: str, value: Any, parameters: Mapping[str, Any]) -> Iterator[str]:
    enabled = value.get("enabled", False) if isinstance(value, Mapping) else value
    if enabled == AUTO:
        return
    if key == "fp16":
        if enabled is not False:
            yield (
                "fp16.enabled is on: 16-bit arithmetic is bf16 here, which needs no loss scale. Write false "
                "and set finetune.precision to 16."
            )
        return
    is_asked = str(parameters.get("precision", "32")) == "16"
    if enabled is not is_asked:
        told = parameters.get("precision", "32")
        yield f'bf16.enabled is {enabled!r}, and finetune.precision is {told}: write "auto".'


def _optimizer(value: Any, parameters: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(value, Mapping) or str(value.get("type")).lower() not in ("adamw", "adam"):
        yield "optimizer is not AdamW: finetune.optim names the optimiser. Leave the block out."
        return
    if parameters.get("optim", "adamw_torch") != "adamw_torch":
        yield f"optimizer is {value['type']}, and finetune.optim is {parameters['optim']}: leave it out."
    given = value.get("params") or {}
    if not isinstance(given, Mapping):
        yield "optimizer.params is not an object."
        return
    for key, one in given.items():
        if key in _OPTIMIZER:
            yield from _agrees(f"optimizer.params.{key}", one, _OPTIMIZER[key], parameters)
        elif key == "betas":
            wanted = [parameters.get("adam_beta1", 0.9), parameters.get("adam_beta2", 0.999)]
            yield from _same(
                "optimizer.params.betas",
                list(one) if isinstance(one, list | tuple) else one,
                wanted,
                "finetune.adam_beta1 and adam_beta2",
            )
        elif not (key in ("torch_adam", "adam_w_mode") and one is True):
            yield f"optimizer.params.{key} is not obeyed: leave it out."
