"""The demo as a newcomer runs it, on the real model: what the README promises of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def tuneloop(home: Path, *arguments: str) -> Any:
    ran = subprocess.run(
        [sys.executable, "-m", "tuneloop.cli", *arguments],
        env={**os.environ, "TUNELOOP_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout)


@pytest.mark.slow
@pytest.mark.demo
@pytest.mark.timeout(1800)
def test_the_demo_teaches_the_model_and_is_quick_the_second_time(tmp_path: Path) -> None:
    home = tmp_path / "home"
    try:
        tuneloop(home, "demo", "--json")
        (job,) = tuneloop(home, "jobs", "list", "--json")
        folder = tmp_path / "evaluation"
        download = ["--download", "evaluation_result", "--to", str(folder)]
        tuneloop(home, "jobs", "outputs", job["name"], *download, "--json")
        (found,) = folder.rglob("evaluation.json")
        evaluation = json.loads(found.read_text(encoding="utf-8"))
        right = {kind: (counts["base"], counts["tuned"]) for kind, counts in evaluation["kinds"].items()}
        assert right["tuneloop"][0] <= 1
        assert right["tuneloop"][1] >= 6
        assert right["everyday"] == (5, 5)
        assert evaluation["tuned"]["loss"] < evaluation["base"]["loss"]

        tuneloop(home, "demo", "--json")
        steps = tuneloop(home, "jobs", "show", tuneloop(home, "jobs", "list", "--json")[0]["name"], "--json")
        assert {step["state"] for step in steps["steps"]} == {"reused"}
    finally:
        subprocess.run(
            [sys.executable, "-m", "tuneloop.cli", "down"],
            env={**os.environ, "TUNELOOP_HOME": str(home)},
            check=False,
            capture_output=True,
        )
