"""How a finetune step is carried out where it runs: processes, packs, and what gives way to memory."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from tuneloop import lm, training
from tuneloop.core.plan import Rows, Setup, architecture_of, choose
from tuneloop.core.recipe import FinetuneParameters
from tuneloop.core.types import StepFile
from tuneloop.training.data import Conversations, split_path
from tuneloop.training.loop import PACK_TOKENS


@dataclass(frozen=True)
class Carried:
    plan: training.Plan
    pack_tokens: int
    is_checkpointed: bool
    longest: int
    """Tokens of the longest training row: no pack can be smaller."""
    planned_bytes: int | None = None
    """Of the accelerators of all processes together, or of the machine without; None: nobody can tell."""


def carried_out(step: StepFile, machine: training.Machine, nodes: int = 1) -> Carried:
    """On so many machines like this one. Raises `Unsupported` for what cannot be obeyed."""
    parameters = FinetuneParameters.model_validate(step.parameters)
    plan = training.plan(parameters, machine, nodes)
    rows = _rows(Path(step.inputs["dataset"].path), parameters, plan)
    try:
        architecture = architecture_of(_config(Path(step.inputs["model"].path)))
    except KeyError:
        # A model that nobody can plan is trained as it is written.
        packs = parameters.pack_tokens or max(rows.longest, PACK_TOKENS[machine.device])
        is_checkpointed = parameters.activation_checkpointing == "always"
        return Carried(plan, packs, is_checkpointed, rows.longest)
    device: Literal["cpu", "cuda"] = "cuda" if machine.device == "cuda" else "cpu"
    choice = choose(
        architecture,
        Setup.of(
            parameters.model_dump(),
            has_fast_bf16=machine.has_fast_bf16,
            devices=plan.processes,
            nodes=min(nodes, parameters.num_nodes_finetune),
        ),
        rows,
        device=device,
        available_bytes=torch.cuda.mem_get_info()[0] if device == "cuda" else step.memory_bytes,
    )
    chosen = replace(plan, strategy=choice.strategy)
    together = plan.processes if device == "cuda" else 1
    return Carried(
        chosen,
        choice.pack_tokens,
        choice.is_checkpointed,
        rows.longest,
        planned_bytes=choice.planned_bytes * together,
    )


def _config(folder: Path) -> dict[str, object]:
    read: dict[str, object] = json.loads(
        (lm.resolve_folders(folder)[0] / "config.json").read_text(encoding="utf-8")
    )
    return read


def _rows(dataset: Path, parameters: FinetuneParameters, plan: training.Plan) -> Rows:
    learns_all = parameters.loss_tokens == "all"
    train = Conversations(split_path(dataset, "train"), learns_all=learns_all)
    validation = None
    if parameters.evaluation_strategy != "disable":
        validation = Conversations(split_path(dataset, "validation"), learns_all=learns_all)
    return Rows.counted(
        train.lengths.tolist(),
        train.learned_tokens,
        effective_batch=plan.effective_batch,
        validation_lengths=() if validation is None else validation.lengths.tolist(),
    )
