"""The objective's loss must be transformers' own, however conversations are packed, in every architecture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from tests import architectures
from tests.architectures import ARCHITECTURES, ORIGINAL_LENGTH, build, conversations
from tests.models import FAMILIES, Family, tiny_model
from tuneloop import lm
from tuneloop.core.errors import Unsupported
from tuneloop.training import attention
from tuneloop.training.data import Conversation, pack
from tuneloop.training.loss import Objective, check_forward


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


def adapted(model: Any) -> Any:
    """With an adapter that changes something: LoRA's B starts at zero."""
    found = lm.add_lora(model, 4, 8, seed=1)
    chance = torch.Generator().manual_seed(2)
    for name, weight in found.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1, generator=chance)
    return found


def total(objective: Objective, chosen: list[Conversation], budget: int = 4096) -> torch.Tensor:
    return sum((objective.summed_loss(batch) for batch in objective.batches(chosen, budget)), torch.zeros(()))


@pytest.mark.parametrize("used", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_loss_and_gradients_equal_padded_ones(tmp_path: Path, family: Family, used: str) -> None:
    folder = tiny_model(tmp_path, family)
    chosen = some(5)
    ours = lm.load_model(folder, attn_implementation=used)
    reference = lm.load_model(folder, attn_implementation=used)
    objective = Objective(ours)
    assert objective.is_packed
    assert objective.remarks == []
    loss, expected = objective.summed_loss(pack(chosen)), padded_loss(reference, chosen)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    for (name, mine), theirs in zip(ours.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("is_lora", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_equal_those_of_transformers(
    name: str, is_lora: bool, is_checkpointed: bool
) -> None:
    chosen = conversations()
    ours, reference = (adapted(build(name)) if is_lora else build(name) for _ in range(2))
    if is_checkpointed:
        ours.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    objective = Objective(ours)
    ours.train()
    assert attention.implementation(ours) == attention.NAME
    assert objective.remarks == []
    loss, expected = total(objective, chosen), architectures.plain_loss(reference, chosen)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    trained = 0
    for (which, mine), theirs in zip(ours.named_parameters(), reference.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), which
        if mine.grad is not None:
            trained += 1
            scale = float(theirs.grad.abs().max())
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4 * scale + 1e-6, msg=which)
    assert trained


def test_however_it_is_cut_the_sum_is_the_same() -> None:
    chosen = conversations((9, 31, 4, 17, 12, 25))
    model = build("qwen3")
    objective = Objective(model)
    sums = {budget: total(objective, chosen, budget).item() for budget in (1, 32, 60, 1000)}
    assert [len(objective.batches(chosen, budget)) for budget in sums] == [6, 4, 2, 1]
    assert list(sums.values()) == pytest.approx([sums[1]] * 4, rel=1e-5)


def test_under_autocast_the_loss_is_near_that_of_fp32() -> None:
    chosen = conversations()
    exact = total(Objective(build("llama")), chosen).item()
    model = build("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        objective = Objective(model)
        assert objective.remarks == []
        loss = total(objective, chosen)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=0.01)
    loss.backward()


def test_tokens_that_do_not_count_get_no_gradient() -> None:
    model = build("llama")
    objective = Objective(model)
    ids = np.arange(8)
    silent = Conversation(0, ids, np.zeros(8, dtype=bool))
    learned = Conversation(1, ids + 8, np.array([0, 0, 0, 1, 1, 0, 0, 0], dtype=bool))
    embedded: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, given, made: embedded.append(made.requires_grad_()) or made.retain_grad()
    )
    objective.summed_loss(pack([silent, learned, silent])).backward()
    has_gradient = embedded[-1].grad[0].abs().sum(1) > 0
    # Position 3, counted from 0, predicts the last learned token: what comes after has no part in the loss.
    assert has_gradient.tolist() == [False] * 8 + [True] * 4 + [False] * 4 + [False] * 8


def test_a_model_that_ignores_where_conversations_begin_is_found_out() -> None:
    model = build("llama")
    forward = model.forward

    def blind(*, position_ids: Any, logits_to_keep: Any, boundaries: Any = None, **given: Any) -> Any:
        return forward(logits_to_keep=logits_to_keep, boundaries=(0, given["input_ids"].shape[1]), **given)

    model.forward = blind
    objective = Objective(model)
    assert not objective.is_packed
    assert "one by one" in objective.remarks[-1]
    assert objective.packs([5, 5, 5], 100) == [[0], [1], [2]]
    chosen = conversations()
    expected = architectures.plain_loss(build("llama"), chosen)
    assert total(objective, chosen).item() == pytest.approx(expected.item(), rel=1e-5)


def test_an_attention_that_is_told_no_window_is_not_replaced() -> None:
    model = build("mistral")
    # The layers say 6; the configuration, from which transformers makes its masks, says otherwise.
    model.config.layer_types = ["full_attention", "full_attention"]
    objective = Objective(model)
    assert attention.implementation(model) == "sdpa"
    assert "does not know" in objective.remarks[0]
    assert objective.is_packed


def test_packing_can_be_forbidden() -> None:
    objective = Objective(build("llama"), is_packing_allowed=False)
    assert not objective.is_packed
    assert objective.packs([3, 4], 100) == [[0], [1]]
    assert objective.remarks == []


def test_logits_that_are_changed_after_the_head_are_learned_as_they_are_changed() -> None:
    chosen = conversations()
    model = build("gemma3", final_logit_softcapping=2.0)
    objective = Objective(model)
    assert "changes its logits after the head" in objective.remarks[0]
    expected = architectures.plain_loss(build("gemma3", final_logit_softcapping=2.0), chosen)
    assert total(objective, chosen).item() == pytest.approx(expected.item(), rel=1e-5)


def test_an_adapted_head_is_learned() -> None:
    chosen = conversations()

    def with_head() -> Any:
        model = lm.add_lora(build("llama"), 4, 8, targets=["q_proj", "lm_head"], seed=1)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(weight, 0.1)
        return model

    ours, reference = with_head(), with_head()
    objective = Objective(ours)
    assert objective.remarks == []
    loss, expected = total(objective, chosen), architectures.plain_loss(reference, chosen)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for (which, mine), theirs in zip(ours.named_parameters(), reference.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=which)


def test_long_conversations_go_alone_where_length_changes_the_frequencies() -> None:
    objective = Objective(build("phi3"))
    assert objective.alone_above == ORIGINAL_LENGTH
    lengths = [4, ORIGINAL_LENGTH + 1, ORIGINAL_LENGTH, 30]
    assert objective.packs(lengths, 100) == [[0, 2], [1], [3]]


def test_closed_the_model_is_what_it_was() -> None:
    model, untouched = adapted(build("gemma3")), adapted(build("gemma3"))
    objective = Objective(model, noise_alpha=5.0)
    objective.summed_loss(pack(conversations()))
    objective.close()
    objective.close()
    ids = torch.arange(20)[None]
    for each in (model, untouched):
        each.train()
    assert torch.equal(model(input_ids=ids).logits, untouched(input_ids=ids).logits)
    assert attention.implementation(model) == "sdpa"
    assert list(model.state_dict()) == list(untouched.state_dict())


def test_the_measurement_leaves_mode_and_generators_alone() -> None:
    model = build("llama").train()
    before = torch.get_rng_state()
    Objective(model)
    assert model.training
    assert torch.equal(before, torch.get_rng_state())


def test_a_model_without_chosen_logits_is_refused() -> None:
    class Other(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids

    with pytest.raises(Unsupported, match=r"Other cannot be trained: .* logits_to_keep and no position_ids"):
        check_forward(Other())


# ---------------------------------------------------------------- NEFTune


def noised(alpha: float, lengths: tuple[int, ...], *, is_training: bool = True) -> torch.Tensor:
    """(T, d) what is added to the embeddings of a pack."""
    model = build("llama")
    objective = Objective(model, noise_alpha=alpha)
    model.train(is_training)
    batch = pack(conversations(lengths))
    plain = torch.nn.functional.embedding(batch.input_ids, model.get_input_embeddings().weight)
    seen: list[torch.Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    torch.manual_seed(7)
    objective.summed_loss(batch)
    return (seen[-1] - plain.detach())[0]


def test_noise_is_scaled_by_the_length_of_each_conversation_not_of_the_pack() -> None:
    alpha, width = 5.0, 32
    lengths = (64, 16)
    noise = noised(alpha, lengths)
    for part, length in zip(noise.split(lengths), lengths, strict=True):
        reach = alpha / math.sqrt(length * width)
        assert float(part.abs().max()) == pytest.approx(reach, rel=0.02)
        assert float(part.std()) == pytest.approx(reach / math.sqrt(3), rel=0.1)
        assert abs(float(part.mean())) < reach / 10


def test_a_conversation_alone_gets_the_noise_of_the_paper() -> None:
    """arXiv:2310.05914, algorithm 1, with the same draws."""
    torch.manual_seed(7)
    expected = torch.empty(1, 20, 32).uniform_(-1, 1)[0] * 5.0 / math.sqrt(20 * 32)
    torch.testing.assert_close(noised(5.0, (20,)), expected, rtol=1e-4, atol=1e-6)


def test_there_is_no_noise_in_evaluation() -> None:
    assert float(noised(5.0, (20,), is_training=False).abs().max()) == 0
