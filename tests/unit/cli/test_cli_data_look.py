"""`tuneloop data check | stats | show | list | register | describe`, with the step process that they run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models import tiny_tokenizer
from tests.unit.cli.conftest import Ran
from tests.unit.cli.fake_api import FakeApi

Command = Callable[..., Ran]


def talk(question: str, answer: str) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"id": question, "messages": messages})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "talks.jsonl"
    file.write_text("\n".join([talk("Hi", "Hello"), talk("Who?", "  "), talk("Why?", "Because " * 20)]))
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_tokenizer(tmp_path_factory.mktemp("model"), "smollm2")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 256}))
    return folder


def test_a_bad_row_is_told_with_its_place_and_fails_the_command(
    tuneloop_command: Command, data: Path
) -> None:
    ran = tuneloop_command("data", "check", str(data))
    assert ran.code == 2
    assert f"{data} line 2 (id Who?): messages[1].content: found" in ran.out
    assert "1 of 3 rows is bad. With --fix" in ran.out
    assert "name a --model" in ran.out


def test_within_the_budget_it_is_a_success(tuneloop_command: Command, data: Path) -> None:
    ran = tuneloop_command("data", "check", str(data), "--bad-rows", "1")
    assert ran.code == 0
    assert "1 of 3 rows is bad, 1 allowed." in ran.out


def test_with_a_model_lengths_and_what_would_be_cut_are_told(
    tuneloop_command: Command, data: Path, model: Path
) -> None:
    ran = tuneloop_command(
        "data", "check", str(data), "--model", str(model), "--max-seq-length", "100", "--long-rows", "cut"
    )
    assert "1 row is longer than max_seq_length, 100 tokens." in ran.out
    assert "cut (chosen)" in ran.out
    assert "name a --model" not in ran.out


def test_all_findings_go_to_a_file_of_their_own(
    tuneloop_command: Command, data: Path, tmp_path: Path
) -> None:
    tuneloop_command("data", "check", str(data), "--findings", str(tmp_path / "found.jsonl"))
    (found,) = map(json.loads, (tmp_path / "found.jsonl").read_text().splitlines())
    assert (found["line"], found["rule"]) == (2, "content_not_empty")


def test_fix_writes_a_copy_beside_the_file_and_never_over_one(tuneloop_command: Command, data: Path) -> None:
    ran = tuneloop_command("data", "check", str(data), "--fix")
    fixed = data.with_name("talks.fixed.jsonl")
    assert len(fixed.read_text().splitlines()) == 2
    assert f"{fixed}: 2 of 3 rows written" in ran.out
    assert "line 2: row dropped (content_not_empty)" in ran.out
    assert len(data.read_text().splitlines()) == 3
    again = tuneloop_command("data", "check", str(data), "--fix")
    assert (again.code, "talks.fixed.jsonl is there already" in again.err) == (4, True)


def test_a_length_without_a_model_is_refused(tuneloop_command: Command, data: Path) -> None:
    ran = tuneloop_command("data", "check", str(data), "--max-seq-length", "60")
    assert (ran.code, "Add --model" in ran.err) == (2, True)


def test_the_same_file_twice_is_refused(tuneloop_command: Command, data: Path) -> None:
    assert tuneloop_command("data", "check", str(data), str(data)).code == 2


def test_statistics_leave_bad_rows_out_and_say_so(tuneloop_command: Command, data: Path, model: Path) -> None:
    ran = tuneloop_command("data", "stats", str(data), "--model", str(model))
    assert ran.code == 0
    assert "2 (1 bad, left out)" in ran.out
    assert "median" in ran.out


def test_what_is_learned_of_a_row_stands_in_brackets_where_there_are_no_colours(
    tuneloop_command: Command, data: Path, model: Path
) -> None:
    ran = tuneloop_command("data", "show", str(data), "--model", str(model))
    assert "<|im_start|>assistant\n[[Hello<|im_end|>]]" in ran.out
    assert "learned (" in ran.out


def test_on_a_terminal_what_is_learned_is_green(
    tuneloop_command: Command, data: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    ran = tuneloop_command("data", "show", str(data), "--model", str(model))
    assert "\x1b[32mHello<|im_end|>" in ran.out


def test_a_row_that_cannot_be_learned_is_shown_with_the_reason(tuneloop_command: Command, data: Path) -> None:
    ran = tuneloop_command("data", "show", str(data), "--row", "2")
    assert "user: Who?" in ran.out
    assert "(rule content_not_empty)" in ran.out


def test_a_model_that_is_neither_card_nor_folder_is_told(
    tuneloop_command: Command, api: FakeApi, data: Path
) -> None:
    from tuneloop.core.errors import NotFound

    api.errors["GET", "/api/cards/nonsense"] = NotFound("There is no base model 'nonsense'.")
    ran = tuneloop_command("data", "check", str(data), "--model", "nonsense")
    assert (ran.code, "no base model 'nonsense'" in ran.err) == (3, True)


def test_registered_data_is_listed_and_described(tuneloop_command: Command, data: Path) -> None:
    listed = tuneloop_command("data", "list").out
    assert all(word in listed for word in ("support", "0123456789ab", "CC-BY-4.0"))
    said = tuneloop_command("data", "register", str(data), "--name", "support").out
    assert said == "support:0123456789ab: 2 rows, jsonl\n"
    described = tuneloop_command("data", "describe", "support").out
    assert "2, 1 of them bad" in described
    assert "1 user, 1 assistant" in described


@pytest.mark.parametrize("place", ["loop", "folder", "gone.jsonl"])
def test_what_is_no_file_is_told_as_such(tuneloop_command: Command, tmp_path: Path, place: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    ran = tuneloop_command("data", "check", str(tmp_path / place))
    assert (ran.code, str(tmp_path / place) in ran.err) == (3, True)


def test_a_name_with_quotes_and_spaces_is_read(tuneloop_command: Command, tmp_path: Path) -> None:
    file = tmp_path / 'it\'s "mine" \\ now.jsonl'
    file.write_text(talk("Hi", "Hello"))
    assert tuneloop_command("data", "check", str(file)).code == 0
