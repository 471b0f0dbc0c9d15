"""Losses, time and memory of each layout with two processes against one, on this machine's CPU.

    .venv/bin/python benchmarks/layouts.py --folder /tmp/layouts

A Llama of 31 million random weights, all of them and with LoRA. Each layout has fresh processes, forked from
one that has imported what they need (`tests/ranks.py`). Memory is the kernel's largest resident set, per
process on average. DeepSpeed is used where `make test` has put it, in `.deepspeed/`. Exit code 1 unless all
losses equal one process's to 1e-5.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.conversations import write_dataset  # noqa: E402
from tests.models import tiny_tokenizer  # noqa: E402
from tests.ranks import Group, Outcome, Scenario, has_deepspeed, run  # noqa: E402

TOLERANCE = 1e-5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    folder = parser.parse_args().folder
    model, dataset = _model(folder / "model"), str(write_dataset(folder / "dataset", train=64))
    layouts = ["ddp", "fsdp", *(["zero2", "zero3"] if has_deepspeed() else [])]
    scenarios = [
        _scenario(f"{mode}/{layout}", model, dataset, layout, mode)
        for mode in ("full", "lora")
        for layout in ("plain", *layouts)
    ]
    groups = [Group(1 if each.strategy == "plain" else 2, [each]) for each in scenarios]
    outcomes = run(groups, folder / "ranks", seconds=1800).outcomes
    print(
        "| mode | layout | largest difference of a loss | seconds | MB per process |\n|---|---|---|---|---|"
    )
    differences = [_row(name, outcome, outcomes) for name, outcome in outcomes.items()]
    print(f"\ntorch threads: 1 per process; CPUs: {os.cpu_count()}")
    return int(max(differences) > TOLERANCE)


def _row(name: str, outcome: Outcome, outcomes: dict[str, Outcome]) -> float:
    if outcome.error:
        raise SystemExit(f"{name}: {outcome.error}")
    mode, layout = name.split("/")
    alone = outcomes[f"{mode}/plain"].losses
    difference = max(abs(loss - alone[step]) for step, loss in outcome.losses.items())
    memory = outcome.result["peak_memory_bytes"] / outcome.result["processes"] / 1e6
    print(f"| {mode} | {layout} | {difference:.1e} | {outcome.result['seconds']:.1f} | {memory:,.0f} |")
    return difference


def _scenario(name: str, model: str, dataset: str, layout: str, mode: str) -> Scenario:
    parameters = {
        "per_device_train_batch_size": 8 if layout == "plain" else 4,
        "max_steps": 8,
        "learning_rate": 1e-4,
        "apply_lora": mode == "lora",
        # None but the last.
        "checkpoint_steps": 100,
    }
    return Scenario(
        name,
        model,
        dataset,
        strategy=layout,
        parameters=parameters,
        pack_tokens=128,
        lora={} if mode == "lora" else None,
    )


def _model(folder: Path) -> str:
    import torch
    import transformers

    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=16000,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=512,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        tiny_tokenizer(folder)
    return str(folder)


if __name__ == "__main__":
    sys.exit(main())
