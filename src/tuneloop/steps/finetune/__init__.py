"""The finetune step: base model and tokenised conversations in, `trained` out.

    trained/
      trained.json               mode, engine, steps, losses, batch: only what an equal run repeats
      adapter_config.json  adapter_model.safetensors       mode "lora" (PEFT layout)
      config.json  model.safetensors  tokenizer.json ...   mode "full" (Hugging Face layout)

`checkpoints/` beside the outputs is what a later attempt goes on from. An adapter is not merged here:
export does it, and checks the merged weights against the adapter.

One process trains right here. For several this process becomes their supervisor (`steps.launch`), which
imports no torch: `work` is what each of them does.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from tuneloop.core.recipe import FinetuneParameters
from tuneloop.steps import curve
from tuneloop.steps.context import StepContext
from tuneloop.steps.finetune.asking import ask
from tuneloop.steps.launch import settings, supervise


def run(context: StepContext) -> None:
    try:
        _train(context)
    except Exception:
        curve.draw(context)  # How it went wrong is best seen there.
        raise
    curve.draw(context)


def _train(context: StepContext) -> None:
    wanted = _several(context)
    if wanted is not None:
        supervise.run(context, wanted, settings.read(os.environ))
        return
    work: Any = importlib.import_module("tuneloop.steps.finetune.work")
    work.train_alone(context)


def _several(context: StepContext) -> supervise.Wanted | None:
    """What to start when several processes train; None: one does, here. Raises what the plan raises."""
    parameters = FinetuneParameters.model_validate(context.parameters)
    if parameters.number_of_gpu_to_use_finetuning * parameters.num_nodes_finetune == 1:
        return None
    nodes = min(parameters.num_nodes_finetune, settings.read(os.environ).nodes)
    told = ask(context.folder, nodes)
    if told["processes"] == 1:
        return None
    return supervise.Wanted(
        processes=told["processes"] // nodes,
        nodes=nodes,
        machine=told["machine"],
        strategy=told["strategy"],
        pack_tokens=told["pack_tokens"],
        longest=told["longest"],
        is_checkpointed=told["is_checkpointed"],
        may_lower_packs=parameters.auto_find_batch_size,
    )
