"""Attempt folders of finetune steps, their processes, and what became of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tuneloop.core.types import ResultFile, StepFile, StepFileInput

TOGETHER = {"number_of_gpu_to_use_finetuning": 2, "cpu_processes": 2, "per_device_train_batch_size": 2}
"""Two processes on one machine; four conversations a step."""
LONG = {"num_train_epochs": 5000, "evaluation_strategy": "disable", "checkpoint_seconds": 5}


def write_attempt(
    folder: Path, model: Path, dataset: Path, previous: Sequence[Path] = (), **parameters: Any
) -> Path:
    folder.mkdir()
    inputs = {"model": model, "dataset": dataset}
    step = StepFile(
        attempt="job/finetune/1",
        attempt_id=folder.name,
        kind="finetune",
        parameters={"learning_rate": 1e-3, "logging_steps": 1, "apply_lora": True, **parameters},
        inputs={role: StepFileInput(path=str(path), digest="sha256:0") for role, path in inputs.items()},
        outputs={"trained": "folder"},
        previous_attempts=tuple(map(str, previous)),
    )
    (folder / "step.json").write_text(step.model_dump_json(exclude_none=True))
    return folder


def start(
    module: str, *arguments: str, log: Path, prefix: Sequence[str] = (), **environment: str
) -> subprocess.Popen[bytes]:
    with open(log, "ab") as said:
        return subprocess.Popen(
            [*prefix, sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            start_new_session=True,
        )


@contextmanager
def running(
    folder: Path, prefix: Sequence[str] = (), **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """The step's process; nothing of it is left afterwards."""
    process = start("tuneloop.steps", str(folder), log=folder / "log.txt", prefix=prefix, **environment)
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def wait_until(is_so: Callable[[], bool], seconds: float, what: str = "it is so") -> float:
    """Seconds that it took."""
    started = time.monotonic()
    while not is_so():
        assert time.monotonic() - started < seconds, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return time.monotonic() - started


def result_of(folder: Path) -> ResultFile:
    return ResultFile.model_validate_json((folder / "result.json").read_text())


def losses_of(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["values"]["loss"] for line in lines if "loss" in line["values"]}


def has_trained(folder: Path, steps: int = 5) -> Callable[[], bool]:
    def has() -> bool:
        file = folder / "metrics.jsonl"
        return file.exists() and file.read_text().count("\n") >= steps

    return has


def processes_of(folder: Path) -> Mapping[str, psutil.Process]:
    """What runs for an attempt: ranks by their number, the rest by their module."""
    found = {}
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
            if str(folder) in line and process.status() != psutil.STATUS_ZOMBIE:
                module = line[line.index("-m") + 1]
                found[process.environ()["RANK"] if module == "tuneloop.steps.rank" else module] = process
        except (psutil.Error, ValueError, OSError):
            continue
    return found
