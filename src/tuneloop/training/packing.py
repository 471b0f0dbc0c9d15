"""Which conversations share a pack, and which process computes them: pure functions of lengths in tokens.

Every process works both out for itself and comes to the same, so nothing is sent. Knows no tensor.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def packs(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices into `lengths`, grouped so that a group has at most `budget` tokens; what is longer than that
    stands alone. Best-fit decreasing: each, from the longest on, goes where it leaves the least room, which
    takes at most 11/9 of the fewest groups possible, and one more (Johnson 1973). Groups, and indices in
    them, are in the order of the input.
    """
    rooms: list[tuple[int, int]] = []  # (tokens that still fit, group), ascending
    groups: list[list[int]] = []
    for index in _longest_first(lengths):
        length = int(lengths[index])
        place = bisect_left(rooms, (length, -1))
        if place == len(rooms):
            room, group = budget, len(groups)
            groups.append([])
        else:
            room, group = rooms.pop(place)
        groups[group].append(index)
        if room > length:
            insort(rooms, (room - length, group))
    return sorted(sorted(group) for group in groups)


def shares(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices into `lengths` for each of `ranks` processes, balanced by tokens. Longest first, each to who
    has least (LPT): the largest share exceeds the best possible by at most 1/3 (Graham 1969, theorem 2), and
    the mean by less than one conversation. Indices are in the order of the input; a share is empty only where
    there are fewer conversations than processes.
    """
    loads = [(0, 0, rank) for rank in range(ranks)]  # (tokens, conversations, rank)
    found: list[list[int]] = [[] for _ in range(ranks)]
    for index in _longest_first(lengths):
        tokens, count, rank = loads[0]
        found[rank].append(index)
        heapq.heapreplace(loads, (tokens + int(lengths[index]), count + 1, rank))
    return [sorted(share) for share in found]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    """Equal ones in the order of the input."""
    order: list[int] = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist()
    return order
