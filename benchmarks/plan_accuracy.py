"""Predicted against measured peaks of the real finetune step, one process each, on this machine.

    .venv/bin/python benchmarks/plan_accuracy.py --folder /tmp/plan --deepspeed .deepspeed

Llama, Phi-3, Qwen, Gemma and Mistral shapes with random weights, 10 to 150 million parameters; LoRA, DoRA
and all weights, one row at a time and packs of several, activations kept and computed again, accumulation,
evaluation, Adafactor, and two processes with DDP, FSDP, ZeRO-2 and ZeRO-3. None of them was used to fit the
constants (`plan_fit.py`). What is measured, and how several processes are counted: `plan_runs.py`. Exit
code 1 unless the median error is at most 5 %, the worst 15 %, and none under by more than 10 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from plan_runs import Case, measure, predict

MEDIAN, WORST, UNDER = 0.05, 0.15, 0.10

SMALL = Case("llama", 512, 1408, 8, 8, 8, 32000, False, 0)
SMOL = Case("llama", 576, 1536, 30, 9, 3, 49152, True, 0)
PHI = Case("phi3", 512, 1536, 10, 8, 8, 32064, False, 0)
PHI_WIDE = Case("phi3", 768, 3072, 4, 12, 12, 12000, False, 0)
QWEN = Case("qwen2", 640, 1728, 8, 10, 2, 60000, True, 0)
QWEN3 = Case("qwen3", 512, 1536, 10, 8, 4, 48000, True, 0)
GEMMA = Case("gemma3_text", 640, 2560, 8, 8, 2, 64000, True, 0)
MISTRAL = Case("mistral", 640, 2048, 8, 10, 5, 32000, False, 0)
TINY = Case("llama", 320, 864, 5, 5, 5, 16000, False, 0, dtype="float32")


def _of(base: Case, **changes: object) -> Case:
    return Case(**{**vars(base), **changes})  # type: ignore[arg-type]


CASES = (
    _of(SMALL, length=128, lora_r=8),
    _of(SMALL, length=128),
    _of(SMALL, length=1024, lora_r=8),
    _of(SMALL, length=128, rows=8, pack=1024, lora_r=16),
    _of(SMALL, length=1024, rows=2),
    _of(SMALL, length=700, rows=3, pack=2100, lora_r=8, checkpointed=True),
    _of(SMOL, length=256, lora_r=16),
    _of(SMOL, length=256, rows=4, pack=512, lora_r=8, steps=2),
    _of(SMOL, length=200, steps=2),
    _of(SMOL, length=512, rows=2, pack=1024, checkpointed=True, steps=2),
    _of(PHI, length=800, lora_r=8),
    _of(PHI, length=256, rows=4, pack=1024, lora_r=16),
    _of(PHI, length=600),
    _of(PHI, length=300, rows=4, pack=600, evaluated=4),
    _of(PHI_WIDE, length=1500, lora_r=8, steps=2),
    _of(QWEN, length=640, lora_r=16),
    _of(QWEN, length=320, rows=4, pack=640),
    _of(QWEN, length=500, optimizer="adafactor"),
    _of(QWEN3, length=700, lora_r=8),
    _of(QWEN3, length=350, rows=2, pack=700, learned_share=0.3),
    _of(GEMMA, length=200, rows=4, pack=800, lora_r=16),
    _of(GEMMA, length=400),
    _of(MISTRAL, length=600, rows=2, pack=1200, lora_r=8),
    _of(MISTRAL, length=900, checkpointed=True),
    _of(MISTRAL, length=500, lora_r=8, dora=True),
    _of(TINY, length=64),
    _of(SMALL, length=300, rows=4, pack=600, processes=2, steps=2),
    _of(MISTRAL, length=200, rows=8, pack=800, lora_r=16, processes=2, steps=2),
    _of(SMALL, length=300, rows=4, pack=600, processes=2, strategy="fsdp", steps=2),
    _of(MISTRAL, length=400, rows=4, pack=800, lora_r=8, processes=2, strategy="fsdp", steps=2),
    _of(SMALL, length=300, rows=4, pack=600, processes=2, strategy="zero2", steps=2),
    _of(QWEN3, length=256, rows=4, pack=512, processes=2, strategy="zero2", steps=2),
    _of(SMALL, length=300, rows=4, pack=600, processes=2, strategy="zero3", steps=2),
    _of(MISTRAL, length=400, rows=4, pack=800, lora_r=8, processes=2, strategy="zero3", steps=2),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where models and runs are made")
    parser.add_argument("--deepspeed", type=Path, help="where it is, when it is not installed")
    parser.add_argument("--json", type=Path, help="write what was seen here too")
    given = parser.parse_args()
    print("command: " + " ".join(["python", *sys.argv]))
    print(f"{'configuration':54} {'parameters':>10} {'predicted':>10} {'measured':>10} {'error':>8}")
    began, errors, seen = time.monotonic(), [], []
    for case in CASES:
        predicted = predict(case).device
        measured = measure(case, given.folder, given.deepspeed)["peak_memory_bytes"]
        error = (predicted.total_bytes - measured) / measured
        errors.append(error)
        seen.append({"case": case.name, "predicted": predicted.total_bytes, "measured": measured})
        millions = case.architecture().parameters / 1e6
        sizes = f"{predicted.total_bytes / 1e6:7.0f} MB {measured / 1e6:7.0f} MB"
        print(f"{case.name:54} {millions:9.0f}M {sizes} {100 * error:+7.1f}%", flush=True)
    if given.json:
        given.json.write_text(json.dumps(seen, indent=1) + "\n", encoding="utf-8")
    median = statistics.median(abs(error) for error in errors)
    worst, under = max(abs(error) for error in errors), -min(0.0, *errors)
    is_good = median <= MEDIAN and worst <= WORST and under <= UNDER
    print(
        f"\n{len(errors)} configurations in {time.monotonic() - began:.0f} s: "
        f"median error {100 * median:.1f} % (at most {100 * MEDIAN:.0f}), "
        f"worst {100 * worst:.1f} % (at most {100 * WORST:.0f}), "
        f"most under {100 * under:.1f} % (at most {100 * UNDER:.0f}): {'passed' if is_good else 'FAILED'}"
    )
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
