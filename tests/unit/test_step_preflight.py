"""The preflight of one process, against a store in memory: who does not answer is named."""

from __future__ import annotations

import json
import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")

from torch.distributed import HashStore

from tuneloop.core.errors import RankLost, Unsupported
from tuneloop.steps.launch import preflight
from tuneloop.steps.launch.preflight import Measured, Preflight
from tuneloop.steps.launch.reports import FOLDER, Node, Run

RUN = Run(
    token="t",
    nodes=(Node(0, "a"), Node(1, "b")),
    processes=1,
    machine={"device": "cpu", "gpus": 0, "has_fast_bf16": False},
    join_seconds=1.2,
)


def flight(folder: Path, run: Run = RUN, rank: int = 0) -> Preflight:
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    return Preflight(folder, run, rank, lambda error: None)


def test_a_process_that_does_not_come_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        RankLost, match=r"process 2 of 2 \(rank 1\) on node 1 \(b, 127\.0\.0\.1\) did not come"
    ) as lost:
        flight(tmp_path)._meet(HashStore())
    assert lost.value.details == {"node": 1, "rank": 1}


def test_processes_that_come_meet(tmp_path: Path) -> None:
    store = HashStore()
    store.set("here/1", "")
    flight(tmp_path)._meet(store)


def test_a_folder_that_is_another_one_elsewhere_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "FOLDER_SECONDS", 0.1)
    store = HashStore()
    flight(tmp_path / "one")._check_folder(store)
    flight(tmp_path / "one", rank=1)._check_folder(store)
    other = flight(tmp_path / "two", rank=1)
    (tmp_path / "two" / FOLDER / "shared").write_text("of an earlier run")
    with pytest.raises(Unsupported, match=r"process 2 of 2 .* does not see .*two as the first one does"):
        other._check_folder(store)


def test_a_port_that_is_closed_between_two_machines_is_told_on_both(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as tried:
        closed = tried.getsockname()[1]
    store = HashStore()
    store.set("door/1", str(closed))
    store.set("knocked/1", json.dumps([]))
    told = f"node 0 .* does not reach node 1 .* on port {closed}: .*refused"
    with pytest.raises(RankLost, match=told) as lost:
        flight(tmp_path)._check_doors(store)
    assert "Open all ports" in str(lost.value)
    assert json.loads(store.get("knocked/0"))[0].startswith("node 0 (a, 127.0.0.1) does not reach node 1")


def test_ports_that_are_open_are_passed_and_one_machine_knocks_at_none(tmp_path: Path) -> None:
    store = HashStore()
    with socket.create_server(("127.0.0.1", 0)) as door:
        store.set("door/1", str(door.getsockname()[1]))
        store.set("knocked/1", json.dumps([]))
        flight(tmp_path)._check_doors(store)
    assert store.get("knocked/0") == b"[]"
    flight(tmp_path, replace(RUN, nodes=RUN.nodes[:1]))._check_doors(HashStore())


def test_what_takes_longer_than_its_deadline_is_told_by_another_thread(tmp_path: Path) -> None:
    told: list[RankLost] = []
    is_told = threading.Event()

    def fail(error: RankLost) -> None:
        told.append(error)
        is_told.set()

    (tmp_path / FOLDER).mkdir()
    passing = Preflight(tmp_path, RUN, 0, fail)
    with passing._deadline(60, "do this"):
        pass
    with passing._deadline(0.05, "reach each other"):
        assert is_told.wait(5)
    (error,) = told
    assert error.message.startswith("The 2 processes did not reach each other within 0.05 s: node 0 (a, ")
    assert "node 1 (b, 127.0.0.1)" in error.message


def test_what_was_measured_is_told_in_megabytes_and_milliseconds() -> None:
    assert str(Measured(0.42, 9.22e8, 0.0004)) == (
        "met after 0.4 s; a sum over all takes 0.4 ms, one of 4 MB goes at 922 MB/s"
    )
