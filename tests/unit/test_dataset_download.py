"""Datasets off the hub and off folders: which rows, which files are fetched, what is left when it stops."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.hub import Hub, etag_of
from tests.steps import step_context
from tuneloop.core import disk
from tuneloop.core.errors import (
    Conflict,
    DataError,
    DatasetUnavailable,
    DiskFull,
    NotFound,
    TuneloopError,
    Unsupported,
    UsageError,
)
from tuneloop.core.types import ProgressLine
from tuneloop.steps import dataset_download
from tuneloop.steps.dataset_download import rows_of
from tuneloop.steps.dataset_rows import json_line
from tuneloop.steps.hub import datasets, fetch

NAME = "HuggingFaceH4/ultrachat_200k"
SHARDS = {"train_sft": (40, 40, 20), "test_sft": (23,), "train_gen": (26,), "test_gen": (10,)}
README = "---\nconfigs:\n- config_name: default\n  data_files:\n" + "".join(
    f"  - split: {split}\n    path: data/{split}-*\n" for split in SHARDS
)


def talk(number: int, about: str = "train_sft") -> dict[str, Any]:
    return {
        "prompt": f"{about} {number} é/\U0001f600",
        "prompt_id": f"{number:04}",
        "messages": [
            {"content": f"{about} {number}", "role": "user"},
            {"content": 'a "b"\n\t\u2028', "role": "assistant"},
        ],
    }


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("datasets") / "repository"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text(f"{README}---\n# ultrachat\n")
    for split, sizes in SHARDS.items():
        start = 0
        for number, size in enumerate(sizes):
            rows = [talk(row, split) for row in range(start, start + size)]
            name = f"{split}-{number:05}-of-{len(sizes):05}-a3ecf92756993583.parquet"
            pq.write_table(pa.Table.from_pylist(rows), folder / "data" / name)
            start += size
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    import huggingface_hub.constants

    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(fetch, "RETRY_SECONDS", (0.0, 0.0))
    with Hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


class Downloaded:
    def __init__(self, report: dict[str, Any], warnings: list[str], stages: list[str]) -> None:
        self.report = report
        self.warnings = warnings
        self.stages = stages
        self.by_split = {split["split"]: split for split in report["splits"]}


Download = Callable[..., Downloaded]


@pytest.fixture
def download(tmp_path: Path) -> Iterator[Download]:
    """Runs the step into `tmp_path/out`, each time in a folder of its own, with one cache."""
    made = []

    def run(source: Path | str = NAME, **parameters: Any) -> Downloaded:
        given: dict[str, Any] = {"target": str(tmp_path / "out"), **parameters}
        inputs = {"source": source} if isinstance(source, Path) else {}
        if not inputs:
            given["dataset"] = source
        context = step_context(
            tmp_path / f"step{len(made)}",
            "dataset_download",
            inputs=inputs,
            outputs={"report": "file"},
            parameters=given,
            cache_folder=tmp_path / "cache",
        )
        made.append(context)
        dataset_download.run(context)
        lines = (context.folder / "progress.jsonl").read_text().splitlines()
        stages = [ProgressLine.model_validate_json(line).stage for line in lines]
        return Downloaded(json.loads(context.output("report").read_text()), context.warnings, stages)

    yield run
    for context in made:
        context.close()


def rows_in(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_bytes().splitlines()]


def bodies(hub: Hub) -> list[str]:
    """Files that were fetched whole, by name."""
    return sorted(
        request.path.rsplit("/", 1)[1]
        for request in hub.requests
        if "/resolve/" in request.path and not (request.range or "").partition("-")[2]
    )


# ---------------------------------------------------------------- which rows


@pytest.mark.parametrize(
    ("percent", "rows", "expected"),
    [
        (5, 207_865, 10_393),
        (5, 23_110, 1156),
        (5, 256_032, 12_802),
        (5, 28_304, 1415),
        (50, 1, 0),
        (50, 3, 2),
        (50, 5, 2),
        (100, 7, 7),
        (2.5, 100, 2),
        (7.5, 100, 8),
    ],
)
def test_per_cents_are_rounded_as_datasets_does(percent: float, rows: int, expected: int) -> None:
    assert rows_of(percent, rows) == expected


def test_the_first_rows_of_every_split_are_written(
    hub: Hub, download: Download, repository: Path, tmp_path: Path
) -> None:
    commit = hub.publish(f"datasets/{NAME}", repository)
    found = download(split_pct=10)
    assert found.report["commit"] == commit
    assert {name: split["rows"] for name, split in found.by_split.items()} == {
        "train_sft": 10,
        "test_sft": 2,
        "train_gen": 3,
        "test_gen": 1,
    }
    assert rows_in(tmp_path / "out" / "train_sft.jsonl") == [talk(number) for number in range(10)]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {f"{split}.jsonl" for split in SHARDS}
    assert {split["state"] for split in found.by_split.values()} == {"written"}


def test_only_the_files_that_hold_the_rows_are_fetched(
    hub: Hub, download: Download, repository: Path
) -> None:
    hub.publish(f"datasets/{NAME}", repository)
    found = download(split_pct=50, splits=["train_sft"])
    assert [name[:15] for name in bodies(hub)] == ["README.md", "train_sft-00000", "train_sft-00001"]
    split = found.by_split["train_sft"]
    assert (split["rows"], split["of_rows"], split["files_read"], split["of_files"]) == (50, 100, 2, 3)


def test_all_rows_take_no_counting(hub: Hub, download: Download, repository: Path, tmp_path: Path) -> None:
    hub.publish(f"datasets/{NAME}", repository)
    download(splits=["train_sft"])
    assert len(bodies(hub)) == 4
    assert "counting rows" not in download(splits=["train_sft"]).stages
    assert rows_in(tmp_path / "out" / "train_sft.jsonl") == [talk(number) for number in range(100)]


def test_a_server_that_sends_no_parts_costs_more_and_gives_the_same(
    hub: Hub, download: Download, repository: Path
) -> None:
    hub.publish(f"datasets/{NAME}", repository)
    hub.ignores_ranges = True
    split = download(split_pct=10, splits=["train_sft"]).by_split["train_sft"]
    assert (split["rows"], split["of_rows"], split["files_read"]) == (10, 100, 3)


def test_a_file_whose_name_leaves_the_folder_is_not_listed(
    hub: Hub, download: Download, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.jsonl").write_bytes(lines({"n": 1}))
    hub.publish("datasets/maker/talk", tmp_path / "mine")
    for name in ("train/../../../evil.jsonl", "/evil.jsonl", "train//evil.jsonl", "train\\evil.jsonl"):
        hub.repositories["datasets/maker/talk"].files[name] = lines({"n": 2})
    assert download("maker/talk").by_split["train"]["rows"] == 1
    assert not [name for name in bodies(hub) if "evil" in name]


def test_footers_larger_than_the_first_bite_are_asked_for_again(
    hub: Hub, download: Download, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish(f"datasets/{NAME}", repository)
    monkeypatch.setattr(datasets, "TAIL_BYTES", 16)
    assert download(split_pct=10, splits=["train_sft"]).by_split["train_sft"]["of_rows"] == 100


def test_a_share_without_a_row_is_refused_before_anything_is_fetched(
    hub: Hub, download: Download, repository: Path, tmp_path: Path
) -> None:
    hub.publish(f"datasets/{NAME}", repository)
    with pytest.raises(UsageError, match="1 % of the 23 rows of test_sft are none"):
        download(split_pct=1)
    assert bodies(hub) == ["README.md"]
    assert not (tmp_path / "out").exists()


def test_a_revision_is_a_branch_or_a_commit(hub: Hub, download: Download, repository: Path) -> None:
    commit = hub.publish(f"datasets/{NAME}", repository, branches=("main", "refs/convert/parquet"))
    for revision in (commit, "refs/convert/parquet"):
        assert download(revision=revision, splits=["test_gen"]).report["commit"] == commit
    with pytest.raises(DatasetUnavailable, match="no revision 'v9'") as refused:
        download(revision="v9")
    assert "--revision" in str(refused.value.next_move)


def test_a_dataset_without_an_owner_is_found(hub: Hub, download: Download, repository: Path) -> None:
    hub.publish("datasets/samsum", repository)
    assert download("samsum", splits=["test_gen"]).report["dataset"] == "samsum"


def test_a_listing_of_several_pages_is_read_to_its_end(
    hub: Hub, download: Download, repository: Path
) -> None:
    hub.page_size = 2
    hub.publish(f"datasets/{NAME}", repository)
    assert set(download(split_pct=50).by_split) == set(SHARDS)


# ---------------------------------------------------------------- what is written


def test_json_lines_are_written_as_to_json_writes_them() -> None:
    """What datasets 2.9.0 and 5.2.0 write for this row, byte for byte."""
    row = {
        "s": 'a/b <é> \u2028 \U0001f600 \x7f \x01\t\b\f"\\',
        "i": 1,
        "b": True,
        "m": [{"c": "é/"}],
        "n": None,
        "t": "\\u007f",
    }
    assert json_line(row) == (
        rb'{"s":"a\/b <\u00e9> \u2028 \ud83d\ude00 '
        + b"\x7f"
        + rb' \u0001\t\b\f\"\\","i":1,"b":true,"m":[{"c":"\u00e9\/"}],"n":null,"t":"\\u007f"}'
        + b"\n"
    )


def test_what_is_not_a_number_is_null_and_bytes_are_refused() -> None:
    assert json_line({"a": [float("nan"), {"b": float("inf")}, 0.1]}) == b'{"a":[null,{"b":null},0.1]}\n'
    with pytest.raises(Unsupported, match="holds bytes") as refused:
        json_line({"a": b"x"})
    assert "--format parquet" in str(refused.value.next_move)


def test_parquet_holds_the_same_rows(hub: Hub, download: Download, repository: Path, tmp_path: Path) -> None:
    hub.publish(f"datasets/{NAME}", repository)
    download(splits=["train_sft"], split_pct=50, format="parquet")
    table = pq.read_table(tmp_path / "out" / "train_sft.parquet")
    assert table.to_pylist() == [talk(number) for number in range(50)]


def test_the_same_download_again_changes_nothing(
    hub: Hub, download: Download, repository: Path, tmp_path: Path
) -> None:
    hub.publish(f"datasets/{NAME}", repository)
    download(splits=["test_gen"])
    before = (tmp_path / "out" / "test_gen.jsonl").stat()
    hub.requests.clear()
    assert download(splits=["test_gen"]).by_split["test_gen"]["state"] == "unchanged"
    assert (tmp_path / "out" / "test_gen.jsonl").stat().st_mtime_ns == before.st_mtime_ns
    assert bodies(hub) == []


def test_other_content_is_replaced_only_when_it_is_said(
    hub: Hub, download: Download, repository: Path, tmp_path: Path
) -> None:
    hub.publish(f"datasets/{NAME}", repository)
    mine = tmp_path / "out" / "test_gen.jsonl"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(Conflict, match=r"test_gen.jsonl is there already") as refused:
        download(splits=["test_gen", "test_sft"])
    assert "--force" in str(refused.value.next_move)
    assert mine.read_text() == "mine"
    assert [file.name for file in mine.parent.iterdir()] == ["test_gen.jsonl"]
    assert download(splits=["test_gen"], force=True).by_split["test_gen"]["state"] == "replaced"
    assert len(rows_in(mine)) == 10


def test_a_folder_in_the_place_of_a_file_is_left_alone(
    hub: Hub, download: Download, repository: Path, tmp_path: Path
) -> None:
    hub.publish(f"datasets/{NAME}", repository)
    (tmp_path / "out" / "test_gen.jsonl").mkdir(parents=True)
    with pytest.raises(Conflict, match="is a folder"):
        download(splits=["test_gen"], force=True)


def test_a_full_disk_is_told_before_anything_is_fetched(
    hub: Hub, download: Download, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish(f"datasets/{NAME}", repository)
    monkeypatch.setattr(disk, "free_bytes", lambda near: 100)
    with pytest.raises(DiskFull, match="100 are free") as refused:
        download()
    assert "--to" in str(refused.value.next_move)
    assert bodies(hub) == ["README.md"]


# ---------------------------------------------------------------- bad days


def test_a_download_that_was_killed_goes_on_where_it_was(
    hub: Hub, download: Download, repository: Path, tmp_path: Path
) -> None:
    hub.publish(f"datasets/{NAME}", repository)
    [file] = (repository / "data").glob("test_gen-*")
    content = file.read_bytes()
    blobs = tmp_path / "cache" / "hub" / "datasets--HuggingFaceH4--ultrachat_200k" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{etag_of(file.name, content)}.partial").write_bytes(content[:500])
    assert download(splits=["test_gen"]).by_split["test_gen"]["rows"] == 10
    assert [request.range for request in hub.requests if request.is_store] == ["bytes=500-"]


def test_a_hub_that_fails_says_that_what_was_fetched_is_kept(
    hub: Hub, download: Download, repository: Path, tmp_path: Path
) -> None:
    hub.publish(f"datasets/{NAME}", repository)
    hub.status["test_gen-"] = [500] * 9
    with pytest.raises(DatasetUnavailable, match="answers 500 again and again") as refused:
        download(splits=["test_gen"])
    assert str(refused.value.next_move).startswith("Run it again later; what was fetched is kept.")
    assert not (tmp_path / "out").exists()


def test_a_changed_body_is_not_used(hub: Hub, download: Download, repository: Path, tmp_path: Path) -> None:
    hub.publish(f"datasets/{NAME}", repository)
    [file] = (repository / "data").glob("test_gen-*")
    hub.changed[f"data/{file.name}"] = 2
    with pytest.raises(DatasetUnavailable, match=r"has the sha256 digest .* the hub lists"):
        download(splits=["test_gen"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("token", "about", "said"),
    [
        (None, {"is_gated": True}, "is gated"),
        ("stranger", {"is_gated": True}, "the account of HF_TOKEN has not"),
        (None, {"is_private": True}, "there is no HF_TOKEN"),
        ("invalid", {}, "HF_TOKEN is not accepted"),
    ],
)
def test_what_may_not_be_read_is_told_with_the_way_in(
    hub: Hub,
    download: Download,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    token: str | None,
    about: dict[str, Any],
    said: str,
) -> None:
    hub.publish(f"datasets/{NAME}", repository, readers={"reader"}, **about)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(DatasetUnavailable) as refused:
        download()
    assert said in str(refused.value)
    assert "catalog" not in str(refused.value)


def test_who_may_read_it_gets_it_and_the_token_stays_with_the_hub(
    hub: Hub, download: Download, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish(f"datasets/{NAME}", repository, is_gated=True, readers={"reader"})
    monkeypatch.setenv("HF_TOKEN", "reader")
    download(split_pct=50, splits=["train_sft"])
    at_store = [request.token for request in hub.requests if request.is_store]
    assert at_store
    assert set(at_store) == {None}


def test_a_hub_that_stumbles_is_asked_again(hub: Hub, download: Download, repository: Path) -> None:
    hub.publish(f"datasets/{NAME}", repository)
    hub.status["/api/datasets"] = [503]
    hub.status["train_sft-00001"] = [502]
    assert download(split_pct=10, splits=["train_sft"]).by_split["train_sft"]["of_rows"] == 100


def test_what_was_fetched_once_can_be_had_without_the_hub(
    hub: Hub, download: Download, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish(f"datasets/{NAME}", repository)
    download(split_pct=50, splits=["train_sft"])
    before = (tmp_path / "out" / "train_sft.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.requests.clear()
    download(split_pct=50, splits=["train_sft"])
    assert (tmp_path / "out" / "train_sft.jsonl").read_bytes() == before
    assert hub.requests == []
    with pytest.raises(
        DatasetUnavailable, match=r"HF_HUB_OFFLINE is set, and data/test_sft.* not in the cache"
    ):
        download(splits=["test_sft"])


def test_a_cached_file_that_was_damaged_is_found_without_the_hub(
    hub: Hub, download: Download, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish(f"datasets/{NAME}", repository)
    download(splits=["test_gen"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    [cached] = (tmp_path / "cache").rglob("test_gen-*.parquet")
    content = cached.read_bytes()
    cached.resolve().write_bytes(content[:-9] + b"x" + content[-8:])
    with pytest.raises(DatasetUnavailable, match="is damaged"):
        download(splits=["test_gen"])


def test_a_hub_that_is_gone_is_replaced_by_the_cache_and_it_is_said(
    hub: Hub, download: Download, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish(f"datasets/{NAME}", repository)
    download(splits=["test_gen"])
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    found = download(splits=["test_gen"])
    assert [warning for warning in found.warnings if "the hub was not reached" in warning]
    with pytest.raises(DatasetUnavailable, match="was not reached"):
        download("maker/other")


def test_what_ends_like_no_parquet_is_told(
    hub: Hub, download: Download, repository: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    (broken / "data").mkdir(parents=True)
    (broken / "data" / "train-00000-of-00001.parquet").write_bytes(b"version https://git-lfs")
    hub.publish(f"datasets/{NAME}", broken)
    with pytest.raises(DatasetUnavailable, match="it ends with '-lfs'"):
        download(split_pct=50)
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        download()


# ---------------------------------------------------------------- folders


def lines(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def test_a_folder_of_text_files_is_read_too(download: Download, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(lines(*({"n": number} for number in range(10))))
    (folder / "test.json.gz").write_bytes(gzip.compress(json.dumps([{"n": 1}, {"n": 2}]).encode()))
    found = download(folder, split_pct=50)
    assert {name: (split["rows"], split["of_rows"]) for name, split in found.by_split.items()} == {
        "train": (5, 10),
        "test": (1, 2),
    }
    assert rows_in(tmp_path / "out" / "train.jsonl") == [{"n": number} for number in range(5)]
    assert found.report["commit"] is None


def test_a_folder_of_parquet_is_counted_by_its_footers(
    download: Download, repository: Path, tmp_path: Path
) -> None:
    found = download(repository, split_pct=10, splits=["train_sft"])
    assert found.by_split["train_sft"]["files_read"] == 1
    assert rows_in(tmp_path / "out" / "train_sft.jsonl") == [talk(number) for number in range(10)]


def test_one_file_is_a_dataset_of_one_split(download: Download, tmp_path: Path) -> None:
    (tmp_path / "talk.jsonl").write_bytes(lines({"n": 1}))
    assert list(download(tmp_path / "talk.jsonl").by_split) == ["talk"]


def test_a_row_that_cannot_be_read_is_told_with_its_line(download: Download, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(lines({"n": 1}) + b"\n{broken\n")
    with pytest.raises(DataError, match=r"train.jsonl line 3 cannot be read") as refused:
        download(tmp_path / "train.jsonl")
    assert refused.value.details[0]["line"] == 3  # type: ignore[index, call-overload]
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_json_lines_become_parquet_with_the_columns_of_all_rows(download: Download, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(lines({"a": 1}, {"a": 2.5, "b": [{"c": "x"}]}))
    download(tmp_path / "train.jsonl", format="parquet")
    assert pq.read_table(tmp_path / "out" / "train.parquet").to_pylist() == [
        {"a": 1.0, "b": None},
        {"a": 2.5, "b": [{"c": "x"}]},
    ]


def test_a_column_of_two_types_is_no_parquet(download: Download, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(lines({"a": "x"}, {"a": [1]}))
    with pytest.raises(DataError, match="more than one type") as refused:
        download(tmp_path / "train.jsonl", format="parquet")
    assert "--format jsonl" in str(refused.value.next_move)


@pytest.mark.parametrize("name", ["nothing", "nothing.jsonl"])
def test_a_place_that_is_not_there_is_told(download: Download, tmp_path: Path, name: str) -> None:
    with pytest.raises(NotFound, match="no such file or folder"):
        download(tmp_path / name)


def test_a_split_without_rows_has_no_share(download: Download, tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), tmp_path / "train.parquet")
    with pytest.raises(TuneloopError, match="has no rows"):
        download(tmp_path / "train.parquet", split_pct=50)
