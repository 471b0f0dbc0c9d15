"""The preprocess step: tokens and marks out of conversations, and no row left out in silence."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
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
from tuneloop.training.data import Conversations


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
    rows = []
    for shard in sorted((context.output("dataset") / split).iterdir()):
        with pa.OSFile(str(shard)) as source:
            rows += pa.ipc.open_file(source).read_all().to_pylist()
    return rows


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
    lengths = [len(row["input_ids"]) for row in rows]
    assert about["splits"]["train"] == {
        "rows": 7,
        "conversations": 7,
        "turns": 7,
        "tokens": sum(lengths),
        "learned_tokens": sum(sum(row["learn"]) for row in rows),
        "lengths": {
            "median": sorted(lengths)[3],
            "p90": max(lengths),
            "p99": max(lengths),
            "max": max(lengths),
            "histogram": [{"up_to": 64, "conversations": 7}],
        },
        "long_rows": 0,
        "first_long_line": None,
        "truncated_rows": 0,
        "dropped_rows": 0,
        "lost_turns": 0,
        "lost_learned_tokens": 0,
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
    assert [(each["line"], each["rule"]) for each in caught.value.details] == [(2, "encoding")]


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
        DataError,
        match=r"line 1: messages\[0\]\.role: found .system. first.*role not supported \(rule template\)",
    ):
        run(tmp_path / "step", folder, {**files, "test": write(tmp_path / "s.jsonl", [row])})


def test_reading_stops_at_a_hundred_findings(tmp_path: Path, model: Path, files: dict[str, Path]) -> None:
    with pytest.raises(DataError, match="100 findings or more") as caught:
        run(tmp_path / "step", model, {**files, "train": write(tmp_path / "bad.jsonl", ["{}"] * 150)})
    assert len(caught.value.details) == 100


def test_parquet_csv_and_gzip_give_the_tokens_of_json_lines(
    tmp_path: Path, model: Path, files: dict[str, Path]
) -> None:
    import pyarrow.parquet as pq

    rows = [talk(n) for n in range(5)]
    pq.write_table(pa.table({"messages": [row["messages"] for row in rows]}), tmp_path / "t.parquet")
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(write(tmp_path / "t.jsonl", rows).read_bytes()))
    with open(tmp_path / "t.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["messages"], *([json.dumps(row["messages"])] for row in rows)])
    found = [
        [
            row["input_ids"]
            for row in read(run(tmp_path / name, model, {**files, "train": tmp_path / file}), "train")
        ]
        for name, file in (("a", "t.jsonl"), ("b", "t.parquet"), ("c", "t.jsonl.gz"), ("d", "t.csv"))
    ]
    assert found[0] == found[1] == found[2] == found[3]


def test_the_conversation_may_stand_in_another_column(
    tmp_path: Path, model: Path, files: dict[str, Path]
) -> None:
    other = [{"chat": talk(n)["messages"], "messages": 1} for n in range(3)]
    named = {name: write(tmp_path / f"{name}.jsonl", other) for name in files}
    context = run(tmp_path / "step", model, named, messages_column="chat")
    assert len(read(context, "train")) == 3
    assert stats(context)["messages_column"] == "chat"


def test_so_many_bad_rows_as_the_recipe_allows_are_dropped_and_told(
    tmp_path: Path, model: Path, files: dict[str, Path]
) -> None:
    bad = {**files, "train": write(tmp_path / "bad.jsonl", [talk(0), "{}", talk(2), "[]", talk(4)])}
    context = run(tmp_path / "step", model, bad, bad_rows=2)
    assert [row["row"] for row in read(context, "train")] == [1, 3, 5]
    (warning,) = context.warnings
    assert "2 bad rows were dropped" in warning
    assert "first: bad.jsonl line 2" in warning
    assert stats(context)["bad_rows"]["dropped"] == 2
    with pytest.raises(DataError, match=r"2 rows are bad; preprocess\.bad_rows allows 1"):
        run(tmp_path / "fewer", model, bad, bad_rows=1)


def test_what_is_no_mistake_is_said_and_kept(tmp_path: Path, model: Path, files: dict[str, Path]) -> None:
    row = talk(0)
    row["messages"].append({"role": "user", "content": "and?"})
    context = run(tmp_path / "step", model, {**files, "test": write(tmp_path / "w.jsonl", [row])})
    assert len(read(context, "test")) == 1
    assert any("w.jsonl: 1 finding of rule last_turn, first in line 1" in each for each in context.warnings)


# ---------------------------------------------------------------- length


def turns(number: int, words: tuple[int, ...]) -> dict[str, Any]:
    """A system message and turns of so many words each."""
    messages = [{"role": "system", "content": "be brief"}]
    for turn, count in enumerate(words):
        messages.append({"role": "user", "content": f"Question {number} {turn}?"})
        messages.append({"role": "assistant", "content": f"turn{turn} " + "yes " * count + "end"})
    return {"messages": messages}


def texts(context: StepContext, model: Path, split: str = "train") -> list[str]:
    tokenizer = lm.load_tokenizer(model)
    return [tokenizer.decode(row["input_ids"]) for row in read(context, split)]


def test_a_row_that_is_too_long_fails_the_step_and_says_what_each_policy_would_lose(
    tmp_path: Path, model: Path, files: dict[str, Path]
) -> None:
    train = write(tmp_path / "long.jsonl", [talk(0), turns(1, (6, 6, 6)), turns(2, (2,))])
    with pytest.raises(DataError) as caught:
        run(tmp_path / "step", model, {**files, "train": train}, max_seq_length=100)
    found = caught.value
    assert "1 row is longer than preprocess.max_seq_length of 100 tokens" in found.message
    assert "long.jsonl line 2" in found.message
    row, *policies = found.details
    assert (row["line"], row["limit"]) == (2, 100)
    assert row["tokens"] > 100
    lost = {each["policy"]: each for each in policies}
    assert list(lost) == ["drop", "keep_last_turns", "split_turns", "cut"]
    assert (lost["drop"]["rows"], lost["drop"]["turns"]) == (1, 3)
    assert (lost["split_turns"]["rows"], lost["split_turns"]["turns"]) == (0, 0)
    assert lost["split_turns"]["assistant_tokens"] == 0
    assert 0 < lost["keep_last_turns"]["assistant_tokens"] < lost["drop"]["assistant_tokens"]
    assert f"Set preprocess.max_seq_length to {row['tokens']}" in (found.next_move or "")


def test_long_rows_are_dropped_when_the_recipe_says_so(
    tmp_path: Path, model: Path, files: dict[str, Path]
) -> None:
    train = write(tmp_path / "long.jsonl", [talk(0), turns(1, (6, 6, 6)), talk(2)])
    context = run(tmp_path / "s", model, {**files, "train": train}, max_seq_length=100, long_rows="drop")
    assert [row["row"] for row in read(context, "train")] == [1, 3]
    counts = stats(context)["splits"]["train"]
    assert (counts["long_rows"], counts["dropped_rows"], counts["lost_turns"]) == (1, 1, 3)
    assert counts["lost_learned_tokens"] > 0
    assert any("1 of 3 train rows are longer than 100 tokens (first: line 2)" in w for w in context.warnings)


def test_the_last_turns_that_fit_are_kept_after_the_system_message(
    tmp_path: Path, model: Path, files: dict[str, Path]
) -> None:
    train = write(tmp_path / "long.jsonl", [turns(1, (6, 6, 6)), turns(2, (2, 90)), talk(3)])
    context = run(
        tmp_path / "s", model, {**files, "train": train}, max_seq_length=120, long_rows="keep_last_turns"
    )
    rows = read(context, "train")
    # The last turn of the second row does not fit by itself: nothing can be kept of it.
    assert [row["row"] for row in rows] == [1, 3]
    assert len(rows[0]["input_ids"]) <= 120
    text = texts(context, model)[0]
    assert text.startswith("<|system|>")
    assert "turn0" not in text
    assert "turn1" in text
    assert "turn2" in text
    counts = stats(context)["splits"]["train"]
    assert (counts["truncated_rows"], counts["dropped_rows"], counts["lost_turns"]) == (1, 1, 3)


def test_a_long_row_is_split_into_conversations_that_fit_and_nothing_is_lost(
    tmp_path: Path, model: Path, files: dict[str, Path]
) -> None:
    train = write(tmp_path / "long.jsonl", [turns(1, (6, 6, 6, 6)), talk(2)])
    context = run(
        tmp_path / "s", model, {**files, "train": train}, max_seq_length=120, long_rows="split_turns"
    )
    rows = read(context, "train")
    assert [row["row"] for row in rows] == [1, 1, 2]
    pieces = texts(context, model)[:2]
    assert all(piece.startswith("<|system|>") for piece in pieces)
    assert ["turn0" in pieces[0], "turn1" in pieces[0], "turn2" in pieces[1], "turn3" in pieces[1]] == [
        True
    ] * 4
    counts = stats(context)["splits"]["train"]
    assert (counts["rows"], counts["conversations"], counts["turns"], counts["lost_turns"]) == (2, 3, 5, 0)
    assert counts["lost_learned_tokens"] == 0


def test_a_turn_that_does_not_fit_by_itself_is_left_out_of_a_split(
    tmp_path: Path, model: Path, files: dict[str, Path]
) -> None:
    train = write(tmp_path / "long.jsonl", [turns(1, (6, 90, 6))])
    context = run(
        tmp_path / "s", model, {**files, "train": train}, max_seq_length=120, long_rows="split_turns"
    )
    assert [("turn0" in t, "turn1" in t, "turn2" in t) for t in texts(context, model)] == [
        (True, False, False),
        (False, False, True),
    ]
    assert stats(context)["splits"]["train"]["lost_turns"] == 1


def test_longer_rows_are_cut_when_the_recipe_says_so(
    tmp_path: Path, model: Path, files: dict[str, Path]
) -> None:
    train = write(tmp_path / "long.jsonl", [talk(0), talk(1, words=40), talk(2, words=60)])
    context = run(tmp_path / "s", model, {**files, "train": train}, max_seq_length=64, long_rows="cut")
    assert [len(row["input_ids"]) for row in read(context, "train")][1:] == [64, 64]
    assert stats(context)["splits"]["train"]["truncated_rows"] == 2
    assert any("2 of 3 train rows are longer than 64 tokens" in warning for warning in context.warnings)
    assert any("line 2" in warning for warning in context.warnings)


def test_a_split_of_which_nothing_is_left_is_refused(
    tmp_path: Path, model: Path, files: dict[str, Path]
) -> None:
    test = write(tmp_path / "long.jsonl", [talk(0, words=90)])
    with pytest.raises(DataError, match="No row is left for test: 0 bad rows and 1 long ones were dropped"):
        run(tmp_path / "s", model, {**files, "test": test}, max_seq_length=64, long_rows="drop")


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
        run(tmp_path / "step", model, {**files, "train": train}, max_seq_length=48, long_rows="cut")
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


def openings(context: StepContext, model: Path, split: str) -> set[str]:
    tokenizer = lm.load_tokenizer(model)
    return {
        tokenizer.decode(row["input_ids"]).split("Question")[1].split("?")[0] for row in read(context, split)
    }


def test_carved_splits_are_shuffled_and_no_opening_line_stands_in_two(
    tmp_path: Path, model: Path, files: dict[str, Path]
) -> None:
    # Every opening line twice, side by side.
    train = write(tmp_path / "all.jsonl", [talk(n // 2, words=1 + n % 2) for n in range(120)])
    context = run(tmp_path / "step", model, {"train": train})
    seen = [openings(context, model, split) for split in ("train", "validation", "test")]
    assert sum(map(len, seen)) == 60 == len(set.union(*seen))
    assert min(map(len, seen)) > 0
    assert sum(len(read(context, split)) for split in ("train", "validation", "test")) == 120
    held_out = [row["row"] for split in ("validation", "test") for row in read(context, split)]
    assert min(held_out) < 90
    (warning,) = context.warnings
    assert "split_seed 42; rows with the same opening line stay together" in warning


def test_another_seed_carves_other_rows(tmp_path: Path, model: Path) -> None:
    train = write(tmp_path / "all.jsonl", [talk(n) for n in range(60)])
    one, other = (run(tmp_path / str(seed), model, {"train": train}, split_seed=seed) for seed in (1, 2))
    assert [row["row"] for row in read(one, "test")] != [row["row"] for row in read(other, "test")]


def test_three_opening_lines_are_enough_for_three_splits(tmp_path: Path, model: Path) -> None:
    for seed in range(4):
        train = write(tmp_path / "few.jsonl", [talk(n) for n in range(3)])
        context = run(tmp_path / str(seed), model, {"train": train}, split_seed=seed)
        assert [len(read(context, split)) for split in ("train", "validation", "test")] == [1, 1, 1]


def test_rows_taken_in_file_order_are_said(tmp_path: Path, model: Path, files: dict[str, Path]) -> None:
    train = write(tmp_path / "all.jsonl", [talk(n) for n in range(10)])
    context = run(tmp_path / "step", model, {"train": train, "test": files["test"]}, split="contiguous")
    assert [row["row"] for row in read(context, "train")] == list(range(1, 9))
    assert [row["row"] for row in read(context, "validation")] == [9, 10]
    assert len(read(context, "test")) == 3
    (warning,) = context.warnings
    assert "rows 9 to 10 of the training file" in warning
    assert "file order" in warning


# ---------------------------------------------------------------- processes


def test_two_processes_write_the_bytes_of_one(
    tmp_path: Path, model: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess, "PART_BYTES", 2000)
    train = write(tmp_path / "all.jsonl", [talk(n, words=n % 30) for n in range(150)])
    alone = run(tmp_path / "a", model, {"train": train})
    monkeypatch.setattr(preprocess, "processes_for", lambda text_bytes: 2)
    together = run(tmp_path / "b", model, {"train": train})
    assert of_path(alone.output("dataset")) == of_path(together.output("dataset"))
    assert alone.warnings == together.warnings


def test_findings_of_two_processes_are_those_of_one(
    tmp_path: Path, model: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess, "PART_BYTES", 500)
    rows = [talk(n) if n % 7 else {"prompt": n} for n in range(60)]
    train = write(tmp_path / "bad.jsonl", rows)
    found = []
    for processes in (1, 2):
        monkeypatch.setattr(preprocess, "processes_for", lambda text_bytes, count=processes: count)
        with pytest.raises(DataError) as caught:
            run(tmp_path / str(processes), model, {**files, "train": train})
        found.append((caught.value.message, caught.value.details))
    assert found[0] == found[1]
    assert [each["line"] for each in found[0][1]] == [1, 8, 15, 22, 29, 36, 43, 50, 57]


def test_a_split_that_outgrows_a_shard_goes_on_in_the_next(
    tmp_path: Path, model: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess, "PART_BYTES", 1000)
    monkeypatch.setattr(preprocess, "SHARD_BYTES", 4000)
    train = write(tmp_path / "all.jsonl", [talk(n) for n in range(60)])
    context = run(tmp_path / "step", model, {**files, "train": train})
    assert len(list((context.output("dataset") / "train").iterdir())) > 2
    assert [row["row"] for row in read(context, "train")] == list(range(1, 61))
    split = Conversations(context.output("dataset") / "train")
    assert [each.row for each in split] == list(range(1, 61))


def test_writing_loads_no_pandas() -> None:
    program = (
        "import sys, numpy as np\n"
        "from tuneloop.steps.preprocess.shards import record_batch\n"
        "from tuneloop.tokens import Tokens\n"
        "ids = np.arange(3, dtype=np.int32)\n"
        "print(record_batch([(7, Tokens(ids, ids > 0))]).to_pylist(), 'pandas' in sys.modules)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    row = {"input_ids": [0, 1, 2], "learn": [False, True, True], "row": 7}
    assert ran.stdout.strip() == f"[{row}] False"
