"""A command run against the fake server, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

import tuneloop
from tests.unit.cli.fake_api import TOKEN, FakeApi, application, served
from tuneloop.cli import live, root, session
from tuneloop.client import Client
from tuneloop.core.settings import Settings


@dataclass
class Ran:
    """What a command left: exit code and both streams."""

    code: int
    out: str
    err: str


class FakeDaemon:
    """Finds and starts the fake server; counts the starts."""

    def __init__(self, url: str) -> None:
        self.server = SimpleNamespace(url=url, token=TOKEN, version=tuneloop.__version__, pid=0)
        self.is_up = True
        self.starts = 0

    def find(self, settings: object) -> SimpleNamespace | None:
        return self.server if self.is_up else None

    def prepare_home(self, settings: Settings) -> Path:
        settings.home.mkdir(parents=True, exist_ok=True)
        return settings.home

    def ensure(self, settings: object) -> SimpleNamespace:
        self.starts += 1
        self.is_up = True
        return self.server


@pytest.fixture(scope="session")
def _holder() -> Iterator[tuple[SimpleNamespace, str]]:
    """One loopback server for all tests; each test puts its own state in it."""
    holder = SimpleNamespace(api=FakeApi())

    class Delegate:
        def __getattr__(self, name: str) -> object:
            return getattr(holder.api, name)

    with served(application(Delegate())) as url:  # type: ignore[arg-type]
        yield holder, url


@pytest.fixture
def api(_holder: tuple[SimpleNamespace, str]) -> FakeApi:
    holder, url = _holder
    holder.api = FakeApi()
    holder.api.url = url
    return holder.api


@pytest.fixture
def client(api: FakeApi) -> Iterator[Client]:
    made = Client(api.url, TOKEN)
    yield made
    made.close()


@pytest.fixture
def daemon(api: FakeApi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeDaemon:
    fake = FakeDaemon(api.url)
    monkeypatch.setattr(session, "_daemon", lambda: fake)
    monkeypatch.setattr(live, "POLL_SECONDS", 0.0)
    monkeypatch.setenv("TUNELOOP_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TUNELOOP_DEBUG", raising=False)
    monkeypatch.setattr("sys.argv", ["tuneloop"])
    return fake


@pytest.fixture
def tuneloop_command(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs `tuneloop ARGUMENTS` and returns what a shell would see."""

    def run(*arguments: str) -> Ran:
        code = root.run(arguments)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run
