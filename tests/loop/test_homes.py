"""Homes that are newer, older, moved, copied, read-only, oddly named, or two at once; and their token."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.disks import small_disk
from tests.homes import contents, old_home
from tests.loop.world import LoopWorld, wait_for
from tuneloop import daemon
from tuneloop.adapters.mlflow import open_server
from tuneloop.adapters.sql import SqlStore, schema_of
from tuneloop.client import Client
from tuneloop.core.errors import HomeUnusable, NotAllowed, ServerUnreachable
from tuneloop.core.home import SCHEMA_VERSION, read_mark
from tuneloop.core.settings import Settings


def client_of(home: Path) -> Client:
    server = daemon.ensure(Settings(home=home))
    return Client(server.url, server.token)


def take_down(home: Path) -> None:
    found = daemon.find(Settings(home=home))
    if found is not None:
        client = Client(found.url, found.token)
        client.shutdown("all")
        client.close()
    wait_for(lambda: not daemon.is_locked(home), "the server to end", 60)


def move(world: LoopWorld, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(world.home, target)
    world.settings = Settings(home=target)
    world.home = target


# ---------------------------------------------------------------- versions


def test_a_newer_home_is_refused_and_no_byte_of_it_changes(tmp_path: Path) -> None:
    home = tmp_path / "home"
    daemon.prepare_home(Settings(home=home))
    SqlStore.open(home / "tuneloop.db").close()
    mark = json.loads((home / "home.json").read_text())
    (home / "home.json").write_text(json.dumps({**mark, "format": SCHEMA_VERSION + 1}))
    home.chmod(0o755)  # even what would be mended in a home of ours
    before = contents(home)
    with pytest.raises(HomeUnusable, match=rf"newer Tuneloop .schema {SCHEMA_VERSION + 1}; this one knows"):
        daemon.ensure(Settings(home=home))
    assert contents(home) == before
    assert home.stat().st_mode & 0o777 == 0o755


def test_a_newer_store_is_refused_even_where_the_home_does_not_say_so(tmp_path: Path) -> None:
    home = tmp_path / "home"
    daemon.prepare_home(Settings(home=home))
    SqlStore.open(home / "tuneloop.db").close()
    with closing(sqlite3.connect(home / "tuneloop.db")) as connection, connection:
        connection.execute("UPDATE meta SET value = '99'")
    before = (home / "tuneloop.db").read_bytes()
    with pytest.raises(ServerUnreachable, match=r"newer Tuneloop .schema 99"):
        daemon.ensure(Settings(home=home))
    assert (home / "tuneloop.db").read_bytes() == before


def test_an_older_home_is_migrated_by_its_server(tmp_path: Path) -> None:
    home = tmp_path / "home"
    old_home(home)
    client = client_of(home)
    try:
        assert client.endpoint("chat")["description"] == "from before"
        assert schema_of(home / "tuneloop.db") == SCHEMA_VERSION
        mark = read_mark(home)
        assert mark is not None
        assert (mark.id, mark.schema, mark.place) == ("0123456789abcdef", SCHEMA_VERSION, str(home))
        assert [schema_of(backup) for backup in (home / "backups").iterdir()] == [1]
    finally:
        client.close()
        take_down(home)


# ---------------------------------------------------------------- places


def test_a_read_only_home_is_refused_and_no_byte_of_it_changes(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 16) as disk:
        home = disk.path / "home"
        daemon.prepare_home(Settings(home=home))
        before = contents(home)
        disk.remount("ro")
        with pytest.raises(HomeUnusable, match="can only be read"):
            daemon.ensure(Settings(home=home))
        with pytest.raises(HomeUnusable, match="can only be read"):
            daemon.ensure(Settings(home=disk.path / "not-there-yet"))
        assert daemon.find(Settings(home=home)) is None
        assert contents(home) == before


def test_a_home_on_a_full_disk_is_told_and_works_with_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 16) as disk:
        home = disk.path / "home"
        disk.fill()
        with pytest.raises(Exception, match="Disk full"):
            daemon.ensure(Settings(home=home))
        disk.make_room()
        client = client_of(home)
        assert client.health()
        client.close()
        take_down(home)


def test_a_server_ends_with_its_disk_and_starts_again_where_it_is_found(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 32) as disk:
        home = disk.path / "home"
        client = client_of(home)
        pid = client.health()["pid"]
        client.close()
        disk.take_away()
        wait_for(lambda: not Path(f"/proc/{pid}").exists() or _is_zombie(pid), "the server to end", 30)
        assert daemon.find(Settings(home=home)) is None
        assert not home.exists(), "it began to grow again"


def _is_zombie(pid: int) -> bool:
    for child in daemon.started:
        child.poll()
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_home_that_is_moved_under_its_server_ends_it_and_works_where_it_is_now(
    world: LoopWorld, tmp_path: Path
) -> None:
    world.client.create_endpoint("chat")
    wait_for(lambda: world.client.endpoint("chat")["openai_base_url"], "the router")
    pid, before = world.server_pid(), world.home
    move(world, tmp_path / "elsewhere" / "home")
    assert daemon.find(world.settings) is None, "a server that means another place was believed"
    world.restart_server()
    assert world.server_pid() != pid
    assert not before.exists(), "it began to grow again"
    assert world.client.status()["home"] == str(world.home)
    wait_for(lambda: world.client.endpoint("chat")["openai_base_url"], "the router")
    wait_for(lambda: len(world.processes()) == 2, "one tracker and one router")


def test_a_server_that_holds_a_home_and_does_not_answer_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    daemon.prepare_home(Settings(home=home))
    monkeypatch.setattr(daemon.finding, "HELD_SECONDS", 0.2)
    (home / "server.json").write_text(json.dumps({"pid": 4242, "port": 1, "home": "/old/place"}))
    with (
        daemon.only_server(home),
        pytest.raises(HomeUnusable, match=r"pid 4242.*lay at /old/place.*kill 4242"),
    ):
        daemon.ensure(Settings(home=home))


def test_a_copy_of_a_home_is_a_workspace_of_its_own(world: LoopWorld, tmp_path: Path) -> None:
    world.client.create_endpoint("chat")
    wait_for(lambda: world.client.endpoint("chat")["openai_base_url"], "the router")
    url = str(world.client.endpoint("chat")["openai_base_url"])
    copy = tmp_path / "copy"
    # While everything runs: the worst moment, and what people do.
    shutil.copytree(world.home, copy, symlinks=True)
    client = client_of(copy)
    try:
        assert client.health()["home_id"] != world.client.health()["home_id"]
        assert client.status()["home"] == str(copy)
        wait_for(lambda: client.endpoint("chat")["openai_base_url"], "a router of its own")
        assert str(client.endpoint("chat")["openai_base_url"]) != url
    finally:
        client.close()
        take_down(copy)
    assert len(world.processes()) == 2, "the original's processes went with the copy's"
    assert str(world.client.endpoint("chat")["openai_base_url"]) == url


ODD = "100% ümlaut #1 & 'so' [x]"


def test_a_home_may_have_almost_any_name(tmp_path: Path) -> None:
    home = tmp_path / ODD
    client = client_of(home)
    try:
        client.create_endpoint("chat")
        wait_for(lambda: client.endpoint("chat")["openai_base_url"], "the router")
        assert (home / "tuneloop.db").exists()
    finally:
        client.close()
        take_down(home)
    tags = {"tuneloop.job": "job"}
    settings = Settings(home=home)
    mlflow = open_server(settings.tracking_uri, home / "mlflow" / "artifacts")
    assert mlflow.ensure_run("tests", "tuneloop.job", "a run", tags, datetime.now(UTC))
    assert (home / "mlflow" / "mlflow.db").exists()
    assert [one.name for one in tmp_path.iterdir()] == [ODD]


def test_a_name_that_mlflow_could_not_say_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HomeUnusable, match=r"has a '\?' in its path"):
        daemon.ensure(Settings(home=tmp_path / "what? now"))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the token


def test_a_token_that_is_replaced_under_a_running_server_counts_at_once(world: LoopWorld) -> None:
    pid, old = world.server_pid(), (world.home / "token").read_text()
    fresh = world.home / "token.new"
    fresh.write_text(secrets.token_urlsafe(32))
    os.replace(fresh, world.home / "token")
    outsider = Client(world.client.url, old)
    with pytest.raises(NotAllowed):
        outsider.status()
    outsider.close()
    world.restart_server()
    assert world.client.status()["pid"] == pid


def test_a_token_that_was_removed_is_made_anew_for_the_running_server(world: LoopWorld) -> None:
    pid = world.server_pid()
    (world.home / "token").unlink()
    with pytest.raises(NotAllowed):
        world.client.status()
    world.restart_server()
    assert world.client.status()["pid"] == pid
