"""The loss of packed conversations: next-token cross-entropy in nats, of the learned tokens alone.

`Objective` is what a model is trained on. It is built once, and measures on that very model what holds for
it: whether conversations can share a pack without seeing each other (by our attention, or by transformers'
masks, which it derives from position ids that start afresh), and whether the head can form the loss by
itself. What does not hold is not used; the loss is the same in every case, and `remarks` say what it costs.

Letters: T tokens of the pack, K of them that count, V vocabulary.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from tuneloop.core.errors import Unsupported
from tuneloop.training import attention, packing
from tuneloop.training.data import Batch, Conversation, pack
from tuneloop.training.head import Head, base_model, plain_loss


class Objective:
    """`summed_loss(batch)` for one model. It changes how the model computes, not what, and `close`
    undoes that."""

    def __init__(
        self, model: nn.Module, is_packing_allowed: bool = True, noise_alpha: float | None = None
    ) -> None:
        """`noise_alpha`: of NEFTune (arXiv:2310.05914), noise on the embeddings in training; None or 0: none.
        Raises `Unsupported` for a model that cannot be asked for the logits of chosen positions."""
        check_forward(model)
        self._model: Any = model
        self.remarks: list[str] = []
        """What does not hold for this model and is done in another way, for people."""
        self._attention = attention.implementation(model)
        self.isolates = is_packing_allowed and self._choose_attention()
        self.alone_above = rotary_limit(model.config)
        """A conversation longer than this goes alone, because its length changes the rotary frequencies."""
        self._head = self._choose_head()
        self._noise = Noise(model, noise_alpha) if noise_alpha else None

    @property
    def is_packed(self) -> bool:
        """Whether conversations may share a pack."""
        return self.isolates

    def packs(self, lengths: Sequence[int], budget: int) -> list[list[int]]:
        """Indices of the conversations, by `lengths` in tokens, that may be computed together, at most
        `budget` tokens at a time; see `packing.packs`."""
        if not self.isolates:
            return [[index] for index in range(len(lengths))]
        limit = self.alone_above
        if limit is None:
            return packing.packs(lengths, budget)
        short = [index for index, length in enumerate(lengths) if length <= limit]
        long = [[index] for index, length in enumerate(lengths) if length > limit]
        grouped = packing.packs([lengths[index] for index in short], budget)
        return sorted([[short[index] for index in group] for group in grouped] + long)

    def batches(self, conversations: Sequence[Conversation], budget: int) -> list[Batch]:
        grouped = self.packs([len(each.input_ids) for each in conversations], budget)
        return [pack([conversations[index] for index in group]) for group in grouped]

    def summed_loss(self, batch: Batch, model: Any = None) -> torch.Tensor:
        """Negative log-likelihood of the batch's targets, summed, fp32. `model`: the same in a wrapper of
        several processes, to be called in its place."""
        called = self._model if model is None else model
        if self._noise is not None:
            self._noise.lengths = batch.boundaries
        if self._head is None:
            return plain_loss(self._output(called, batch)[0], batch.targets)
        with self._head.learning(batch.targets):
            return self._output(called, batch)

    def close(self) -> None:
        """Leave the model as it was found. May be called twice."""
        attention.use(self._model, self._attention)
        for each in (self._head, self._noise):
            if each is not None:
                each.detach()
        self._head = self._noise = None

    def _output(self, model: Any, batch: Batch) -> torch.Tensor:
        return _logits(
            model,
            batch.input_ids,
            batch.position_ids,
            batch.predict_from,
            **({"boundaries": batch.boundaries} if self._is_attention_ours() else {}),
        )

    def _is_attention_ours(self) -> bool:
        return attention.implementation(self._model) == attention.NAME

    # ------------------------------------------------------------ measured at the start

    def _choose_attention(self) -> bool:
        """Whether conversations can share a pack, with the fastest attention that allows it in place."""
        if self._attention == attention.REPLACED:
            if isolates(self._model, attention.NAME):
                attention.use(self._model, attention.NAME)
                return True
            self.remarks.append(
                f"{_family(self._model)} attends in a way that Tuneloop's packed attention does not know: "
                "masks of transformers are used, whose time and memory grow with the square of a pack."
            )
        if isolates(self._model, self._attention):
            return True
        self.remarks.append(
            f"conversations of {_family(self._model)} would see each other in a pack, so they are computed "
            "one by one. The result is the same; the speed is lower."
        )
        return False

    def _choose_head(self) -> Head | None:
        head = Head(self._model)
        if self._is_right(head):
            return head
        head.detach()
        self.remarks.append(
            f"{_family(self._model)} changes its logits after the head: those of all learned tokens of a "
            "pack exist at once. Lower finetune.pack_tokens if memory is short."
        )
        return None

    @torch.no_grad()
    def _is_right(self, head: Head) -> bool:
        with _evaluating(self._model):
            batch = _sample(self._model, (6, 8)).to(_device(self._model))
            expected = plain_loss(self._output(self._model, batch)[0], batch.targets)
            with head.learning(batch.targets):
                found = self._output(self._model, batch)
        return found.shape == () and bool((found - expected).abs() <= 1e-3 * expected.abs())


class Noise:
    """NEFTune: while the embeddings train, each token's gets uniform noise of +-alpha / sqrt(L d), where L is
    the length of its conversation, not of the pack, and d the hidden size. Drawn from torch's own generator,
    whose state a checkpoint holds."""

    def __init__(self, model: Any, alpha: float) -> None:
        self._alpha = alpha
        self.lengths: tuple[int, ...] = (0,)
        """The boundaries of the batch in work."""
        self._hook = base_model(model).get_input_embeddings().register_forward_hook(self._add)

    def detach(self) -> None:
        self._hook.remove()

    def _add(self, module: nn.Module, inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return embedded
        counts = torch.tensor(self.lengths, device=embedded.device).diff()
        reach_T = torch.repeat_interleave(self._alpha / torch.sqrt(counts * embedded.shape[-1]), counts)
        noise = torch.empty_like(embedded).uniform_(-1.0, 1.0)
        return embedded + noise * reach_T[:, None].to(embedded.dtype)


def check_forward(model: nn.Module) -> None:
    """Raise `Unsupported` unless the model can be asked for the logits of chosen positions."""
    base = base_model(model)
    missing = {"position_ids", "logits_to_keep"} - set(inspect.signature(base.forward).parameters)
    if missing:
        raise Unsupported(
            f"{type(base).__name__} cannot be trained: its forward has no "
            f"{' and no '.join(sorted(missing))}. Supported are decoder-only models of transformers that "
            "have both, such as Llama, Phi-3 and Qwen2."
        )


def vocabulary_size(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.get_text_config().vocab_size)


def rotary_limit(config: Any) -> int | None:
    """The length above which the frequencies change: LongRoPE (arXiv:2402.13753) and dynamic NTK scaling."""
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    if parameters.get("rope_type") not in ("longrope", "dynamic"):
        return None
    original = parameters.get("original_max_position_embeddings")
    return int(
        original or getattr(text, "original_max_position_embeddings", 0) or text.max_position_embeddings
    )


# ---------------------------------------------------------------- measuring isolation


@torch.no_grad()
def isolates(model: Any, name: str) -> bool:
    """Whether a conversation, packed and computed by the attention `name`, gives what it gives alone by the
    model's present one, whatever lies in front of it."""
    before = attention.implementation(model)
    try:
        with _evaluating(model):
            alone = _logits_of_second(model, (8,))
            attention.use(model, name)
            return _knows_the_windows(model) and _changes_little(model, alone)
    finally:
        attention.use(model, before)


def _changes_little(model: Any, alone: torch.Tensor) -> bool:
    after = [_logits_of_second(model, (6, 8), begin) for begin in (3, 40)]
    scale = float(alone.abs().max())
    # Same shapes and kernels, so the tokens in front change nothing at all; alone, sums run in another order.
    is_independent = float((after[0] - after[1]).abs().max()) <= 1e-6 * scale
    tolerance = 1e-3 if alone.dtype == torch.float32 else 5e-2
    return is_independent and float((after[0] - alone).abs().max()) <= tolerance * scale


def _knows_the_windows(model: Any) -> bool:
    """Whether our attention is told the window of every layer: a window is too long to be measured."""
    if attention.implementation(model) != attention.NAME:
        return True
    seen: set[int | None] = set()
    _logits_of_second(model, (8,), seen_windows=seen)
    return seen == attention.windows(model)


def _logits_of_second(model: Any, lengths: tuple[int, ...], begin: int = 3, **arguments: Any) -> torch.Tensor:
    """Logits of the last of some conversations, the same whatever `begin`, which changes those in front."""
    batch = _sample(model, lengths, begin).to(_device(model))
    if attention.implementation(model) == attention.NAME:
        arguments["boundaries"] = batch.boundaries
    keep = torch.arange(batch.tokens - lengths[-1], batch.tokens, device=batch.input_ids.device)
    return _logits(model, batch.input_ids, batch.position_ids, keep, **arguments)[0]


def _sample(model: Any, lengths: tuple[int, ...], begin: int = 3) -> Batch:
    size = vocabulary_size(model)
    starts = [begin] * (len(lengths) - 1) + [11]
    return pack(
        [
            Conversation(0, np.arange(start, start + length) % size, np.ones(length, dtype=bool))
            for start, length in zip(starts, lengths, strict=True)
        ]
    )


def _logits(
    model: Any, input_ids: torch.Tensor, position_ids: torch.Tensor, keep: torch.Tensor, **arguments: Any
) -> torch.Tensor:
    """(1, K, V)"""
    output: Any = model(
        input_ids=input_ids,
        position_ids=position_ids,
        logits_to_keep=keep,
        use_cache=False,
        return_dict=True,
        **arguments,
    )
    logits: torch.Tensor = output.logits
    return logits


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _family(model: Any) -> str:
    return type(base_model(model)).__name__
