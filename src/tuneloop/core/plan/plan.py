"""A whole plan: memory, disk, time, the verdict, and what to change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import JsonValue

from tuneloop.core import sizes
from tuneloop.core.plan.changes import LORA_R, Change, fits, smallest_changes
from tuneloop.core.plan.choice import Choice, choose
from tuneloop.core.plan.cost import Disk, Rate, Time, disk, time, weights_on_disk
from tuneloop.core.plan.memory import Peak, peak
from tuneloop.core.plan.setup import Place, Rows, Setup
from tuneloop.core.plan.shape import trained_parameters
from tuneloop.core.types import Card, Noun

Verdict = Literal["fits", "tight", "does not fit"]
TIGHT = 0.9
"""Share of the limit above which a plan that fits is called tight: the model is wrong by about that much."""


class Plan(Noun):
    """JSON-ready."""

    model: str
    parameters: int
    trained_parameters: int
    place: Place
    setup: Setup
    rows: Rows
    peak: Peak
    limit_bytes: int
    disk: Disk
    time: Time
    verdict: Verdict
    reasons: tuple[str, ...] = ()
    """Why it does not fit; empty when it does."""
    unsupported: tuple[str, ...] = ()
    """What this version does not do: the plan holds elsewhere, `tuneloop run` does it otherwise."""
    warnings: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    sizes: tuple[Recommendation, ...] = ()
    """The smallest sizes on which it would fit as it is written, where it does not fit here."""

    @property
    def is_fit(self) -> bool:
        return self.verdict != "does not fit"


class Recommendation(Noun):
    """A setting or a size that fits."""

    what: str
    place: str
    settings: dict[str, JsonValue]
    total_bytes: int
    limit_bytes: int
    is_supported: bool = True


def place_of_size(size: sizes.Size, nodes: int = 1) -> Place:
    """An Azure size as a place to plan for."""
    return Place(
        name=size.name,
        device="cuda" if size.gpus else "cpu",
        device_memory_bytes=size.gpu_memory_bytes if size.gpus else size.memory_bytes,
        host_memory_bytes=size.memory_bytes,
        gpus=size.gpus or 0,
        gpu=size.gpu,
        nodes=nodes,
        cores=size.cores or 1,
        disk_bytes=None if size.disk_gib is None else size.disk_gib * sizes.GIB,
        has_fast_bf16=size.has_fast_bf16,
        is_here=False,
    )


def setup_at(finetune: Mapping[str, Any], place: Place) -> Setup:
    """As training runs there: a process for each GPU, and without any as many as `cpu_processes` lets; never
    more than are asked for (`training.plan.processes_of`)."""
    each = min(finetune["number_of_gpu_to_use_finetuning"], place.gpus or finetune["cpu_processes"])
    nodes = min(finetune["num_nodes_finetune"], place.nodes)
    return Setup.of(finetune, has_fast_bf16=place.has_fast_bf16, devices=each * nodes, nodes=nodes)


def plan(
    card: Card, finetune: Mapping[str, Any], rows: Rows, place: Place, *, rate: Rate | None = None
) -> Plan:
    """`finetune` are the parameters of the step, resolved. Raises `Unsupported` for more processes than a
    node of the size has GPUs."""
    warnings = [] if place.is_here else _checked(card, finetune, place)
    asked, file_bytes = setup_at(finetune, place), weights_on_disk(card)
    setup = _chosen(card, asked, rows, place).setup
    found = peak(card.architecture, setup, rows, device=place.device, file_bytes=file_bytes)
    space = disk(card, setup, rows, finetune)
    reasons = _reasons(found, place, space)
    is_fit = not reasons
    share = found.device.total_bytes / place.device_memory_bytes
    changes = (
        []
        if fits(found, place)
        else smallest_changes(card.architecture, asked, rows, place, file_bytes=file_bytes)
    )
    return Plan(
        model=f"{card.name}:{card.version}",
        parameters=card.architecture.parameters,
        trained_parameters=trained_parameters(card.architecture, setup),
        place=place,
        setup=setup,
        rows=rows,
        peak=found,
        limit_bytes=place.device_memory_bytes,
        disk=space,
        time=time(setup, rows, rate),
        verdict="does not fit" if not is_fit else "tight" if share > TIGHT else "fits",
        reasons=tuple(reasons),
        unsupported=tuple(_unsupported(place)),
        warnings=tuple(warnings),
        changes=tuple(changes),
        sizes=() if fits(found, place) else tuple(sizes_that_fit(card, finetune, rows)),
    )


def _checked(card: Card, finetune: Mapping[str, Any], place: Place) -> list[str]:
    """The document's checks of a size: where its script would stop, a warning, since nothing is rented."""
    told = [sizes.why_not_allowed(place.name, sizes.allow_list(card.tags))]
    if place.gpus:
        told.append(sizes.check_processes(finetune["number_of_gpu_to_use_finetuning"], place.name))
    return [each for each in told if each]


def _reasons(found: Peak, place: Place, space: Disk) -> list[str]:
    reasons = []
    if found.device.total_bytes > place.device_memory_bytes:
        what = f"each {place.gpu or 'GPU'}" if place.device == "cuda" else "the machine"
        reasons.append(
            f"{gigabytes(found.device.total_bytes)} would be needed, {gigabytes(place.device_memory_bytes)} "
            f"are there for {what}"
        )
    if found.host_bytes > place.host_memory_bytes:
        reasons.append(
            f"{gigabytes(found.host_bytes)} of main memory would be needed, "
            f"{gigabytes(place.host_memory_bytes)} are there"
        )
    # In Azure outputs go to a storage account: the local disk of a size limits little.
    if place.is_here and place.disk_bytes is not None and space.total_bytes > place.disk_bytes:
        reasons.append(
            f"{gigabytes(space.total_bytes)} of disk would be needed, {gigabytes(place.disk_bytes)} are free"
        )
    return reasons


def _chosen(card: Card, setup: Setup, rows: Rows, place: Place, share: float = 1.0) -> Choice:
    """As the step will choose with that `share` of the place's memory."""
    return choose(
        card.architecture,
        setup,
        rows,
        device=place.device,
        available_bytes=int(share * place.device_memory_bytes),
        file_bytes=weights_on_disk(card),
    )


def _unsupported(place: Place) -> list[str]:
    if place.is_here:
        return []
    return [f"steps run on this machine, not on a {place.name}: the plan holds for that size alone"]


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


# ---------------------------------------------------------------- recommendations


def sizes_that_fit(
    card: Card, finetune: Mapping[str, Any], rows: Rows, *, most: int = 3
) -> list[Recommendation]:
    """The smallest sizes that can still be had on which one process trains it as it is written, by the GPU
    memory of a node; of each kind of GPU the smallest. A model's allow list is obeyed."""
    allowed = sizes.allow_list(card.tags)
    found: list[Recommendation] = []
    seen: set[tuple[str | None, int]] = set()
    for size in sorted(sizes.SIZES, key=lambda each: (each.gpus or 0) * each.gpu_memory_gib):
        kind = (size.gpu, size.gpu_memory_gib)
        if kind in seen or not size.gpus or size.is_retired:
            continue
        if sizes.why_not_allowed(size.name, allowed) is not None:
            continue
        place = place_of_size(size)
        setup = Setup.of(finetune, has_fast_bf16=size.has_fast_bf16)
        chosen = _chosen(card, setup, rows, place).setup
        reached = peak(card.architecture, chosen, rows, device="cuda", file_bytes=weights_on_disk(card))
        if fits(reached, place):
            seen.add(kind)
            found.append(_of_size(size, reached))
    return found[:most]


def _of_size(size: sizes.Size, reached: Peak) -> Recommendation:
    return Recommendation(
        what=f"{size.name}: {size.gpus} {size.gpu} of {size.gpu_memory_gib} GiB",
        place=size.name,
        settings={},
        total_bytes=reached.device.total_bytes,
        limit_bytes=size.gpu_memory_bytes,
        is_supported=False,
    )


def recommend(card: Card, finetune: Mapping[str, Any], rows: Rows, place: Place) -> list[Recommendation]:
    """The three best ways: of each method, the one that was written first, what fits the place with a tenth
    to spare and recomputes the least; then the smallest sizes."""
    setup = setup_at(finetune, place)
    found: list[Recommendation] = []
    for method in (setup, _as_lora(setup), _as_full(setup)):
        best = _best(card, method, rows, place)
        if best is not None and all(best.settings != other.settings for other in found):
            found.append(best)
    return [*found, *sizes_that_fit(card, finetune, rows)][:3]


def _as_lora(setup: Setup) -> Setup:
    return setup.model_copy(
        update={"apply_lora": True, "lora_r": setup.lora_r if setup.apply_lora else LORA_R}
    )


def _as_full(setup: Setup) -> Setup:
    return setup.model_copy(
        update={"apply_lora": False, "has_dropout": False, "is_dora": False, "is_4bit": False}
    )


def _best(card: Card, setup: Setup, rows: Rows, place: Place) -> Recommendation | None:
    chosen = _chosen(card, setup, rows, place, TIGHT)
    if not chosen.is_fit:
        return None
    reached = peak(
        card.architecture, chosen.setup, rows, device=place.device, file_bytes=weights_on_disk(card)
    )
    return _of_setting(chosen, reached, place) if fits(reached, place) else None


def _of_setting(chosen: Choice, reached: Peak, place: Place) -> Recommendation:
    setup = chosen.setup
    method = f"LoRA (rank {setup.lora_r})" if setup.apply_lora else "all weights"
    settings: dict[str, JsonValue] = {
        "finetune.apply_lora": setup.apply_lora,
        "finetune.pack_tokens": chosen.pack_tokens,
        "finetune.activation_checkpointing": "always" if chosen.is_checkpointed else "never",
    }
    if setup.apply_lora:
        settings["finetune.lora_r"] = setup.lora_r
    if chosen.strategy in ("ddp", "fsdp"):
        settings["finetune.strategy"] = chosen.strategy
    again = ", activations computed again" if chosen.is_checkpointed else ""
    return Recommendation(
        what=f"{method}, {chosen.pack_tokens} tokens at a time{again}",
        place=place.name,
        settings=settings,
        total_bytes=reached.device.total_bytes,
        limit_bytes=place.device_memory_bytes,
        is_supported=place.is_here,
    )


Plan.model_rebuild()
