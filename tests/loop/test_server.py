"""The background server: one per home, found again, replaced, and clear about why it does not start."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.loop.world import LoopWorld, wait_for
from tuneloop import daemon
from tuneloop.core.errors import HomeUnusable, ServerUnreachable
from tuneloop.core.settings import Settings


def run_server(settings: Settings, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tuneloop.daemon"],
        env={**os.environ, "TUNELOOP_HOME": str(settings.home), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_second_server_of_a_home_ends_with_a_sentence(world: LoopWorld) -> None:
    ran = run_server(world.settings)
    assert ran.returncode == HomeUnusable.exit_code
    assert "is running already" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_taken_port_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("TUNELOOP_PORT", str(taken.getsockname()[1]))
        with pytest.raises(ServerUnreachable, match=f"Port {taken.getsockname()[1]} .* is taken"):
            daemon.ensure(Settings(home=tmp_path / "home"))


def test_a_home_that_is_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(HomeUnusable, match="is not a folder"):
        daemon.ensure(Settings(home=tmp_path / "file"))


def test_the_server_comes_back_on_its_port_and_with_its_token(world: LoopWorld) -> None:
    before = daemon.find(world.settings)
    world.take_down()
    assert daemon.find(world.settings) is None
    world.restart_server()
    after = daemon.find(world.settings)
    assert before is not None
    assert after is not None
    assert (after.url, after.token) == (before.url, before.token)


def test_a_server_file_of_another_home_is_not_believed(world: LoopWorld, tmp_path: Path) -> None:
    other = Settings(home=tmp_path / "other")
    daemon.prepare_home(other)
    (other.home / "server.json").write_text((world.home / "server.json").read_text())
    assert daemon.find(other) is None


def test_ending_the_server_alone_leaves_its_processes_to_the_next(world: LoopWorld) -> None:
    world.client.create_endpoint("chat")
    wait_for(lambda: world.client.endpoint("chat")["scoring_uri"], "the router")
    router = world.identity(world.service_folder("router"))
    world.client.shutdown("server")
    wait_for(lambda: not daemon.is_locked(world.home), "the server to end")
    assert any("router" in owner for owner in world.processes())
    world.restart_server()
    assert world.identity(world.service_folder("router")) == router
    wait_for(
        lambda: json.loads((world.home / "services/router/routes.json").read_text())["endpoints"], "routes"
    )
