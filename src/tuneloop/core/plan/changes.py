"""The smallest changes after which a plan fits, each with what it would then take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

from pydantic import JsonValue

from tuneloop.core.plan.choice import choose
from tuneloop.core.plan.memory import Peak, peak
from tuneloop.core.plan.setup import Place, Rows, Setup
from tuneloop.core.types import Architecture, Noun

SHORTEST = 64
"""Tokens below which cutting rows is no advice any more."""
MOST_CUT = 8
"""Rows cut to less than this fraction of the longest are another data set."""
LORA_R = 16

Case = tuple[Setup, Rows]


class Change(Noun):
    """Something to do, and the peak that it leads to."""

    what: str
    """For people."""
    settings: dict[str, JsonValue]
    """Keys of a recipe to set; empty where it is not the recipe that changes."""
    total_bytes: int
    host_bytes: int = 0
    is_supported: bool = True
    """Whether this version does it."""


class _Step(Noun):
    """One kind of change, applied to a case."""

    what: str
    settings: dict[str, JsonValue]
    setup: Setup
    rows: Rows
    is_supported: bool = True


def fits(found: Peak, place: Place) -> bool:
    return (
        found.device.total_bytes <= place.device_memory_bytes and found.host_bytes <= place.host_memory_bytes
    )


def smallest_changes(
    architecture: Architecture, setup: Setup, rows: Rows, place: Place, *, file_bytes: int | None = None
) -> list[Change]:
    """Single changes that suffice; where none of those that this version does would, pairs, then threes. At
    most three combinations; what this version does comes first, then what costs the result the least."""

    def measure(setup: Setup, rows: Rows) -> Peak:
        chosen = choose(
            architecture,
            setup,
            rows,
            device=place.device,
            available_bytes=place.device_memory_bytes,
            file_bytes=file_bytes,
        )
        return peak(architecture, chosen.setup, rows, device=place.device, file_bytes=file_bytes)

    moves = _moves(place)
    found = [
        change
        for move in moves
        for change in [_best(move((setup, rows)), measure, place)]
        if change is not None
    ]
    if any(change.is_supported for change in found):
        return sorted(found, key=lambda change: not change.is_supported)
    for size in (2, 3):
        combined = list(_combined(moves, size, (setup, rows), measure, place))
        if combined:
            return [*combined[:3], *found]
    return found


Move = Callable[[Case], Iterator[_Step]]
"""The variants of one change, the smallest first."""


def _best(steps: Iterator[_Step], measure: Callable[[Setup, Rows], Peak], place: Place) -> Change | None:
    for step in steps:
        found = measure(step.setup, step.rows)
        if fits(found, place):
            return Change(
                what=step.what,
                settings=step.settings,
                total_bytes=found.device.total_bytes,
                host_bytes=found.host_bytes,
                is_supported=step.is_supported,
            )
    return None


def _combined(
    moves: Sequence[Move], size: int, case: Case, measure: Callable[[Setup, Rows], Peak], place: Place
) -> Iterator[Change]:
    for chosen in combinations(moves, size):
        steps: list[_Step] = []
        now = case
        # All but the last go as far as they can; the last as far as it must.
        for move in chosen[:-1]:
            every = list(move(now))
            if not every:
                break
            steps.append(every[-1])
            now = (every[-1].setup, every[-1].rows)
        else:
            last = _best(chosen[-1](now), measure, place)
            if last is not None and all(step.is_supported for step in steps) and last.is_supported:
                merged: dict[str, JsonValue] = {}
                for step in steps:
                    merged.update(step.settings)
                yield last.model_copy(
                    update={
                        "what": ", ".join([*(step.what for step in steps), last.what]),
                        "settings": {**merged, **last.settings},
                    }
                )


def _moves(place: Place) -> list[Move]:
    def packs(case: Case) -> Iterator[_Step]:
        setup, rows = case
        # At 0 packs shrink by themselves.
        tokens = setup.pack_tokens // 2
        while setup.is_packed and tokens > rows.longest:
            yield _packs_of(tokens, setup, rows)
            tokens //= 2
        if setup.is_packed and setup.pack_tokens > rows.longest:
            yield _packs_of(rows.longest, setup, rows)

    def checkpointing(case: Case) -> Iterator[_Step]:
        setup, rows = case
        if setup.checkpointing == "never":
            yield _Step(
                what="activation_checkpointing always: slower by a third, the same result",
                settings={"finetune.activation_checkpointing": "always"},
                setup=setup.model_copy(update={"checkpointing": "always"}),
                rows=rows,
            )

    def quantized(case: Case) -> Iterator[_Step]:
        setup, rows = case
        if not setup.is_4bit and setup.sharding == "none" and place.device == "cuda":
            r = setup.lora_r if setup.apply_lora else LORA_R
            lora: dict[str, JsonValue] = {} if setup.apply_lora else {"finetune.apply_lora": True}
            yield _Step(
                what="quantization 4bit (QLoRA)"
                + ("" if setup.apply_lora else f", apply_lora true (rank {r})"),
                settings={
                    **lora,
                    **({} if setup.apply_lora else {"finetune.lora_r": r}),
                    "finetune.quantization": "4bit",
                },
                setup=setup.model_copy(update={"apply_lora": True, "lora_r": r, "is_4bit": True}),
                rows=rows,
            )

    def precision(case: Case) -> Iterator[_Step]:
        setup, rows = case
        if place.has_fast_bf16 and not setup.is_bf16:
            yield _Step(
                what='precision "16"',
                settings={"finetune.precision": "16"},
                setup=setup.model_copy(update={"is_bf16": True}),
                rows=rows,
            )

    def lora(case: Case) -> Iterator[_Step]:
        setup, rows = case
        if not setup.apply_lora:
            yield _Step(
                what=f"apply_lora true (rank {LORA_R})",
                settings={"finetune.apply_lora": True, "finetune.lora_r": LORA_R},
                setup=setup.model_copy(update={"apply_lora": True, "lora_r": LORA_R}),
                rows=rows,
            )

    def adafactor(case: Case) -> Iterator[_Step]:
        setup, rows = case
        if setup.optimizer != "adafactor" and not setup.apply_lora:
            yield _Step(
                what="optim adafactor",
                settings={"finetune.optim": "adafactor"},
                setup=setup.model_copy(update={"optimizer": "adafactor"}),
                rows=rows,
            )

    def length(case: Case) -> Iterator[_Step]:
        setup, rows = case
        for tokens in _shorter(rows.longest):
            yield _Step(
                what=f"max_seq_length {tokens} in place of {rows.longest}: longer rows lose what is beyond",
                settings={"preprocess.max_seq_length": tokens},
                setup=setup,
                rows=rows.cut_to(tokens),
            )

    def sharded(case: Case) -> Iterator[_Step]:
        setup, rows = case
        if setup.sharding != "none" or not setup.can_shard:
            return
        yield _Step(
            what=f"strategy fsdp: each of {setup.devices} processes holds a part",
            settings={"finetune.strategy": "fsdp", "finetune.apply_deepspeed": False},
            setup=setup.model_copy(update={"sharding": "fsdp"}),
            rows=rows,
        )

    def zero(case: Case) -> Iterator[_Step]:
        setup, rows = case
        if setup.devices > 1 and not setup.can_shard:
            return
        ladder = (("zero2", "none"), ("zero3", "none"), ("zero2", "optimizer"), ("zero3", "all"))
        for stage, offload in ladder if setup.devices > 1 else ladder[2:]:
            aside = {"none": "", "optimizer": ", optimiser offloaded", "all": ", all offloaded"}[offload]
            yield _Step(
                what=f"ZeRO-{stage[-1]}{aside}",
                settings={"finetune.apply_deepspeed": True, "finetune.deepspeed_stage": stage[-1]},
                setup=setup.model_copy(update={"sharding": stage, "offload": offload}),
                rows=rows,
                is_supported=offload == "none",
            )

    found: list[Move] = [packs, checkpointing, sharded, precision, lora, length, adafactor]
    return [*found, quantized, zero] if place.device == "cuda" else found


def _packs_of(tokens: int, setup: Setup, rows: Rows) -> _Step:
    return _Step(
        what=f"pack_tokens {tokens}: the same result",
        settings={"finetune.pack_tokens": tokens},
        setup=setup.model_copy(update={"pack_tokens": tokens}),
        rows=rows,
    )


def _shorter(longest: int) -> Iterator[int]:
    """Lengths below `longest`, in steps of an eighth or so, on multiples of 64, down to a fraction of it."""
    least, tokens = max(SHORTEST, longest // MOST_CUT), longest
    while True:
        tokens = int(tokens * 0.875) // SHORTEST * SHORTEST
        if tokens < least:
            return
        yield tokens
