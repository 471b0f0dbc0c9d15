"""Two machines that train together: network namespaces, with a wire between them that can go dark."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from tests import ranks
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

SECRET = "only the two of them know"
FIRST, SECOND = "10.77.5.1", "10.77.5.2"
TWO_NODES = {"num_nodes_finetune": 2, "per_device_train_batch_size": 2}
SETTINGS = {"TUNELOOP_NODES": "2", "TUNELOOP_NODE_ADDRESS": FIRST, "TUNELOOP_NODE_SECRET": SECRET}
START_SECONDS = 150


class Wire:
    """Two namespaces with a pair of interfaces between them."""

    def __init__(self) -> None:
        self.names = tuple(f"tuneloop-{os.getpid()}-{side}" for side in "ab")

    def lay(self) -> None:
        ends = [f"tl{os.getpid() % 100000}{side}" for side in "ab"]
        for name in self.names:
            _ip("netns", "add", name)
        _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, interface, address in zip(self.names, ends, (FIRST, SECOND), strict=True):
            _ip("link", "set", interface, "netns", name)
            _ip("-n", name, "link", "set", interface, "name", "eth0")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "eth0", "up")

    def inside(self, node: int) -> list[str]:
        return ["ip", "netns", "exec", self.names[node]]

    def go_dark(self) -> None:
        """Packets vanish in both directions, and nobody is told: a queue that holds nothing."""
        queue = ["root", "tbf", "rate", "1kbit", "burst", "10", "limit", "1"]
        for node in (0, 1):
            subprocess.run(
                [*self.inside(node), "tc", "qdisc", "add", "dev", "eth0", *queue],
                check=True,
                capture_output=True,
            )

    def cut(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def wire() -> Iterator[Wire]:
    if os.getuid() != 0:
        pytest.skip("network namespaces are root's to make")
    laid = Wire()
    try:
        try:
            laid.lay()
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield laid
    finally:
        laid.cut()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), "smollm2")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@contextmanager
def second_node(wire: Wire, log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    process = start(
        "tuneloop.steps.launch",
        "--join",
        f"{FIRST}:29471",
        "--node-rank",
        "1",
        log=log,
        prefix=wire.inside(1),
        **{"TUNELOOP_NODE_SECRET": SECRET, **environment},
    )
    try:
        yield process
    finally:
        end(process)


def _with_deepspeed() -> dict[str, str]:
    return {"PYTHONPATH": str(ranks.DEEPSPEED), "DS_ACCELERATOR": "cpu"} if ranks.DEEPSPEED.is_dir() else {}


ZERO3 = {"apply_deepspeed": True, "deepspeed_stage": "3"}


@pytest.mark.parametrize(
    "how",
    [{"strategy": "ddp"}, {"strategy": "fsdp", "apply_lora": False}, ZERO3],
    ids=["ddp", "fsdp", "zero3"],
)
def test_two_machines_train_as_two_processes_of_one_do(
    wire: Wire, tmp_path: Path, model: Path, dataset: Path, how: dict[str, Any]
) -> None:
    if how is ZERO3 and not ranks.DEEPSPEED.is_dir():
        pytest.skip("DeepSpeed is not there")
    extra = _with_deepspeed() if how is ZERO3 else {}
    one = write_attempt(tmp_path / "one", model, dataset, **TOGETHER, **how)
    with running(one, **extra) as process:
        assert process.wait(START_SECONDS) == 0, (one / "log.txt").read_text()
    two = write_attempt(tmp_path / "two", model, dataset, **TWO_NODES, **how)
    with (
        second_node(wire, tmp_path / "guest.txt", **extra),
        running(two, wire.inside(0), **SETTINGS, **extra) as process,
    ):
        assert process.wait(START_SECONDS) == 0, (two / "log.txt").read_text()
    assert losses_of(two) == pytest.approx(losses_of(one), abs=1e-6)
    assert len(losses_of(two)) == 4
    assert f"node 1 ({os.uname().nodename}, {SECOND}) is here" in (two / "log.txt").read_text()


def test_a_process_killed_on_the_second_machine_ends_both_and_is_named(
    wire: Wire, tmp_path: Path, model: Path, dataset: Path
) -> None:
    folder = write_attempt(tmp_path / "a", model, dataset, **TWO_NODES, **LONG)
    with second_node(wire, tmp_path / "guest.txt"), running(folder, wire.inside(0), **SETTINGS) as process:
        wait_until(has_trained(folder), START_SECONDS, "training")
        processes_of(folder)["1"].kill()
        seconds = wait_until(lambda: process.poll() is not None, 10, "the first machine's end")
        error = result_of(folder).error
        left = wait_until(lambda: not processes_of(folder), 5, "the second machine's end")
    print(
        f"killed: the step ended after {seconds:.1f} s, the last process {left:.1f} s later", file=sys.stderr
    )
    assert error is not None
    assert error.code == "rank_lost"
    assert "rank 1" in error.message
    assert f"{SECOND}) was ended by SIGKILL" in error.message


def test_a_link_that_goes_dark_ends_both_sides_within_seconds(
    wire: Wire, tmp_path: Path, model: Path, dataset: Path
) -> None:
    folder = write_attempt(tmp_path / "a", model, dataset, **TWO_NODES, **LONG)
    guest_log = tmp_path / "guest.txt"
    with second_node(wire, guest_log), running(folder, wire.inside(0), **SETTINGS) as process:
        wait_until(has_trained(folder), START_SECONDS, "training")
        wire.go_dark()
        seconds = wait_until(lambda: process.poll() is not None, 15, "the first machine's end")
        left = wait_until(lambda: not processes_of(folder), 5, "the second machine's end")
        error = result_of(folder).error
    print(f"dark: the step ended after {seconds:.1f} s, the last process {left:.1f} s later", file=sys.stderr)
    assert error is not None
    assert error.code == "rank_lost"
    assert f"{SECOND}) has not been heard for 10 s" in error.message
    assert f"{FIRST}) has not been heard for 10 s" in guest_log.read_text()


def test_the_next_attempt_goes_on_with_the_same_second_machine(
    wire: Wire, tmp_path: Path, model: Path, dataset: Path
) -> None:
    settings = {**TWO_NODES, "num_train_epochs": 200, "checkpoint_steps": 5, "evaluation_strategy": "disable"}
    lost = write_attempt(tmp_path / "lost", model, dataset, **settings)
    again = write_attempt(tmp_path / "again", model, dataset, [lost], **settings)
    whole = write_attempt(tmp_path / "whole", model, dataset, **settings)
    with second_node(wire, tmp_path / "guest.txt"):
        with running(lost, wire.inside(0), **SETTINGS) as process:
            wait_until(has_trained(lost, 12), START_SECONDS, "training")
            processes_of(lost)["1"].kill()
            process.wait(10)
        for folder in (again, whole):
            with running(folder, wire.inside(0), **SETTINGS) as process:
                assert process.wait(START_SECONDS) == 0, (folder / "log.txt").read_text()
    resumed = losses_of(again)
    assert 5 < min(resumed) < 800
    assert resumed == pytest.approx({n: losses_of(whole)[n] for n in resumed}, abs=1e-6)
