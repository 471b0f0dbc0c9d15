"""Fit the measured constants of `tuneloop.core.plan.constants` on a CPU.

    .venv/bin/python benchmarks/plan_fit.py --folder /tmp/plan            measure what is missing, then fit
    .venv/bin/python benchmarks/plan_fit.py --folder /tmp/plan --fresh    measure everything anew

The configurations are other ones than those of `plan_accuracy.py`: other shapes, lengths and batches. What
was measured is kept in `plan_fit.json` beside this file; the constants that are printed belong into
`core/plan/constants.py`. One heavy process at a time; about ten minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from plan_runs import Case, measure, predict

from tuneloop.core.plan import memory

TOO_LITTLE = 2.0
"""How much worse an estimate below what is measured counts than one above."""
TRIES = 600
OF_ONE = ("LIBRARY_BYTES", "SLACK_SHARE", "LORA_SLACK_LAYERS", "LORA_SEVERAL_PACKS_SHARE")
OF_SEVERAL = ("LAUNCHERS_BYTES", "DEEPSPEED_BYTES")
SEEN = Path(__file__).with_suffix(".json")

LLAMA = Case("llama", 384, 1024, 6, 6, 2, 24000, False, 256)
WIDE = Case("llama", 768, 2048, 8, 12, 4, 32000, False, 256)
PHI = Case("phi3", 384, 1152, 6, 6, 6, 20000, False, 256)
QWEN = Case("qwen2", 448, 1280, 6, 7, 1, 40000, True, 256)
DEEP = Case("llama", 384, 1024, 24, 6, 2, 24000, True, 256)
FUSED = Case("phi3", 640, 2560, 4, 10, 10, 10000, False, 256)
GEMMA = Case("gemma3_text", 512, 2048, 6, 8, 4, 50000, True, 256)


def _of(base: Case, **changes: object) -> Case:
    return Case(**{**vars(base), **changes})  # type: ignore[arg-type]


CASES = (
    _of(LLAMA, length=96),
    _of(LLAMA, length=700, rows=2),
    _of(LLAMA, length=700, lora_r=16),
    _of(LLAMA, length=1400, lora_r=4),
    _of(LLAMA, length=150, rows=6, pack=900, lora_r=16),
    _of(LLAMA, length=150, rows=6, pack=900, evaluated=6),
    _of(PHI, length=500),
    _of(PHI, length=500, rows=2, pack=1000, lora_r=16),
    _of(PHI, length=350, rows=6, pack=1050, lora_r=8),
    _of(QWEN, length=400),
    _of(QWEN, length=400, rows=2, lora_r=16),
    _of(QWEN, length=900, lora_r=32, learned_share=0.3),
    _of(QWEN, family="qwen3", length=250, rows=3, pack=750),
    _of(WIDE, length=500, rows=2, pack=1000, lora_r=16),
    _of(WIDE, length=500),
    _of(WIDE, length=900, rows=2, pack=1800, lora_r=8, checkpointed=True),
    _of(WIDE, length=1200, checkpointed=True),
    _of(WIDE, length=400, lora_r=8, dora=True),
    _of(WIDE, length=300, optimizer="adafactor"),
    _of(GEMMA, length=400, rows=2, pack=800, lora_r=8),
    _of(GEMMA, length=300),
    Case("llama", 640, 4608, 3, 10, 5, 9000, False, 1900, lora_r=8),
    _of(DEEP, length=300, lora_r=8),
    _of(DEEP, length=300, rows=3, pack=300, lora_r=8),
    _of(DEEP, length=300),
    _of(DEEP, length=300, rows=3, pack=300),
    _of(FUSED, length=1700, lora_r=16),
    _of(FUSED, length=900, rows=2, lora_r=16),
    _of(WIDE, length=200, rows=4, pack=400, processes=2, steps=2),
    _of(QWEN, length=300, rows=4, pack=600, lora_r=16, processes=2, steps=2),
    _of(WIDE, length=200, rows=4, pack=400, processes=2, strategy="fsdp", steps=2),
    _of(QWEN, length=300, rows=4, pack=600, processes=2, strategy="fsdp", steps=2),
    _of(WIDE, length=200, rows=4, pack=400, processes=2, strategy="zero2", steps=2),
    _of(QWEN, length=300, rows=4, pack=600, lora_r=16, processes=2, strategy="zero2", steps=2),
    _of(WIDE, length=200, rows=4, pack=400, processes=2, strategy="zero3", steps=2),
    _of(QWEN, length=300, rows=4, pack=600, processes=2, strategy="zero3", steps=2),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where models and runs are made")
    parser.add_argument("--deepspeed", type=Path, help="where it is, when it is not installed")
    parser.add_argument("--fresh", action="store_true", help="measure again what is known")
    given = parser.parse_args()
    seen = {} if given.fresh or not SEEN.exists() else json.loads(SEEN.read_text(encoding="utf-8"))
    for case in CASES:
        if case.name not in seen:
            seen[case.name] = measure(case, given.folder, given.deepspeed)["peak_memory_bytes"]
            SEEN.write_text(json.dumps(seen, indent=1) + "\n", encoding="utf-8")
        print(f"{case.name:54} {seen[case.name] / 1e6:8.0f} MB", flush=True)
    for names, cases in (
        (OF_ONE, [case for case in CASES if case.processes == 1]),
        (OF_SEVERAL, [case for case in CASES if case.processes > 1]),
    ):
        fit(names, {case: seen[case.name] for case in cases})
        for name in names:
            print(f"{name:24} {getattr(memory, name):,.3f}")
        for case in cases:
            print(f"  {case.name:54} {100 * error_of(case, seen[case.name]):+6.1f} %")


def fit(names: Sequence[str], seen: Mapping[Case, int]) -> None:
    """Moves the constants `names` of the memory model, one at a time and at random, as long as the squared
    relative errors of the planned peaks get smaller."""
    chance = random.Random(0)
    least, steps = _squares(seen), dict.fromkeys(names, 0.15)
    for _ in range(TRIES):
        name = chance.choice(names)
        before = getattr(memory, name)
        setattr(memory, name, before * (1 + chance.gauss(0, steps[name])))
        found = _squares(seen)
        if found < least:
            least, steps[name] = found, 1.2 * steps[name]
        else:
            setattr(memory, name, before)
            steps[name] = max(0.005, 0.93 * steps[name])


def _squares(seen: Mapping[Case, int]) -> float:
    """Told too little, a run ends without a result; told too much, a pack is smaller than need be."""
    errors = (error_of(case, measured) for case, measured in seen.items())
    return sum((error * (TOO_LITTLE if error < 0 else 1.0)) ** 2 for error in errors)


def error_of(case: Case, measured: int) -> float:
    return predict(case).device.total_bytes / measured - 1


if __name__ == "__main__":
    main()
