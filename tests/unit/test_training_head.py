"""The chunked loss against torch's cross-entropy, and against the memory that it promises."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional  # noqa: E402

from tests.architectures import build  # noqa: E402
from tests.unit.test_training_attention import Largest  # noqa: E402
from tuneloop.training import head  # noqa: E402
from tuneloop.training.head import ChunkedLoss, Head, chunk_positions  # noqa: E402


def operands(dtype: torch.dtype, positions: int = 11) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, 16, generator=chance, dtype=torch.float64).to(dtype)
    weight = torch.randn(50, 16, generator=chance, dtype=torch.float64).to(dtype)
    return (
        hidden.requires_grad_(),
        weight.requires_grad_(),
        torch.randint(0, 50, (positions,), generator=chance),
    )


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_loss_and_gradients_equal_those_of_cross_entropy(
    dtype: torch.dtype, tolerance: float, chunk: int
) -> None:
    hidden, weight, targets = operands(dtype)
    (ChunkedLoss.apply(hidden, weight, targets, chunk) * 0.25).backward()
    found = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    expected = functional.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
    (expected * 0.25).backward()
    torch.testing.assert_close(
        ChunkedLoss.apply(hidden, weight, targets, chunk), expected, rtol=tolerance, atol=0
    )
    for mine, theirs in zip(found, (hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_under_autocast_products_are_bf16_and_the_softmax_is_fp32() -> None:
    hidden, weight, targets = operands(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ChunkedLoss.apply(hidden, weight, targets, 3)
    assert loss.dtype == torch.float32
    logits = (hidden.bfloat16() @ weight.bfloat16().t()).float()
    expected = functional.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    exact = torch.autograd.grad(
        functional.cross_entropy(hidden @ weight.t(), targets, reduction="sum"), (hidden, weight)
    )
    for mine, theirs in zip((hidden.grad, weight.grad), exact, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 0.02


def test_a_bf16_weight_gets_its_gradient_summed_in_fp32() -> None:
    hidden, weight, targets = operands(torch.bfloat16, positions=600)
    ChunkedLoss.apply(hidden, weight, targets, 1).backward()
    exact = torch.autograd.grad(
        functional.cross_entropy(hidden.float() @ weight.float().t(), targets, reduction="sum"), weight
    )[0]
    assert weight.grad.dtype == torch.bfloat16
    assert float((weight.grad.float() - exact.float()).norm() / exact.float().norm()) < 0.01


def test_a_frozen_weight_gets_no_gradient_and_costs_no_product() -> None:
    hidden, weight, targets = operands(torch.float32)
    frozen = weight.detach()
    with Products() as made:
        ChunkedLoss.apply(hidden, frozen, targets, 100).backward()
    assert made.count == 2
    assert hidden.grad is not None
    assert frozen.grad is None


def test_without_gradients_only_the_logits_are_computed() -> None:
    model = build("llama")
    module = model.lm_head
    attached = Head(model)
    states = torch.randn(1, 5, 32, requires_grad=True)
    with torch.no_grad(), attached.learning(torch.arange(5)), Products() as made:
        loss = module(states)
    assert made.count == 1
    assert not loss.requires_grad


class Products(Largest):
    """How many matrix products are made."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.__name__.split(".")[0] in ("mm", "addmm", "addmm_", "bmm")
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_no_tensor_is_larger_than_a_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    size, chunk = 5000, 7
    monkeypatch.setattr(head, "CHUNK_BYTES", {"cpu": chunk * size * 4})
    assert chunk_positions(size, torch.device("cpu")) == chunk
    model = build("llama", vocab_size=size, hidden_size=4)
    model.requires_grad_(False)
    attached = Head(model)
    with attached.learning(torch.arange(100)), Largest() as seen:
        model.lm_head(torch.randn(1, 100, 4, requires_grad=True)).backward()
    assert seen.elements <= chunk * size


@pytest.mark.parametrize("is_fused", [True, False])
def test_no_positions_give_a_loss_of_zero_that_can_be_differentiated(is_fused: bool) -> None:
    model = build("llama")
    attached = Head(model)
    attached.is_fused = is_fused
    states = torch.randn(1, 0, 32, requires_grad=True)
    with attached.learning(torch.zeros(0, dtype=torch.long)):
        loss = model.lm_head(states)
    loss.backward()
    assert loss.item() == 0
    assert states.grad.shape == (1, 0, 32)


def test_a_head_that_computes_in_its_own_way_is_asked_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    model.lm_head = torch.nn.Linear(32, 96, bias=True)
    monkeypatch.setattr(head, "CHUNK_BYTES", {"cpu": 3 * 96 * 4})
    states, targets = torch.randn(1, 10, 32, requires_grad=True), torch.arange(10)
    expected = functional.cross_entropy(model.lm_head(states)[0], targets, reduction="sum")
    wanted = torch.autograd.grad(expected, (states, model.lm_head.weight, model.lm_head.bias))
    attached = Head(model)
    assert not attached.is_fused
    with attached.learning(targets):
        loss = model.lm_head(states)
    found = torch.autograd.grad(loss, (states, model.lm_head.weight, model.lm_head.bias))
    for mine, theirs in zip((loss, *found), (expected, *wanted), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_gradient_is_taken_once() -> None:
    hidden, weight, targets = operands(torch.float32)
    loss = ChunkedLoss.apply(hidden, weight, targets, 4)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="was taken already"):
        loss.backward()


def test_detached_the_head_is_what_it_was() -> None:
    model = build("llama")
    before = dict(model.lm_head.__dict__)
    attached = Head(model)
    ids = torch.arange(5)[None]
    inside = model(input_ids=ids).logits
    attached.detach()
    attached.detach()
    assert model.lm_head.__dict__ == before
    assert torch.equal(inside, model(input_ids=ids).logits)
