"""The page and the data about what of the SDK works say what the tests, the SDK's list and the routes say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tuneloop.server.azure import coverage
from tuneloop.server.azure.coverage import ABSENT, REFUSED, WORKS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("azure_coverage", ROOT / "docs" / "azure_coverage.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_coverage_is_what_the_tests_show(generate: ModuleType) -> None:
    stale = [path.relative_to(ROOT).as_posix() for path in generate.stale()]
    assert stale == [], "run: python docs/azure_coverage.py"


def test_every_call_has_a_state_and_what_works_has_its_proof() -> None:
    calls = coverage.calls()
    assert coverage.sdk().startswith("azure-ai-ml 1.")
    assert len(calls) > 150
    assert [call.name for call in calls] == sorted({call.name for call in calls})
    for call in (*calls, *coverage.other_calls()):
        assert call.state in coverage.STATES
        assert bool(call.tests) is (call.state != ABSENT), call
    assert sum(coverage.counts(calls).values()) == len(calls)


def test_the_counts_at_the_top_of_the_page_are_those_of_its_rows() -> None:
    page = (ROOT / "docs" / "reference" / "azure-coverage.md").read_text(encoding="utf-8")
    calls = coverage.calls()
    for call in calls:
        assert f"| `{call.name}` | {call.state} |" in page
    counted = coverage.counts(calls)
    assert f"Of the {len(calls)} public calls" in page
    assert f"**{counted[WORKS]} work**, **{counted[REFUSED]} are refused**" in page


def test_every_operation_says_what_it_does() -> None:
    for one in coverage.operations():
        assert one.summary, one
        assert one.state == REFUSED or one.module != "refused", one


def test_marks_are_read_as_they_stand(generate: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "TABLE: dict[str, str] = {'schedules.get': '1', 'schedules.list': '2'}\n"
        "@pytest.mark.verbs('jobs.list', 'jobs.get')\n"
        "def test_one(): ...\n"
        "@pytest.mark.refuses(*TABLE)\n"
        "@pytest.mark.parametrize('x', [pytest.param(1, marks=pytest.mark.verbs('jobs.stream'))])\n"
        "def test_two(x): ...\n"
        "@pytest.mark.verbs('never.seen')\n"
        "def helper(): ...\n"
    )
    assert list(generate.marks(tmp_path)) == [
        ("jobs.list", WORKS, "test_some.py::test_one"),
        ("jobs.get", WORKS, "test_some.py::test_one"),
        ("schedules.get", REFUSED, "test_some.py::test_two"),
        ("schedules.list", REFUSED, "test_some.py::test_two"),
        ("jobs.stream", WORKS, "test_some.py::test_two"),
    ]


def test_a_mark_that_names_no_call_is_told(
    generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test_some.py").write_text("@pytest.mark.verbs('jobs.lst')\ndef test_one(): ...\n")
    monkeypatch.setattr(generate, "marks", lambda real=generate.marks: real(tmp_path))
    with pytest.raises(SystemExit, match=r"test_some.py::test_one is marked with 'jobs.lst'"):
        generate.facts(["jobs.list"], "azure-ai-ml 1")


def test_a_call_that_works_in_one_form_and_is_refused_in_another_works(
    generate: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = [("jobs.list", REFUSED, "a"), ("jobs.list", WORKS, "b"), ("registry.models.get", WORKS, "c")]
    monkeypatch.setattr(generate, "marks", lambda: iter(shown))
    found = generate.facts(["jobs.get", "jobs.list"], "azure-ai-ml 1")
    assert found["calls"] == {
        "jobs.get": {"state": ABSENT, "tests": []},
        "jobs.list": {"state": WORKS, "tests": ["b"]},
    }
    assert found["others"] == {"registry.models.get": {"state": WORKS, "tests": ["c"]}}
