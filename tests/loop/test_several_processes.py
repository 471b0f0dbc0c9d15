"""One finetune step in two processes: what it makes, and what is left when any of them dies."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

pytest.importorskip("torch")

from tests.attempts import (
    LONG,
    TOGETHER,
    has_trained,
    losses_of,
    processes_of,
    result_of,
    running,
    wait_until,
    write_attempt,
)
from tests.conversations import write_dataset
from tests.models import tiny_model

START_SECONDS = 150


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), "smollm2")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def test_two_processes_make_what_one_makes_and_an_attempt_after_a_killed_one_goes_on(
    tmp_path: Path, model: Path, dataset: Path
) -> None:
    settings = {"num_train_epochs": 30, "checkpoint_steps": 4, "evaluation_strategy": "disable"}
    one = write_attempt(tmp_path / "one", model, dataset, per_device_train_batch_size=4, **settings)
    with running(one) as process:
        assert process.wait(START_SECONDS) == 0, (one / "log.txt").read_text()

    lost = write_attempt(tmp_path / "lost", model, dataset, **TOGETHER, **settings)
    with running(lost) as process:
        wait_until(has_trained(lost, 10), START_SECONDS, "training")
        processes_of(lost)["1"].kill()
        wait_until(lambda: process.poll() is not None, 15, "the step's end")
        wait_until(lambda: not processes_of(lost), 2, "nothing is left")
    error = result_of(lost).error
    assert error is not None
    assert error.code == "rank_lost"
    assert error.message.startswith("Process 2 of 2 (rank 1) was ended by SIGKILL")
    assert error.details is not None
    assert error.details["exit_code"] == -signal.SIGKILL

    again = write_attempt(tmp_path / "again", model, dataset, [lost], **TOGETHER, **settings)
    with running(again) as process:
        assert process.wait(START_SECONDS) == 0, (again / "log.txt").read_text()
    resumed, whole = losses_of(again), losses_of(one)
    assert 4 < min(resumed) <= max(resumed) == 120
    assert resumed == pytest.approx({step: whole[step] for step in resumed}, abs=2e-5)

    result = result_of(again)
    assert set(result.outputs) == {"trained"}
    assert result.metrics["processes"] == 2
    assert result.metrics["resumed_from_step"] == min(resumed) - 1
    assert result.peak_memory_bytes is not None
    alone = result_of(one).peak_memory_bytes
    assert alone is not None
    assert result.peak_memory_bytes > 1.5 * alone
    about = json.loads((again / "outputs" / "trained" / "trained.json").read_text())
    assert (about["processes"], about["strategy"], about["effective_batch"]) == (2, "ddp", 4)
    log = (again / "log.txt").read_text()
    assert log.count("2 processes on 1 node(s) met after") == 1
    assert (again / "ranks" / "1.txt").exists()


def test_nothing_is_left_of_a_step_that_is_killed(tmp_path: Path, model: Path, dataset: Path) -> None:
    folder = write_attempt(tmp_path / "a", model, dataset, **TOGETHER, **LONG)
    with running(folder) as process:
        wait_until(has_trained(folder), START_SECONDS, "training")
        assert {"0", "1"} < set(processes_of(folder))
        os.kill(process.pid, signal.SIGKILL)
        process.wait(5)
        wait_until(lambda: not processes_of(folder), 10, "nothing is left")
    assert not (folder / "result.json").exists()
