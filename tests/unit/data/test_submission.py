"""What a job's data go through when it is submitted: checked, kept as they are, remembered."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import FakeClock, FakeStore
from tests.unit.data.corpus import good, lines, table, talk
from tests.unit.data.test_reading import FILES, write
from tuneloop.adapters.files import LocalFiles
from tuneloop.core.errors import DataError, InvalidName, NotFound
from tuneloop.core.types import Artifact, Dataset
from tuneloop.workspace.data import MAX_FINDINGS, ChatFiles, Data, check_chat_file

BAD = {"messages": []}


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def data(store: FakeStore, tmp_path: Path) -> Data:
    (tmp_path / "home").mkdir()
    return Data(store, LocalFiles(tmp_path / "home"), FakeClock())


def chat(
    folder: Path, bad_rows: int = 0, column: str = "messages", **rows: list[dict[str, Any]]
) -> ChatFiles:
    paths = {role: folder / f"{role}.jsonl" for role in rows}
    for role, path in paths.items():
        path.write_bytes(lines(*rows[role]))
    return ChatFiles(paths, {role: path.name for role, path in paths.items()}, column, bad_rows)


@pytest.mark.parametrize("kind", FILES)
def test_a_job_takes_every_format_and_stores_it_as_it_is(kind: str, data: Data, tmp_path: Path) -> None:
    name, content, format, _ = FILES[kind]
    path = write(tmp_path, name, content)
    brought = data.bring_in_chat(ChatFiles({"train": path}, {"train": name}))
    stored = tmp_path / "home" / "artifacts"
    [kept] = [each for each in stored.rglob("*") if each.is_file()]
    assert kept.read_bytes() == path.read_bytes()
    dataset = brought.datasets["train"]
    assert (dataset.rows, dataset.bad_rows, dataset.format) == (3, 0, format)
    assert brought.warnings == ()


def test_a_dataset_remembers_schema_counts_and_statistics(data: Data, tmp_path: Path) -> None:
    brought = data.bring_in_chat(chat(tmp_path, train=[good(1), {**good(2), "score": 1.5}]))
    dataset = brought.datasets["train"]
    assert dataset.columns == ("prompt_id", "messages", "score")
    assert dataset.statistics is not None
    assert dataset.statistics.columns == {"prompt_id": "string", "messages": "list", "score": "number"}
    assert dataset.statistics.messages_by_role == {"user": 2, "assistant": 2}
    assert brought.inputs["train"].digest == dataset.artifact
    assert Dataset.model_validate_json(dataset.model_dump_json()) == dataset


def test_a_dataset_written_before_there_were_statistics_is_read() -> None:
    old = {
        "created_at": "2026-01-01T00:00:00Z",
        "name": "a",
        "dataset_version": "1",
        "artifact": "sha256:0",
        "source_path": "/a",
        "rows": 3,
    }
    assert Dataset.model_validate(old).statistics is None


def test_all_files_of_a_job_are_told_at_once(data: Data, tmp_path: Path) -> None:
    files = chat(tmp_path, train=[good(1), BAD], test=[{"prompt": "a"}, good(2), BAD])
    with pytest.raises(DataError) as raised:
        data.bring_in_chat(files)
    told = raised.value.message.splitlines()
    assert told[0] == "1 of 2 rows of train.jsonl cannot be learned from; nothing was started."
    assert told[1].startswith("  train.jsonl line 2: messages: found 0 messages")
    assert told[2] == "2 of 3 rows of test.jsonl cannot be learned from; nothing was started."
    assert [(each["file"], each["line"], each["rule"]) for each in raised.value.details] == [
        ("train.jsonl", 2, "assistant_turn"),
        ("test.jsonl", 1, "messages_present"),
        ("test.jsonl", 3, "assistant_turn"),
    ]


def test_a_rehearsal_refuses_the_same_and_stores_nothing(
    data: Data, store: FakeStore, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="1 of 1 rows"):
        data.check_chat(chat(tmp_path, train=[BAD]))
    assert data.check_chat(chat(tmp_path, train=[good(1)])) == ()
    assert store.list(Dataset) == store.list(Artifact) == []


def test_duplicates_and_leakage_are_warnings_of_a_job(data: Data, tmp_path: Path) -> None:
    files = chat(tmp_path, train=[good(1), good(2), good(1), good(1)], test=[good(2)])
    brought = data.bring_in_chat(files)
    assert brought.warnings == (
        "train.jsonl: 2 findings of the rule duplicate. The first: train.jsonl line 3: found the same "
        "conversation as train.jsonl line 1 (rule duplicate). Drop one of them: what is there twice is "
        "learned twice as hard.",
        "test.jsonl line 1: found the conversation of train.jsonl line 2 (train) (rule leak). Remove it from "
        "one of them: test has to be what train is not.",
    )


def test_the_budget_lets_bad_rows_pass_and_says_so(data: Data, tmp_path: Path) -> None:
    rows = [good(1), BAD, BAD]
    with pytest.raises(DataError, match=r"2 of 3 rows of train.jsonl cannot be learned from \(1 allowed\)"):
        data.bring_in_chat(chat(tmp_path, 1, train=rows))
    brought = data.bring_in_chat(chat(tmp_path, 2, train=rows))
    assert (brought.datasets["train"].rows, brought.datasets["train"].bad_rows) == (3, 2)
    [warning] = brought.warnings
    assert warning.startswith(
        "train.jsonl: bad rows are left out (2, rule assistant_turn). train.jsonl line 2"
    )


def test_a_file_without_a_good_row_is_refused_whatever_the_budget(data: Data, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 of 1 rows of test\.jsonl"):
        data.bring_in_chat(chat(tmp_path, 9, train=[good(1)], test=[BAD]))


def test_the_column_of_the_conversation_can_be_named(data: Data, tmp_path: Path) -> None:
    row = {"talk": good(1)["messages"]}
    assert data.bring_in_chat(chat(tmp_path, column="talk", train=[row])).datasets["train"].rows == 1
    with pytest.raises(DataError, match="messages_present"):
        data.bring_in_chat(chat(tmp_path, train=[row]))


def test_only_the_first_findings_are_listed_and_all_rows_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(*[BAD] * (MAX_FINDINGS + 20)))
    with pytest.raises(DataError, match=f"{MAX_FINDINGS + 20} of {MAX_FINDINGS + 20} rows") as raised:
        check_chat_file(path, "a.jsonl")
    assert len(raised.value.details) == MAX_FINDINGS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b"[]"),
        ("a.csv", b"prompt_id,messages\n"),
        ("a.jsonl.gz", gzip.compress(b"\n" * 300_000)),
        ("a.json", b'{"data": [' + b" " * 300_000 + b"]}"),
    ],
)
def test_a_file_without_rows_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(DataError):
        check_chat_file(path, name)


def test_a_finding_of_a_row_is_told_by_its_id(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(talk({"role": "user", "content": ""})))
    with pytest.raises(DataError) as raised:
        check_chat_file(path, "a.jsonl")
    assert {each["id"] for each in raised.value.details} == {"bad"}
    assert "a.jsonl line 1 (id bad): messages[0].content" in raised.value.message


# ---------------------------------------------------------------- names


def test_a_registered_file_has_a_name_a_version_and_a_licence(data: Data, tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", table().encode())
    first = data.register(path, "a.csv", name="support", license="CC-BY-4.0")
    assert (first.name, first.rows, first.license) == ("support", 3, "CC-BY-4.0")
    assert data.register(path, "a.csv", name="support") == first
    assert data.get("support") == data.get(first.key) == first
    assert data.register(path, "a.csv", name="support", license="MIT").license == "MIT"
    assert [each.license for each in data.list()] == ["MIT"]


def test_another_content_is_another_version_and_the_newest_is_found(store: FakeStore, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    clock = FakeClock()
    data = Data(store, LocalFiles(tmp_path / "home"), clock)
    path = write(tmp_path, "a.jsonl", lines(good(1)))
    first = data.register(path, "a.jsonl")
    clock.move(1)
    write(tmp_path, "a.jsonl", lines(good(2)))
    second = data.register(path, "a.jsonl")
    assert first.key != second.key
    assert data.get("a") == second


def test_a_name_that_is_not_there_and_one_that_cannot_be_are_refused(data: Data, tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", lines(good(1)))
    with pytest.raises(NotFound, match="named 'b'"):
        data.get("b")
    with pytest.raises(InvalidName):
        data.register(path, "a.jsonl", name="no/slash")


def test_what_is_registered_is_held_to_the_rules(data: Data, store: FakeStore, tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", lines(good(1), BAD))
    with pytest.raises(DataError, match="1 of 2 rows"):
        data.register(path, "a.jsonl")
    assert data.register(path, "a.jsonl", bad_rows=1).bad_rows == 1


# ---------------------------------------------------------------- memory


def test_memory_of_a_check_is_flat(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        path = tmp_path / f"{count}.jsonl"
        path.write_bytes(lines(*({**good(number), "pad": "x" * 900} for number in range(count))))
        tracemalloc.start()
        check_chat_file(path, path.name)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    small, large = peak(2500), peak(6000)
    assert large < small + 3500 * 48
