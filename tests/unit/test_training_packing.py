"""Nothing lost, nothing cut, the budget kept, and every process of the same opinion."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("numpy")

from hypothesis import given
from hypothesis import strategies as st

from tuneloop.training.packing import packs, shares

LENGTHS = st.lists(st.integers(1, 300), max_size=60)


@given(LENGTHS, st.integers(1, 400))
def test_every_conversation_is_in_one_pack_and_the_budget_holds(lengths: list[int], budget: int) -> None:
    found = packs(lengths, budget)
    assert sorted(itertools.chain(*found)) == list(range(len(lengths)))
    for group in found:
        assert group == sorted(group)
        assert len(group) == 1 or sum(lengths[index] for index in group) <= budget
    assert found == sorted(found)


@given(LENGTHS, st.integers(1, 400))
def test_no_two_packs_fit_into_one(lengths: list[int], budget: int) -> None:
    """A first-fit property: of any two packs, the later begun holds nothing that fitted into the earlier."""
    sums = [sum(lengths[index] for index in group) for group in packs(lengths, budget)]
    assert all(one + other > budget for one, other in itertools.combinations(sums, 2))


@given(LENGTHS, st.integers(1, 400))
def test_the_longest_go_first_and_where_they_leave_the_least_room(lengths: list[int], budget: int) -> None:
    """Against best-fit decreasing written down without a search."""
    rooms: list[int] = []
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        fitting = [place for place, room in enumerate(rooms) if room >= lengths[index]]
        if not fitting:
            rooms.append(budget)
            groups.append([])
            fitting = [len(rooms) - 1]
        place = min(fitting, key=lambda place: (rooms[place], place))
        groups[place].append(index)
        rooms[place] -= lengths[index]
    assert packs(lengths, budget) == sorted(sorted(group) for group in groups)


def test_packs_fill_up_where_the_order_of_the_input_would_not() -> None:
    assert packs([6, 4, 6, 4], 10) == [[0, 1], [2, 3]]
    assert packs([4, 4, 6, 6], 10) == [[0, 2], [1, 3]]
    assert packs([], 10) == []


@given(LENGTHS, st.integers(1, 9))
def test_every_conversation_is_in_one_share(lengths: list[int], ranks: int) -> None:
    found = shares(lengths, ranks)
    assert len(found) == ranks
    assert sorted(itertools.chain(*found)) == list(range(len(lengths)))
    assert all(share == sorted(share) for share in found)
    assert found == shares(list(lengths), ranks)


@given(LENGTHS, st.integers(1, 9))
def test_shares_differ_by_no_more_than_one_conversation(lengths: list[int], ranks: int) -> None:
    sums = [sum(lengths[index] for index in share) for share in shares(lengths, ranks)]
    longest = max(lengths, default=0)
    assert max(sums) - min(sums) <= longest
    # The best possible share is no shorter than the mean and no shorter than the longest conversation.
    if lengths:
        assert max(sums) <= sum(lengths) / ranks + (1 - 1 / ranks) * longest + 1e-9
    if len(lengths) >= ranks:
        assert all(sums)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(2, 3))
def test_the_largest_share_is_within_a_third_of_the_best_possible(lengths: list[int], ranks: int) -> None:
    best = min(
        max(
            sum(length for length, rank in zip(lengths, choice, strict=True) if rank == one)
            for one in range(ranks)
        )
        for choice in itertools.product(range(ranks), repeat=len(lengths))
    )
    largest = max(sum(lengths[index] for index in share) for share in shares(lengths, ranks))
    assert largest <= best * (4 / 3 - 1 / (3 * ranks)) + 1e-9
