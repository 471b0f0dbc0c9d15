"""What the layouts of several processes have in common: sums and values over the default group of
`torch.distributed`, which whoever started the processes has formed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed, nn

CLIP_EPSILON = 1e-6
"""As in `torch.nn.utils.clip_grad_norm_`."""


class Processes:
    """Rank and size of the group, and what goes over it. Nothing that travels is a pickle."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank = distributed.get_rank()
        self.world = distributed.get_world_size()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the processes, in 64 bits."""
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(summed)
        found: list[float] = summed.tolist()
        return found

    def gather(self, value: Any) -> list[Any]:
        """The values (JSON) of all processes, by rank, on every process."""
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        sizes = [int(size) for size in self._gather_equal(torch.tensor([len(own)], device=self.device))]
        padded = nn.functional.pad(own, (0, max(sizes) - len(own)))
        found = zip(self._gather_equal(padded), sizes, strict=True)
        return [json.loads(bytes(each[:size].tolist())) for each, size in found]

    def barrier(self) -> None:
        self.sum([0.0])

    def norm_and_clip(self, shards: Sequence[torch.Tensor], limit: float) -> float:
        """The norm of a gradient of which each process holds `shards` and no two the same; clipped to
        `limit` in place."""
        squares = torch._foreach_norm(list(shards)) if shards else []
        (square,) = self.sum([float(sum(each.double().square() for each in squares))])
        norm = math.sqrt(square) if square >= 0 else math.nan
        # Not a number is clipped to nothing: the loop stops on it.
        if shards and norm > limit:
            torch._foreach_mul_(list(shards), limit / (norm + CLIP_EPSILON))
        return norm

    def _gather_equal(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        found = [torch.empty_like(tensor) for _ in range(self.world)]
        distributed.all_gather(found, tensor)
        return found
