"""Every rule that reading and a single row can break, over all formats."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.data.corpus import CASES, Case
from tuneloop.core.data.check import check_files
from tuneloop.core.data.reading import open_source, read_rows
from tuneloop.core.data.rules import RULES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_file_gives_its_one_finding_at_its_place(case: Case, tmp_path: Path) -> None:
    path = tmp_path / case.file
    case.write(path)
    report = check_files({"train": open_source(path, case.file)})
    found = [(each.rule, each.row, each.line, each.field) for each in report.findings if each.row == case.row]
    assert found[0] == (case.rule, case.row, case.line, case.field)
    assert report.rows == case.rows
    first = report.findings[0]
    assert first.fix
    assert len(first.value) < 300
    assert f"{case.file} {first.place} {first.line}" in first.sentence()
    is_error = RULES[case.rule].severity == "error"
    assert report.is_good is not is_error


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_rows_around_a_bad_one_are_read(case: Case, tmp_path: Path) -> None:
    path = tmp_path / case.file
    case.write(path)
    rows = list(read_rows(path))
    assert [row.number for row in rows] == list(range(1, case.rows + 1))
    assert sorted(row.line for row in rows) == [row.line for row in rows]


def test_the_corpus_is_large_and_covers_what_can_be_told_of_rows() -> None:
    assert len({case.name for case in CASES}) == len(CASES) > 45
    told = {rule.name for rule in RULES.values() if rule.needs in ("file", "row")}
    elsewhere = {"readable", "duplicate", "leak", "opening_leak"}
    assert {case.rule for case in CASES} == told - elsewhere
    assert {case.file.removesuffix(".gz") for case in CASES} == {
        "a.jsonl",
        "a.json",
        "a.csv",
        "a.tsv",
        "a.parquet",
    }
