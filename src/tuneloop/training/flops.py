"""The arithmetic that a step takes, counted from the model's own matrices; and the machine's peak at it.

Counted are the products that the model needs (PaLM, arXiv:2204.02311, appendix B: model FLOPs). What is
computed a second time to save memory counts once, and so does what a fused kernel repeats. A product of
(m, k) and (k, n) is 2 m k n operations.

Letters: T tokens, K learned ones, L tokens of a conversation.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn

_SHARED_INPUT = (
    frozenset({"q_proj", "k_proj", "v_proj", "qkv_proj"}),
    frozenset({"gate_proj", "up_proj", "gate_up_proj"}),
)
"""Matrices of one layer that read the same numbers: one of them being trained asks no gradient of the
other's input."""
_QUERIES = _SHARED_INPUT[0]

PEAK_SECONDS = 0.3
"""Longest time for the measurement, but for its last product."""
PRODUCT_SECONDS = 0.03
"""A product that takes this long tells the peak."""
LARGEST = {"cpu": 4096, "cuda": 8192}
"""Rows and columns of the largest product that is tried: 3 matrices of 64 MB on a CPU."""


@dataclass(frozen=True)
class Work:
    """FLOPs of learning from a conversation, forward and backward."""

    per_token: int
    """Of all matrices but the head."""
    per_learned: int
    """Of the head, which is computed for learned tokens alone."""
    per_pair: Mapping[int | None, int]
    """Of attention, for each token and each of those that it sees, summed over the layers with this sliding
    window (None: without one)."""

    def of(self, lengths: np.ndarray, learned: np.ndarray) -> np.ndarray:
        """(rows,) for conversations of `lengths` tokens of which `learned` count."""
        tokens = lengths.astype(np.float64)
        found = self.per_token * tokens + self.per_learned * learned.astype(np.float64)
        for window, each in self.per_pair.items():
            found += each * _pairs(tokens, window)
        return found


def _pairs(tokens: np.ndarray, window: int | None) -> np.ndarray:
    """How many (token, token that it sees) there are under a causal mask."""
    seen = tokens if window is None else np.minimum(tokens, window)
    found: np.ndarray = seen * (seen + 1) / 2 + (tokens - seen) * seen
    return found


def count(model: nn.Module) -> Work | None:
    """Of a model that is not sharded yet: what requires a gradient is trained. None where a weight takes part
    in a product that is not counted here (experts, convolutions): no share is better than a wrong one."""
    if _has_other_products(model):
        return None
    head = _modules_of_head(model)
    per_token = per_learned = 0
    has_backward: list[bool] = []
    for site in _sites(model):
        flops = sum(2 * each.in_features * each.out_features * passes for each, passes in site.products)
        if site.products[0][0] in head:
            per_learned += flops
        else:
            per_token += flops
        if site.begins_attention:
            has_backward.append(site.is_reached)
        elif site.is_query and has_backward:
            has_backward[-1] |= site.is_reached
    return Work(per_token, per_learned, _attention(model, has_backward))


@dataclass
class _Site:
    """A matrix of the model with the adapters around it."""

    products: list[tuple[nn.Linear, int]]
    """With the products of each: 1 forward, 1 for the gradient of its input, 1 for its weights'."""
    begins_attention: bool
    is_query: bool
    is_reached: bool
    """Whether what comes out of it depends on something trained."""


def _sites(model: nn.Module) -> Iterator[_Site]:
    """In the order of the forward pass."""
    is_reached, before, slot = False, False, None
    for name, modules in _in_order(_by_site(model)):
        linears = [each for each in modules if isinstance(each, nn.Linear)]
        here = _slot(name)
        if here != slot:
            before = is_reached
        is_trained = any(p.requires_grad for each in modules for p in each.parameters(recurse=False))
        is_reached |= is_trained
        if linears:
            is_query = name.rpartition(".")[2] in _QUERIES
            products = [
                (each, _passes(each, before or (place > 1 and is_trained)))
                for place, each in enumerate(linears)
            ]
            yield _Site(products, is_query and here != slot, is_query, is_reached)
            slot = here


def _passes(linear: nn.Linear, is_reached: bool) -> int:
    return 1 + int(is_reached) + int(linear.weight.requires_grad)


def _by_site(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Modules by the name of what they belong to: an adapter to the matrix that it adapts, behind it. Of an
    adapted matrix: the base, then A and B in turn."""
    found: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if ".original_module" not in name and not any(module.children()):
            site = name.partition(".base_layer")[0].partition(".lora_")[0]
            found.setdefault(site, []).append(module)
    return found


def _in_order(sites: dict[str, list[nn.Module]]) -> list[tuple[str, list[nn.Module]]]:
    """transformers' decoders name their modules in the order of their use, but for attention, where some
    (Phi-3) name what comes out of it first."""
    parents = list(dict.fromkeys(name.rpartition(".")[0] for name in sites))
    place = {name: number for number, name in enumerate(sites)}
    first = {parent: min(place[n] for n in sites if n.rpartition(".")[0] == parent) for parent in parents}

    def key(name: str) -> tuple[int, int]:
        parent, _, leaf = name.rpartition(".")
        return (first[parent], -1) if leaf in _QUERIES else (place[name], 0)

    return [(name, sites[name]) for name in sorted(sites, key=key)]


def _slot(site: str) -> str:
    parent, _, leaf = site.rpartition(".")
    for number, names in enumerate(_SHARED_INPUT):
        if leaf in names:
            return f"{parent}/{number}"
    return site


def _modules_of_head(model: nn.Module) -> set[nn.Module]:
    found: Any = model
    head = found.get_output_embeddings()
    return set() if head is None else set(head.modules())


def _has_other_products(model: nn.Module) -> bool:
    for module in model.modules():
        if not isinstance(module, nn.Linear | nn.Embedding) and any(
            parameter.ndim > 1 for parameter in module.parameters(recurse=False)
        ):
            return True
    return False


def _attention(model: nn.Module, has_backward: list[bool]) -> dict[int | None, int]:
    """Scores and their product with the values: 2 products forward, 4 backward."""
    whole: Any = model
    config = whole.config.get_text_config()
    heads = int(config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    layers = int(config.num_hidden_layers)
    if len(has_backward) != layers:
        has_backward = [any(has_backward)] * layers
    found: Counter[int | None] = Counter()
    for layer, is_reached in enumerate(has_backward):
        found[_window(config, layer)] += (6 if is_reached else 2) * 2 * heads * size
    return dict(found)


def _window(config: Any, layer: int) -> int | None:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return int(window) if window and kinds[layer] == "sliding_attention" else None
    return int(window) if window and getattr(config, "use_sliding_window", True) else None


# ---------------------------------------------------------------- the peak


@lru_cache(maxsize=4)
def peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOPs a second of this process at square matrix products of this type, with the threads and settings of
    now: the best of a few. Measured once per process; None where memory does not hold the matrices."""
    with torch.no_grad():
        try:
            return _measure(device, dtype)
        except (RuntimeError, MemoryError):
            return None


def _measure(device: torch.device, dtype: torch.dtype) -> float:
    clock = _on_gpu if device.type == "cuda" else _here
    size, best, began, tries = 256, 0.0, time.perf_counter(), 0
    while True:
        # Ones: denormal or random numbers would cost generators and tell no other speed.
        left = torch.ones(size, size, device=device, dtype=dtype)
        out = torch.empty_like(left)
        clock(lambda left=left, out=out: torch.mm(left, left, out=out))  # type: ignore[misc]
        seconds = clock(lambda left=left, out=out: torch.mm(left, left, out=out))  # type: ignore[misc]
        best = max(best, 2 * size**3 / seconds)
        is_large = seconds >= PRODUCT_SECONDS or size >= LARGEST[device.type]
        tries += is_large
        if tries >= 4 or time.perf_counter() - began > PEAK_SECONDS:
            return best
        if not is_large:
            size *= 2


def _here(compute: Callable[[], Any]) -> float:
    began = time.perf_counter()
    compute()
    return time.perf_counter() - began


def _on_gpu(compute: Callable[[], Any]) -> float:
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    compute()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000
