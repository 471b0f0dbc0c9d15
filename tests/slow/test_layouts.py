"""Every layout with every family, in 16 bits, on three processes, and killed at random steps."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from safetensors.torch import load_file

from tests.conversations import write_dataset
from tests.models import tiny_model
from tests.ranks import Group, Outcome, Scenario, run
from tests.unit.test_training_layouts import HERE, SEVERAL, after, check_equal, largest, of_kind

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

FAMILIES = ["llama", "mistral", "phi3", "qwen2", "qwen3", "gemma3"]
MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": {}},
    "checkpointed": {"is_checkpointed": True},
    "checkpointed-lora": {"lora": {}, "is_checkpointed": True},
    "dora": {"lora": {"use_dora": True}},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_dataset(tmp_path_factory.mktemp("dataset"), train=17))


def scenario(name: str, model: Path, dataset: str, kind: str, batch: int, **changes: Any) -> Scenario:
    parameters = {
        "per_device_train_batch_size": batch,
        "num_train_epochs": 2,
        "evaluation_strategy": "epoch",
        "apply_lora": changes.get("lora") is not None,
        **changes.pop("parameters", {}),
    }
    tokens = 0 if kind == "plain" else 48
    return Scenario(
        name, str(model), dataset, strategy=kind, parameters=parameters, pack_tokens=tokens, **changes
    )


@pytest.fixture(scope="module", params=FAMILIES)
def compared(
    request: pytest.FixtureRequest, dataset: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_model(folder / "model", request.param)
    alone = [scenario(mode, model, dataset, "plain", 8, **changes) for mode, changes in MODES.items()]
    together = [
        scenario(f"{mode}/{kind}", model, dataset, kind, 4, **changes)
        for mode, changes in MODES.items()
        for kind in HERE
    ]
    return run([Group(1, alone), Group(2, together)], folder / "ranks").outcomes


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("kind", SEVERAL)
def test_every_family_learns_the_same_in_every_layout(
    compared: dict[str, Outcome], kind: str, mode: str
) -> None:
    check_equal(compared[f"{mode}/{of_kind(kind)}"], compared[mode])


@pytest.fixture(scope="module")
def in_16_bits(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("bf16")
    model = tiny_model(folder / "model")
    alone = [scenario(mode, model, dataset, "plain", 8, **MODES[mode]) for mode in ("full", "lora")]
    together = [
        scenario(f"{mode}/{kind}", model, dataset, kind, 4, is_bf16=True, **MODES[mode])
        for mode in ("full", "lora")
        for kind in HERE
    ]
    again = [replace(each, name=f"{each.name}/again") for each in together]
    return run([Group(1, alone), Group(2, [*together, *again])], folder / "ranks").outcomes


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("kind", SEVERAL)
def test_16_bits_stay_near_32_and_repeat(in_16_bits: dict[str, Outcome], kind: str, mode: str) -> None:
    outcome = in_16_bits[f"{mode}/{of_kind(kind)}"]
    assert largest(outcome.losses, in_16_bits[mode].losses) < 0.05
    assert outcome.result["precision"] == "bf16"
    assert outcome.losses == in_16_bits[f"{mode}/{kind}/again"].losses


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("bits", [32, 16])
@pytest.mark.parametrize("kind", ["plain", *SEVERAL])
def test_kills_at_random_steps_change_nothing(
    tmp_path: Path, dataset: str, kind: str, mode: str, bits: int
) -> None:
    """Three deaths, each in another place, then to the end."""
    if kind != "plain":
        of_kind(kind)
    ranks = 1 if kind == "plain" else 2
    model = tiny_model(tmp_path / "model", "qwen2")
    chance = random.Random(f"{kind}/{mode}/{bits}")
    deaths = sorted(chance.sample(range(2, 12), 3))
    whole = scenario(
        "whole",
        model,
        dataset,
        kind,
        4,
        is_bf16=bits == 16,
        saves=str(tmp_path / "whole.safetensors"),
        parameters={
            "num_train_epochs": 4,
            "checkpoint_steps": 2,
            "number_of_gpu_to_use_finetuning": 2,
            "cpu_processes": ranks,
            "evaluation_strategy": "steps",
            "eval_steps": 4,
            "lora_dropout": 0.2 if mode == "lora" else 0.0,
        },
        lora={"lora_dropout": 0.2} if mode == "lora" else None,
    )
    last = replace(
        whole, name="last", checkpoints=str(tmp_path / "kept"), saves=str(tmp_path / "last.safetensors")
    )
    attempts = [replace(last, name=f"until-{step}", dies_at=step) for step in deaths]
    ran = run(
        [Group(ranks, [whole]), *(Group(ranks, [each]) for each in attempts), Group(ranks, [last])],
        tmp_path / "ranks",
    )
    assert all(-9 in codes for codes in ran.codes[1:-1])
    outcome = ran.outcomes["last"]
    step = outcome.result["resumed_from_step"]
    assert deaths[-1] - 2 <= step <= deaths[-1]
    check_equal(outcome, after(step, ran.outcomes["whole"]), losses=1e-6)
    assert outcome.result["kept_step"] == ran.outcomes["whole"].result["kept_step"]
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "last"))
    assert max(float((one[name] - other[name]).abs().max()) for name in one) <= 1e-6
