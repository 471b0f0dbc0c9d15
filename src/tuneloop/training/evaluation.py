"""The validation loss, over all processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from tuneloop.training.data import Conversations
from tuneloop.training.feed import Sharing
from tuneloop.training.layout import Layout


class Validation:
    """The split `validation`, ready to be measured."""

    def __init__(
        self,
        conversations: Conversations,
        sharing: Sharing,
        layout: Layout,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.conversations, self._sharing, self._layout = conversations, sharing, layout
        self._precision = precision

    @torch.no_grad()
    def loss(self, pack_tokens: int, tell: Callable[[int, int], None]) -> float:
        """Mean over all learned tokens of the split, however it is cut. The model is in evaluation mode.
        `tell` hears of rows done and rows in all, of this process."""
        total, done = 0.0, 0
        for batch in self._sharing.batches(self.conversations, range(len(self.conversations)), pack_tokens):
            with self._precision():
                total += float(self._layout.loss(batch)) * batch.weight
            done += len(batch.rows)
            tell(done, -(-len(self.conversations) // self._layout.world))
        (whole,) = self._layout.sum([total])
        return whole / self.conversations.learned_tokens
