"""Repairs: each is named, none changes what is learned, and the rest is dropped by name."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from tests.unit.data.corpus import good, lines, table, talk
from tests.unit.data.test_rules import _ROWS
from tuneloop.core.data.check import check_files
from tuneloop.core.data.reading import open_source, read_rows
from tuneloop.core.data.repair import fix, repair_file
from tuneloop.core.data.rows import Row
from tuneloop.core.data.rules import check_row, is_error
from tuneloop.core.errors import AlreadyExists, DataError

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}


def fixed(row: dict[str, Any]) -> tuple[dict[str, Any] | None, list[str]]:
    return fix(Row(1, 1, row), check_row(row))


@pytest.mark.parametrize(
    ("messages", "repaired", "change"),
    [
        ([{**USER, "role": " User"}, ANSWER], [USER, ANSWER], "messages[0].role ' User' written as 'user'"),
        (
            [{**USER, "role": "human"}, {**ANSWER, "role": "gpt"}],
            [USER, ANSWER],
            "messages[1].role 'gpt' written as 'assistant'",
        ),
        ([{**SYSTEM, "role": "developer"}, USER, ANSWER], [SYSTEM, USER, ANSWER], "written as 'system'"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}]}, ANSWER],
            [USER, ANSWER],
            "messages[0].content taken out of its one text part",
        ),
        (
            [USER, {**ANSWER, "weight": True}],
            [USER, {**ANSWER, "weight": 1}],
            "messages[1].weight written as 1",
        ),
        ([{**SYSTEM, "content": ""}, USER, ANSWER], [USER, ANSWER], "empty system message dropped"),
        ([USER, ANSWER, USER], [USER, ANSWER], "messages[2] dropped: 'user' after the last answer"),
        (
            [USER, ANSWER, USER, {**ANSWER, "content": " "}],
            [USER, ANSWER],
            "messages[3] dropped: 'assistant'",
        ),
        (json.dumps([USER, ANSWER]), [USER, ANSWER], "messages read from the JSON in a string"),
    ],
)
def test_a_repair_is_made_and_named(messages: Any, repaired: Any, change: str) -> None:
    value, changes = fixed({"id": 1, "messages": messages})
    assert value == {"id": 1, "messages": repaired}
    assert any(change in each for each in changes)


@pytest.mark.parametrize(
    "messages",
    [
        [USER, {"role": "bot", "content": "x"}, ANSWER],
        [USER, {"role": "tool", "content": "x"}, ANSWER],
        [USER, {**SYSTEM, "role": "developer"}, ANSWER],
        [{**USER, "content": ""}, ANSWER],
        [USER, {**ANSWER, "content": ""}, USER, ANSWER],
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, ANSWER],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER],
        [{"role": "user", "content": "\ud800"}, ANSWER],
        [USER],
        "not a list",
        [USER, {**ANSWER, "weight": 0.5}],
    ],
)
def test_what_would_be_a_guess_is_dropped_by_rule(messages: Any) -> None:
    value, changes = fixed({"messages": messages})
    assert value is None
    assert changes[0].startswith("row dropped (")


def test_a_good_row_stays_what_it_is() -> None:
    row = {"messages": [USER, ANSWER], "x": [1]}
    value, changes = fixed(row)
    assert value is row
    assert changes == []


def test_the_row_given_is_not_changed() -> None:
    row = {"messages": [{**USER, "role": "User"}, ANSWER]}
    fixed(row)
    assert row["messages"][0]["role"] == "User"


@settings(max_examples=300, deadline=None)
@given(_ROWS)
def test_any_row_comes_out_good_or_not_at_all(row: dict[str, Any]) -> None:
    value, changes = fixed(row)
    if value is None:
        assert changes
        return
    assert not any(map(is_error, check_row(value)))
    assert bool(changes) == (value != row)


# ---------------------------------------------------------------- files


def test_a_repaired_copy_is_good_and_the_report_says_what_was_done(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    rows = [
        good(1),
        talk({**USER, "role": "User"}, ANSWER),
        "oops",
        {"a": 1},
        good(1),
        {**good(1), "note": 2},
    ]
    path.write_bytes(lines(*rows))
    done = repair_file(open_source(path, "train.jsonl"), tmp_path / "fixed.jsonl")
    written = [row.value for row in read_rows(tmp_path / "fixed.jsonl")]
    assert written == [good(1), talk(USER, ANSWER)]
    assert [(each.line, each.what) for each in done.changes] == [
        (2, "messages[0].role 'User' written as 'user'"),
        (3, "row dropped (json)"),
        (4, "row dropped (messages_present)"),
        (5, "row dropped: every letter of its messages was there before"),
        (6, "row dropped: every letter of its messages was there before"),
    ]
    assert (done.rows, done.rows_written, done.rows_changed, done.rows_dropped) == (6, 2, 1, 2)
    assert (done.duplicates_dropped, done.by_rule_dropped) == (2, {"json": 1, "messages_present": 1})
    assert check_files({"train": open_source(tmp_path / "fixed.jsonl")}).findings == ()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"\xef\xbb\xbf" + lines(good(1)), ["byte order mark left out"]),
        ("a.jsonl", lines(good(1)).replace(b"\n", b"\r\n"), ["line ends written as \\n"]),
        (
            "a.jsonl",
            lines(good(1)).decode().encode("utf-16"),
            ["utf-16-le written as UTF-8", "byte order mark left out"],
        ),
        ("a.jsonl.gz", gzip.compress(lines(good(1))), ["unpacked"]),
        ("a.json", json.dumps([good(1)]).encode(), ["json written as JSON Lines"]),
        (
            "a.csv",
            table(rows=1).encode(),
            ["csv written as JSON Lines", "line ends written as \\n"],
        ),
    ],
)
def test_what_changes_about_the_file_as_a_whole_is_said(
    name: str, content: bytes, said: list[str], tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    done = repair_file(open_source(path), tmp_path / "out.jsonl")
    assert [each.what for each in done.changes] == said
    assert (tmp_path / "out.jsonl").read_bytes() == lines(good(1))


def test_values_that_json_does_not_have_are_written_and_said(tmp_path: Path) -> None:
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    row = {**good(1), "at": datetime.datetime(2024, 1, 2), "score": float("nan")}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    done = repair_file(open_source(tmp_path / "a.parquet"), tmp_path / "out.jsonl")
    assert [each.what for each in done.changes] == [
        "parquet written as JSON Lines",
        "NaN or infinity written as null",
        "a value of type datetime written as text",
    ]
    [read] = read_rows(tmp_path / "out.jsonl")
    assert read.value == {**good(1), "at": "2024-01-02 00:00:00", "score": None}


def test_half_a_surrogate_pair_beside_the_conversation_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({**good(1), "note": "\ud83d"}) + "\n")
    repair_file(open_source(tmp_path / "a.jsonl"), tmp_path / "out.jsonl")
    [read] = read_rows(tmp_path / "out.jsonl")
    assert read.value == {**good(1), "note": "\ud83d"}


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(good(1)))
    with pytest.raises(AlreadyExists, match="is there already"):
        repair_file(open_source(path), path)
    assert path.read_bytes() == lines(good(1))


def test_a_copy_that_could_not_be_finished_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(good(1)))
    source = open_source(path)

    def meddle(row: dict[str, Any]) -> list[Any]:
        path.write_bytes(lines(good(2), good(3)))
        return []

    with pytest.raises(DataError, match="written to while it was read"):
        repair_file(source, tmp_path / "out.jsonl", further=meddle)
    assert [each.name for each in tmp_path.iterdir()] == ["a.jsonl"]
