"""Artifacts and attempt folders on a real disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tuneloop.adapters.files import LocalFiles
from tuneloop.core.digest import of_path
from tuneloop.core.errors import NotFound, UsageError


@pytest.fixture
def files(tmp_path: Path) -> LocalFiles:
    return LocalFiles(tmp_path / "home")


def make_folder(path: Path, **contents: str) -> Path:
    path.mkdir(parents=True)
    for name, text in contents.items():
        (path / name).write_text(text)
    return path


def test_adopted_outputs_move_and_leave_a_link(files: LocalFiles, tmp_path: Path) -> None:
    source = make_folder(files.folder("jobs/j/s/1/outputs") / "model", weights="w")
    digest, _ = of_path(source)
    files.adopt(source, digest)
    assert files.has_artifact(digest)
    assert source.is_symlink()
    assert (source / "weights").read_text() == "w"
    files.adopt(source, digest)
    assert (files.artifact_path(digest) / "weights").read_text() == "w"


def test_equal_outputs_are_stored_once(files: LocalFiles) -> None:
    first = make_folder(files.folder("jobs/j/s/1/outputs") / "model", weights="w")
    second = make_folder(files.folder("jobs/j/s/2/outputs") / "model", weights="w")
    digest, _ = of_path(first)
    files.adopt(first, digest)
    files.adopt(second, digest)
    assert os.path.realpath(first) == os.path.realpath(second)


def test_links_hold_when_the_home_is_moved(files: LocalFiles, tmp_path: Path) -> None:
    source = make_folder(files.folder("jobs/j/s/1/outputs") / "model", weights="w")
    digest, _ = of_path(source)
    files.adopt(source, digest)
    (tmp_path / "home").rename(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere/jobs/j/s/1/outputs/model/weights").read_text() == "w"


def test_ingest_copies_so_that_a_later_change_of_the_original_is_not_seen(
    files: LocalFiles, tmp_path: Path
) -> None:
    original = tmp_path / "rows.jsonl"
    original.write_text("before")
    digest, size = files.ingest(original)
    original.write_text("after!")
    assert files.artifact_path(digest).read_text() == "before"
    assert size == 6
    assert [found.name for found in (tmp_path / "home/artifacts").iterdir()] == [digest[7:9]]


def test_the_digest_of_a_folder_depends_on_names_and_contents_only(tmp_path: Path) -> None:
    first = make_folder(tmp_path / "a", x="1", y="2")
    same = make_folder(tmp_path / "b", y="2", x="1")
    renamed = make_folder(tmp_path / "c", x="1", z="2")
    assert of_path(first) == of_path(same)
    assert of_path(first)[0] != of_path(renamed)[0]


def test_a_link_inside_an_artifact_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a", x="1")
    (folder / "passwd").symlink_to("/etc/passwd")
    with pytest.raises(UsageError, match="is a link"):
        of_path(folder)


@pytest.mark.parametrize("bad", ["sha256:../../etc", "md5:abc", "", "sha256:" + "g/" * 32])
def test_what_is_no_digest_has_no_path(files: LocalFiles, bad: str) -> None:
    with pytest.raises(NotFound):
        files.artifact_path(bad)


def test_folders_stay_inside_the_home_and_are_private(files: LocalFiles) -> None:
    with pytest.raises(NotFound):
        files.folder("../outside")
    assert files.folder("jobs/j").stat().st_mode & 0o077 == 0


def test_a_result_that_is_not_there_is_none_and_a_torn_one_is_an_error(files: LocalFiles) -> None:
    folder = files.folder("jobs/j/s/1")
    assert files.read_result(folder) is None
    (folder / "result.json").write_text('{"format": 1')
    with pytest.raises(ValueError, match="cannot be read"):
        files.read_result(folder)
