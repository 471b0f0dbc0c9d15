"""Packed conversations must be as if they were alone, in every family of models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from tests.models import FAMILIES, Family, tiny_model
from tuneloop import lm
from tuneloop.core.errors import Unsupported
from tuneloop.training.data import Conversation, pack
from tuneloop.training.loss import Packing, check_forward, isolates, packing_of, summed_loss


def some(count: int) -> list[Conversation]:
    chance = np.random.default_rng(5)
    lengths = chance.integers(4, 20, count)
    return [
        Conversation(row, chance.integers(0, 448, length), chance.random(length) < 0.6)
        for row, length in enumerate(lengths)
    ]


def padded_loss(model: torch.nn.Module, conversations: list[Conversation]) -> torch.Tensor:
    """Independent of all that is tested here: right padding, an attention mask, labels of -100."""
    longest = max(len(each.input_ids) for each in conversations)
    shape = (len(conversations), longest)
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, -100)
    for row, each in enumerate(conversations):
        length = len(each.input_ids)
        ids[row, :length] = torch.tensor(each.input_ids)
        mask[row, :length] = 1
        labels[row, :length] = torch.where(torch.tensor(each.learn), ids[row, :length], -100)
    return model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=1).loss


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_loss_and_gradients_equal_padded_ones(tmp_path: Path, family: Family, attention: str) -> None:
    folder = tiny_model(tmp_path, family)
    conversations = some(5)
    ours = lm.load_model(folder, attn_implementation=attention)
    reference = lm.load_model(folder, attn_implementation=attention)
    assert isolates(ours)
    loss, expected = summed_loss(ours, pack(conversations)), padded_loss(reference, conversations)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    for (name, mine), theirs in zip(ours.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_a_model_that_ignores_where_conversations_begin_is_found_out(tmp_path: Path) -> None:
    model = lm.load_model(tiny_model(tmp_path))
    forward = model.forward

    def without_positions(*, position_ids: torch.Tensor, **arguments: object) -> object:
        return forward(**arguments)

    model.forward = without_positions
    assert not isolates(model)
    assert not packing_of(model).is_isolated


def test_one_by_one_gives_the_same_sum_as_packed(tmp_path: Path) -> None:
    model = lm.load_model(tiny_model(tmp_path))
    conversations = some(4)
    (packed,) = Packing(is_isolated=True).batches(conversations)
    alone = Packing(is_isolated=False).batches(conversations)
    assert len(alone) == 4
    total = sum(summed_loss(model, batch).item() for batch in alone)
    assert total == pytest.approx(summed_loss(model, packed).item(), rel=1e-5)


def test_long_conversations_go_alone_where_length_changes_the_frequencies(tmp_path: Path) -> None:
    model = lm.load_model(tiny_model(tmp_path, "phi3"))
    model.config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 10}
    assert packing_of(model).alone_above == 10
    lengths = [4, 12, 10, 11]
    conversations = [
        Conversation(row, np.arange(length), np.ones(length, dtype=bool))
        for row, length in enumerate(lengths)
    ]
    assert [batch.rows for batch in Packing(True, 10).batches(conversations)] == [(0, 2), (1,), (3,)]


def test_the_measurement_leaves_mode_and_generators_alone(tmp_path: Path) -> None:
    model = lm.load_model(tiny_model(tmp_path)).train()
    before = torch.get_rng_state()
    isolates(model)
    assert model.training
    assert torch.equal(before, torch.get_rng_state())


def test_a_model_without_chosen_logits_is_refused() -> None:
    class Other(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids

    with pytest.raises(Unsupported, match=r"Other cannot be trained: .* logits_to_keep and no position_ids"):
        check_forward(Other())
