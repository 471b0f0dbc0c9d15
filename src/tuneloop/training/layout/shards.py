"""Tensors of a checkpoint, whole or as rows, whichever way its processes cut them into files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


class Shards(Mapping[str, torch.Tensor]):
    """Whole tensors by name, each read when it is asked for. A tensor of several files was cut along its
    first dimension, in the order of the files; one without dimensions stands in each, and is the same.

    `with Shards(files) as shards: ...`
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = list(files)
        self._opened = ExitStack()
        self._parts: dict[str, list[Any]] = {}

    def __enter__(self) -> Shards:
        for file in self._files:
            opened = self._opened.enter_context(safe_open(str(file), framework="pt"))
            for name in opened.keys():  # noqa: SIM118 - a handle, not a mapping
                self._parts.setdefault(name, []).append(opened.get_slice(name))
        return self

    def __exit__(self, *_: object) -> None:
        self._parts.clear()
        self._opened.close()

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __getitem__(self, name: str) -> torch.Tensor:
        parts = self._parts[name]
        if not parts[0].get_shape():
            return _whole(parts[0])
        return _whole(parts[0]) if len(parts) == 1 else torch.cat([_whole(part) for part in parts])

    def shape(self, name: str) -> list[int]:
        """Of the whole tensor."""
        shapes: list[list[int]] = [part.get_shape() for part in self._parts[name]]
        return [sum(shape[0] for shape in shapes), *shapes[0][1:]] if shapes[0] else []

    def rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Rows `begin` to `end` of the whole tensor; only they are read."""
        found, start = [], 0
        for part in self._parts[name]:
            size = part.get_shape()[0]
            first, last = max(begin - start, 0), min(end - start, size)
            if first < last:
                found.append(part[first:last])
            start += size
        if not found:
            return _whole(self._parts[name][0])[:0]
        return found[0] if len(found) == 1 else torch.cat(found)


def _whole(part: Any) -> torch.Tensor:
    # A slice of everything; safetensors has no other way to read a handle, and none for no dimensions.
    tensor: torch.Tensor = part[:] if part.get_shape() else part[...]
    return tensor
