"""What is trained, in every architecture, must load elsewhere: adapters in PEFT, models in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from tests.architectures import ARCHITECTURES, build, conversations  # noqa: E402
from tests.models import tiny_tokenizer  # noqa: E402
from tuneloop import lm  # noqa: E402
from tuneloop.core.errors import Unsupported  # noqa: E402
from tuneloop.training.loss import Objective  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
KINDS = ("lora", "rslora", "dora", "full")
IDS = torch.arange(30)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def prepared(name: str, kind: str) -> Any:
    model = build(name)
    if kind == "full":
        return model
    return lm.add_lora(model, 4, 8, seed=1, use_rslora=kind == "rslora", use_dora=kind == "dora")


def trained(model: Any) -> list[float]:
    """The losses of a few steps; the model is left as training leaves it."""
    chosen = conversations()
    objective = Objective(model)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(4):
        parts = [objective.summed_loss(batch) for batch in objective.batches(chosen, 64)]
        loss = sum(parts) / sum(batch.learned for batch in objective.batches(chosen, 64))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    objective.close()
    return losses


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_trained_loads_elsewhere_with_equal_logits(name: str, kind: str, tmp_path: Path) -> None:
    base, model = build(name), prepared(name, kind)
    losses = trained(model)
    assert losses[-1] < losses[0] - 0.05
    expected = logits(model)
    assert not torch.allclose(expected, logits(base), atol=1e-2)
    if kind != "full":
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        assert all(
            each.numel() for each in load_file(tmp_path / "adapter/adapter_model.safetensors").values()
        )
        elsewhere = peft.PeftModel.from_pretrained(build(name), str(tmp_path / "adapter"))
        torch.testing.assert_close(logits(elsewhere), expected, rtol=0, atol=1e-5)
        model = lm.merge(model)
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert lm.unusable_tensors(model.state_dict().items()) == []
    model.save_pretrained(tmp_path / "model")
    # peft#2450: tensors without elements were written, and nobody noticed.
    written = load_file(tmp_path / "model/model.safetensors")
    assert all(each.numel() for each in written.values())
    elsewhere = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(elsewhere).__name__ == type(base).__name__
    torch.testing.assert_close(logits(elsewhere), expected, rtol=1e-4, atol=1e-4)


def test_fused_layers_get_one_adapter_each() -> None:
    model = prepared("phi3", "lora")
    layers = {name.split(".lora_A")[0].rsplit(".", 1)[1] for name in model.state_dict() if "lora_A" in name}
    assert layers == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


def test_an_adapter_on_16_bit_weights_is_merged_in_fp32() -> None:
    """A change of a thousandth of a weight is below bf16's rounding: merged in place, most of it is lost."""

    def small() -> Any:
        model = lm.add_lora(build("llama").to(torch.bfloat16), 4, 8, seed=1)
        chance = torch.Generator().manual_seed(2)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=1e-3, generator=chance)
        return model

    base = logits(build("llama").to(torch.bfloat16).float())
    change = logits(small().float()) - base
    assert float(change.abs().max()) > 0
    ours = lm.merge(small())
    assert {each.dtype for each in ours.parameters()} == {torch.float32}
    assert ours.config.dtype == torch.float32
    in_place = small().merge_and_unload().float()

    def lost(model: Any) -> float:
        return float((logits(model) - base - change).norm() / change.norm())

    assert lost(ours) < 1e-2
    assert lost(in_place) > 0.1


def test_4_bits_without_bitsandbytes_are_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("llama").save_pretrained(tiny_tokenizer(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Unsupported, match="bitsandbytes is not installed") as refused:
        lm.load_model(tmp_path, quantization="4bit")
    assert "pip install 'tuneloop[quantization]'" in str(refused.value.next_move)


def test_a_model_in_4_bits_is_trained_by_its_adapter_and_never_merged(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    try:
        lm.refuse_without_four_bits(lm.device())
    except Unsupported as reason:
        pytest.skip(str(reason))
    wide = {"hidden_size": 128, "intermediate_size": 256}
    plain = build("llama", **wide)
    plain.save_pretrained(tiny_tokenizer(tmp_path / "base"))
    base = lm.load_model(tmp_path / "base", device=lm.device(), quantization="4bit")
    assert type(base.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert type(base.lm_head) is torch.nn.Linear
    model = lm.add_lora(base, 4, 8, seed=1)
    assert {
        name for name, each in model.named_parameters() if each.requires_grad and "lora_" not in name
    } == set()
    # An evaluation must not change how the weights are kept, or nothing behind them would be learned.
    logits(model)
    losses = trained(model)
    assert losses[-1] < losses[0] - 0.05
    with pytest.raises(Unsupported, match="4 bits"):
        lm.merge(model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    whole = lm.merge(lm.load_adapter(lm.load_model(tmp_path / "base"), tmp_path / "adapter"))
    assert {each.dtype for each in whole.parameters()} == {torch.float32}
    assert float((logits(whole) - logits(plain)).abs().max()) > 1e-2
