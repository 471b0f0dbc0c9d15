"""Who computes which rows, in which packs."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conversations import conversations, write_split
from tuneloop.training.course import Course
from tuneloop.training.data import Conversations
from tuneloop.training.feed import Feed, Sharing
from tuneloop.training.packing import packs


class Budget:
    """As an objective of a model that may be packed."""

    def packs(self, lengths: list[int], budget: int) -> list[list[int]]:
        return packs(lengths, budget)


ROWS = 23


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Conversations:
    path = tmp_path_factory.mktemp("feed") / "train.arrow"
    return Conversations(write_split(path, *conversations(ROWS, seed=4)))


def feed(split: Conversations, batch: int, budget: int, rank: int, world: int, **options: bool) -> Feed:
    course = Course(len(split), batch, 1, -1, 7)
    return Feed(course, split, Sharing(Budget(), rank, world, **options), budget)  # type: ignore[arg-type]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    batch=st.integers(1, ROWS), budget=st.integers(1, 200), world=st.integers(1, 5), collective=st.booleans()
)
def test_the_processes_together_compute_each_row_of_a_step_once(
    split: Conversations, batch: int, budget: int, world: int, collective: bool
) -> None:
    course = Course(len(split), batch, 1, -1, 7)
    feeds = [feed(split, batch, budget, rank, world, is_collective=collective) for rank in range(world)]
    for step in range(course.total_steps):
        given = [each.batches(step) for each in feeds]
        counted = [pack for packs in given for pack in packs if pack.weight]
        rows = sorted(row for pack in counted for row in pack.rows)
        assert rows == sorted(row + 1 for row in course.rows_of(step))
        assert sum(pack.tokens for pack in counted) == feeds[0].tokens(step)
        assert sum(pack.learned for pack in counted) == feeds[0].learned(step)
        assert all(pack.tokens <= budget or len(pack.boundaries) == 2 for pack in counted)
        assert all(packs for packs in given)
        if collective:
            assert len({len(packs) for packs in given}) == 1


def test_a_filler_counts_for_nothing(split: Conversations) -> None:
    (filler,) = feed(split, 1, 100, rank=1, world=2).batches(0)
    assert (filler.weight, filler.rows) == (0.0, ())


def test_packs_that_are_prepared_ahead_are_the_same(split: Conversations) -> None:
    course = Course(len(split), 4, 2, -1, 7)
    plain = Feed(course, split, Sharing(Budget()), 60)  # type: ignore[arg-type]
    with Feed(course, split, Sharing(Budget()), 60, workers=3) as ahead:  # type: ignore[arg-type]
        for step in range(course.total_steps):
            if step == 5:
                plain.lower(30)
                ahead.lower(30)
            ours, theirs = plain.batches(step), ahead.batches(step)
            assert [each.input_ids.tolist() for each in ours] == [each.input_ids.tolist() for each in theirs]
