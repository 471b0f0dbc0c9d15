"""Azure's sizes of machines with which people fine-tune, and the checks of the Azure document on them.

Facts only: a size is what a plan may be made for and what a named compute may be called after; nothing is
rented. Sources: the size pages of azure-compute-docs, unless an entry says otherwise. GiB are 2**30 bytes;
GPU memory is as the pages write it, in GiB too. The checks are those of Azure's chat-completion notebook
(Azure/azureml-examples, sdk/python/foundation-models/system/finetune/chat-completion).
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping

from tuneloop.core.errors import NotFound, Unsupported
from tuneloop.core.names import did_you_mean
from tuneloop.core.types import Noun

PREFIX = "Standard_"
GIB = 2**30
DOCUMENTS = "size pages of azure-compute-docs"


class Size(Noun):
    """One size of machine."""

    name: str
    """With `Standard_`."""
    cores: int | None = None
    memory_gib: int | None = None
    """None, like `cores` and `gpus`: not looked up, since nobody should use the size."""
    gpus: int | None = 0
    gpu: str | None = None
    gpu_memory_gib: int = 0
    """Of each GPU."""
    disk_gib: int | None = None
    """The local disk; None where it is not published."""
    note: str | None = None
    is_retired: bool = False
    is_denied: bool = False
    """On the notebook's deny list, which holds where a model has no allow list."""
    has_fast_bf16: bool = False
    """Ampere and later (compute capability 8.0)."""
    source: str = DOCUMENTS

    @property
    def short_name(self) -> str:
        return self.name.removeprefix(PREFIX)

    @property
    def memory_bytes(self) -> int:
        return (self.memory_gib or 0) * GIB

    @property
    def gpu_memory_bytes(self) -> int:
        return self.gpu_memory_gib * GIB


def _v100(name: str, cores: int, memory: int, gpus: int, disk: int, note: str, each: int = 16) -> Size:
    return Size(
        name=PREFIX + name,
        cores=cores,
        memory_gib=memory,
        gpus=gpus,
        gpu="V100",
        gpu_memory_gib=each,
        disk_gib=disk,
        note=note,
        is_retired=name.endswith("_v3"),
    )


def _ampere(
    name: str,
    cores: int,
    memory: int,
    gpus: int,
    each: int,
    disk: int | None,
    gpu: str = "A100",
    note: str = "",
) -> Size:
    return Size(
        name=PREFIX + name,
        cores=cores,
        memory_gib=memory,
        gpus=gpus,
        gpu=gpu,
        gpu_memory_gib=each,
        disk_gib=disk,
        note=note or None,
        has_fast_bf16=True,
    )


def _t4(name: str, cores: int, memory: int, gpus: int, disk: int, note: str = "") -> Size:
    return Size(
        name=PREFIX + name,
        cores=cores,
        memory_gib=memory,
        gpus=gpus,
        gpu="T4",
        gpu_memory_gib=16,
        disk_gib=disk,
        note=note or None,
    )


def _k80(name: str) -> Size:
    return Size(
        name=PREFIX + name,
        gpus=None,
        gpu="K80",
        note="on the notebook's deny list",
        is_retired=True,
        is_denied=True,
        source="chat-completion.ipynb of Azure/azureml-examples",
    )


SIZES: tuple[Size, ...] = (
    _t4("NC4as_T4_v3", 4, 28, 1, 176, "the notebook's size for deployment since 2025-10"),
    _t4("NC8as_T4_v3", 8, 56, 1, 352),
    _t4("NC16as_T4_v3", 16, 110, 1, 352),
    _t4("NC64as_T4_v3", 64, 440, 4, 2816),
    _v100("NC6s_v3", 6, 112, 1, 736, "the series was retired on 2025-09-30"),
    _v100("NC12s_v3", 12, 224, 2, 1474, "the series was retired on 2025-09-30"),
    _v100("NC24s_v3", 24, 448, 4, 2948, "the series was retired on 2025-09-30"),
    _v100("NC24rs_v3", 24, 448, 4, 2948, "retired on 2025-09-30; still the component's default for finetune"),
    _v100("ND40rs_v2", 40, 672, 8, 2948, "the notebook's default; no longer in Phi-3's allow list", each=32),
    _ampere("NC24ads_A100_v4", 24, 220, 1, 80, 64, note="no new capacity"),
    _ampere("NC48ads_A100_v4", 48, 440, 2, 80, 128),
    _ampere("NC96ads_A100_v4", 96, 880, 4, 80, 256),
    _ampere("ND96asr_v4", 96, 900, 8, 40, 6000),
    _ampere("ND96amsr_A100_v4", 96, 1900, 8, 80, 6400, note="another list says 1,800 GiB of memory"),
    _ampere("NC40ads_H100_v5", 40, 320, 1, 94, 3576, gpu="H100 NVL", note="the recommended successor"),
    _ampere("NC80adis_H100_v5", 80, 640, 2, 94, 7152, gpu="H100 NVL"),
    _ampere(
        "ND96isr_H100_v5", 96, 1900, 8, 80, None, gpu="H100", note="cores and memory are not from a page"
    ),
    Size(
        name=PREFIX + "D12_v2",
        cores=4,
        memory_gib=28,
        disk_gib=200,
        note="the component's default for import and preprocess; figures are not from a page",
    ),
    Size(name=PREFIX + "DS3_v2", cores=4, memory_gib=14, disk_gib=28, note="the SDK's size if none is named"),
    _k80("NC6"),
    _k80("NC12"),
    _k80("NC24"),
    _k80("NC24r"),
)
"""In the order of GPU generations, small to large."""


def _key(name: str) -> str:
    return name.strip().lower().removeprefix(PREFIX.lower())


_BY_NAME: Mapping[str, Size] = {_key(size.name): size for size in SIZES}


def find(name: str) -> Size | None:
    """Case does not matter, nor does `Standard_`."""
    return _BY_NAME.get(_key(name))


def get(name: str) -> Size:
    """Raises `NotFound` with the nearest name."""
    found = find(name)
    if found is None:
        near = did_you_mean(_key(name), _BY_NAME) or ""
        raise NotFound(
            f"There is no size {name!r} in the table. {near}".rstrip(),
            next_move="See them with: tuneloop compute sizes",
        )
    return found


# ---------------------------------------------------------------- the document's checks


def allow_list(tags: Mapping[str, str], what: str = "finetune") -> list[str] | None:
    """The sizes in a model's tag, which is a Python list as text; None without one or with one that cannot be
    read."""
    written = tags.get(f"{what}_compute_allow_list")
    if written is None:
        return None
    try:
        found = ast.literal_eval(" ".join(written.split()))
    except (ValueError, SyntaxError):
        return None
    return [str(name) for name in found] if isinstance(found, list | tuple) else None


def why_not_provisioned(name: str, state: str) -> str | None:
    """A cluster whose making failed cannot be used (the notebook compares in lower case)."""
    if state.lower() != "failed":
        return None
    return (
        f"Provisioning failed: compute '{name}' is in the state {state}. "
        f"Delete it and create it anew: tuneloop compute delete {name}"
    )


def why_not_allowed(size: str, allowed: Iterable[str] | None) -> str | None:
    """Why a model must not be trained on a size: it is not in its allow list, or, where there is no list, the
    notebook denies it. None when it may."""
    if allowed is not None:
        listed = list(allowed)
        if _key(size) in {_key(name) for name in listed}:
            return None
        return (
            f"{_spelled(size)} is not in the model's finetune_compute_allow_list: {', '.join(listed)}. "
            "Choose one of these."
        )
    denied = [one.name for one in SIZES if one.is_denied]
    if _key(size) in {_key(name) for name in denied}:
        return (
            f"{_spelled(size)} is not supported for finetuning: its GPUs are K80s ({', '.join(denied)} are "
            "denied). Choose a size with a newer GPU: tuneloop compute sizes"
        )
    return None


def gpus_per_node(size: str, listed: Iterable[Size] = SIZES) -> int:
    """From the list of sizes, as the notebook looks it up. Raises `Unsupported` where the size is not listed
    or has no GPU."""
    for one in listed:
        if _key(one.name) == _key(size):
            if one.gpus:
                return one.gpus
            if one.gpus is None:
                break
            raise Unsupported(
                f"{one.name} has no GPU, and finetuning in Azure needs one.",
                next_move="Choose a size with GPUs: tuneloop compute sizes",
            )
    raise Unsupported(
        f"The number of GPUs of {_spelled(size)} is not known: it is not in the list of sizes.",
        next_move="See them with: tuneloop compute sizes",
    )


def check_processes(asked: int, size: str) -> str | None:
    """None, or a warning when GPUs would be idle. Raises `Unsupported` for more processes than GPUs."""
    there = gpus_per_node(size)
    if asked > there:
        raise Unsupported(
            f"number_of_gpu_to_use_finetuning is {asked}, and a node of {_spelled(size)} has {there} "
            f"GPU{'s' if there > 1 else ''}.",
            next_move=f"Set finetune.number_of_gpu_to_use_finetuning to {there}, or choose a larger size.",
        )
    if asked < there:
        return (
            f"number_of_gpu_to_use_finetuning is {asked}, and a node of {_spelled(size)} has {there} GPUs: "
            f"{there - asked} would be idle."
        )
    return None


def _spelled(size: str) -> str:
    found = find(size)
    return found.name if found else size
