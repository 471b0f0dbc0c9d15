"""More of a step in several processes: told to stop, mistaken, and on two nodes that share a machine."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

pytest.importorskip("torch")

from tests.attempts import (
    LONG,
    TOGETHER,
    end,
    has_trained,
    losses_of,
    processes_of,
    result_of,
    running,
    start,
    wait_until,
    write_attempt,
)
from tests.conversations import write_dataset
from tests.models import tiny_model

pytestmark = pytest.mark.slow

START_SECONDS = 150


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), "smollm2")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def test_a_step_that_is_told_to_stop_stops_with_all_its_processes(
    tmp_path: Path, model: Path, dataset: Path
) -> None:
    folder = write_attempt(tmp_path / "a", model, dataset, **TOGETHER, **LONG)
    with running(folder) as process:
        wait_until(has_trained(folder), START_SECONDS, "training")
        os.kill(process.pid, signal.SIGTERM)
        wait_until(lambda: process.poll() is not None, 15, "the step's end")
        assert not processes_of(folder)
    assert result_of(folder).status == "interrupted"
    assert process.returncode == 143


def test_a_mistake_in_two_processes_is_the_steps_own_and_is_told_once(
    tmp_path: Path, model: Path, dataset: Path
) -> None:
    folder = write_attempt(
        tmp_path / "a", model, dataset, **TOGETHER, **LONG, learning_rate=1e30, apply_lora=False
    )
    with running(folder) as process:
        assert process.wait(START_SECONDS) == 1
    error = result_of(folder).error
    assert error is not None
    assert error.code == "diverged"
    assert (folder / "log.txt").read_text().count("error: ") <= 2
    assert not processes_of(folder)


def test_two_nodes_on_loopback_train_as_one_machine_does_and_a_lone_one_keeps_the_batch(
    tmp_path: Path, model: Path, dataset: Path
) -> None:
    asked = {"num_nodes_finetune": 2, "per_device_train_batch_size": 2}
    alone = write_attempt(tmp_path / "alone", model, dataset, **asked)
    with running(alone) as process:
        assert process.wait(START_SECONDS) == 0, (alone / "log.txt").read_text()
    (warning,) = result_of(alone).warnings
    assert "The effective batch stays 2 x 1 x 2 = 4" in warning

    secret = {"TUNELOOP_NODE_SECRET": "only for this test"}
    port = _free_port()
    both = write_attempt(tmp_path / "both", model, dataset, **asked)
    guest = start(
        "tuneloop.steps.launch",
        *("--join", f"127.0.0.1:{port}", "--node-rank", "1", "--once"),
        log=tmp_path / "guest.txt",
        **secret,
    )
    settings = {"TUNELOOP_NODES": "2", "TUNELOOP_NODE_ADDRESS": "127.0.0.1", "TUNELOOP_NODE_PORT": str(port)}
    try:
        with running(both, **settings, **secret) as process:
            assert process.wait(START_SECONDS) == 0, (both / "log.txt").read_text()
        assert guest.wait(20) == 0, (tmp_path / "guest.txt").read_text()
    finally:
        end(guest)
    assert result_of(both).warnings == ()
    assert result_of(both).metrics["processes"] == 2
    assert losses_of(both) == pytest.approx(losses_of(alone), abs=2e-5)
    assert secret["TUNELOOP_NODE_SECRET"] not in "".join(
        path.read_text() for path in (both / "ranks").iterdir()
    )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as tried:
        return int(tried.getsockname()[1])
