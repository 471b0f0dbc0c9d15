"""One tiny model for all loop tests; a workspace with a server for each test that asks for one."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.loop.world import LoopWorld, wait_for
from tests.models import tiny_model
from tuneloop import daemon


@pytest.fixture(scope="session", autouse=True)
def collect_servers() -> Iterator[None]:
    """Servers are meant to outlive whoever started them; here the last one is waited for. And none of them
    writes to an MLflow that whoever runs the tests uses."""
    for name in [name for name in os.environ if name.startswith(("MLFLOW_TRACKING_", "TUNELOOP_MLFLOW_"))]:
        del os.environ[name]
    yield
    for child in daemon.started:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=10)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def world(tmp_path: Path, model_folder: Path) -> Iterator[LoopWorld]:
    one = LoopWorld(tmp_path / "world", model_folder)
    yield one
    one.take_down()
    # One that was started twice and came second may need a moment to see it and end.
    wait_for(lambda: one.processes() == [], "every process to be gone", seconds=10)


@pytest.fixture(scope="module")
def shared_world(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[LoopWorld]:
    """A workspace in which one job has completed; tests that share it leave it as they found it."""
    one = LoopWorld(tmp_path_factory.mktemp("shared") / "world", model_folder)
    yield one
    one.take_down()
    # One that was started twice and came second may need a moment to see it and end.
    wait_for(lambda: one.processes() == [], "every process to be gone", seconds=10)
