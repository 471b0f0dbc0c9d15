"""How much memory of a machine a step or a replica is expected to take: what it claims before it starts.

A finetune claims what `core.plan` says of its shape, its parameters and its rows. The other steps claim the
weights in 32 bits, what is kept beside them, and a process with torch in it. Measured on SmolLM2-135M
(`tuneloop demo` prints the peaks): model_import 1.2 GB, preprocess 0.5, export 1.2, evaluate 1.2, a replica
1.0; this gives 1.2, 0.5, 1.2, 1.2 and 1.1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuneloop.core.plan import Place, Rows, choose, peak, rows_by_characters, setup_at, weights_on_disk
from tuneloop.core.types import Card, RowStatistics, StepKind

PROCESS_BYTES = 500_000_000
"""Python with torch and transformers loaded, before any weight."""
WEIGHT_BYTES = 4
"""Everything is computed in 32 bits on a CPU."""

WORKER_BYTES = 200_000_000
"""A process that tokenises, with its memory of words; two of them and their parent fit in PROCESS_BYTES."""

_COPIES = {"model_import": 1.3, "preprocess": 0.0, "export": 1.3, "evaluate": 1.3}
_REPLICA_COPIES = 1.1


def step_memory_bytes(kind: StepKind, parameters: int, cores: int = 1) -> int:
    """What a step other than finetune on a model of so many `parameters` is expected to take at its peak;
    preprocess has a process for each of the machine's `cores`."""
    workers = WORKER_BYTES * max(0, cores - 2) if kind == "preprocess" else 0
    return PROCESS_BYTES + workers + int(_COPIES[kind] * WEIGHT_BYTES * parameters)


def finetune_memory_bytes(
    card: Card,
    finetune: Mapping[str, Any],
    rows: Rows,
    *,
    gpus: int = 0,
    available_bytes: int | None = None,
) -> int:
    """What a finetune is expected to take of this machine's memory, of which `available_bytes` may be claimed
    (None: no limit); where a GPU holds the model, what passes through on its way there. `finetune` are the
    step's parameters."""
    place = Place(
        name="local", device="cuda" if gpus else "cpu", device_memory_bytes=1, host_memory_bytes=1, gpus=gpus
    )
    setup, file_bytes = setup_at(finetune, place), weights_on_disk(card)
    if gpus:
        return peak(card.architecture, setup, rows, device="cuda", file_bytes=file_bytes).host_bytes
    return choose(
        card.architecture,
        setup,
        rows,
        device="cpu",
        available_bytes=available_bytes,
        file_bytes=file_bytes,
    ).planned_bytes


def rows_expected(
    train: RowStatistics | None, max_seq_length: int, card: Card, validation: RowStatistics | None = None
) -> Rows:
    """Lengths in tokens, as far as they can be told without a tokenizer. `max_seq_length` -1 is the model's
    own limit; without statistics that limit is the worst case."""
    limit = min(card.context_length, max_seq_length) if max_seq_length > 0 else card.context_length
    if train is None or not train.rows:
        return Rows(longest=limit)
    rows = _of(train, limit)
    if validation is None or not validation.rows:
        # What training sets aside for it is a part of the same file.
        return rows
    aside = _of(validation, limit)
    return rows.model_copy(
        update={"validation_tokens": aside.tokens or 0, "longest_evaluated": aside.longest}
    )


def _of(statistics: RowStatistics, limit: int) -> Rows:
    return rows_by_characters(
        most_characters=statistics.most_characters,
        most_messages=statistics.most_messages,
        characters=statistics.characters,
        learned_characters=statistics.learned_characters,
        messages=statistics.messages,
        count=statistics.rows,
        limit=limit,
    )


def replica_memory_bytes(parameters: int) -> int:
    """What a process that serves a model of so many `parameters` is expected to take."""
    return PROCESS_BYTES + int(_REPLICA_COPIES * WEIGHT_BYTES * parameters)


def count_parameters(folder: Path) -> int:
    """The numbers in all safetensors files under `folder`, by their headers alone; 0 where there are none.
    Format: 8 bytes of length, then JSON (huggingface/safetensors, README)."""
    return sum(_count(path) for path in folder.rglob("*.safetensors"))


def _count(path: Path) -> int:
    try:
        with open(path, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header: dict[str, Any] = json.loads(handle.read(min(length, 100_000_000)))
    except (OSError, ValueError):
        return 0
    total = 0
    for name, tensor in header.items():
        if name != "__metadata__":
            size = 1
            for side in tensor["shape"]:
                size *= int(side)
            total += size
    return total
