"""Models that come from elsewhere: files are copied in, told apart by what they hold, and served or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes import FakeClock, FakeStore
from tuneloop.adapters.files import LocalFiles
from tuneloop.core.errors import AlreadyExists, InvalidName, InvalidState, Unsupported, UsageError
from tuneloop.core.states import ModelState
from tuneloop.core.types import Artifact
from tuneloop.workspace.models import Models


class Home:
    def __init__(self, folder: Path) -> None:
        self.store = FakeStore()
        self.files = LocalFiles(folder / "home")
        self.models = Models(self.store, self.files, FakeClock())


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def folder_of(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(name)
    return path


def test_a_folder_is_copied_in_and_is_what_it_was(home: Home, tmp_path: Path) -> None:
    source = folder_of(tmp_path / "things", "a.txt", "deep/b.txt")
    record = home.models.register_files(source, name="things", description="Some", tags={"a": "b"})
    (source / "a.txt").write_text("changed later")
    assert (record.key, record.description, record.tags) == ("things:1", "Some", {"a": "b"})
    assert (record.state, record.lineage.job) == (ModelState.PENDING, None)
    kept = home.files.artifact_path(record.artifact)
    assert (kept / "a.txt").read_text() == "a.txt"
    assert (kept / "deep" / "b.txt").read_text() == "deep/b.txt"


def test_a_file_alone_is_a_folder_that_holds_it(home: Home, tmp_path: Path) -> None:
    record = home.models.register_files(folder_of(tmp_path, "one.bin") / "one.bin", name="file")
    assert (home.files.artifact_path(record.artifact) / "one.bin").read_text() == "one.bin"
    left = [one.name for one in (home.files.home / "artifacts").iterdir() if one.name.startswith(".")]
    assert left == []


def test_the_same_files_again_are_the_same_version_and_others_are_refused(home: Home, tmp_path: Path) -> None:
    source = folder_of(tmp_path / "one", "a")
    first = home.models.register_files(source, name="m", version="v1")
    assert home.models.register_files(source, name="m", version="v1") == first
    with pytest.raises(AlreadyExists, match="m:v1"):
        home.models.register_files(folder_of(tmp_path / "two", "b"), name="m", version="v1")
    assert len(home.models.list("m")) == 1


@pytest.mark.parametrize(("name", "version"), [("a b", "1"), ("m", "a b"), ("m", "latest"), ("m", "LATEST")])
def test_names_and_versions_are_checked(home: Home, tmp_path: Path, name: str, version: str) -> None:
    with pytest.raises((InvalidName, UsageError)):
        home.models.register_files(folder_of(tmp_path / "one", "a"), name=name, version=version)
    assert home.models.list() == []


@pytest.mark.parametrize(
    ("names", "kind", "lacks"),
    [
        (["MLmodel", "model/config.json", "components/tokenizer/tokenizer.json"], "mlflow_model", None),
        (["config.json", "tokenizer.json", "model.safetensors"], "model_folder", None),
        (["MLmodel", "model.pkl"], "folder", "model/config.json and components/tokenizer/tokenizer.json"),
        (["config.json", "tokenizer.json"], "folder", "weights in safetensors"),
        (["config.json", "model.safetensors"], "folder", "tokenizer.json"),
        (["anything"], "folder", "config.json, tokenizer.json, weights in safetensors"),
    ],
)
def test_what_cannot_be_served_says_what_it_lacks(
    home: Home, tmp_path: Path, names: list[str], kind: str, lacks: str | None
) -> None:
    record = home.models.register_files(folder_of(tmp_path / "one", *names), name="m")
    assert home.store.get(Artifact, record.artifact).type == kind
    why = home.models.why_not_served(record.artifact)
    if lacks is None:
        assert why is None
        assert home.models.replica_memory_bytes(record.artifact) > 0
        return
    assert why is not None
    assert lacks in why
    with pytest.raises(Unsupported, match="can be downloaded"):
        home.models.replica_memory_bytes(record.artifact)


def test_other_words_are_carried_to_mlflow_again(home: Home, tmp_path: Path) -> None:
    record = home.models.register_files(folder_of(tmp_path / "one", "a"), name="m")
    carried = home.store.update(
        record.model_copy(update={"state": ModelState.REGISTERED, "mlflow_version": 3})
    )
    same = home.models.describe("m", "1", description="", tags={})
    assert same == carried, "nothing changes, so nothing is carried"
    changed = home.models.describe("m", "1", description="new", tags={"a": "b"})
    assert (changed.description, changed.tags) == ("new", {"a": "b"})
    assert (changed.state, changed.mlflow_version) == (ModelState.REGISTERED, None)
    home.models.delete("m", "1")
    with pytest.raises(InvalidState, match="being deleted"):
        home.models.describe("m", "1", description="late", tags={})
