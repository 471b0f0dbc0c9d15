"""Arrow splits, and packs of their rows."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from tests.conversations import conversations, write_split
from tuneloop.core.errors import DataError
from tuneloop.training.data import Conversations, pack


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_split_gives_back_what_was_written(tmp_path: Path, is_stream: bool) -> None:
    ids, learn = conversations(9, seed=3)
    split = Conversations(write_split(tmp_path / "train.arrow", ids, learn, is_stream=is_stream))
    assert [each.input_ids.tolist() for each in split] == ids
    assert [each.learn.tolist() for each in split] == learn
    assert [each.row for each in split] == list(range(1, 10))
    assert split.tokens == sum(map(len, ids))
    assert split.lengths.tolist() == [len(each) for each in ids]
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
    assert batch.boundaries == (0, 3, 5)
    assert batch.predict_from.tolist() == [0, 1, 3]
    assert batch.targets.tolist() == [11, 12, 21]
    assert (batch.rows, batch.tokens, batch.learned) == ((1, 2), 5, 3)


def test_every_token_but_the_first_counts_where_all_are_to_be_learned(tmp_path: Path) -> None:
    ids = [[10, 11, 12], [20, 21]]
    path = write_split(tmp_path / "t.arrow", ids, [[False, False, True], [False, True]])
    split = Conversations(path, learns_all=True)
    assert (split.learned_tokens, split.learned_per_row.tolist()) == (3, [2, 1])
    batch = pack(list(split))
    assert batch.predict_from.tolist() == [0, 1, 3]
    assert batch.targets.tolist() == [11, 12, 21]
