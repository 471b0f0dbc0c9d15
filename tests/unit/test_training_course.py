"""Which rows a step learns from."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from hypothesis import given
from hypothesis import strategies as st

from tuneloop.training.course import Course


@given(
    rows=st.integers(1, 50),
    effective_batch=st.integers(1, 80),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_every_epoch_visits_every_row_once(rows: int, effective_batch: int, epochs: int, seed: int) -> None:
    course = Course(rows, effective_batch, epochs, -1, seed)
    steps = iter(range(course.total_steps))
    for _ in range(epochs):
        seen = [row for _ in range(course.steps_per_epoch) for row in course.rows_of(next(steps))]
        assert sorted(seen) == list(range(rows))
    assert next(steps, None) is None


def test_max_steps_decides_the_length_in_place_of_epochs() -> None:
    assert Course(10, 2, 3, -1, 0).total_steps == 15
    assert Course(10, 2, 3, 4, 0).total_steps == 4


def test_epochs_and_seeds_differ_in_order() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return Course(30, 30, 2, -1, seed).rows_of(epoch)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_an_epoch_ends_with_its_last_step() -> None:
    course = Course(10, 4, 2, -1, 0)
    assert [step for step in range(1, 7) if course.ends_epoch(step)] == [3, 6]
