"""Splits: who is held out, and what never changes about it."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuneloop.core.data.split import (
    SPLITS,
    Groups,
    Share,
    assign,
    contiguous,
    default_shares,
    group_of,
    opening,
)
from tuneloop.core.errors import DataError, UsageError

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
EIGHTY = {"train": 80, "validation": 10, "test": 10}
HASHES = st.integers(0, (1 << 64) - 1)


def asking(text: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Hello there", "hello   THERE"),
        ("Hello there", "\n hello\tthere "),
        ("Straße", "STRASSE"),
        ("ﬁne", "fine"),
        ("e\u0301tude", "\u00c9tude"),
        ("a\u00a0b", "a b"),
        ("\uff21\uff11", "a1"),
    ],
)
def test_openings_that_read_alike_are_one_group(one: str, other: str) -> None:
    assert opening(asking(one)) == opening(asking(other))
    assert group_of(asking(one)) == group_of(asking(other))


@pytest.mark.parametrize(("one", "other"), [("a", "b"), ("a b", "ab"), ("a", "á"), ("2+2", "2-2")])
def test_openings_that_say_something_else_are_two_groups(one: str, other: str) -> None:
    assert group_of(asking(one)) != group_of(asking(other))


def test_the_opening_is_what_the_user_says_first_whatever_the_system_said() -> None:
    system = {"role": "system", "content": "Be brief."}
    assert group_of([system, *asking("hi")]) == group_of(asking("hi"))
    assert group_of([*asking("hi"), *asking("more")]) == group_of(asking("hi"))


def test_without_a_user_the_first_message_is_the_opening() -> None:
    assert opening([{"role": "assistant", "content": "Once  upon"}, *asking("x")][:1]) == "once upon"
    assert opening([]) == ""


def test_an_opening_of_parts_or_broken_text_still_has_a_group() -> None:
    assert group_of(asking([{"type": "text", "text": "a"}])) != group_of(
        asking([{"type": "text", "text": "b"}])
    )
    assert group_of(asking("\ud800")) != group_of(asking("\ud801"))


def test_the_split_of_a_group_never_changes_between_versions() -> None:
    """Written down once: another answer would move rows of every user's data."""
    assert group_of(asking("Hello there")) == 12367798231784467497
    found = [assign(group, 42, EIGHTY) for group in range(1000, 1030)]
    assert (
        "".join({"train": "t", "validation": "v", "test": "e"}[name] for name in found)
        == "vttttttttttttttttttttvttttttet"
    )


@PATIENT
@given(HASHES, st.integers(-(1 << 40), 1 << 40), st.lists(st.integers(0, 1000), min_size=1, max_size=5))
def test_a_group_is_in_a_split_that_has_a_share(group: int, seed: int, parts: list[int]) -> None:
    shares = {f"s{number}": part for number, part in enumerate([*parts, 1])}
    assert shares[assign(group, seed, shares)] > 0


def test_shares_are_met_on_average() -> None:
    counts = Counter(assign(group, 7, EIGHTY) for group in range(20_000))
    # Four standard deviations of 20,000 draws at 10 %.
    assert abs(counts["validation"] - 2000) < 170
    assert abs(counts["test"] - 2000) < 170


def test_another_seed_is_another_shuffle() -> None:
    one, other = ([assign(group, seed, EIGHTY) for group in range(500)] for seed in (1, 2))
    assert 100 < sum(a != b for a, b in zip(one, other, strict=True)) < 250


@PATIENT
@given(st.lists(HASHES, min_size=3, max_size=30, unique=True), st.integers(0, 99), st.randoms())
def test_no_split_is_empty_and_order_and_parts_do_not_matter(
    groups: list[int], seed: int, shuffle: random.Random
) -> None:
    whole = Groups(seed, EIGHTY)
    for group in groups:
        whole.add(group)
    parts = [Groups(seed, EIGHTY) for _ in range(3)]
    for group in shuffle.sample(groups, len(groups)) * 2:
        shuffle.choice(parts).add(group)
    for part in parts[1:]:
        parts[0].merge(pickle.loads(pickle.dumps(part)))
    found = whole.assignment()
    assert {found(group) for group in groups} == set(EIGHTY)
    assert found == parts[0].assignment()


def test_only_as_many_groups_as_needed_are_moved() -> None:
    groups = [group for group in range(200) if assign(group, 42, EIGHTY) == "train"][:10]
    seen = Groups(42, EIGHTY)
    assert {seen.add(group) for group in groups} == {"train"}
    found = seen.assignment()
    assert Counter(map(found, groups)) == {"train": 8, "validation": 1, "test": 1}
    # The first two in the shuffle of this seed.
    assert found.moved == {5: "validation", 4: "test"}


def test_with_enough_groups_nothing_is_moved() -> None:
    seen = Groups(42, EIGHTY)
    for group in range(1000):
        seen.add(group)
    assert seen.assignment().moved == {}


def test_rows_that_are_added_later_leave_the_others_where_they_are() -> None:
    few, many = Groups(42, EIGHTY), Groups(42, EIGHTY)
    for group in range(300):
        many.add(group)
        if group < 100:
            few.add(group)
    before, after = few.assignment(), many.assignment()
    assert [before(group) for group in range(100)] == [after(group) for group in range(100)]


@pytest.mark.parametrize(("groups", "said"), [([5], "is 1 different"), ([5, 6, 5], "are 2 different")])
def test_fewer_openings_than_splits_are_refused(groups: list[int], said: str) -> None:
    seen = Groups(42, EIGHTY)
    for group in groups:
        seen.add(group)
    with pytest.raises(DataError, match=said) as refused:
        seen.assignment()
    assert "--by component" in (refused.value.next_move or "")


def test_a_split_without_a_share_is_left_out() -> None:
    seen = Groups(42, {"train": 90, "validation": 10, "test": 0})
    seen.add(1)
    seen.add(2)
    assert set(map(seen.assignment(), (1, 2))) == {"train", "validation"}


@pytest.mark.parametrize("shares", [{"train": -1, "test": 2}, {"train": 0}, {}])
def test_shares_that_are_none_are_refused(shares: Mapping[str, int]) -> None:
    with pytest.raises(UsageError, match="cannot be given"):
        Groups(42, shares)


def test_a_seed_of_any_length_is_told_apart() -> None:
    assert len({tuple(assign(group, seed, EIGHTY) for group in range(300)) for seed in (-1, 0, 1 << 64)}) == 3
    with pytest.raises(UsageError, match="128 bits"):
        Groups(1 << 127, EIGHTY)


# ---------------------------------------------------------------- as the component does it


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({"train": 100}, [(0, 80), (80, 90), (90, 100)]),
        ({"train": 9}, [(0, 7), (7, 8), (8, 9)]),
        ({"train": 3}, [(0, 1), (1, 2), (2, 3)]),
        ({"train": 109}, [(0, 89), (89, 99), (99, 109)]),
    ],
)
def test_only_a_training_file_is_carved_80_10_10_in_file_order(
    rows: dict[str, int], expected: Sequence[tuple[int, int]]
) -> None:
    found = contiguous(rows)
    assert [(found[name].start, found[name].stop) for name in SPLITS] == expected
    assert {share.source for share in found.values()} == {"train"}


def test_the_one_that_is_missing_is_the_last_fifth_of_the_training_file() -> None:
    found = contiguous({"train": 50, "test": 7})
    assert found == {
        "train": Share("train", 0, 40),
        "validation": Share("train", 40, 50),
        "test": Share("test", 0, 7),
    }


def test_three_files_are_used_as_they_are() -> None:
    found = contiguous({"train": 5, "validation": 6, "test": 7})
    assert [tuple(found[name]) for name in SPLITS] == [
        ("train", 0, 5),
        ("validation", 0, 6),
        ("test", 0, 7),
    ]


@pytest.mark.parametrize(
    ("rows", "needed"), [({"train": 2}, "at least 3"), ({"train": 1, "test": 4}, "at least 2")]
)
def test_too_few_rows_to_carve_are_refused(rows: dict[str, int], needed: str) -> None:
    with pytest.raises(DataError, match="too few to carve") as refused:
        contiguous(rows)
    assert needed in (refused.value.next_move or "")


@pytest.mark.parametrize(
    ("given_files", "expected"),
    [
        (["train"], {"train": 80, "validation": 10, "test": 10}),
        (["train", "test"], {"train": 80, "validation": 20}),
        (["train", "validation", "test"], {"train": 100}),
    ],
)
def test_shares_follow_from_the_files_that_are_given(
    given_files: list[str], expected: dict[str, int]
) -> None:
    assert default_shares(given_files) == expected
