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

from plan_runs import Case, measure, predict

from tuneloop.core.plan.constants import LARGE_BLOCK_SHARE
from tuneloop.core.plan.memory import kept_bytes, large_bytes

TOO_LITTLE = 2.0
"""How much worse an estimate below what is measured counts than one above."""
SEEN = Path(__file__).with_suffix(".json")

LLAMA = Case("llama", 384, 1024, 6, 6, 2, 24000, False, 256)
PHI = Case("phi3", 384, 1152, 6, 6, 6, 20000, False, 256)
QWEN = Case("qwen2", 448, 1280, 6, 7, 1, 40000, True, 256)


def _of(base: Case, **changes: object) -> Case:
    return Case(**{**vars(base), **changes})  # type: ignore[arg-type]


CASES = (
    _of(LLAMA, length=96),
    _of(LLAMA, length=700),
    _of(LLAMA, length=700, lora_r=16),
    _of(LLAMA, length=1400, lora_r=4),
    _of(LLAMA, length=300, batch=3, lora_r=16),
    _of(LLAMA, length=300, batch=3, evaluates=True),
    _of(PHI, length=500),
    _of(PHI, length=500, lora_r=16),
    _of(PHI, length=350, batch=4, lora_r=8),
    _of(PHI, length=1200, accumulation=2),
    _of(QWEN, length=400),
    _of(QWEN, length=400, lora_r=16),
    _of(QWEN, length=250, batch=3, lora_r=8),
    _of(QWEN, length=900, lora_r=32, learned_share=0.3),
    Case("llama", 768, 2048, 8, 12, 4, 32000, False, 500, lora_r=16),
    Case("llama", 768, 2048, 8, 12, 4, 32000, False, 500),
    Case("llama", 640, 1600, 6, 10, 10, 26000, False, 1100, lora_r=8),
    Case("llama", 448, 1200, 12, 7, 7, 18000, False, 600, lora_r=16, batch=2),
    Case("llama", 640, 4608, 3, 10, 5, 9000, False, 1900, lora_r=8),
    Case("qwen2", 512, 1408, 6, 8, 2, 70000, True, 300, batch=2),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where models and runs are made")
    parser.add_argument("--fresh", action="store_true", help="measure again what is known")
    given = parser.parse_args()
    seen = {} if given.fresh or not SEEN.exists() else json.loads(SEEN.read_text(encoding="utf-8"))
    for case in CASES:
        if case.name not in seen:
            seen[case.name] = measure(case, given.folder)["peak_memory_bytes"]
            SEEN.write_text(json.dumps(seen, indent=1) + "\n", encoding="utf-8")
        print(f"{case.name:40} {seen[case.name] / 1e6:8.0f} MB", flush=True)
    fit({case: seen[case.name] for case in CASES})


def fit(seen: dict[Case, int]) -> None:
    """Least squares of the relative error, errors below counting double, over what is left when everything
    that is counted is taken off: measured = counted + process + share * kept in small blocks."""
    import numpy as np

    rows, targets, weights = [], [], []
    for case, measured in seen.items():
        memory = predict(case).device
        counted = sum(size for cause, size in memory.causes.items() if cause not in ("process", "slack"))
        kept, large = kept_of(case)
        is_lora = case.lora_r > 0
        rows.append([1.0, 0.0 if is_lora else kept - large, kept - large if is_lora else 0.0])
        targets.append(measured - counted - LARGE_BLOCK_SHARE * large)
        weights.append(1.0 / measured)
    system, wanted, relative = np.array(rows), np.array(targets), np.array(weights)
    scale = relative.copy()
    for _ in range(20):
        found, *_ = np.linalg.lstsq(system * scale[:, None], wanted * scale, rcond=None)
        # Told too little, a run ends without a result; told too much, a batch is halved.
        scale = relative * np.where(system @ found < wanted, TOO_LITTLE, 1.0)
    print(f"\nLIBRARY_BYTES        = {found[0]:,.0f}")
    print(f"ALLOCATOR_SHARE      = {found[1]:.3f}")
    print(f"LORA_ALLOCATOR_SHARE = {found[2]:.3f}")
    for row, target, weight, case in zip(rows, targets, weights, seen, strict=True):
        error = (float(np.dot(row, found)) - target) * weight
        print(f"  {case.name:40} {100 * error:+6.1f} %")


def kept_of(case: Case) -> tuple[float, float]:
    """Bytes that a backward pass of the case keeps, and those of them in large blocks."""
    from plan_runs import rows_of, setup_of

    shape, setup, rows = case.architecture(), setup_of(case), rows_of(case)
    kept = kept_bytes(shape, setup, rows)
    return kept, large_bytes(shape, setup, rows, kept)


if __name__ == "__main__":
    main()
