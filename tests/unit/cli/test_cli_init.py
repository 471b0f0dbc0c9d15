"""`tuneloop init`: what it sees of the data, what it proposes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Ran
from tests.unit.cli.fake_api import FakeApi, card
from tuneloop.cli import look, proposal
from tuneloop.core import recipe
from tuneloop.core.errors import DataError
from tuneloop.core.recipe import Recipe
from tuneloop.core.types import Card

Command = Callable[..., Ran]


def row(question: str, answer: str, *, system: str | None = None) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return json.dumps({"messages": messages, "source": "shop"}, ensure_ascii=False)


def write(path: Path, rows: list[str]) -> Path:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def rows(count: int, words: int = 5) -> list[str]:
    return [row(f"Question {n}?", "word " * words) for n in range(count)]


def proposed(path: Path, model: Card | None = None, test: Path | None = None) -> tuple[str, Recipe]:
    files = proposal.Files(look.look_at(path), None, look.look_at(test) if test else None)
    text = proposal.recipe(model or card(), files, path.with_name("my.yaml"))
    return text, recipe.parse(text, path="my.yaml")


# ---------------------------------------------------------------- the look


def test_a_look_counts_rows_turns_systems_and_repetitions(tmp_path: Path) -> None:
    told = [*rows(3), row("Question 0?", "word " * 5), row("Hi", "Ho", system="Be kind."), "not json", ""]
    found = look.look_at(write(tmp_path / "a.jsonl", told))
    assert (found.rows, found.system_rows, found.repeated_rows, found.unread_rows) == (6, 1, 1, 1)
    assert found.columns == ["messages", "source"]
    assert (min(found.turns), max(found.turns)) == (2, 3)


def test_lengths_count_scripts_beyond_ascii_for_more(tmp_path: Path) -> None:
    plain = look.look_at(write(tmp_path / "a.jsonl", [row("a" * 70, "b" * 70)]))
    other = look.look_at(write(tmp_path / "b.jsonl", [row("字" * 70, "字" * 70)]))
    assert plain.lengths == [40 + 16]
    assert other.lengths == [140 + 16]


def test_of_a_large_file_the_beginning_is_read_and_the_rest_estimated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", [row("Question?", "Answer.")] * 1000)
    monkeypatch.setattr(look, "CHUNK_BYTES", path.stat().st_size // 50)
    monkeypatch.setattr(look, "MOST_BYTES", path.stat().st_size // 10)
    found = look.look_at(path)
    assert not found.is_whole
    assert abs(found.rows - 1000) <= 100
    assert len(found.lengths) < 200


def test_every_format_that_a_job_takes_is_looked_at(tmp_path: Path) -> None:
    messages = json.dumps([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    (tmp_path / "a.csv").write_text('messages,topic\n"' + messages.replace('"', '""') + '",greeting\n')
    found = look.look_at(tmp_path / "a.csv")
    assert (found.rows, found.turns, found.columns) == (1, [2], ["messages", "topic"])


# ---------------------------------------------------------------- the proposal


def test_the_recipe_is_a_good_one_and_says_why_beside_every_choice(tmp_path: Path) -> None:
    text, parsed = proposed(write(tmp_path / "shop orders.jsonl", rows(120)))
    assert parsed.finetune.apply_lora
    assert parsed.data.name == "shop-orders"
    stages = text[text.index("preprocess:") :].splitlines()
    assert all("  # " in one for one in stages if one.startswith("  "))
    assert "120 conversations of 2 messages" in text


def test_no_row_is_cut_by_the_proposed_length(tmp_path: Path) -> None:
    _, parsed = proposed(write(tmp_path / "a.jsonl", [*rows(10), *rows(10, words=900)]))
    most = max(look.look_at(tmp_path / "a.jsonl").lengths)
    assert most < parsed.preprocess.max_seq_length <= card().context_length


def test_a_few_very_long_rows_do_not_set_the_length_and_are_counted(tmp_path: Path) -> None:
    text, parsed = proposed(write(tmp_path / "a.jsonl", [*rows(500), row("Q?", "word " * 9000)]))
    assert parsed.preprocess.max_seq_length < 1000
    assert "and 1 rows more than this" in text


def test_the_length_stays_within_what_the_model_reads(tmp_path: Path) -> None:
    small = card().model_copy(update={"context_length": 512})
    _, parsed = proposed(write(tmp_path / "a.jsonl", rows(10, words=900)), small)
    assert parsed.preprocess.max_seq_length == 512


@pytest.mark.parametrize(
    ("count", "batch", "epochs"), [(50, 2, 5), (450, 2, 3), (1_000, 8, 3), (30_000, 16, 1)]
)
def test_more_rows_get_larger_batches_and_fewer_rounds(
    tmp_path: Path, count: int, batch: int, epochs: int
) -> None:
    _, parsed = proposed(write(tmp_path / "a.jsonl", [row("Q?", "A.")] * count))
    tuned = parsed.finetune
    assert tuned.per_device_train_batch_size * tuned.gradient_accumulation_steps == batch
    assert tuned.num_train_epochs == epochs


def test_long_rows_are_accumulated_instead_of_batched(tmp_path: Path) -> None:
    _, parsed = proposed(write(tmp_path / "a.jsonl", rows(1_000, words=1_500)))
    tuned = parsed.finetune
    assert tuned.per_device_train_batch_size * parsed.preprocess.max_seq_length <= 4096
    assert tuned.gradient_accumulation_steps > 1


def test_the_learning_rate_stays_within_what_is_advised(tmp_path: Path) -> None:
    advised = card().model_copy(update={"defaults": {"learning_rate_max": 5e-5, "learning_rate": 5e-6}})
    text, parsed = proposed(write(tmp_path / "a.jsonl", rows(10)), advised)
    assert parsed.finetune.learning_rate == 5e-5
    assert "the most that is advised" in text


def test_splits_that_are_not_given_are_explained(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", rows(100))
    alone, _ = proposed(train)
    assert "validation and test are not given: about a fifth of train (20 rows)" in alone
    with_test, parsed = proposed(train, test=write(tmp_path / "b.jsonl", rows(3)))
    assert "validation is not given: about a fifth of train (20 rows)" in with_test
    assert "Mind: 3 conversations of test are in train as well" in with_test.replace("\n#   ", " ")
    assert parsed.data.test == "b.jsonl"


# ---------------------------------------------------------------- the command


def test_init_writes_beside_nothing_and_tells_the_next_commands(
    tuneloop_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "orders.jsonl", rows(30))
    ran = tuneloop_command("init", "--data", "orders.jsonl")
    assert ran.code == 0
    assert "tuneloop run orders.yaml --dry-run" in ran.out
    written = (tmp_path / "orders.yaml").read_text()
    again = tuneloop_command("init", "--data", "orders.jsonl")
    assert (again.code, "--output" in again.err) == (4, True)
    assert (tmp_path / "orders.yaml").read_text() == written


def test_paths_in_the_recipe_start_at_its_folder(
    tuneloop_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    write(tmp_path / "orders.jsonl", rows(30))
    assert tuneloop_command("init", "--data", "orders.jsonl", "--output", "recipes/a.yaml").code == 0
    text = (tmp_path / "recipes" / "a.yaml").read_text()
    assert recipe.parse(text, path="a").data.train == "../orders.jsonl"


def test_nothing_is_written_when_the_check_finds_something(
    tuneloop_command: Command, api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "orders.jsonl", ['{"prompt": "a"}'])
    api.errors["POST", "/api/recipes/resolve"] = DataError("1 of 1 rows cannot be learned from.")
    assert tuneloop_command("init", "--data", "orders.jsonl").code == 2
    assert not (tmp_path / "orders.yaml").exists()


def test_a_recipe_can_go_to_stdout(tuneloop_command: Command, tmp_path: Path) -> None:
    path = write(tmp_path / "orders.jsonl", rows(30))
    ran = tuneloop_command("init", "--data", str(path), "--output", "-")
    assert recipe.parse(ran.out, path="-").model == "SmolLM2-135M-Instruct:1"


def test_a_missing_file_is_told_with_its_neighbour(tuneloop_command: Command, tmp_path: Path) -> None:
    write(tmp_path / "orders.jsonl", rows(1))
    ran = tuneloop_command("init", "--data", str(tmp_path / "order.json"))
    assert (ran.code, "Did you mean 'orders.jsonl'?" in ran.err) == (3, True)
