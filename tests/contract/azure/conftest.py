"""One workspace with an open listener for all tests of the dialect, and the SDK's processes against it."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator

import pytest

from tests.contract.azure.pipelines import Streamed, submit
from tests.contract.azure.sdk import ENVIRONMENTS, AzureWorld, Sdk, python_of
from tests.loop.world import wait_for
from tuneloop import daemon


@pytest.fixture(scope="session")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AzureWorld]:
    """Shared by all tests: each names what it makes after itself and looks only at that."""
    for which in ENVIRONMENTS:
        if not python_of(which).is_file():
            pytest.skip(f"the SDK's environment .azure/{which} is not there: make .azure/.installed")
    world = AzureWorld(tmp_path_factory.mktemp("azure") / "world")
    yield world
    world.take_down()
    wait_for(lambda: world.processes() == [], "every process to be gone", seconds=10)
    for child in daemon.started:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=10)


@pytest.fixture(params=["new", "older"])
def sdk(azure: AzureWorld, request: pytest.FixtureRequest) -> Sdk:
    """The newest SDK and one that is a year old: `sdk.run(code)` with `ml` and `registry`."""
    return azure.sdk(request.param)


@pytest.fixture(scope="session")
def streamed(azure: AzureWorld) -> Streamed:
    """A job that was submitted and followed to its end through the SDK, and what was printed meanwhile."""
    name = submit(azure.sdk("new"), "completed", tags={"team": "blue"}, logging_steps=1)
    followed = azure.sdk("new").run(f"ml.jobs.stream({name!r})")
    followed.ok()
    return Streamed(name, followed.printed)


@pytest.fixture(scope="session")
def completed(streamed: Streamed) -> str:
    """The name of a job that has completed, with the output `trained_model`."""
    return streamed.name


@pytest.fixture(scope="session")
def train(azure: AzureWorld) -> str:
    """The address of uploaded rows."""
    found = azure.sdk("new").run(
        """
        data = Data(name="uploaded_train", version="1", type="uri_file", path="./train.jsonl")
        result = ml.data.create_or_update(data).path
        """
    )
    return str(found.ok())
