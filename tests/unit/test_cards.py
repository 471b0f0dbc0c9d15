"""The cards that ship: their numbers add up, their tags parse as users' scripts parse them."""

from __future__ import annotations

import ast
import json
import re

import pytest

from tuneloop.core.recipe import defaults_of
from tuneloop.core.types import Card, HubSource, PackageSource
from tuneloop.workspace.catalog import CARDS, shipped_cards

SHIPPED = shipped_cards()
PHI = [card for card in SHIPPED if card.name.startswith("Phi-3-mini")]
LISTS = ("finetune_compute_allow_list", "inference_compute_allow_list", "inference_supported_envs")


def by_name(card: Card) -> str:
    return card.name


def weights(card: Card) -> int:
    """Of a decoder with SwiGLU and RMSNorm; Qwen2 has biases on queries, keys and values."""
    shape = card.architecture
    queries, values = (heads * shape.head_size for heads in (shape.attention_heads, shape.key_value_heads))
    attention = 2 * shape.hidden_size * (queries + values)
    biases = queries + 2 * values if shape.family == "qwen2" else 0
    layer = attention + biases + 3 * shape.hidden_size * shape.intermediate_size + 2 * shape.hidden_size
    embeddings = shape.vocabulary_size * shape.hidden_size * (1 if shape.tied_embeddings else 2)
    return embeddings + shape.layers * layer + shape.hidden_size


def test_four_cards_ship() -> None:
    assert {f"{card.name}:{card.version}" for card in SHIPPED} == {
        "SmolLM2-135M-Instruct:1",
        "Phi-3-mini-4k-instruct:15",
        "Phi-3-mini-128k-instruct:13",
        "Qwen2.5-0.5B-Instruct:1",
    }


@pytest.mark.parametrize("card", SHIPPED, ids=by_name)
def test_the_file_is_named_after_the_card(card: Card) -> None:
    assert (CARDS / f"{card.name}.yaml").is_file()


@pytest.mark.parametrize("card", SHIPPED, ids=by_name)
def test_the_parameters_are_the_sum_over_the_architecture(card: Card) -> None:
    assert weights(card) == card.parameters


@pytest.mark.parametrize("card", SHIPPED, ids=by_name)
def test_every_source_is_pinned(card: Card) -> None:
    for source in card.sources:
        if isinstance(source, HubSource):
            assert re.fullmatch(r"[0-9a-f]{40}", source.revision)
        if isinstance(source, PackageSource):
            assert re.fullmatch(r"[0-9a-f]{64}", source.sha256)


@pytest.mark.parametrize("card", SHIPPED, ids=by_name)
def test_every_number_has_its_reference(card: Card) -> None:
    assert {"architecture", "parameters", "revision"} <= card.references.keys()


@pytest.mark.parametrize("card", SHIPPED, ids=by_name)
def test_the_defaults_are_parameters_of_ours(card: Card) -> None:
    defaults_of(card)


@pytest.mark.parametrize("card", PHI, ids=by_name)
def test_a_users_script_can_parse_the_tags(card: Card) -> None:
    for tag in LISTS:
        value = card.tags[tag]
        assert str(ast.literal_eval(value)) == value
        with pytest.raises(json.JSONDecodeError):
            json.loads(value)
    defaults = card.tags["model_specific_defaults"]
    assert json.dumps(json.loads(defaults)) == defaults
    assert ast.literal_eval(defaults) == json.loads(defaults)


@pytest.mark.parametrize("card", PHI, ids=by_name)
def test_the_defaults_are_the_tag_as_values(card: Card) -> None:
    assert json.loads(card.tags["model_specific_defaults"]) == card.defaults


def test_phi_4k_has_the_lists_of_the_registry_in_their_order() -> None:
    card = next(card for card in PHI if card.version == "15")
    assert card.id == "azureml://registries/azureml/models/Phi-3-mini-4k-instruct/versions/15"
    assert ast.literal_eval(card.tags["finetune_compute_allow_list"]) == [
        "Standard_NC24ads_A100_v4",
        "Standard_NC48ads_A100_v4",
        "Standard_NC96ads_A100_v4",
        "Standard_ND96asr_v4",
        "Standard_ND96amsr_A100_v4",
    ]
    assert ast.literal_eval(card.tags["inference_compute_allow_list"]) == [
        "Standard_NC6s_v3",
        "Standard_NC12s_v3",
        "Standard_NC24s_v3",
        "Standard_ND40rs_v2",
        "Standard_NC24ads_A100_v4",
        "Standard_NC48ads_A100_v4",
        "Standard_ND96asr_v4",
        "Standard_ND96amsr_A100_v4",
        "Standard_NC96ads_A100_v4",
    ]


def test_only_the_cards_of_the_registry_have_its_tags() -> None:
    tagged = {card.name for card in SHIPPED if card.tags}
    assert tagged == {card.name for card in PHI}


def test_smollm2_says_that_its_weights_were_quantised() -> None:
    source = next(card for card in SHIPPED if card.name.startswith("SmolLM2")).sources[0]
    assert isinstance(source, PackageSource)
    assert source.note == "dequantised from 4 bits"
