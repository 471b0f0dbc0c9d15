"""Losses that a tiny run gives, written down: a change of the arithmetic shows here first.

Where they are to change, `ENGINE` in training/loop.py rises with them. Tolerance: 1e-4 relative, because
other processors sum in another order; computing each conversation by itself moved them by 1.4e-7.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from tests.conversations import Heard, write_dataset
from tests.models import Family, tiny_model
from tuneloop import lm
from tuneloop.core.recipe import FinetuneParameters
from tuneloop.training import Machine, TrainingInputs, train

TOLERANCE = 1e-4
EXPECTED: dict[tuple[Family, bool], list[float]] = {
    ("llama", False): [
        6.437735,
        6.138145,
        6.517366,
        6.38018,
        5.782403,
        6.198094,
        5.153013,
        5.430904,
        4.87269,
        5.415145,
    ],
    ("llama", True): [
        6.437735,
        6.138145,
        6.518868,
        6.361664,
        5.669681,
        6.055268,
        5.210425,
        5.277213,
        4.765367,
        5.168562,
    ],
    ("phi3", False): [
        6.490039,
        6.103522,
        6.25686,
        6.235837,
        5.768587,
        5.836022,
        5.215863,
        5.321829,
        4.800349,
        5.219466,
    ],
    ("phi3", True): [
        6.490039,
        6.103522,
        6.260776,
        6.218632,
        5.70773,
        5.631924,
        5.204474,
        5.293639,
        4.752362,
        4.910996,
    ],
}


@pytest.mark.parametrize("is_lora", [False, True])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_ten_steps_give_the_losses_that_were_written_down(
    family: Family, is_lora: bool, tmp_path: Path
) -> None:
    model = lm.load_model(tiny_model(tmp_path / "model", family)).requires_grad_(True)
    if is_lora:
        model = lm.add_lora(model, 8, 16, seed=4)
    chosen = FinetuneParameters.model_validate(
        {
            "learning_rate": 1e-2 if is_lora else 1e-3,
            "max_steps": 10,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "warmup_steps": 2,
            "lr_scheduler_type": "cosine",
            "logging_steps": 1,
            "evaluation_strategy": "disable",
            "seed": 11,
        }
    )
    heard = Heard()
    inputs = TrainingInputs(write_dataset(tmp_path / "data"), chosen, tmp_path / "checkpoints")
    train(model, inputs, heard, Machine("cpu", 0, has_fast_bf16=False))
    losses = [values["loss"] for _, values in heard.lines if "loss" in values]
    assert losses == pytest.approx(EXPECTED[family, is_lora], rel=TOLERANCE)
