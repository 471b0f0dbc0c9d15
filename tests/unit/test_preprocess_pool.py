"""Worker processes: in order, few parts at a time, and nothing left behind whatever ends first."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests import pool_work
from tests.models import tiny_tokenizer
from tuneloop.core.errors import DataError, Internal, OutOfMemory, StepFailed
from tuneloop.core.types import StepFile, StepFileInput
from tuneloop.steps import pool as pool_module
from tuneloop.steps.pool import Pool


@pytest.fixture(autouse=True)
def workers_find_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


def children() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if "tuneloop.steps.pool_worker" in child.cmdline()
    ]


def test_answers_come_in_order_whoever_is_done_first() -> None:
    parts = [0.05 if number % 4 == 0 else 0.0 for number in range(24)]
    with Pool[float, float](pool_work.Wait(), 3) as pool:
        assert list(pool.do(iter(parts))) == parts
    assert children() == []


def test_parts_are_taken_as_they_are_needed_so_memory_stays_the_same() -> None:
    taken = 0

    def parts() -> Iterator[bytes]:
        nonlocal taken
        for number in range(60):
            taken += 1
            yield bytes([number]) * (1 << 20)

    with Pool[bytes, bytes](pool_work.Echo(), 2) as pool:
        for given, answer in enumerate(pool.do(parts()), 1):
            assert answer[:1] == bytes([given - 1])
            assert taken - given <= 2 * pool_module.WINDOW
    assert taken == 60


def test_one_process_starts_no_other() -> None:
    with Pool[bytes, bytes](pool_work.Echo(), 1) as pool:
        assert list(pool.do(iter([b"a", b"b"]))) == [b"a", b"b"]
        assert children() == []


@pytest.mark.parametrize(
    ("how", "expected", "words"),
    [
        ("refuse", DataError, "row 7 is bad"),
        ("defect", Internal, "KeyError: 'nothing'"),
        ("exit", StepFailed, "ended with exit code 5"),
        ("killed", OutOfMemory, "was killed, perhaps because memory ran out"),
    ],
)
def test_what_ends_a_worker_is_said_and_no_process_is_left(
    how: str, expected: type[Exception], words: str
) -> None:
    with pytest.raises(expected, match=words), Pool[str, str](pool_work.Fail(), 2) as pool:
        list(pool.do(iter(["fine", "fine", how, *["fine"] * 20])))
    assert children() == []


def test_an_interrupt_leaves_no_process_behind() -> None:
    def parts() -> Iterator[float]:
        yield from [0.0, 0.0]
        assert len(children()) == 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Pool[float, float](pool_work.Wait(), 2) as pool:
        list(pool.do(parts()))
    assert children() == []


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    program = (
        "import itertools, sys\n"
        "from tests import pool_work\n"
        "from tuneloop.steps.pool import Pool\n"
        "with Pool(pool_work.Pid(), 2) as pool:\n"
        "    for pid in pool.do(itertools.repeat(b'')):\n"
        "        print(pid, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids: set[int] = set()
        while len(pids) < 2:
            pids.add(int(parent.stdout.readline()))
        workers = [psutil.Process(pid) for pid in pids]
        # Told to end as a group is, they stay: the step itself lets go of them.
        for worker in workers:
            worker.send_signal(signal.SIGTERM)
        assert psutil.wait_procs(workers, timeout=0.5)[0] == []
        os.kill(parent.pid, signal.SIGKILL)
    gone, alive = psutil.wait_procs(workers, timeout=20)
    assert alive == []
    assert len(gone) == 2


def test_a_step_that_is_told_to_stop_leaves_no_worker_behind(tmp_path: Path) -> None:
    model = tiny_tokenizer(tmp_path / "model", "phi3")
    (model / "config.json").write_text(json.dumps({"model_type": "phi3", "max_position_embeddings": 256}))
    row = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "yes " * 30}]}
    data = tmp_path / "train.jsonl"
    data.write_text((json.dumps(row) + "\n") * 100_000)
    step = tmp_path / "step"
    inputs = {"model": model, "train": data, "validation": data, "test": data}
    step.mkdir()
    written = StepFile(
        attempt="job/preprocess/1",
        attempt_id="attempt",
        kind="preprocess",
        inputs={
            name: StepFileInput(path=str(path), digest=name, name=path.name) for name, path in inputs.items()
        },
        outputs={"dataset": "dataset_folder"},
    )
    (step / "step.json").write_text(written.model_dump_json())
    started = subprocess.Popen(
        [sys.executable, "-m", "tuneloop.steps", str(step)], env={**os.environ, "OMP_NUM_THREADS": "2"}
    )
    progress = step / "progress.jsonl"
    while "tokenising" not in (progress.read_text() if progress.exists() else ""):
        assert started.poll() is None
        threading.Event().wait(0.02)
    workers = children()
    started.terminate()
    assert started.wait(timeout=30) == 143
    assert json.loads((step / "result.json").read_text())["status"] == "interrupted"
    assert psutil.wait_procs(workers, timeout=10)[1] == []


def test_no_more_processes_than_cores_and_than_the_text_is_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(pool_module, "this_machine", lambda: _Cores(8))
    assert pool_module.processes_for(1 << 30) == 8
    assert pool_module.processes_for(9 << 20) == 2
    assert pool_module.processes_for(1000) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert pool_module.processes_for(1 << 30) == 3
    monkeypatch.setattr(pool_module, "this_machine", lambda: _Cores(1))
    assert pool_module.processes_for(1 << 30) == 1


class _Cores:
    def __init__(self, cores: int) -> None:
        self.cores = cores
