"""The table of Azure's sizes, and the document's checks on cluster and tags."""

from __future__ import annotations

import pytest
import yaml

from tuneloop.core import sizes
from tuneloop.core.errors import NotFound, Unsupported
from tuneloop.core.types import Card
from tuneloop.workspace.catalog import CARDS


def phi3_tags() -> dict[str, str]:
    return Card.model_validate(
        yaml.safe_load((CARDS / "Phi-3-mini-4k-instruct.yaml").read_text("utf-8"))
    ).tags


@pytest.mark.parametrize(
    "written", ["STANDARD_NC24ADS_A100_V4", "Standard_nc24ads_A100_v4", "nc24ads_a100_v4"]
)
def test_a_size_is_found_whatever_its_case_with_and_without_standard(written: str) -> None:
    found = sizes.get(written)
    assert found.name == "Standard_NC24ads_A100_v4"
    assert (found.cores, found.memory_gib, found.gpus, found.gpu_memory_gib) == (24, 220, 1, 80)


def test_an_unknown_size_names_the_nearest_one() -> None:
    with pytest.raises(NotFound, match="nc24ads_a100_v4"):
        sizes.get("Standard_NC24ads_A100_v5")


def test_names_are_unique_and_numbers_hang_together() -> None:
    names = [size.short_name.lower() for size in sizes.SIZES]
    assert len(names) == len(set(names)) == 23
    for size in sizes.SIZES:
        assert bool(size.gpus or size.gpus is None) == bool(size.gpu), size.name
        assert bool(size.gpu_memory_gib) == bool(size.gpus), size.name
        assert size.is_denied or (size.cores and size.memory_gib), size.name


def test_every_size_of_a_shipped_allow_list_is_in_the_table() -> None:
    listed = {
        name
        for path in CARDS.glob("*.yaml")
        for what in ("finetune", "inference")
        for name in sizes.allow_list(Card.model_validate(yaml.safe_load(path.read_text("utf-8"))).tags, what)
        or ()
    }
    assert len(listed) >= 9
    assert [name for name in sorted(listed) if sizes.find(name) is None] == []


def test_a_failed_cluster_is_refused_in_any_spelling_of_its_state() -> None:
    assert "Provisioning failed" in (sizes.why_not_provisioned("gpu", "Failed") or "")
    assert sizes.why_not_provisioned("gpu", "Succeeded") is None


def test_the_allow_list_is_obeyed_whatever_the_case() -> None:
    allowed = sizes.allow_list(phi3_tags())
    assert allowed is not None
    assert sizes.why_not_allowed("STANDARD_NC24ADS_A100_V4", allowed) is None
    refused = sizes.why_not_allowed("standard_nd40rs_v2", allowed) or ""
    assert "Standard_ND40rs_v2 is not in" in refused
    assert "Standard_NC96ads_A100_v4" in refused


def test_without_an_allow_list_k80_sizes_are_denied_and_others_are_not() -> None:
    for denied in ("Standard_NC6", "STANDARD_NC12", "nc24", "NC24r"):
        assert "not supported for finetuning" in (sizes.why_not_allowed(denied, None) or "")
    assert sizes.why_not_allowed("Standard_NC6s_v3", None) is None
    # With a list, the list alone decides, as in the document.
    assert sizes.why_not_allowed("Standard_NC6", ["STANDARD_NC6"]) is None


def test_an_allow_list_is_a_python_list_as_text_and_what_cannot_be_read_is_none() -> None:
    assert sizes.allow_list({"finetune_compute_allow_list": "['a',\n 'b']"}) == ["a", "b"]
    assert sizes.allow_list({"finetune_compute_allow_list": "os.system('x')"}) is None
    assert sizes.allow_list({}) is None


def test_gpus_of_a_node_come_from_the_list_of_sizes() -> None:
    assert sizes.gpus_per_node("standard_nd40rs_v2") == 8
    with pytest.raises(Unsupported, match="has no GPU"):
        sizes.gpus_per_node("Standard_D12_v2")
    with pytest.raises(Unsupported, match="not in the list"):
        sizes.gpus_per_node("Standard_Z9")


def test_more_processes_than_gpus_is_an_error_and_fewer_a_warning() -> None:
    assert sizes.check_processes(2, "Standard_NC48ads_A100_v4") is None
    assert "1 would be idle" in (sizes.check_processes(1, "Standard_NC48ads_A100_v4") or "")
    with pytest.raises(Unsupported) as refused:
        sizes.check_processes(3, "Standard_NC48ads_A100_v4")
    assert "has 2 GPUs" in refused.value.message
    assert "number_of_gpu_to_use_finetuning to 2" in str(refused.value.next_move)
