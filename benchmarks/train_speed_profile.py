"""Where the CPU time of Tuneloop's own steps goes: torch's profiler, its operators put into groups.

A group's seconds are those of its operators themselves, not of what they call. Products are told apart by the
shapes that they get, head and loss by the vocabulary in a shape or by the function that they run under.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

from torch.profiler import ProfilerActivity, profile
from train_speed_clock import Task

PRODUCTS = {
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::addmm_",
    "mkldnn::_linear_pointwise",
}
COPIES = ("copy", "cat", "clone", "contiguous", "index", "embedding", "to_copy", "fill", "zero", "gather")


class Profiler:
    """Records the steps after the first."""

    def __init__(self, task: Task) -> None:
        config = json.loads((task.model / "config.json").read_text(encoding="utf-8"))
        self._vocabulary: int = config["vocab_size"]
        self._rank: int = task.lora["r"]
        self._steps = task.steps
        self._profile: Any = profile(activities=[ProfilerActivity.CPU], record_shapes=True)

    def step_ended(self, step: int) -> None:
        if step == 1:
            self._profile.start()
        if step == self._steps:
            self._profile.stop()

    def groups(self) -> dict[str, float]:
        """CPU seconds by group."""
        return _summed(self._profile.events(), self._group)

    def operators(self) -> dict[str, float]:
        """CPU seconds by group and operator, the largest thirty."""
        found = _summed(self._profile.events(), lambda event: f"{self._group(event)}: {event.name}")
        return dict(sorted(found.items(), key=lambda item: -item[1])[:30])

    def _group(self, event: Any) -> str:
        above = list(_with_parents(event))
        sizes = {size for shape in event.input_shapes or () for size in shape if isinstance(size, int)}
        if any(name.startswith("Optimizer.") for name in above):
            return "optimiser"
        if event.name in ("aten::_foreach_norm", "aten::linalg_vector_norm"):
            return "optimiser"
        if any("ChunkedLoss" in name or "cross_entropy" in name or "log_softmax" in name for name in above):
            return "head and loss"
        if self._vocabulary in sizes and "embedding" not in event.name:
            return "head and loss"
        if any("scaled_dot_product" in name for name in above):
            return "attention"
        if not event.name.startswith("aten::"):
            return "other"
        if event.name in PRODUCTS:
            return "products of the adapter" if self._rank in sizes else "products of the layers"
        if any(word in event.name for word in COPIES):
            return "copies"
        return "elementwise"


def _with_parents(event: Any) -> Any:
    while event is not None:
        yield event.name
        event = event.cpu_parent


def _summed(events: Any, key: Any) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for event in events:
        found[key(event)] += event.self_cpu_time_total / 1e6
    return dict(found)
