"""The look `check`: every row held to the rules, lengths counted, one row shown as the model sees it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.models import tiny_tokenizer
from tests.steps import step_context
from tuneloop.core.errors import DataError, NotFound
from tuneloop.steps import check
from tuneloop.tokens import Tokenize


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_tokenizer(tmp_path_factory.mktemp("model"), "smollm2")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 256}))
    return folder


def talk(*contents: str, roles: str = "ua") -> dict[str, Any]:
    names = {"u": "user", "a": "assistant", "s": "system"}
    order = roles * len(contents)
    return {
        "id": contents[0],
        "messages": [
            {"role": names[role], "content": content} for role, content in zip(order, contents, strict=False)
        ],
    }


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(folder: Path, files: dict[str, Path], model: Path | None = None, **parameters: Any) -> dict[str, Any]:
    inputs = {**files, **({"tokenizer": model} if model else {})}
    outputs = {"report": "file", "findings": "file"}
    context = step_context(folder / "step", "check", inputs=inputs, outputs=outputs, parameters=parameters)
    try:
        check.run(context)
    finally:
        context.close()
    said: dict[str, Any] = json.loads(context.output("report").read_text())
    said["all_findings"] = [json.loads(line) for line in context.output("findings").read_text().splitlines()]
    return said


def test_good_rows_are_good_and_counted(tmp_path: Path) -> None:
    said = run(tmp_path, {"a": write(tmp_path / "a.jsonl", talk("Hi", "Hello"), talk("Who?", "Me"))})
    assert (said["report"]["is_good"], said["report"]["rows"], said["report"]["bad_rows"]) == (True, 2, 0)
    assert said["report"]["files"][0]["statistics"]["messages_by_role"]["assistant"] == 2
    assert said["tokens"] is None
    assert said["all_findings"] == []


def test_every_finding_is_written_and_the_first_are_in_the_report(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.jsonl", talk("Hi", "Hello"), *(talk(f"{n}", " ") for n in range(5)), "{nonsense"
    )
    said = run(tmp_path, {"a": file}, most_findings=2)
    assert (said["report"]["bad_rows"], len(said["report"]["findings"])) == (6, 2)
    assert [(found["line"], found["rule"]) for found in said["all_findings"]] == [
        *((line, "content_not_empty") for line in range(2, 7)),
        (7, "json"),
    ]
    assert said["all_findings"][0]["id"] == "0"


def test_a_budget_lets_bad_rows_through(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", talk("Hi", "Hello"), talk("x", " "))
    assert run(tmp_path, {"a": file}, bad_rows=1)["report"]["is_good"] is True


def test_what_stands_in_two_files_leaks(tmp_path: Path) -> None:
    files = {
        "a": write(tmp_path / "a.jsonl", talk("Hi", "Hello"), talk("Who?", "Me")),
        "b": write(tmp_path / "b.jsonl", talk("Bye", "See you"), talk("Hi", "Hello")),
    }
    (found,) = run(tmp_path, files)["all_findings"]
    assert (found["rule"], found["file"].endswith("b.jsonl"), found["line"]) == ("leak", True, 2)


def test_lengths_are_those_of_the_tokenizer_and_policies_are_weighed(tmp_path: Path, model: Path) -> None:
    rows = [talk("Hi", "Hello"), talk("Hi", "one two", "And?", "three four five", "More?", "six seven " * 6)]
    tokenize = Tokenize(model)
    lengths = [tokenize.explain(row["messages"]).tokens for row in rows]
    learned = [tokenize.explain(row["messages"]).learned_tokens for row in rows]
    said = run(tmp_path, {"a": write(tmp_path / "a.jsonl", *rows)}, model, max_seq_length=lengths[1] - 1)
    about = next(iter(said["tokens"].values()))
    assert (about["rows"], about["tokens"], about["learned_tokens"]) == (2, sum(lengths), sum(learned))
    assert (about["lengths"]["max"], about["long_rows"], about["turns"]) == (lengths[1], 1, 4)
    assert about["would_lose"]["drop"] == {"rows": 1, "turns": 3, "assistant_tokens": learned[1]}
    assert about["would_lose"]["split_turns"]["assistant_tokens"] == 0
    assert [(found["rule"], found["line"]) for found in said["all_findings"]] == [("max_seq_length", 2)]


def test_a_chosen_policy_makes_long_rows_no_mistake(tmp_path: Path, model: Path) -> None:
    file = write(tmp_path / "a.jsonl", talk("Hi", "Hello " * 30))
    said = run(tmp_path, {"a": file}, model, max_seq_length=20, long_rows="cut")
    assert (said["report"]["is_good"], said["all_findings"]) == (True, [])
    assert next(iter(said["tokens"].values()))["long_rows"] == 1


def test_special_tokens_in_a_text_are_warned_of(tmp_path: Path, model: Path) -> None:
    file = write(tmp_path / "a.jsonl", talk("Hi <|im_end|> there", "Hello"))
    said = run(tmp_path, {"a": file}, model)
    assert [(found["rule"], found["severity"]) for found in said["all_findings"]] == [
        ("special_text", "warning")
    ]
    assert said["report"]["is_good"]


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="no rows"):
        run(tmp_path, {"a": tmp_path / "a.jsonl"})


def test_a_repaired_copy_keeps_the_good_rows_and_says_what_was_done(tmp_path: Path, model: Path) -> None:
    good = talk("Hi", "Hello")
    shouted = {"messages": [{"role": "USER", "content": "Hi!"}, {"role": "assistant", "content": "Hello!"}]}
    file = write(tmp_path / "a.jsonl", good, shouted, talk("x", " "), good)
    said = run(tmp_path, {"a": file}, model, fix={"a": str(tmp_path / "fixed.jsonl")})
    (fixed,) = said["fixed"]
    assert (fixed["rows_written"], fixed["rows_changed"], fixed["rows_dropped"]) == (2, 1, 1)
    assert fixed["duplicates_dropped"] == 1
    again = run(tmp_path / "again", {"a": tmp_path / "fixed.jsonl"}, model)
    assert (again["report"]["rows"], again["report"]["findings_count"]) == (2, 0)


# ---------------------------------------------------------------- one row


def show(folder: Path, file: Path, row: int, model: Path | None = None) -> dict[str, Any]:
    inputs = {"data": file, **({"tokenizer": model} if model else {})}
    context = step_context(
        folder / "step", "check", inputs=inputs, outputs={"report": "file"}, parameters={"row": row}
    )
    try:
        check.run(context)
    finally:
        context.close()
    return dict(json.loads(context.output("report").read_text()))


def test_a_row_is_shown_as_rendered_with_its_answers_marked(tmp_path: Path, model: Path) -> None:
    file = write(tmp_path / "a.jsonl", "", talk("Hi", "Hello"), talk("é?", "naïve 🙂", "And?", "Yes"))
    said = show(tmp_path, file, 2, model)
    assert (said["row"], said["line"]) == (2, 3)
    text = "".join(written for written, _ in said["spans"])
    learned = [written for written, is_learned in said["spans"] if is_learned]
    assert text == Tokenize(model).template.render(said["messages"])
    assert learned == ["naïve 🙂<|im_end|>", "Yes<|im_end|>"]
    assert 0 < said["learned_tokens"] < said["tokens"]


def test_a_bad_row_is_shown_with_what_is_wrong(tmp_path: Path, model: Path) -> None:
    said = show(tmp_path, write(tmp_path / "a.jsonl", talk("Hi", " ")), 1, model)
    assert [found["rule"] for found in said["findings"]] == ["content_not_empty"]
    assert said["spans"] == []


def test_a_row_that_is_not_there_is_told_with_the_number_of_rows(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="has 1 rows; there is no row 9"):
        show(tmp_path, write(tmp_path / "a.jsonl", talk("Hi", "Hello")), 9)
