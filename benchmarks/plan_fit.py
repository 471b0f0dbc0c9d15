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
from pathlib import Path

from plan_runs import Case, measure, predict, rows_of, setup_of

from tuneloop.core.plan.constants import (
    ALLOCATOR_SHARE,
    LARGE_BLOCK_SHARE,
    LORA_ALLOCATOR_SHARE,
    SEVERAL_PACKS_FACTOR,
)
from tuneloop.core.plan.memory import kept_bytes, large_bytes

TOO_LITTLE = 2.0
"""How much worse an estimate below what is measured counts than one above."""
SEEN = Path(__file__).with_suffix(".json")

LLAMA = Case("llama", 384, 1024, 6, 6, 2, 24000, False, 256)
WIDE = Case("llama", 768, 2048, 8, 12, 4, 32000, False, 256)
PHI = Case("phi3", 384, 1152, 6, 6, 6, 20000, False, 256)
QWEN = Case("qwen2", 448, 1280, 6, 7, 1, 40000, True, 256)
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
        print(f"{case.name:40} {seen[case.name] / 1e6:8.0f} MB", flush=True)
    fit({case: seen[case.name] for case in CASES})


def fit(seen: dict[Case, int]) -> None:
    """Least squares of the relative error, errors below counting double, over what is left when everything
    that is counted is taken off: measured = counted + process + share * kept in small blocks."""
    import numpy as np

    alone = {case: measured for case, measured in seen.items() if case.processes == 1}
    rows, targets, weights = [], [], []
    for case, measured in alone.items():
        memory = predict(case).device
        counted = sum(size for cause, size in memory.causes.items() if cause not in ("process", "slack"))
        kept, large = kept_of(case)
        # What was left behind where a later moment is the peak is counted too.
        left = memory.causes["slack"] - share_of(case) * (kept - large) - LARGE_BLOCK_SHARE * large
        is_lora, factor = (
            case.lora_r > 0,
            SEVERAL_PACKS_FACTOR if case.rows * case.length > case.pack_tokens else 1.0,
        )
        small = factor * (kept - large)
        rows.append([1.0, 0.0 if is_lora else small, small if is_lora else 0.0])
        targets.append(measured - counted - LARGE_BLOCK_SHARE * large - left)
        weights.append(1.0 / measured)
    system, wanted, relative = np.array(rows), np.array(targets), np.array(weights)
    scale = relative.copy()
    for _ in range(20):
        found, *_ = np.linalg.lstsq(system * scale[:, None], wanted * scale, rcond=None)
        # Told too little, a run ends without a result; told too much, a pack is smaller than need be.
        scale = relative * np.where(system @ found < wanted, TOO_LITTLE, 1.0)
    print(f"\nLIBRARY_BYTES        = {found[0]:,.0f}")
    print(f"ALLOCATOR_SHARE      = {found[1]:.3f}")
    print(f"LORA_ALLOCATOR_SHARE = {found[2]:.3f}")
    for row, target, weight, case in zip(rows, targets, weights, alone, strict=True):
        error = (float(np.dot(row, found)) - target) * weight
        print(f"  {case.name:54} {100 * error:+6.1f} %")
    for case, measured in seen.items():
        if case.processes > 1:
            planned = predict(case).device.total_bytes
            print(f"  {case.name:54} {100 * (planned / measured - 1):+6.1f} % with the constants as they are")


def share_of(case: Case) -> float:
    share = LORA_ALLOCATOR_SHARE if case.lora_r else ALLOCATOR_SHARE
    return share * (
        SEVERAL_PACKS_FACTOR if case.rows * case.length > case.pack_tokens * case.processes else 1.0
    )


def kept_of(case: Case) -> tuple[float, float]:
    """Bytes that a backward pass of the case keeps, and those of them in large blocks."""
    shape, setup, rows = case.architecture(), setup_of(case), rows_of(case)
    kept = kept_bytes(shape, setup, rows, "cpu")
    return kept, large_bytes(shape, setup, rows, kept)


if __name__ == "__main__":
    main()
