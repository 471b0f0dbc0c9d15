"""What only shows over whole files: duplicates, leakage, counts, and the report."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.corpus import good, lines, talk
from tuneloop.core.chat import Finding
from tuneloop.core.data.check import Checker, Part, check_chunk, check_files
from tuneloop.core.data.reading import open_source
from tuneloop.core.data.report import Report, RowFinding
from tuneloop.core.data.rows import Row

BAD = {"messages": []}


def files(folder: Path, **rows: list[dict[str, Any]]) -> dict[str, Any]:
    made = {}
    for role, content in rows.items():
        path = folder / f"{role}.jsonl"
        path.write_bytes(lines(*content))
        made[role] = open_source(path, path.name)
    return made


def told(report: Report, rule: str) -> list[tuple[str, int, str]]:
    return [(each.file, each.line, each.value) for each in report.findings if each.rule == rule]


def spaced(row: dict[str, Any]) -> dict[str, Any]:
    """The same conversation as somebody else wrote it down."""
    return {
        "other": 1,
        "messages": [{**each, "content": f" {each['content']}\n"} for each in row["messages"]],
    }


def test_good_files_have_an_empty_report(tmp_path: Path) -> None:
    report = check_files(files(tmp_path, train=[good(1), good(2)], test=[good(3)]))
    assert (report.is_good, report.rows, report.bad_rows, report.findings, report.by_rule) == (
        True,
        3,
        0,
        (),
        (),
    )


def test_a_conversation_that_is_there_twice_is_a_warning_at_the_later_row(tmp_path: Path) -> None:
    rows = [good(1), good(2), spaced(good(1)), good(3), good(2), good(1)]
    report = check_files(files(tmp_path, train=rows))
    assert told(report, "duplicate") == [
        ("train.jsonl", 3, "the same conversation as train.jsonl line 1"),
        ("train.jsonl", 5, "the same conversation as train.jsonl line 2"),
        ("train.jsonl", 6, "the same conversation as train.jsonl line 1"),
    ]
    assert (report.is_good, report.bad_rows, report.warnings, report.errors) == (True, 0, 3, 0)


def test_one_opening_with_several_answers_is_no_finding_in_one_file(tmp_path: Path) -> None:
    user, answer = good(1)["messages"]
    other = {"messages": [user, {**answer, "content": "In Andalusia."}]}
    assert check_files(files(tmp_path, train=[good(1), other])).findings == ()


def test_bad_rows_are_duplicates_of_nothing(tmp_path: Path) -> None:
    report = check_files(files(tmp_path, train=[BAD, BAD], test=[BAD]))
    assert {each.rule for each in report.findings} == {"assistant_turn"}


def test_a_conversation_in_two_splits_is_an_error_of_the_later_one(tmp_path: Path) -> None:
    report = check_files(
        files(tmp_path, train=[good(1), good(2)], validation=[good(3)], test=[good(4), good(2)])
    )
    assert told(report, "leak") == [("test.jsonl", 2, "the conversation of train.jsonl line 2 (train)")]
    assert told(report, "opening_leak") == []
    assert (report.is_good, report.bad_rows) == (False, 1)
    assert [file.bad_rows for file in report.files] == [0, 0, 1]


def test_a_row_that_leaks_from_two_splits_is_one_bad_row(tmp_path: Path) -> None:
    report = check_files(files(tmp_path, train=[good(1)], validation=[good(1)], test=[good(1)]))
    assert len(told(report, "leak")) == 3
    assert report.bad_rows == 2


def test_an_opening_line_in_two_splits_is_a_warning(tmp_path: Path) -> None:
    user, answer = good(2)["messages"]
    again = {"messages": [{**user, "content": user["content"].upper()}, {**answer, "content": "No idea."}]}
    report = check_files(files(tmp_path, train=[good(1), good(2)], test=[again]))
    assert told(report, "opening_leak") == [
        ("test.jsonl", 1, "the opening line of train.jsonl line 2 (train)")
    ]
    assert report.is_good


def test_files_of_one_role_are_one_set(tmp_path: Path) -> None:
    made = files(tmp_path, first=[good(1)], second=[good(2), good(1)])
    checker = Checker()
    for source in made.values():
        checker.begin("train", source)
        for chunk in source.chunks():
            checker.add(check_chunk(chunk))
    report = checker.finish()
    assert told(report, "duplicate") == [("second.jsonl", 2, "the same conversation as first.jsonl line 1")]
    assert told(report, "leak") == []


def test_lines_are_told_where_rows_are_not_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(good(1), "", "", good(2), good(1)))
    report = check_files({"train": open_source(path, "a.jsonl")})
    assert told(report, "duplicate") == [("a.jsonl", 5, "the same conversation as a.jsonl line 1")]
    assert [each.row for each in report.findings] == [3]


def test_lines_are_told_where_the_first_line_is_blank(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines("", good(1), good(1)))
    report = check_files({"train": open_source(path, "a.jsonl")})
    assert told(report, "duplicate") == [("a.jsonl", 3, "the same conversation as a.jsonl line 2")]


def test_places_in_an_array_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([good(1), good(1)], indent=1))
    [finding] = check_files({"train": open_source(path, "a.json")}).findings
    assert finding.sentence().startswith(
        "a.json row 2: found the same conversation as a.json row 1 (rule duplicate)"
    )


def test_a_sentence_says_file_line_id_field_value_rule_and_fix(tmp_path: Path) -> None:
    row = {"prompt_id": "x" * 64, "messages": [good(1)["messages"][0], {"role": "assistant", "content": ""}]}
    [finding] = check_files(files(tmp_path, train=[good(1), row])).findings
    assert finding.id == "x" * 64
    assert finding.sentence() == (
        'train.jsonl line 2 (id xxxxxxxxxxxx...): messages[1].content: found "" (rule content_not_empty). '
        "Write the text, or remove the message."
    )


def test_the_budget_for_bad_rows_is_counted_in_rows(tmp_path: Path) -> None:
    two = {"messages": [{"role": "x", "content": ""}]}
    made = files(tmp_path, train=[good(1), two, two])
    assert not check_files(made, budget=1).is_good
    report = check_files(made, budget=2)
    assert (report.is_good, report.bad_rows, report.findings_count) == (True, 2, 6)


def test_findings_beyond_the_first_are_counted_and_given_to_the_listener(tmp_path: Path) -> None:
    heard: list[RowFinding] = []
    report = check_files(files(tmp_path, train=[BAD] * 30), most_findings=4, listen=heard.append)
    assert (len(report.findings), report.findings_count, len(heard)) == (4, 30, 30)
    assert [(each.rule, each.findings, each.severity) for each in report.by_rule] == [
        ("assistant_turn", 30, "error")
    ]


def test_rules_are_summed_up_with_errors_and_the_most_frequent_first(tmp_path: Path) -> None:
    user, answer = good(1)["messages"]
    rows = [talk(user, answer, user), {"a": 1}, BAD, {"b": 1}]
    report = check_files(files(tmp_path, train=rows))
    assert [(each.rule, each.findings) for each in report.by_rule] == [
        ("messages_present", 2),
        ("assistant_turn", 1),
        ("last_turn", 1),
    ]


def test_further_rules_see_the_rows_without_errors_only(tmp_path: Path) -> None:
    seen = []

    def further(row: Row) -> list[Finding]:
        seen.append(row.number)
        return [Finding("template", "messages", "x", "y")] if row.number == 3 else []

    source = files(tmp_path, train=[good(1), BAD, good(3)])["train"]
    checker = Checker()
    checker.begin("train", source)
    for chunk in source.chunks():
        checker.add(check_chunk(chunk, further=further))
    report = checker.finish()
    assert seen == [1, 3]
    assert [(each.rule, each.line) for each in report.findings] == [("assistant_turn", 2), ("template", 3)]
    assert report.bad_rows == 2


def test_a_rule_that_nobody_listed_is_an_error() -> None:
    part = Part()
    part.add(Row(1, 1, good(1)), [Finding("new_rule", "", "x", "y")])
    assert part.bad_rows == 1


def test_parts_travel_between_processes(tmp_path: Path) -> None:
    [chunk] = files(tmp_path, train=[good(1), BAD])["train"].chunks()
    part = check_chunk(chunk)
    assert pickle.loads(pickle.dumps(part)) == part
    assert len(part.keys) == 2 * len(part.lines) == 4


def test_statistics_count_the_good_rows(tmp_path: Path) -> None:
    user, answer = {"role": "user", "content": "añb"}, {"role": "assistant", "content": "four"}
    system = {"role": "system", "content": "s"}
    rows = [
        {"id": 1, "messages": [user, answer]},
        {"id": "x", "messages": [system, user, {**answer, "weight": 0}, user, answer], "score": 0.5},
        BAD,
    ]
    [file] = check_files(files(tmp_path, train=rows)).files
    assert file.statistics.model_dump() == {
        "rows": 2,
        "messages": 7,
        "characters": 7 + 15,
        "learned_characters": 8,
        "messages_by_role": {"system": 1, "user": 3, "assistant": 3},
        "most_messages": 5,
        "most_characters": 15,
        "columns": {"id": "integer | string", "messages": "list", "score": "number"},
    }


def test_a_report_is_json_and_back(tmp_path: Path) -> None:
    report = check_files(files(tmp_path, train=[good(1), BAD], test=[good(1)]))
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_memory_is_sixteen_bytes_a_row() -> None:
    part = Part()
    for number in range(100):
        part.add(Row(number + 1, number + 1, good(number)), [])
    assert len(part.keys) * part.keys.itemsize == 1600


@pytest.mark.parametrize("weight", [0, 1])
def test_a_weight_is_part_of_what_a_conversation_is(tmp_path: Path, weight: int) -> None:
    user, answer = good(1)["messages"]
    rows = [
        {"messages": [user, answer, user, answer]},
        talk(user, {**answer, "weight": weight}, user, answer),
    ]
    report = check_files(files(tmp_path, train=rows))
    assert len(told(report, "duplicate")) == weight
