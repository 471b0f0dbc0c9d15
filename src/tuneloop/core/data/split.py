"""Which rows are trained on and which are held out: shuffled and grouped, or as Azure's component does it.

`data split` and preprocessing decide here, and nowhere else. Pure: never import what reads or writes files.

Shuffled: a conversation's group is its opening line, the first thing the user says, so that two rows that
open alike never stand in two splits. A group's split follows from its hash and the seed alone. So it does not
depend on the order of the rows, every process can decide for itself, rows can be decided on one by one, and
rows that are added later leave the others where they are. The price: shares are met on average (of 1,000
groups at 10 %, 100 give or take 9), and a large group goes as a whole.

Contiguous: the first rows train, the next validate, the last test, in file order.
"""

from __future__ import annotations

import heapq
import json
import unicodedata
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import accumulate
from typing import Any, NamedTuple

from tuneloop.core.errors import DataError, UsageError

SPLITS = ("train", "validation", "test")

SEED = 42

_HASHES = 1 << 64


def default_shares(given: Sequence[str]) -> dict[str, int]:
    """Per cent of the training file for train and for every split that has no file of its own, as Azure's
    component carves: 80 / 10 / 10, or 80 / 20 when one is missing (chat_completion_datapreprocess 0.0.80)."""
    missing = [name for name in SPLITS if name not in given and name != "train"]
    carved = {0: 0, 1: 20, 2: 10}[len(missing)]
    return {"train": 100 - carved * len(missing), **dict.fromkeys(missing, carved)}


# ---------------------------------------------------------------- shuffled


def opening(messages: Sequence[Mapping[str, Any]]) -> str:
    """The first user message (without one: the first message), so that what reads alike is equal: Unicode
    NFKC, case folded, every run of white space one space, none at the ends."""
    said = [message for message in messages if message.get("role") == "user"] or messages[:1]
    content = said[0].get("content") if said else ""
    text = content if isinstance(content, str) else json.dumps(content, sort_keys=True, default=str)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def group_of(messages: Sequence[Mapping[str, Any]]) -> int:
    """64 bits of the opening line: rows of one group belong into one split."""
    text = opening(messages).encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big")


def assign(group: int, seed: int, shares: Mapping[str, int]) -> str:
    """The split of a group: each gets as much of all hashes as its share of the sum of `shares`."""
    return _at(_place(group, seed), shares)


def _place(group: int, seed: int) -> int:
    """Where a group stands in the shuffle, of 2**64 places."""
    written = group.to_bytes(8, "big") + seed.to_bytes(16, "big", signed=True)
    return int.from_bytes(blake2b(written, digest_size=8, person=b"tuneloop-split").digest(), "big")


def _at(place: int, shares: Mapping[str, int]) -> str:
    ends = list(accumulate(shares.values()))
    return list(shares)[bisect_right(ends, place * ends[-1] // _HASHES)]


@dataclass(frozen=True)
class Assignment:
    """The split of every group of some rows; none of `shares` is empty. Picklable."""

    seed: int
    shares: Mapping[str, int]
    moved: Mapping[int, str] = field(default_factory=dict)
    """Groups that are elsewhere than `assign` says, so that no split is empty."""

    def __call__(self, group: int) -> str:
        return self.moved.get(group) or assign(group, self.seed, self.shares)


class Groups:
    """What has to be known of all groups before the first row is written, in constant memory: for each split
    the few groups that come first in the shuffle.

        groups = Groups(seed, shares)
        for row in rows: groups.add(group_of(row["messages"]))     # or in parts, then merge()
        split_of = groups.assignment()

    Raises `UsageError` for shares that are no shares.
    """

    def __init__(self, seed: int, shares: Mapping[str, int]) -> None:
        wrong = {name: share for name, share in shares.items() if share < 0}
        if wrong or not any(shares.values()):
            raise UsageError(
                f"The shares {dict(shares)} cannot be given.",
                next_move="Give each split a number of 0 or more, and one of them more than 0.",
            )
        if not -(1 << 127) <= seed < 1 << 127:
            raise UsageError(f"The seed {seed} has more than 128 bits.", next_move="Give a smaller one.")
        self._seed = seed
        self._shares = {name: share for name, share in shares.items() if share}
        self._first: dict[str, dict[int, int]] = {name: {} for name in self._shares}
        """Of each split, group to place of the `len(shares)` groups with the lowest places: one more than
        it can be asked for."""

    def add(self, group: int) -> str:
        """Count a row's group in; gives the split that `assign` says."""
        place = _place(group, self._seed)
        split = _at(place, self._shares)
        self._keep(split, group, place)
        return split

    def merge(self, other: Groups) -> None:
        """Count in what another process has seen, of the same seed and shares."""
        for split, first in other._first.items():
            for group, place in first.items():
                self._keep(split, group, place)

    def _keep(self, split: str, group: int, place: int) -> None:
        first = self._first[split]
        first[group] = place
        if len(first) > len(self._shares):
            del first[max(first, key=first.__getitem__)]

    def assignment(self) -> Assignment:
        """Where every group goes. An empty split gets the first group (in the shuffle) of the largest share
        that has more than one. Raises `DataError` when there are fewer different opening lines than splits.
        """
        moved: dict[int, str] = {}
        left = {name: sorted(first, key=first.__getitem__) for name, first in self._first.items()}
        for empty in [name for name, groups in left.items() if not groups]:
            donors = [name for name in self._by_share() if len(left[name]) > 1]
            if not donors:
                raise _too_few(sum(len(first) for first in self._first.values()), list(self._shares))
            group = left[donors[0]].pop(0)
            moved[group] = empty
            left[empty] = [group]
        return Assignment(self._seed, self._shares, moved)

    def _by_share(self) -> list[str]:
        return heapq.nlargest(len(self._shares), self._shares, key=self._shares.__getitem__)


def _too_few(openings: int, splits: list[str]) -> DataError:
    one = openings == 1
    named = " and ".join(filter(None, (", ".join(splits[:-1]), splits[-1])))
    return DataError(
        f"There {'is' if one else 'are'} {openings} different opening line{'' if one else 's'} (first user "
        f"messages), too few for {named}: rows that open alike stay in one split.",
        next_move="Add rows, make fewer splits, or split in file order (--by component; in a recipe "
        "preprocess.split: contiguous).",
    )


# ---------------------------------------------------------------- contiguous


class Share(NamedTuple):
    """The rows `start` to `stop` (counted from 0) of the file of input `source` make a split."""

    source: str
    start: int
    stop: int


def contiguous(rows: Mapping[str, int]) -> dict[str, Share]:
    """Input name to its number of rows, in; the share of every split, out. Only train: 80 / 10 / 10. One of
    the others missing: 80 / 20. In file order (chat_completion_datapreprocess 0.0.80).

    Raises `DataError` when there are too few rows to carve.
    """
    missing = [name for name in SPLITS if name not in rows]
    shares = default_shares(list(rows))
    carved = {name: max(1, rows["train"] * shares[name] // 100) for name in missing}
    ends = list(accumulate((rows["train"] - sum(carved.values()), *carved.values())))
    if ends[0] < 1:
        carving = f", too few to carve {' and '.join(missing)} out of it" if missing else ""
        raise DataError(
            f"the training file has {rows['train']} rows{carving}.",
            next_move=f"Give it at least {len(missing) + 1}, or name files for the other splits.",
        )
    found = {name: Share(name, 0, count) for name, count in rows.items()}
    found["train"] = Share("train", 0, ends[0])
    for name, start, stop in zip(missing, ends, ends[1:], strict=False):
        found[name] = Share("train", start, stop)
    return {name: found[name] for name in SPLITS}
