"""The executor's contract on real processes: once, known, stoppable with children, outliving the starter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tuneloop.adapters import local
from tuneloop.adapters.local import LocalExecutor
from tuneloop.core.process import claim, is_alive

PROGRAM = """
import json, os, pathlib, signal, subprocess, sys, time
from tuneloop.core.process import claim
folder = pathlib.Path(sys.argv[1])
if not claim(folder, os.environ["TUNELOOP_OWNER"]):
    sys.exit(3)
if os.environ.get("STUBBORN"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.environ.get("CHILD"):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (folder / "child").write_text(str(child.pid))
with open(folder / "starts", "a") as starts:
    starts.write("x")
print("here I am", flush=True)
time.sleep(float(os.environ.get("LIVES", "60")))
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "program_under_test.py").write_text(PROGRAM)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path / "modules"), os.environ.get("PYTHONPATH", "")])
    )
    return "program_under_test"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "attempt with a space"
    path.mkdir()
    return path


@pytest.fixture
def executor(folder: Path) -> Iterator[LocalExecutor]:
    one = LocalExecutor()
    yield one
    one.stop("owner", folder, kill=True)
    wait_for(lambda: one.status("owner", folder) != "running")


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def test_a_folder_that_nothing_was_started_in_is_absent(executor: LocalExecutor, folder: Path) -> None:
    assert executor.status("owner", folder) == "absent"
    assert executor.identity(folder) is None


def test_a_process_is_known_by_pid_start_time_and_owner(
    executor: LocalExecutor, folder: Path, module: str
) -> None:
    executor.ensure("owner", folder, module, {})
    wait_for(lambda: executor.status("owner", folder) == "running")
    identity = executor.identity(folder)
    assert identity is not None
    assert identity.owner == "owner"
    assert is_alive(identity)
    assert not is_alive(identity.model_copy(update={"started_at": identity.started_at - 5}))


def test_ensure_twice_is_one_process_even_from_two_executors(
    executor: LocalExecutor, folder: Path, module: str
) -> None:
    other = LocalExecutor()
    for _ in range(3):
        executor.ensure("owner", folder, module, {})
        other.ensure("owner", folder, module, {})
    wait_for(lambda: (folder / "starts").exists())
    children = [*executor._children.values(), *other._children.values()]
    owner = executor.identity(folder)
    assert owner is not None
    wait_for(lambda: all(child.poll() is not None or child.pid == owner.pid for child in children))
    assert (folder / "starts").read_text() == "x"
    executor.stop("owner", folder, kill=True)
    wait_for(lambda: all(child.poll() is not None for child in children))


def test_what_has_ended_is_not_started_again_in_its_folder(
    executor: LocalExecutor, folder: Path, module: str
) -> None:
    executor.ensure("owner", folder, module, {"LIVES": "0"})
    wait_for(lambda: executor.status("owner", folder) == "ended")
    executor.ensure("owner", folder, module, {"LIVES": "0"})
    time.sleep(0.3)
    assert (folder / "starts").read_text() == "x"
    assert executor.last_lines(folder) == ["here I am"]


def test_a_process_that_dies_before_it_takes_its_folder_has_ended_and_is_not_started_again(
    executor: LocalExecutor, folder: Path
) -> None:
    executor.ensure("owner", folder, "there_is_no_such_module", {})
    wait_for(lambda: executor.status("owner", folder) == "ended")
    executor.ensure("owner", folder, "there_is_no_such_module", {})
    assert executor.status("owner", folder) == "ended"
    assert "No module named there_is_no_such_module" in executor.last_lines(folder)[-1]


def test_ended_children_are_collected_whichever_folder_is_asked_for(
    executor: LocalExecutor, folder: Path, tmp_path: Path, module: str
) -> None:
    executor.ensure("owner", folder, module, {"LIVES": "0"})
    child = executor._children[folder].pid
    wait_for(lambda: executor.status("owner", tmp_path) == "absent" and not psutil.pid_exists(child))
    assert executor.status("owner", folder) == "ended"


def test_stopping_ends_the_process(executor: LocalExecutor, folder: Path, module: str) -> None:
    executor.ensure("owner", folder, module, {})
    wait_for(lambda: (folder / "starts").exists())
    executor.stop("owner", folder)
    wait_for(lambda: executor.status("owner", folder) == "ended")


def test_killing_ends_a_stubborn_process_and_its_children(
    executor: LocalExecutor, folder: Path, module: str
) -> None:
    executor.ensure("owner", folder, module, {"STUBBORN": "1", "CHILD": "1"})
    wait_for(lambda: (folder / "starts").exists())
    child = int((folder / "child").read_text())
    executor.stop("owner", folder)
    time.sleep(0.3)
    assert executor.status("owner", folder) == "running"
    executor.stop("owner", folder, kill=True)
    wait_for(lambda: executor.status("owner", folder) == "ended")
    wait_for(lambda: _is_gone(child))


def test_children_left_by_a_killed_process_are_found_by_their_owner(
    executor: LocalExecutor, folder: Path, module: str
) -> None:
    executor.ensure("owner", folder, module, {"CHILD": "1"})
    wait_for(lambda: (folder / "starts").exists())
    child = int((folder / "child").read_text())
    os.kill(executor.identity(folder).pid, signal.SIGKILL)  # type: ignore[union-attr]
    wait_for(lambda: executor.status("owner", folder) == "ended")
    executor.stop("somebody else", folder, kill=True)
    assert not _is_gone(child)
    executor.stop("owner", folder, kill=True)
    wait_for(lambda: _is_gone(child))


def test_after_a_stop_a_process_on_its_way_finds_the_folder_taken(
    executor: LocalExecutor, folder: Path, module: str
) -> None:
    executor.stop("owner", folder)
    assert executor.status("owner", folder) == "ended"
    assert claim(folder, "owner") is False
    executor.ensure("owner", folder, module, {})
    time.sleep(0.3)
    assert not (folder / "starts").exists()


def test_a_process_outlives_whoever_started_it(folder: Path, module: str, executor: LocalExecutor) -> None:
    starter = (
        "import sys, pathlib; from tuneloop.adapters.local import LocalExecutor;"
        f"LocalExecutor().ensure('owner', pathlib.Path({str(folder)!r}), {module!r}, {{}})"
    )
    subprocess.run([sys.executable, "-c", starter], check=True)
    wait_for(lambda: executor.status("owner", folder) == "running")
    assert json.loads((folder / "process.json").read_text())["owner"] == "owner"


def test_the_environment_of_the_submission_reaches_the_process_and_hub_settings_of_the_server_do_not(
    executor: LocalExecutor, folder: Path, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "of the server")
    executor.ensure("owner", folder, module, {"HF_ENDPOINT": "http://127.0.0.1:1"})
    wait_for(lambda: executor.status("owner", folder) == "running")
    environment = psutil.Process(executor.identity(folder).pid).environ()  # type: ignore[union-attr]
    assert environment["HF_ENDPOINT"] == "http://127.0.0.1:1"
    assert "HF_TOKEN" not in environment


def _is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize(("chosen", "expected"), [(None, "1"), ("3", "3")])
def test_in_a_container_with_fewer_cores_a_process_is_told_how_many_unless_somebody_chose(
    folder: Path, module: str, monkeypatch: pytest.MonkeyPatch, chosen: str | None, expected: str
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    executor = LocalExecutor(threads=1)
    executor.ensure("owner", folder, module, {})
    wait_for(lambda: executor.status("owner", folder) == "running")
    identity = executor.identity(folder)
    assert identity is not None
    assert psutil.Process(identity.pid).environ()["OMP_NUM_THREADS"] == expected
    executor.stop("owner", folder, kill=True)
    wait_for(lambda: executor.status("owner", folder) == "ended")


@pytest.mark.parametrize("chosen", [None, "glibc.malloc.arena_max=2"])
def test_freed_memory_is_joined_in_the_processes_unless_somebody_chose(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    """The environment that they get: what the kernel shows of it glibc has cut at the colons."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if chosen is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", chosen)
    given = local._environment("owner", "tuneloop.steps", {})
    assert given["GLIBC_TUNABLES"] == (chosen or "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0")
    submitted = local._environment("owner", "tuneloop.steps", {"GLIBC_TUNABLES": ""})
    assert submitted["GLIBC_TUNABLES"] == ""
