"""Learning rates against transformers' own schedulers."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch
import transformers

from tuneloop.training.schedule import NAMES, learning_rate

PEAK = 3e-4


def trace_of_transformers(name: str, warmup: int, total: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (3, 10), (12, 10), (1, 2)])
def test_rates_equal_transformers_trace(name: str, warmup: int, total: int) -> None:
    ours = [
        learning_rate(name, step, peak=PEAK, warmup_steps=warmup, total_steps=total) for step in range(total)
    ]
    assert ours == pytest.approx(trace_of_transformers(name, warmup, total), abs=1e-15)


def test_every_schedule_of_the_component_is_there() -> None:
    from tuneloop.core.recipe import FinetuneParameters

    allowed = FinetuneParameters.model_json_schema()["properties"]["lr_scheduler_type"]["enum"]
    assert set(NAMES) == set(allowed)
