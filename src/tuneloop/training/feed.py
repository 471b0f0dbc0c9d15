"""The packs that each process computes, prepared ahead by threads where that is asked for.

Every process works out who gets what from the lengths of the rows alone, so nothing has to be sent: rows are
shared out balanced by tokens, and each share is packed up to the budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from tuneloop.training.course import Course
from tuneloop.training.data import Batch, Conversations, pack
from tuneloop.training.loss import Objective
from tuneloop.training.packing import shares


@dataclass(frozen=True)
class Sharing:
    """How rows are shared out and packed, for the process that asks."""

    objective: Objective
    rank: int = 0
    world: int = 1
    is_collective: bool = False
    """Every process must have as many packs as the others."""

    def batches(self, conversations: Conversations, rows: Sequence[int], pack_tokens: int) -> Iterator[Batch]:
        """This process's packs of `rows`, at least one; fillers stand where others have more."""
        grouped = [
            self._packs(conversations, share, pack_tokens) for share in self._shares(conversations, rows)
        ]
        own = grouped[self.rank]
        for group in own:
            yield pack([conversations[row] for row in group])
        for _ in range(self._fillers(grouped)):
            shortest = min(rows, key=lambda row: int(conversations.lengths[row]))
            yield pack([conversations[shortest]]).as_filler()

    def _fillers(self, grouped: Sequence[Sequence[object]]) -> int:
        own = len(grouped[self.rank])
        # Fewer rows than processes leave one without any: it computes something all the same.
        return max(len(groups) for groups in grouped) - own if self.is_collective else int(own == 0)

    def _shares(self, conversations: Conversations, rows: Sequence[int]) -> list[list[int]]:
        if self.world == 1:
            return [list(rows)]
        lengths = [int(conversations.lengths[row]) for row in rows]
        return [[rows[index] for index in share] for share in shares(lengths, self.world)]

    def _packs(self, conversations: Conversations, rows: Sequence[int], pack_tokens: int) -> list[list[int]]:
        lengths = [int(conversations.lengths[row]) for row in rows]
        return [[rows[index] for index in group] for group in self.objective.packs(lengths, pack_tokens)]


class Feed:
    """The training set, step by step: `with Feed(...) as feed: feed.batches(step)`."""

    def __init__(
        self,
        course: Course,
        conversations: Conversations,
        sharing: Sharing,
        pack_tokens: int,
        workers: int = 0,
    ) -> None:
        """`workers`: threads, each of which prepares one step ahead; 0: a step is prepared when it comes."""
        self._course, self._conversations, self._sharing = course, conversations, sharing
        self.pack_tokens = pack_tokens
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers, "feed") if workers else None
        self._ahead: dict[int, Future[list[Batch]]] = {}

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def batches(self, step: int) -> list[Batch]:
        """Of this process, for step number `step`, counted from 0."""
        if self._pool is None:
            return self._make(step)
        for each in range(step, min(step + self._workers, self._course.total_steps - 1) + 1):
            if each not in self._ahead:
                self._ahead[each] = self._pool.submit(self._make, each)
        return self._ahead.pop(step).result()

    def lower(self, pack_tokens: int) -> None:
        """From now on, packs of at most so many tokens."""
        self.pack_tokens = pack_tokens
        self._ahead.clear()

    def tokens(self, step: int) -> int:
        """Over all processes."""
        return int(self._conversations.lengths[list(self._course.rows_of(step))].sum())

    def learned(self, step: int) -> int:
        """Tokens that count for the loss, over all processes."""
        return int(self._conversations.learned_per_row[list(self._course.rows_of(step))].sum())

    def _make(self, step: int) -> list[Batch]:
        rows = self._course.rows_of(step)
        return list(self._sharing.batches(self._conversations, rows, self.pack_tokens))
