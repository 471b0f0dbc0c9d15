"""Optimisers of the component, and their state as named tensors and plain numbers (never a pickle)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tuneloop.core.recipe import FinetuneParameters

Scalars = dict[str, dict[str, float | int]]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name, tied tensors once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def of(parameters: FinetuneParameters, trained: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """As a finetune step's parameters say."""
    return build(
        parameters.optim,
        trained,
        weight_decay=parameters.weight_decay,
        betas=(parameters.adam_beta1, parameters.adam_beta2),
        epsilon=parameters.adam_epsilon,
    )


def build(
    name: str,
    parameters: Mapping[str, nn.Parameter],
    *,
    weight_decay: float,
    betas: tuple[float, float],
    epsilon: float,
) -> torch.optim.Optimizer:
    """`adamw_torch` or `adafactor`. Matrices decay; biases and norms, which have one dimension, do not."""
    matrices = [each for each in parameters.values() if each.ndim >= 2]
    vectors = [each for each in parameters.values() if each.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((matrices, weight_decay), (vectors, 0.0))
        if params
    ]
    if name == "adamw_torch":
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=epsilon, fused=True)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        # As transformers' Trainer sets it: the rate comes from outside.
        adafactor: torch.optim.Optimizer = Adafactor(
            groups, lr=0.0, scale_parameter=False, relative_step=False
        )
        return adafactor
    raise KeyError(name)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def dump_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, torch.Tensor], Scalars]:
    """Tensors named `<parameter>/<key>`, and numbers by parameter and key."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: Scalars = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}/{key}"] = value
            elif value is not None:
                scalars.setdefault(name, {})[key] = value
    return tensors, scalars


def load_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
    scalars: Scalars,
) -> None:
    """The reverse of `dump_state`."""
    state: dict[str, dict[str, Any]] = {name: dict(scalars.get(name, {})) for name in parameters}
    for path, tensor in tensors.items():
        name, key = path.rsplit("/", 1)
        state[name][key] = tensor.to(parameters[name].device, copy=True)
    for name, parameter in parameters.items():
        if state[name]:
            optimizer.state[parameter] = state[name]
