"""The look `probe`: how fast this machine trains layers of a given shape.

Random weights of the model's shape, with one layer and with three, are trained for a few seconds each with
the real loss and the real optimiser. The difference is what two layers cost; what is left is the
embedding, the head and the loss. So the time of a micro-batch follows for any number of layers, without
the model and without data.

    rate     JSON: `tokens_per_second` for all layers, `seconds_per_layer` and `seconds_besides` of a
    micro-batch of `tokens`, `device`, `threads`, `measured_seconds`
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import numpy as np
import torch
from pydantic import Field

from tuneloop import lm
from tuneloop.core.errors import Unsupported
from tuneloop.core.recipe.values import Count, Flag, Parameters, PositiveNumber
from tuneloop.core.types import Architecture
from tuneloop.steps.context import StepContext
from tuneloop.training import optimizer
from tuneloop.training.data import Batch, Conversation, pack
from tuneloop.training.loss import Objective

LAYERS = (1, 3)
WARM_STEPS = 1
"""The first step is slower: memory is asked for, kernels are chosen."""
LEAST_STEPS = 3


class ProbeParameters(Parameters):
    architecture: Architecture
    tokens: Count = 512
    """Of a micro-batch."""
    rows: Count = 1
    """That it is packed of."""
    learned_share: PositiveNumber = 0.6
    apply_lora: Flag = False
    lora_r: Count = 8
    lora_targets: tuple[str, ...] | None = None
    is_bf16: Flag = False
    optimizer: str = Field(default="adamw_torch", pattern="^(adamw_torch|adafactor)$")
    seconds: PositiveNumber = 20.0
    machine: str = ""
    """Read by nobody: it is part of the question, so that another machine's answer is not taken."""


def run(context: StepContext) -> None:
    parameters = ProbeParameters.model_validate(context.parameters)
    threads = lm.threads()
    lm.quiet()
    began = time.monotonic()
    seconds: dict[int, float] = {}
    for layers in LAYERS:
        context.progress(
            f"training {layers} of {parameters.architecture.layers} layers", len(seconds), len(LAYERS)
        )
        seconds[layers] = _micro_batch_seconds(parameters, layers)
    few, many = LAYERS
    each = max(0.0, (seconds[many] - seconds[few]) / (many - few))
    besides = max(0.0, seconds[few] - few * each)
    whole = besides + parameters.architecture.layers * each
    said = {
        "tokens_per_second": parameters.tokens / whole,
        "seconds_per_layer": each,
        "seconds_besides": besides,
        "tokens": parameters.tokens,
        "device": lm.device().type,
        "threads": threads,
        "measured_seconds": time.monotonic() - began,
    }
    context.output("rate").write_text(json.dumps(said), encoding="utf-8")
    context.summary["tokens_per_second"] = parameters.tokens / whole


def _micro_batch_seconds(parameters: ProbeParameters, layers: int) -> float:
    """The median of forward, backward and optimiser step."""
    device = lm.device()
    with lm.memory_errors(device, "Plan without it: tuneloop plan RECIPE --no-probe"):
        model = _model(parameters, layers).to(device).train()
        trained = optimizer.trainable(model)
        steps = optimizer.build(
            parameters.optimizer, trained, weight_decay=0.0, betas=(0.9, 0.999), epsilon=1e-8
        )
        batch = _batch(parameters).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=parameters.is_bf16):
            objective = Objective(model)
        for _ in range(WARM_STEPS):
            _step(objective, steps, batch, parameters.is_bf16)
        return statistics.median(_timed(objective, steps, batch, parameters))


def _timed(
    objective: Objective, steps: torch.optim.Optimizer, batch: Batch, parameters: ProbeParameters
) -> list[float]:
    found: list[float] = []
    until = time.monotonic() + parameters.seconds / len(LAYERS)
    while len(found) < LEAST_STEPS or time.monotonic() < until:
        began = time.perf_counter()
        _step(objective, steps, batch, parameters.is_bf16)
        found.append(time.perf_counter() - began)
    return found


def _step(objective: Objective, steps: torch.optim.Optimizer, batch: Batch, is_bf16: bool) -> None:
    device = batch.input_ids.device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=is_bf16):
        lost = objective.summed_loss(batch) / batch.learned
    torch.autograd.backward(lost)
    steps.step()
    steps.zero_grad(set_to_none=True)
    # On a GPU the work is done when its result is read.
    float(lost.detach())


def _batch(parameters: ProbeParameters) -> Batch:
    vocabulary = parameters.architecture.vocabulary_size
    length = max(2, parameters.tokens // parameters.rows)
    learned = max(1, min(length - 1, round(length * parameters.learned_share)))
    generator = np.random.default_rng(0)
    learn = np.arange(length) >= length - learned
    return pack(
        [
            Conversation(row, generator.integers(0, vocabulary, length, dtype=np.int32), learn)
            for row in range(parameters.rows)
        ]
    )


def _model(parameters: ProbeParameters, layers: int) -> Any:
    """Random weights; a frozen base may be in 16 bits, as in a finetune."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = parameters.architecture
    values: dict[str, Any] = {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.attention_heads,
        "num_key_value_heads": shape.key_value_heads,
        "head_dim": shape.head_size,
        "vocab_size": shape.vocabulary_size,
        "tie_word_embeddings": shape.tied_embeddings,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "sdpa",
    }
    if shape.sliding_window is not None:
        values["sliding_window"] = shape.sliding_window
    try:
        config = AutoConfig.for_model(shape.family, **values)
    except ValueError as error:
        raise Unsupported(
            f"The family {shape.family!r} is not one that transformers can build from numbers alone.",
            next_move="Plan without a measured rate: tuneloop plan RECIPE --no-probe",
        ) from error
    torch.manual_seed(0)
    low = torch.bfloat16 if parameters.is_bf16 and parameters.apply_lora else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=low)
    if not parameters.apply_lora:
        return model.requires_grad_(True)
    return lm.add_lora(model, parameters.lora_r, 16, 0.0, parameters.lora_targets, seed=0)
