"""What every side of `train_speed.py` shares: the rows, the clock, and the machine's matrix product.

Run by the environments of the peers too, so nothing but torch and the standard library is imported.
`python train_speed_clock.py` prints the fp32 GFLOP/s of one thread: the best of three shapes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SHAPES = ((1024, 576, 1536), (1024, 1024, 1024), (2048, 2048, 2048))
"""Products that are timed: one of the model's own, and two where blocking pays most."""


def arguments(about: str | None) -> argparse.Namespace:
    """What a side is told."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--task", type=Path, required=True, help="task.json of the setup")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true", help="compute activations twice")
    parser.add_argument("--out", type=Path, required=True, help="where the figures go (JSON)")
    parser.add_argument("--profile", action="store_true")
    return parser.parse_args()


class Task:
    """The rows and the settings that all sides share, as the setup wrote them."""

    def __init__(self, file: Path, batch: int) -> None:
        written = json.loads(file.read_text(encoding="utf-8"))
        self.model = Path(written["model"])
        self.adapter = Path(written["adapter"])
        self.lora: dict[str, Any] = written["lora"]
        self.learning_rate: float = written["learning_rate"]
        self.max_length: int = written["max_length"]
        timed: list[dict[str, list[int]]] = written["rows"]
        warm_up = min(timed, key=lambda row: len(row["input_ids"]))
        self.rows = [*[warm_up] * batch, *timed]
        """The first `batch` of them are the step that is not timed."""
        self.steps = len(self.rows) // batch
        self.tokens = sum(len(row["input_ids"]) for row in timed)
        self.targets = sum(sum(row["learn"][1:]) for row in timed)

    def labels(self) -> Iterator[list[int]]:
        """As Hugging Face's trainers take them: -100 is not learned."""
        for row in self.rows:
            yield [
                token if learn else -100 for token, learn in zip(row["input_ids"], row["learn"], strict=True)
            ]


class Clock:
    """CPU and wall seconds from the end of the first step to the end of the last one, and what was seen."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._began = (0.0, 0.0)
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.figures: dict[str, Any] = {}

    def step_ended(self, step: int) -> None:
        """Steps count from 1."""
        now = (time.process_time(), time.monotonic())
        if step == 1:
            self._began = now
        if step == self._task.steps:
            self.figures = {
                "tokens": self._task.tokens,
                "targets": self._task.targets,
                "cpu_seconds": now[0] - self._began[0],
                "wall_seconds": now[1] - self._began[1],
                "peak_rss_bytes": peak_rss_bytes(),
            }

    def saw(self, loss: float, norm: float) -> None:
        self.losses.append(loss)
        self.norms.append(norm)

    def write(self, out: Path, **more: Any) -> None:
        """Raises `SystemExit` when the side did not run all of its steps."""
        if not self.figures or len(self.losses) != self._task.steps:
            raise SystemExit(f"{len(self.losses)} of {self._task.steps} steps were seen")
        written = {**self.figures, "losses": self.losses, "norms": self.norms, "versions": versions(), **more}
        out.write_text(json.dumps(written, indent=1), encoding="utf-8")


def peak_rss_bytes() -> int:
    """The most memory that this process has held, as the kernel counted it; loading the model is in it."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this kernel does not tell VmHWM")


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "peft", "accelerate", "trl", "llamafactory", "tuneloop"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def gemm_gflops(seconds: float = 1.0) -> dict[str, float]:
    """fp32 GFLOP/s of `torch.mm` by shape, per CPU second, the best of many tries of each."""
    import torch

    torch.set_num_threads(1)
    found = {}
    for m, k, n in SHAPES:
        left, right = torch.randn(m, k), torch.randn(k, n)
        out = torch.empty(m, n)
        best, ends = float("inf"), time.process_time() + seconds
        while time.process_time() < ends:
            began = time.process_time()
            torch.mm(left, right, out=out)
            best = min(best, time.process_time() - began)
        found[f"{m}x{k}x{n}"] = 2 * m * k * n / best / 1e9
    return found


if __name__ == "__main__":
    print(json.dumps(gemm_gflops()))
