"""What a run takes besides memory: space on the disk, and time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tuneloop.core.plan import shape
from tuneloop.core.plan.setup import Rows, Setup
from tuneloop.core.types import Card, Noun

TOKEN_BYTES = 5
"""Of a tokenised row: a 32-bit number, and its mark."""
CHECKPOINTS_AT_LEAST = 2
"""The newest two stay while training goes on (`training.checkpoint.prune`)."""
FORWARD_SHARE = 1 / 3
"""Of a training step's time: a backward pass costs about two forward passes (arXiv:2001.08361, 2.1)."""
RECOMPUTED = 4 / 3
"""Of a training step's time where layers are computed again: one more forward pass (arXiv:1604.06174)."""


class Disk(Noun):
    """Bytes by what takes them. What is cached from an earlier run is counted all the same."""

    parts: dict[str, int]
    total_bytes: int


class Rate(Noun):
    """What a device does in a second, and how that is known."""

    tokens_per_second: float
    how: str


class Time(Noun):
    """Of the finetune step."""

    steps_per_epoch: int
    steps: int
    seconds_per_epoch: float | None = None
    seconds: float | None = None
    """None where the rate of the place, or the rows, are not known."""
    how: str


def weights_on_disk(card: Card) -> int:
    """Of the imported model: what comes in a package is written out in 32 bits."""
    source = card.sources[0] if card.sources else None
    return (
        4 * card.parameters
        if source is not None and source.type == "package"
        else card.expected_download_bytes
    )


def disk(card: Card, setup: Setup, rows: Rows, finetune: Mapping[str, Any]) -> Disk:
    trained = shape.trained_parameters(card.architecture, setup)
    states = 12 if setup.optimizer == "adamw_torch" else 4
    length = time(setup, rows, None)
    kept = finetune["save_total_limit"]
    milestones = _milestones(setup, length, finetune)
    count = max(CHECKPOINTS_AT_LEAST, milestones if kept <= 0 else min(kept, milestones))
    parts = {
        "download": card.expected_download_bytes,
        "imported model": weights_on_disk(card),
        "tokenised rows": TOKEN_BYTES * ((rows.tokens or 0) + rows.validation_tokens),
        "checkpoints": count * states * trained,
        "trained weights": 4 * trained,
        "exported model": 4 * card.parameters,
    }
    return Disk(parts=parts, total_bytes=sum(parts.values()))


def _milestones(setup: Setup, length: Time, finetune: Mapping[str, Any]) -> int:
    """Checkpoints that are kept for good: at evaluations, at the ends of epochs, at the end."""
    epochs = max(1, math.ceil(length.steps / max(1, length.steps_per_epoch)))
    if finetune["evaluation_strategy"] != "steps":
        return epochs
    share = finetune["evaluation_steps_interval"]
    between = max(1, int(share * length.steps_per_epoch)) if share > 0 else finetune["eval_steps"]
    return epochs + length.steps // between


def time(setup: Setup, rows: Rows, rate: Rate | None) -> Time:
    """Steps are those of `training.data.Course`: the last one of an epoch may be smaller."""
    if rows.count is None or rows.tokens is None:
        return Time(
            steps_per_epoch=0,
            steps=max(0, setup.max_steps),
            how="the number of rows is not known: there is no data",
        )
    per_epoch = max(1, math.ceil(rows.count / setup.effective_batch))
    steps = setup.max_steps if setup.max_steps > 0 else per_epoch * setup.epochs
    if rate is None:
        return Time(steps_per_epoch=per_epoch, steps=steps, how="the rate of this place is not measured")
    speed = rate.tokens_per_second * setup.devices
    training = (RECOMPUTED if setup.is_checkpointed else 1.0) * rows.tokens / speed
    evaluation = FORWARD_SHARE * rows.validation_tokens / speed if setup.evaluates else 0.0
    epochs = steps / per_epoch
    return Time(
        steps_per_epoch=per_epoch,
        steps=steps,
        seconds_per_epoch=training + evaluation,
        seconds=training * epochs + evaluation * max(1, math.ceil(epochs)),
        how=rate.how,
    )
