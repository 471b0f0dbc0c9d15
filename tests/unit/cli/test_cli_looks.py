"""Looks: processes that a command runs by hand, remembered by what was asked."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from tuneloop.cli import looks
from tuneloop.core.errors import DataError, NotFound, StepFailed

STEP = """
import json, os, signal, time
from pathlib import Path
from tuneloop.core.errors import DataError

def run(context):
    asked = context.parameters
    with open(asked["runs"], "a") as runs:
        runs.write("ran\\n")
    context.progress("looking", done=1, total=2, unit="rows")
    if asked.get("how") == "refuse":
        raise DataError("row 3 is bad.", next_move="Mend it.", details=[{"line": 3}])
    if asked.get("how") == "vanish":
        print("about to vanish", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if asked.get("how") == "wait":
        time.sleep(30)
    if asked.get("how") == "slowly":
        time.sleep(0.5)
    context.output("answer").write_text(json.dumps({"bytes": context.inputs["data"].stat().st_size}))
"""


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file to look at; `probe` steps run STEP."""
    place = tmp_path / "python"
    place.mkdir()
    (place / "sitecustomize.py").write_text(
        "import sys, types\nmodule = types.ModuleType('tuneloop.steps.probe')\n"
        f"exec({STEP!r}, module.__dict__)\nsys.modules[module.__name__] = module\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(place))
    monkeypatch.setenv("TUNELOOP_HOME", str(tmp_path / "home"))
    file = tmp_path / "data.jsonl"
    file.write_text("12345")
    return file


def look(data: Path, **asked: str) -> Path:
    parameters = {"runs": str(data.with_name("runs")), **asked}
    return looks.run("probe", parameters, {"data": data}, {"answer": "file"}, label="Looking")


def runs(data: Path) -> int:
    return len((data.with_name("runs")).read_text().splitlines())


def test_an_answer_is_remembered_until_the_file_changes(data: Path) -> None:
    first = look(data)
    assert looks.output_json(first, "answer") == {"bytes": 5}
    assert look(data) == first
    assert runs(data) == 1
    data.write_text("123456789")
    assert looks.output_json(look(data), "answer") == {"bytes": 9}
    assert runs(data) == 2


def test_without_the_cache_it_runs_again(data: Path) -> None:
    look(data)
    parameters = {"runs": str(data.with_name("runs"))}
    looks.run("probe", parameters, {"data": data}, {"answer": "file"}, label="Looking", cached=False)
    assert runs(data) == 2


def test_what_the_step_refuses_is_raised_as_it_was(data: Path) -> None:
    with pytest.raises(DataError, match="row 3 is bad") as caught:
        look(data, how="refuse")
    assert (caught.value.next_move, caught.value.details) == ("Mend it.", [{"line": 3}])
    with pytest.raises(DataError):
        look(data, how="refuse")
    assert runs(data) == 2, "a failure was remembered"


def test_a_process_that_vanishes_is_told_with_its_last_words(data: Path) -> None:
    with pytest.raises(StepFailed, match="about to vanish"):
        look(data, how="vanish")


def test_a_file_that_is_not_there_is_told(data: Path) -> None:
    with pytest.raises(NotFound, match=r"gone\.jsonl"):
        look(data.with_name("gone.jsonl"))


def test_two_that_ask_the_same_at_once_get_one_answer(data: Path) -> None:
    answers: list[Path] = []
    threads = [threading.Thread(target=lambda: answers.append(look(data, how="slowly"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == 3
    assert len(set(answers)) == runs(data) == 1


def test_ctrl_c_ends_the_process_and_leaves_nothing_remembered(data: Path) -> None:
    def interrupt() -> None:
        while not data.with_name("runs").exists():
            pass
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        look(data, how="wait")
    look(data)
    assert runs(data) == 2


def test_progress_is_told_line_by_line_where_nothing_can_be_drawn(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(looks, "LINE_SECONDS", 0.0)
    look(data, how="slowly")
    assert "Looking: looking  1/2 rows   50 %" in capsys.readouterr().err


def test_the_looks_that_nobody_asked_for_are_forgotten_first(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looks, "KEPT", 2)
    first, second = look(data, n="1"), look(data, n="2")
    os.utime(first, (1, 1))
    look(data, n="1")
    third = look(data, n="3")
    assert (first.exists(), second.exists(), third.exists()) == (True, False, True)
