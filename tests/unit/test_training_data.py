"""Arrow splits, order and packing."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from hypothesis import given
from hypothesis import strategies as st

from tests.conversations import conversations, write_split
from tuneloop.core.errors import DataError
from tuneloop.training.data import Conversations, Course, in_order, pack


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_split_gives_back_what_was_written(tmp_path: Path, is_stream: bool) -> None:
    ids, learn = conversations(9, seed=3)
    split = Conversations(write_split(tmp_path / "train.arrow", ids, learn, is_stream=is_stream))
    assert [each.input_ids.tolist() for each in split] == ids
    assert [each.learn.tolist() for each in split] == learn
    assert [each.row for each in split] == list(range(1, 10))
    assert split.tokens == sum(map(len, ids))
    assert split.learned_tokens == sum(sum(marks[1:]) for marks in learn)


def test_a_file_that_is_not_arrow_is_a_data_error(tmp_path: Path) -> None:
    path = tmp_path / "train.arrow"
    path.write_text("no arrow")
    with pytest.raises(DataError, match="cannot be read as Arrow"):
        Conversations(path)


def test_missing_columns_are_named(tmp_path: Path) -> None:
    import pyarrow as pa

    table = pa.table({"input_ids": pa.array([[1, 2]])})
    with pa.OSFile(str(tmp_path / "t.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match="no column learn, row"):
        Conversations(tmp_path / "t.arrow")


def test_rows_without_a_token_to_learn_are_refused_by_number(tmp_path: Path) -> None:
    # The first token of a conversation is predicted from nothing, so row 2 teaches nothing either.
    split = Conversations(
        write_split(
            tmp_path / "t.arrow", [[1, 2], [3, 4], [5, 6]], [[False, True], [True, False], [False] * 2]
        )
    )
    with pytest.raises(DataError, match=r"no token to learn in row\(s\) 2, 3"):
        split.check(100)


def test_tokens_of_another_model_are_refused(tmp_path: Path) -> None:
    split = Conversations(write_split(tmp_path / "t.arrow", [[1, 99]], [[False, True]]))
    split.check(100)
    with pytest.raises(DataError, match="token 99 is not in the model's vocabulary of 50"):
        split.check(50)


def test_a_packed_batch_predicts_learned_tokens_from_the_one_before_and_never_across(tmp_path: Path) -> None:
    ids = [[10, 11, 12], [20, 21]]
    learn = [[False, True, True], [True, True]]
    batch = pack(list(Conversations(write_split(tmp_path / "t.arrow", ids, learn))))
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.predict_from.tolist() == [0, 1, 3]
    assert batch.targets.tolist() == [11, 12, 21]
    assert (batch.rows, batch.tokens, batch.learned) == ((1, 2), 5, 3)


@given(
    rows=st.integers(1, 50),
    batch_size=st.integers(1, 9),
    accumulation=st.integers(1, 9),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_every_epoch_visits_every_row_once(
    rows: int, batch_size: int, accumulation: int, epochs: int, seed: int
) -> None:
    course = Course(rows, batch_size, accumulation, epochs, -1, seed)
    steps = iter(range(course.total_steps))
    for _ in range(epochs):
        seen = [
            index
            for _ in range(course.steps_per_epoch)
            for micro_batch in course.micro_batches(next(steps))
            for index in micro_batch
        ]
        assert sorted(seen) == list(range(rows))
    assert next(steps, None) is None


@given(batch_size=st.integers(1, 8), accumulation=st.integers(1, 8), step=st.integers(0, 40))
def test_a_step_learns_from_the_same_rows_however_its_batch_is_cut(
    batch_size: int, accumulation: int, step: int
) -> None:
    whole = Course(23, batch_size * accumulation, 1, 3, 41, 7)
    cut = Course(23, batch_size, accumulation, 3, 41, 7)
    assert [row for part in cut.micro_batches(step) for row in part] == list(whole.micro_batches(step)[0])


def test_max_steps_decides_the_length_in_place_of_epochs() -> None:
    assert Course(10, 2, 1, 3, -1, 0).total_steps == 15
    assert Course(10, 2, 1, 3, 4, 0).total_steps == 4


def test_epochs_and_seeds_differ_in_order() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, ...]]:
        return Course(30, 30, 1, 2, -1, seed).micro_batches(epoch)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_evaluation_takes_rows_in_order() -> None:
    assert [list(part) for part in in_order(5, 2)] == [[0, 1], [2, 3], [4]]
