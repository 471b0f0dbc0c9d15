"""Models off the hub, against one on loopback: what is fetched, what is checked, what a bad day says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from tests.hub import Hub, etag_of
from tests.models import tiny_model
from tests.steps import step_context
from tuneloop.core.errors import ModelUnavailable, Unsupported
from tuneloop.core.types import HubSource, ProgressLine, ResultFile, StepFile
from tuneloop.steps import hub as ours
from tuneloop.steps.context import StepContext
from tuneloop.steps.hub import fetch, listing
from tuneloop.steps.hub.cache import Repository, digest_of
from tuneloop.steps.model_files import COPIED

NAME = "maker/tiny"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("hub") / "model", "qwen2")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that HF_ENDPOINT names, for an account without a token, and without patience."""
    import huggingface_hub.constants

    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(fetch, "RETRY_SECONDS", (0.0, 0.0))
    with Hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


@pytest.fixture
def context(tmp_path: Path) -> Iterator[StepContext]:
    made = step_context(tmp_path / "step", "model_import", cache_folder=tmp_path / "cache")
    yield made
    made.close()


def snapshot(context: StepContext, revision: str, name: str = NAME, **options: Any) -> ours.Snapshot:
    return ours.snapshot(context, HubSource(repository=name, revision=revision), COPIED, **options)


def refused(context: StepContext, revision: str, name: str = NAME) -> ModelUnavailable:
    with pytest.raises(ModelUnavailable) as caught:
        snapshot(context, revision, name)
    return caught.value


def blob(context: StepContext, model: Path, name: str = WEIGHTS) -> Path:
    assert context.cache_folder is not None
    blobs = context.cache_folder / "hub" / "models--maker--tiny" / "blobs"
    return blobs / etag_of(name, (model / name).read_bytes())


def copy_of(model: Path, target: Path) -> Path:
    target.mkdir()
    for file in model.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


# ---------------------------------------------------------------- what is fetched


def test_what_a_model_needs_is_fetched_and_nothing_else(
    hub: Hub, context: StepContext, model: Path, tmp_path: Path
) -> None:
    folder = copy_of(model, tmp_path / "repository")
    (folder / "LICENSE").write_text("MIT")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    for name in (
        "pytorch_model.bin",
        "model.gguf",
        "consolidated.safetensors",
        "modeling_own.py",
        "model.onnx",
    ):
        (folder / name).write_bytes(b"x")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    found = snapshot(context, hub.publish(NAME, folder))
    expected = {file.name for file in model.iterdir()} | {"LICENSE", "README.md"}
    assert {file.name for file in found.folder.iterdir()} == expected
    assert sorted(hub.fetched()) == sorted(expected)
    assert (found.folder / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()


def test_the_weights_come_after_the_rest_was_looked_at(hub: Hub, context: StepContext, model: Path) -> None:
    seen: list[str] = []

    def look(folder: Path) -> None:
        seen.extend(file.name for file in folder.iterdir())
        raise Unsupported("not this one")

    with pytest.raises(Unsupported, match="not this one"):
        snapshot(context, hub.publish(NAME, model), look=look)
    assert "config.json" in seen
    assert WEIGHTS not in [*seen, *hub.fetched()]


def test_the_shards_that_the_index_names_are_fetched(
    hub: Hub, context: StepContext, model: Path, tmp_path: Path
) -> None:
    folder = copy_of(model, tmp_path / "repository")
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (folder / shards[0]).write_bytes((folder / WEIGHTS).read_bytes())
    (folder / shards[1]).write_bytes(b"two")
    (folder / WEIGHTS).rename(folder / "consolidated.safetensors")
    index = {"weight_map": {"a": shards[0], "b": shards[1], "c": shards[0]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    snapshot(context, hub.publish(NAME, folder))
    assert sorted(hub.fetched(".safetensors")) == shards


@pytest.mark.parametrize("name", ["../../elsewhere.safetensors", "/etc/x.safetensors", "weights.bin"])
def test_an_index_that_reaches_out_of_its_folder_is_refused(
    hub: Hub, context: StepContext, model: Path, tmp_path: Path, name: str
) -> None:
    folder = copy_of(model, tmp_path / "repository")
    (folder / WEIGHTS).rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(Unsupported, match="only safetensors files beside it are read"):
        snapshot(context, hub.publish(NAME, folder))


def test_a_listing_of_several_pages_is_read_to_its_end(hub: Hub, context: StepContext, model: Path) -> None:
    hub.page_size = 2
    found = snapshot(context, hub.publish(NAME, model))
    assert {file.name for file in found.folder.iterdir()} == {file.name for file in model.iterdir()}


def test_a_file_whose_name_leaves_the_folder_is_not_listed(
    hub: Hub, context: StepContext, model: Path
) -> None:
    commit = hub.publish(NAME, model)
    hub.repositories[NAME].files["..\\evil.json"] = b"{}"
    snapshot(context, commit)
    assert not [name for name in hub.fetched() if "evil" in name]


def test_pickled_weights_are_refused_by_name_before_anything_is_fetched(
    hub: Hub, context: StepContext, model: Path, tmp_path: Path
) -> None:
    folder = copy_of(model, tmp_path / "repository")
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(Unsupported, match=r"pytorch_model\.bin.*runs whatever code is in them"):
        snapshot(context, hub.publish(NAME, folder))
    assert hub.fetched() == []


def test_what_is_in_the_cache_is_not_fetched_again(hub: Hub, context: StepContext, model: Path) -> None:
    commit = hub.publish(NAME, model)
    snapshot(context, commit)
    hub.requests.clear()
    assert snapshot(context, commit).commit == commit
    assert hub.fetched() == []


def test_two_that_want_the_same_fetch_it_once(
    hub: Hub, context: StepContext, model: Path, tmp_path: Path
) -> None:
    commit = hub.publish(NAME, model)
    hub.rate = 2_000_000
    other = step_context(tmp_path / "other", "model_import", cache_folder=context.cache_folder)
    thread = threading.Thread(target=snapshot, args=(other, commit))
    thread.start()
    snapshot(context, commit)
    thread.join()
    other.close()
    assert hub.fetched(WEIGHTS) == [WEIGHTS]


def test_the_cache_is_the_one_of_huggingface_hub(
    hub: Hub, context: StepContext, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import snapshot_download

    monkeypatch.setenv("HF_HOME", str(tmp_path / "theirs"))
    commit = hub.publish(NAME, model)
    cache = tmp_path / "theirs" / "hub"
    theirs = snapshot_download(NAME, revision=commit, cache_dir=cache, endpoint=hub.url, etag_timeout=5)
    hub.requests.clear()
    assert snapshot(context, commit).folder == Path(theirs)
    assert hub.fetched() == []
    ours_only = tmp_path / "ours"
    monkeypatch.setenv("HF_HUB_CACHE", str(ours_only))
    found = snapshot(context, commit)
    assert snapshot_download(NAME, revision=commit, cache_dir=ours_only, local_files_only=True) == str(
        found.folder
    )


# ---------------------------------------------------------------- broken off


def test_a_cut_connection_goes_on_where_it_broke(hub: Hub, context: StepContext, model: Path) -> None:
    hub.cut = {WEIGHTS: [200_000]}
    found = snapshot(context, hub.publish(NAME, model))
    assert (found.folder / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()
    ranges = [request.range for request in hub.requests if request.is_store]
    assert ranges[0] is None
    assert ranges[1] is not None
    assert 0 < int(ranges[1].removeprefix("bytes=").removesuffix("-")) <= 200_000


def test_a_server_that_ignores_ranges_sends_all_of_it_again(
    hub: Hub, context: StepContext, model: Path
) -> None:
    hub.cut, hub.ignores_ranges = {WEIGHTS: [200_000]}, True
    found = snapshot(context, hub.publish(NAME, model))
    assert (found.folder / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()
    lines = _progress(context, "downloading maker/tiny")
    assert lines[-1].done == lines[-1].total


@pytest.mark.parametrize("length", [1, 300_000, "all", "more"])
def test_what_an_earlier_process_left_is_used_as_far_as_it_goes(
    hub: Hub, context: StepContext, model: Path, length: int | str
) -> None:
    commit = hub.publish(NAME, model)
    content = (model / WEIGHTS).read_bytes()
    left = {"all": content, "more": content + b"?"}[length] if isinstance(length, str) else content[:length]
    whole = blob(context, model)
    whole.parent.mkdir(parents=True)
    partial = whole.with_name(f"{whole.name}.partial")
    partial.write_bytes(left)
    found = snapshot(context, commit)
    assert (found.folder / WEIGHTS).read_bytes() == content
    assert not partial.exists()
    asked = [request.range for request in hub.requests if request.is_store]
    assert asked == {"all": [], "more": [None]}.get(str(length), [f"bytes={length}-"])


def test_a_partial_file_of_other_content_is_found_by_its_digest(
    hub: Hub, context: StepContext, model: Path
) -> None:
    commit = hub.publish(NAME, model)
    whole = blob(context, model)
    whole.parent.mkdir(parents=True)
    whole.with_name(f"{whole.name}.partial").write_bytes(b"?" * 1000)
    found = snapshot(context, commit)
    assert (found.folder / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()
    assert any("model.safetensors has the sha256 digest" in warning for warning in context.warnings)


def test_a_step_that_is_killed_in_the_middle_is_taken_up_by_the_next(
    hub: Hub, model: Path, tmp_path: Path
) -> None:
    commit = hub.publish(NAME, model)
    hub.rate = 150_000
    first = _start_step(tmp_path / "first", commit, tmp_path / "cache", hub)
    partial = (
        tmp_path
        / "cache/hub/models--maker--tiny/blobs"
        / f"{etag_of(WEIGHTS, (model / WEIGHTS).read_bytes())}.partial"
    )
    _wait_for(lambda: partial.exists() and partial.stat().st_size >= 100_000, first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = partial.stat().st_size
    assert 100_000 <= kept < (model / WEIGHTS).stat().st_size
    assert not (tmp_path / "first" / "result.json").exists()
    hub.requests.clear()
    hub.rate = None
    second = _start_step(tmp_path / "second", commit, tmp_path / "cache", hub)
    assert second.wait(60) == 0
    assert [request.range for request in hub.requests if request.is_store] == [f"bytes={kept}-"]
    result = ResultFile.model_validate_json((tmp_path / "second" / "result.json").read_text())
    assert result.is_repeatable
    weights = tmp_path / "second" / "outputs" / "model" / WEIGHTS
    assert weights.read_bytes() == (model / WEIGHTS).read_bytes()


def _start_step(folder: Path, commit: str, cache: Path, hub: Hub) -> subprocess.Popen[bytes]:
    folder.mkdir()
    source = {"type": "hub", "repository": NAME, "revision": commit}
    step = StepFile(
        attempt="job/model_import/1",
        attempt_id="attempt",
        kind="model_import",
        parameters={"card": {"name": "Tiny", "version": "1", "source": source}},
        outputs={"model": "model_folder"},
        cache_folder=str(cache),
    )
    (folder / "step.json").write_text(step.model_dump_json())
    with open(folder / "log.txt", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tuneloop.steps", str(folder)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_ENDPOINT": hub.url},
        )


def _wait_for(is_so: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert process.poll() is None, "the step ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---------------------------------------------------------------- what is checked


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_changed_body_is_deleted_and_fetched_again(
    hub: Hub, context: StepContext, model: Path, name: str
) -> None:
    hub.changed = {name: 1}
    found = snapshot(context, hub.publish(NAME, model))
    assert (found.folder / name).read_bytes() == (model / name).read_bytes()
    assert any(f"{name} has the" in warning and "fetched again" in warning for warning in context.warnings)


def test_a_body_that_is_changed_every_time_is_refused_by_name_and_deleted(
    hub: Hub, context: StepContext, model: Path
) -> None:
    hub.changed = {WEIGHTS: 9}
    error = refused(context, hub.publish(NAME, model))
    assert "model.safetensors has the sha256 digest" in error.message
    assert "nothing of it is used" in error.message
    assert not blob(context, model).exists()
    assert len(hub.fetched(WEIGHTS)) == 2


def test_a_file_of_the_cache_that_was_damaged_is_found_and_fetched_again(
    hub: Hub, context: StepContext, model: Path
) -> None:
    commit = hub.publish(NAME, model)
    snapshot(context, commit)
    content = blob(context, model).read_bytes()
    blob(context, model).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found = snapshot(context, commit)
    assert (found.folder / WEIGHTS).read_bytes() == content
    assert any("fetched again" in warning for warning in context.warnings)


def test_a_file_of_another_size_than_listed_is_refused(
    hub: Hub, context: StepContext, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.publish(NAME, model)
    files = hub.repositories[NAME].files
    listed = listing.files_of(HubSource(repository=NAME, revision=commit), commit)
    monkeypatch.setattr(listing, "files_of", lambda *_: listed)
    files["config.json"] = files["config.json"] + b" "
    error = refused(context, commit)
    assert "onsistency check failed" in error.message
    left = blob(context, model, "config.json")
    assert not left.exists()
    assert not left.with_name(f"{left.name}.partial").exists()


def test_a_hub_that_answers_with_another_commit_is_not_believed(
    hub: Hub, context: StepContext, model: Path
) -> None:
    hub.publish(NAME, model)
    hub.repositories[NAME].branches = ("main", "a" * 40)
    assert "answers with commit" in refused(context, "a" * 40).message


def test_digests_are_those_of_git_and_of_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"hello\n")
    # `git hash-object` and `sha256sum` of the same bytes.
    assert digest_of(tmp_path / "file", "git-sha1") == "ce013625030ba8dba906f756967f9e9ca394464a"
    expected = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
    assert digest_of(tmp_path / "file", "sha256") == expected


# ---------------------------------------------------------------- tokens


def test_a_token_goes_to_the_hub_and_never_to_its_store(
    hub: Hub, context: StepContext, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "reader")
    snapshot(context, hub.publish(NAME, model))
    assert {request.token for request in hub.requests if not request.is_store} == {"reader"}
    assert [request.token for request in hub.requests if request.is_store] == [None]


def test_without_a_token_none_is_sent(hub: Hub, context: StepContext, model: Path) -> None:
    snapshot(context, hub.publish(NAME, model))
    assert {request.token for request in hub.requests} == {None}


def test_nothing_is_told_but_what_is_wanted(hub: Hub, context: StepContext, model: Path) -> None:
    snapshot(context, hub.publish(NAME, model))
    assert all(
        request.path.startswith(("/api/models/", f"/{NAME}/")) or request.is_store for request in hub.requests
    )
    assert {agent.split(";")[0].split("/")[0] for agent in _agents(hub)} == {"tuneloop"}
    assert not [agent for agent in _agents(hub) if "torch" in agent or "agent/" in agent]


def _agents(hub: Hub) -> set[str]:
    return {request.user_agent for request in hub.requests}


def test_a_gated_model_without_a_token_names_the_page_and_the_variable(
    hub: Hub, context: StepContext, model: Path
) -> None:
    error = refused(context, hub.publish(NAME, model, is_gated=True, readers={"reader"}))
    assert "maker/tiny is gated" in error.message
    assert "there is no HF_TOKEN" in error.message
    assert f"{hub.url}/maker/tiny" in str(error.next_move)
    assert "export HF_TOKEN" in str(error.next_move)


def test_a_gated_model_with_a_token_that_may_not_says_so(
    hub: Hub, context: StepContext, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "stranger")
    error = refused(context, hub.publish(NAME, model, is_gated=True, readers={"reader"}))
    assert "the account of HF_TOKEN has not" in error.message


@pytest.mark.parametrize("about", [{"is_gated": True}, {"is_private": True}])
def test_a_gated_or_private_model_is_fetched_with_a_token_that_may(
    hub: Hub, context: StepContext, model: Path, monkeypatch: pytest.MonkeyPatch, about: dict[str, Any]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "reader")
    found = snapshot(context, hub.publish(NAME, model, readers={"reader"}, **about))
    assert (found.folder / WEIGHTS).is_file()


@pytest.mark.parametrize("token", [None, "stranger"])
@pytest.mark.parametrize("is_private", [True, False])
def test_a_private_or_missing_repository_is_said_to_be_one_of_the_two(
    hub: Hub,
    context: StepContext,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    token: str | None,
    is_private: bool,
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    commit = hub.publish(NAME, model, is_private=True) if is_private else "a" * 40
    error = refused(context, commit)
    assert "has no such repository, or it is private" in error.message
    assert ("HF_TOKEN may not see it" if token else "there is no HF_TOKEN") in error.message


def test_a_token_that_is_no_token_is_said_to_be_refused(
    hub: Hub, context: StepContext, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "invalid")
    error = refused(context, hub.publish(NAME, model))
    assert "answers 401: HF_TOKEN is not accepted" in error.message
    assert "settings/tokens" in str(error.next_move)


def test_an_unknown_revision_is_named(hub: Hub, context: StepContext, model: Path) -> None:
    hub.publish(NAME, model)
    error = refused(context, "a" * 40)
    assert f"the hub has no revision '{'a' * 40}'" in error.message


# ---------------------------------------------------------------- bad days


@pytest.mark.parametrize("status", [500, 503])
@pytest.mark.parametrize("where", ["/revision/", "/resolve/"])
def test_a_hub_that_stumbles_once_is_asked_again(
    hub: Hub, context: StepContext, model: Path, status: int, where: str
) -> None:
    hub.status = {where: [status]}
    assert (snapshot(context, hub.publish(NAME, model)).folder / WEIGHTS).is_file()


@pytest.mark.parametrize(
    ("status", "words"), [(503, "answers 503 again and again"), (429, "too many requests")]
)
def test_a_hub_that_goes_on_stumbling_is_given_up_by_name(
    hub: Hub, context: StepContext, model: Path, status: int, words: str
) -> None:
    hub.status = {"/revision/": [status] * 20}
    error = refused(context, hub.publish(NAME, model))
    assert words in error.message
    assert "what was fetched is kept" in str(error.next_move)


def test_a_hub_that_is_not_there_is_named(
    context: StepContext, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    error = refused(context, "a" * 40)
    assert "http://127.0.0.1:9 was not reached" in error.message
    assert "HF_ENDPOINT" in str(error.next_move)


def test_without_the_hub_the_copy_in_the_cache_is_used_and_it_is_said(
    hub: Hub, context: StepContext, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.publish(NAME, model)
    first = snapshot(context, commit)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert snapshot(context, commit) == first
    assert any("the hub was not reached" in warning and "is used" in warning for warning in context.warnings)


def test_a_disk_that_is_too_small_is_found_before_anything_is_fetched(
    hub: Hub, context: StepContext, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    error = refused(context, hub.publish(NAME, model))
    assert "are to be fetched into" in error.message
    assert "that disk has 1.0 kB left" in error.message
    assert "HF_HOME" in str(error.next_move)
    assert hub.fetched() == []


def test_a_disk_that_fills_while_a_file_is_fetched_names_the_file(
    hub: Hub, context: StepContext, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, chunk: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch._Sink, "write", full)
    with pytest.raises(OSError, match="No space left") as caught:
        snapshot(context, hub.publish(NAME, model))
    assert caught.value.errno == 28
    assert str(caught.value.filename).endswith(".partial")


def test_a_cache_that_cannot_be_written_is_named(
    hub: Hub, context: StepContext, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    assert "cannot be written" in refused(context, hub.publish(NAME, model)).message


# ---------------------------------------------------------------- offline


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_the_cache_is_used_and_nobody_is_asked(
    hub: Hub, context: StepContext, model: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    commit = hub.publish(NAME, model)
    first = snapshot(context, commit)
    hub.requests.clear()
    monkeypatch.setenv(variable, "1")
    assert snapshot(context, commit) == first
    assert hub.requests == []


def test_offline_and_not_in_the_cache_says_what_to_do(
    hub: Hub, context: StepContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    error = refused(context, "a" * 40)
    assert "HF_HUB_OFFLINE is set, and it is not in the cache" in error.message
    assert "Unset HF_HUB_OFFLINE" in str(error.next_move)
    assert "catalog use NAME --source FOLDER" in str(error.next_move)


def test_offline_a_copy_without_its_weights_is_not_used(
    hub: Hub, context: StepContext, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.publish(NAME, model)
    (snapshot(context, commit).folder / WEIGHTS).unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "no model.safetensors" in refused(context, commit).message


def test_offline_a_damaged_copy_is_not_used(
    hub: Hub, context: StepContext, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.publish(NAME, model)
    snapshot(context, commit)
    blob(context, model).write_bytes(b"?")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    error = refused(context, commit)
    assert "the cached model.safetensors is damaged" in error.message
    assert str(blob(context, model)) in str(error.next_move)


# ---------------------------------------------------------------- branches


def test_a_branch_is_looked_up_and_the_commit_that_it_meant_is_said(
    hub: Hub, context: StepContext, model: Path
) -> None:
    commit = hub.publish(NAME, model)
    assert snapshot(context, "main").commit == commit
    assert any("'main', which moves" in warning and commit in warning for warning in context.warnings)


def test_offline_a_branch_means_the_commit_that_it_meant_last(
    hub: Hub, context: StepContext, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.publish(NAME, model)
    snapshot(context, "main")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert snapshot(context, "main").commit == commit


def test_a_branch_that_moved_gives_the_new_commit(
    hub: Hub, context: StepContext, model: Path, tmp_path: Path
) -> None:
    snapshot(context, hub.publish(NAME, model) and "main")
    folder = copy_of(model, tmp_path / "newer")
    (folder / "README.md").write_text("newer")
    commit = hub.publish(NAME, folder)
    found = snapshot(context, "main")
    assert found.commit == commit
    assert (found.folder / "README.md").read_text() == "newer"


# ---------------------------------------------------------------- what is said


def test_progress_has_bytes_rate_and_time_left(hub: Hub, context: StepContext, model: Path) -> None:
    hub.rate = 400_000
    snapshot(context, hub.publish(NAME, model))
    size = (model / WEIGHTS).stat().st_size
    lines = [line for line in _progress(context, "downloading maker/tiny") if line.total == size]
    assert {line.unit for line in lines} == {"bytes"}
    assert [line.done for line in lines] == sorted(line.done or 0 for line in lines)
    assert lines[-1].done == size
    between = [line for line in lines if 0 < (line.done or 0) < size]
    assert between
    assert all(100_000 < line.values["bytes_per_second"] < 1_000_000 for line in between)
    assert all(0 < (line.remaining_seconds or 0) < 10 for line in between)


def test_the_log_says_what_comes_from_where(
    hub: Hub, context: StepContext, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = hub.publish(NAME, model)
    snapshot(context, commit)
    said = capsys.readouterr().out
    assert f"fetching 1 file of maker/tiny at {commit[:12]} from {hub.url}: 414.6 kB" in said


def _progress(context: StepContext, stage: str) -> list[ProgressLine]:
    text = (context.folder / "progress.jsonl").read_text().splitlines()
    return [line for line in map(ProgressLine.model_validate_json, text) if line.stage == stage]


def test_the_cache_lies_where_the_variables_say(
    context: StepContext, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    assert context.cache_folder is not None
    assert Repository.of(NAME, context).root == context.cache_folder / "hub"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "theirs"))
    assert Repository.of(NAME, context).root == tmp_path / "theirs" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "nearer"))
    assert Repository.of(NAME, context).root == tmp_path / "nearer"
