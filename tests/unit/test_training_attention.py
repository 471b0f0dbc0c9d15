"""A packed conversation must give the logits and the gradients that it gives alone."""

from __future__ import annotations

import itertools

import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from tests.architectures import ARCHITECTURES, WINDOW, build, conversations  # noqa: E402
from tuneloop.training import attention  # noqa: E402
from tuneloop.training.attention import packed_attention  # noqa: E402
from tuneloop.training.data import Batch, pack  # noqa: E402

LENGTHS = (9, 31, 4, 17)


def every_logit(model, batch: Batch) -> torch.Tensor:
    """(T, V)"""
    ours = attention.implementation(model) == attention.NAME
    return model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        **({"boundaries": batch.boundaries} if ours else {}),
    ).logits[0]


def packed_length(name: str) -> tuple[int, ...]:
    """LongRoPE changes its frequencies with the longest conversation of a pack: those go alone."""
    return (9, 20, 4, 17) if name == "phi3" else LENGTHS


@pytest.mark.parametrize("used", ["eager", "sdpa", attention.NAME])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_logits_equal_those_of_each_alone(name: str, used: str) -> None:
    chosen = conversations(packed_length(name))
    assert max(packed_length(name)) > WINDOW
    model = build(name, "eager" if used == "eager" else "sdpa")
    reference = build(name, "sdpa")
    if used == attention.NAME:
        attention.use(model, used)
    with torch.no_grad():
        found = every_logit(model, pack(chosen))
        alone = torch.cat([every_logit(reference, pack([each])) for each in chosen])
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


def test_a_conversation_beyond_the_original_length_of_longrope_is_the_same_alone() -> None:
    model, reference = build("phi3"), build("phi3")
    attention.use(model, attention.NAME)
    batch = pack(conversations((40,)))
    with torch.no_grad():
        torch.testing.assert_close(
            every_logit(model, batch), every_logit(reference, batch), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_gradients_equal_those_of_each_alone(name: str) -> None:
    chosen = conversations(packed_length(name))
    model, reference = build(name), build(name)
    attention.use(model, attention.NAME)
    every_logit(model, pack(chosen)).square().mean().backward()
    torch.cat([every_logit(reference, pack([each])) for each in chosen]).square().mean().backward()
    for (which, mine), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=which)


@pytest.mark.parametrize("window", [None, 1, 5, 128, 200, 700])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_windows_of_any_length_equal_a_mask_written_down(window: int | None, softcap: float | None) -> None:
    torch.manual_seed(0)
    boundaries = (0, 300, 303, 600)
    query, key, value = (torch.randn(1, heads, 600, 8) for heads in (4, 2, 2))
    found, _ = packed_attention(
        torch.nn.Module(), query, key, value, None,
        boundaries=boundaries, scaling=0.3, sliding_window=window, softcap=softcap,
    )  # fmt: skip
    sees = torch.zeros(600, 600, dtype=torch.bool)
    for begin, end in itertools.pairwise(boundaries):
        sees[begin:end, begin:end] = True
    behind = torch.arange(600)[:, None] - torch.arange(600)
    sees &= (behind >= 0) & (behind < (window or 600))
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~sees, float("-inf")).softmax(-1)
    expected = (weights @ value.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.is_contiguous()


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return made


def test_no_tensor_grows_with_the_square_of_the_pack() -> None:
    model = build("mistral")
    attention.use(model, attention.NAME)
    batch = pack(conversations((64,) * 16))
    with torch.no_grad(), Largest() as seen:
        model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            boundaries=batch.boundaries,
            logits_to_keep=torch.tensor([1]),
            use_cache=False,
        )
    assert batch.tokens == 1024
    assert seen.elements < batch.tokens**2 / 8


def test_a_call_that_names_no_boundaries_is_refused() -> None:
    model = build("llama")
    attention.use(model, attention.NAME)
    with pytest.raises(RuntimeError, match=r"call it through training\.loss\.Objective"):
        model(input_ids=torch.arange(5)[None])


def test_dropout_is_obeyed() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 12, 8) for _ in range(3))
    for softcap in (None, 3.0):
        given = {"boundaries": (0, 12), "softcap": softcap}
        kept, _ = packed_attention(torch.nn.Module(), query, key, value, None, **given)
        dropped, _ = packed_attention(torch.nn.Module(), query, key, value, None, dropout=0.5, **given)
        assert not torch.allclose(kept, dropped)


def test_the_kinds_of_layers_that_are_known() -> None:
    assert attention.windows(build("llama")) == {None}
    assert attention.windows(build("mistral")) == {WINDOW}
    assert attention.windows(build("gemma3")) == {WINDOW, None}
    model = build("gemma3")
    model.config.layer_types = ["chunked_attention", "full_attention"]
    assert attention.windows(model) is None
