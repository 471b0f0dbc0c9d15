"""The preprocess step: tokens and marks out of conversations, and no row left out in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import pyarrow as pa

from tests.models import tiny_tokenizer
from tests.steps import step_context
from tuneloop import lm
from tuneloop.core.digest import of_path
from tuneloop.core.errors import DataError, Unsupported
from tuneloop.steps import preprocess
from tuneloop.steps.context import StepContext


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_tokenizer(tmp_path_factory.mktemp("model"), "phi3")
    (folder / "config.json").write_text(json.dumps({"model_type": "phi3", "max_position_embeddings": 256}))
    return folder


def talk(number: int, words: int = 3) -> dict[str, Any]:
    return {
        "prompt": "ignored",
        "messages": [
            {"role": "user", "content": f"Question {number}?"},
            {"role": "assistant", "content": " ".join(["yes"] * words) + f" {number} é 🙂"},
        ],
    }


def write(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(folder: Path, model: Path, files: dict[str, Path], **parameters: Any) -> StepContext:
    context = step_context(
        folder,
        "preprocess",
        inputs={"model": model, **files},
        outputs={"dataset": "dataset_folder"},
        parameters=parameters,
    )
    try:
        preprocess.run(context)
    finally:
        context.close()
    return context


def read(context: StepContext, split: str) -> list[dict[str, Any]]:
    with pa.OSFile(str(context.output("dataset") / f"{split}.arrow")) as source:
        return pa.ipc.open_file(source).read_all().to_pylist()


def stats(context: StepContext) -> dict[str, Any]:
    return json.loads((context.output("dataset") / "stats.json").read_text())


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {
        "train": write(tmp_path / "train.jsonl", [talk(n) for n in range(7)]),
        "validation": write(tmp_path / "validation.jsonl", [talk(n) for n in range(2)]),
        "test": write(tmp_path / "test.jsonl", [talk(n) for n in range(3)]),
    }


def test_ids_equal_apply_chat_template_and_marks_spell_the_answers(
    tmp_path: Path, model: Path, files: dict[str, Path]
) -> None:
    context = run(tmp_path / "step", model, files)
    tokenizer = lm.load_tokenizer(model)
    rows = read(context, "train")
    assert [row["row"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    for number, row in enumerate(rows):
        theirs = tokenizer.apply_chat_template(talk(number)["messages"])["input_ids"]
        assert row["input_ids"] == theirs
        learned = [token for token, mark in zip(row["input_ids"], row["learn"], strict=True) if mark]
        assert tokenizer.decode(learned) == talk(number)["messages"][1]["content"] + "<|end|>"


def test_statistics_count_every_split(tmp_path: Path, model: Path, files: dict[str, Path]) -> None:
    context = run(tmp_path / "step", model, files)
    rows = read(context, "train")
    about = stats(context)
    assert about["splits"]["train"] == {
        "rows": 7,
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "learned_tokens": sum(sum(row["learn"]) for row in rows),
        "longest": max(len(row["input_ids"]) for row in rows),
        "cut_rows": 0,
        "first_cut_line": None,
        "special_text_rows": 0,
    }
    assert about["splits"]["test"]["rows"] == 3
    assert about["template_digest"] == lm.load_template(model).digest
    assert about["max_seq_length"] == 256
    assert context.summary["train_rows"] == 7
    assert context.warnings == []


def test_equal_inputs_give_equal_bytes(tmp_path: Path, model: Path, files: dict[str, Path]) -> None:
    digests = [of_path(run(tmp_path / name, model, files).output("dataset")) for name in "ab"]
    assert digests[0] == digests[1]


def test_rows_are_the_same_whatever_the_batch_size(
    tmp_path: Path, model: Path, files: dict[str, Path]
) -> None:
    one = run(tmp_path / "a", model, files, batch_size=2)
    other = run(tmp_path / "b", model, files, batch_size="1000")
    assert read(one, "train") == read(other, "train")


def test_blank_lines_and_a_byte_order_mark_are_skipped_and_lines_still_counted(
    tmp_path: Path, model: Path, files: dict[str, Path]
) -> None:
    rows = ["\ufeff" + json.dumps(talk(0)), "", json.dumps(talk(1)), "  "]
    context = run(tmp_path / "step", model, {**files, "train": write(tmp_path / "b.jsonl", rows)})
    assert [row["row"] for row in read(context, "train")] == [1, 3]


# ---------------------------------------------------------------- bad rows


def test_every_bad_row_is_reported_with_file_line_field_rule_and_fix(
    tmp_path: Path, model: Path, files: dict[str, Path]
) -> None:
    user = {"role": "user", "content": "x"}
    rows = [
        talk(0),
        '{"messages": [',
        {"prompt": "x"},
        {"messages": [{"role": "robot", "content": "x"}, {"role": "assistant", "content": "y"}]},
        {"messages": [user, {"role": "assistant", "content": ""}]},
        {"messages": [user]},
        "[1, 2]",
    ]
    bad = {"train": write(tmp_path / "bad.jsonl", rows), "test": write(tmp_path / "t.jsonl", ["{}"])}
    with pytest.raises(DataError) as caught:
        run(tmp_path / "step", model, {**files, **bad})
    found = [(each["file"], each["line"], each["field"], each["rule"]) for each in caught.value.details]
    assert found == [
        ("bad.jsonl", 2, "", "json"),
        ("bad.jsonl", 3, "messages", "messages_present"),
        ("bad.jsonl", 4, "messages[0].role", "role_known"),
        ("bad.jsonl", 5, "messages[1].content", "content_not_empty"),
        ("bad.jsonl", 6, "messages", "assistant_turn"),
        ("bad.jsonl", 7, "", "row_is_object"),
        ("t.jsonl", 1, "messages", "messages_present"),
    ]
    assert all(each["fix"] for each in caught.value.details)
    assert "bad.jsonl line 2: the row: found " in caught.value.message
    assert "(7 findings; the first 5 are shown)" in caught.value.message


def test_bytes_that_are_no_utf8_are_reported_with_their_line(
    tmp_path: Path, model: Path, files: dict[str, Path]
) -> None:
    bad = tmp_path / "latin.jsonl"
    bad.write_bytes(json.dumps(talk(0)).encode() + b'\n{"messages": "\xe9"}\n')
    with pytest.raises(DataError) as caught:
        run(tmp_path / "step", model, {**files, "train": bad})
    assert [(each["line"], each["rule"]) for each in caught.value.details] == [(2, "utf8")]


def test_a_row_that_the_template_refuses_is_reported(
    tmp_path: Path, files: dict[str, Path], model: Path
) -> None:
    folder = tiny_tokenizer(tmp_path / "model", "phi3")
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    template = folder / "chat_template.jinja"
    template.write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}" + template.read_text()
    )
    row = {"messages": [{"role": "system", "content": "s"}, *talk(0)["messages"]]}
    with pytest.raises(
        DataError, match=r"line 1: messages: found roles system.*System role not supported \(rule template\)"
    ):
        run(tmp_path / "step", folder, {**files, "test": write(tmp_path / "s.jsonl", [row])})


def test_reading_stops_at_a_hundred_findings(tmp_path: Path, model: Path, files: dict[str, Path]) -> None:
    with pytest.raises(DataError, match="100 findings or more") as caught:
        run(tmp_path / "step", model, {**files, "train": write(tmp_path / "bad.jsonl", ["{}"] * 150)})
    assert len(caught.value.details) == 100


def test_a_parquet_file_is_refused_by_name(tmp_path: Path, model: Path, files: dict[str, Path]) -> None:
    file = tmp_path / "train.parquet"
    file.write_bytes(b"PAR1....PAR1")
    with pytest.raises(Unsupported, match=r"train\.parquet is a Parquet file"):
        run(tmp_path / "step", model, {**files, "train": file})


# ---------------------------------------------------------------- length


def test_longer_rows_are_cut_and_said(tmp_path: Path, model: Path, files: dict[str, Path]) -> None:
    train = write(tmp_path / "long.jsonl", [talk(0), talk(1, words=40), talk(2, words=60)])
    context = run(tmp_path / "step", model, {**files, "train": train}, max_seq_length=64)
    assert [len(row["input_ids"]) for row in read(context, "train")][1:] == [64, 64]
    assert stats(context)["splits"]["train"]["cut_rows"] == 2
    assert any("2 of 3 train rows are longer than 64 tokens" in warning for warning in context.warnings)
    assert any("line 2" in warning for warning in context.warnings)


def test_a_row_cut_before_its_first_answer_is_reported(
    tmp_path: Path, model: Path, files: dict[str, Path]
) -> None:
    long = {
        "messages": [
            {"role": "user", "content": "why " * 40},
            {"role": "assistant", "content": "so"},
        ]
    }
    train = write(tmp_path / "long.jsonl", [talk(0), long])
    with pytest.raises(DataError) as caught:
        run(tmp_path / "step", model, {**files, "train": train}, max_seq_length=48)
    assert [(each["line"], each["rule"]) for each in caught.value.details] == [(2, "learned_token")]


def test_more_tokens_than_the_model_reads_are_refused(
    tmp_path: Path, model: Path, files: dict[str, Path]
) -> None:
    with pytest.raises(Unsupported, match="max_seq_length is 257, and the model reads at most 256 tokens"):
        run(tmp_path / "step", model, files, max_seq_length=257)


def test_padding_is_accepted_with_a_warning(tmp_path: Path, model: Path, files: dict[str, Path]) -> None:
    context = run(tmp_path / "step", model, files, pad_to_max_length="true")
    assert any("none is padded" in warning for warning in context.warnings)


def test_text_of_special_tokens_is_said(tmp_path: Path, model: Path, files: dict[str, Path]) -> None:
    row = {"messages": [{"role": "user", "content": "what is <|endoftext|>?"}, talk(0)["messages"][1]]}
    context = run(tmp_path / "step", model, {**files, "test": write(tmp_path / "s.jsonl", [row])})
    assert any("1 test rows hold the text of a special token" in warning for warning in context.warnings)


# ---------------------------------------------------------------- carving


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({"train": 10}, {"train": (0, 8), "validation": (8, 9), "test": (9, 10)}),
        ({"train": 23}, {"train": (0, 19), "validation": (19, 21), "test": (21, 23)}),
        ({"train": 10, "test": 4}, {"train": (0, 8), "validation": (8, 10)}),
        ({"train": 11, "validation": 3}, {"train": (0, 9), "test": (9, 11)}),
        ({"train": 5, "validation": 3, "test": 4}, {"train": (0, 5), "validation": (0, 3), "test": (0, 4)}),
        ({"train": 3}, {"train": (0, 1), "validation": (1, 2), "test": (2, 3)}),
    ],
)
def test_missing_splits_are_carved_from_the_end_of_train(rows: dict, expected: dict) -> None:
    shares = preprocess.plan_splits(rows)
    for name, (start, stop) in expected.items():
        assert (shares[name].start, shares[name].stop) == (start, stop)
    assert list(shares) == ["train", "validation", "test"]
    assert shares["test"].source == ("test" if "test" in rows else "train")


@pytest.mark.parametrize(
    "rows", [{"train": 2}, {"train": 1, "test": 5}, {"train": 0, "validation": 1, "test": 1}]
)
def test_too_few_rows_are_refused(rows: dict) -> None:
    with pytest.raises(DataError, match=f"has {rows['train']} rows"):
        preprocess.plan_splits(rows)


def test_carved_rows_keep_their_lines_and_are_said(
    tmp_path: Path, model: Path, files: dict[str, Path]
) -> None:
    train = write(tmp_path / "all.jsonl", [talk(n) for n in range(10)])
    context = run(tmp_path / "step", model, {"train": train, "test": files["test"]})
    assert [row["row"] for row in read(context, "train")] == list(range(1, 9))
    assert [row["row"] for row in read(context, "validation")] == [9, 10]
    assert len(read(context, "test")) == 3
    (warning,) = context.warnings
    assert "rows 9 to 10 of the training file" in warning
    assert "file order" in warning
