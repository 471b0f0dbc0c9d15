"""What training may choose for itself, chosen for the memory that there is: how much is computed at a time,
whether activations are kept, and whether `strategy: auto` shards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from tuneloop.core.plan.memory import peak
from tuneloop.core.plan.setup import PACK_TOKENS, Rows, Setup, pack_of
from tuneloop.core.types import Architecture, Noun

Strategy = Literal["plain", "ddp", "fsdp", "zero2", "zero3"]


class Choice(Noun):
    """How a step is carried out."""

    pack_tokens: int
    """Most tokens that a process computes at a time: `TrainingInputs.pack_tokens`."""
    is_checkpointed: bool
    """`TrainingInputs.is_checkpointed`."""
    strategy: Strategy
    """`training.plan.Plan.strategy`."""
    planned_bytes: int
    """Of each GPU; of the machine, all processes together, where it has none."""
    is_fit: bool
    """False: nothing that may be chosen makes it fit into what is available; this takes the least."""
    setup: Setup
    """As it was asked with, all of this decided."""


def choose(
    architecture: Architecture,
    setup: Setup,
    rows: Rows,
    *,
    device: Literal["cpu", "cuda"],
    available_bytes: int | None,
    file_bytes: int | None = None,
) -> Choice:
    """The fastest way that fits into `available_bytes`: of each GPU, or of what may be claimed of the machine
    where there is none (None: no limit is known). Pure: the claim, `tuneloop plan` and the step all ask this,
    with the same `available_bytes`, so that what is claimed is what is done.

    What gives way, in this order: packs shrink to the longest row; DDP becomes FSDP under `strategy: auto`;
    activations are computed again. What a recipe writes is obeyed: `pack_tokens` above 0,
    `activation_checkpointing` other than `auto`, `strategy` other than `auto`.

    The step:

        setup = Setup.of(parameters.model_dump(), has_fast_bf16=machine.has_fast_bf16, devices=plan.processes,
                         nodes=nodes)
        rows = Rows.counted(train.lengths, train.learned_tokens, effective_batch=plan.effective_batch,
                            validation_lengths=validation.lengths)
        choice = choose(architecture_of(config), setup, rows, device=machine.device,
                        available_bytes=step.memory_bytes or free memory of the GPU)
    """
    seen = []
    for each in _ways(setup, rows, device):
        needed = peak(architecture, each, rows, device=device, file_bytes=file_bytes).device.total_bytes
        seen.append(_choice(each, needed, available_bytes is None or needed <= available_bytes))
        if seen[-1].is_fit:
            return seen[-1]
    return min(seen, key=lambda choice: choice.planned_bytes)


def _ways(setup: Setup, rows: Rows, device: str) -> Iterator[Setup]:
    """The fastest first."""
    now = _with(
        setup,
        pack_tokens=setup.pack_tokens or max(rows.longest, PACK_TOKENS[device]),
        checkpointing="always" if setup.checkpointing == "always" else "never",
    )
    yield now
    if not setup.pack_tokens and pack_of(now, rows, device) > rows.longest:
        now = _with(now, pack_tokens=rows.longest)
        yield now
    # Where the tables are most of a model, sharding takes more than it saves: so both are tried again.
    cut = [now]
    if setup.may_shard and setup.sharding == "none" and setup.can_shard:
        cut.append(_with(now, sharding="fsdp"))
        yield cut[-1]
    if setup.checkpointing == "auto":
        yield from (_with(each, checkpointing="always") for each in cut)


def _with(setup: Setup, **changes: object) -> Setup:
    return setup.model_copy(update=changes)


def _choice(setup: Setup, needed: int, is_fit: bool) -> Choice:
    plain: Strategy = "plain" if setup.devices == 1 else "ddp"
    return Choice(
        pack_tokens=setup.pack_tokens,
        is_checkpointed=setup.is_checkpointed,
        strategy=plain if setup.sharding == "none" else setup.sharding,
        planned_bytes=needed,
        is_fit=is_fit,
        setup=setup,
    )
