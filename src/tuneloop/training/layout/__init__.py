"""One file for each way to lay training out over processes; `base` holds what they have in common."""

from __future__ import annotations

from tuneloop.training.layout.base import Dump, Layout, shard_suffix
from tuneloop.training.layout.plain import Plain
from tuneloop.training.plan import Plan

__all__ = ["Dump", "Layout", "Plain", "of", "shard_suffix"]


def of(plan: Plan) -> Layout:
    """The layout that the plan names. Several processes have formed their group before
    (`torch.distributed.init_process_group`)."""
    # Each is imported where it is used: what one layout needs costs the others nothing.
    if plan.strategy == "ddp":
        from tuneloop.training.layout.ddp import Ddp

        return Ddp(plan.device)
    if plan.strategy == "fsdp":
        from tuneloop.training.layout.fsdp import Fsdp

        return Fsdp(plan.device, is_bf16=plan.is_bf16)
    if plan.strategy in ("zero2", "zero3"):
        from tuneloop.training.layout.zero import Zero

        return Zero(plan.device, plan.strategy, is_bf16=plan.is_bf16)
    return Plain(plan.device)
