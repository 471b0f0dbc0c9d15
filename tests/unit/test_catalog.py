"""The catalogue of base models, on a store of the imagination."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.fakes import FakeClock, FakeStore
from tuneloop.core.errors import AlreadyExists, NotFound, UsageError
from tuneloop.core.types import FolderSource, HubSource
from tuneloop.workspace.catalog import Catalog

CARD = """\
name: Tiny-Chat
version: "9"
description: A very small model.
license: mit
publisher: Nobody
parameters: 1000
context_length: 128
architecture:
  family: llama
  hidden_size: 8
  intermediate_size: 16
  layers: 1
  attention_heads: 2
  key_value_heads: 1
  head_size: 4
  vocabulary_size: 64
  tied_embeddings: true
template_family: chatml
sources:
  - type: hub
    repository: nobody/tiny-chat
    revision: 0123456789abcdef0123456789abcdef01234567
"""


@pytest.fixture
def catalog() -> Catalog:
    return Catalog(FakeStore(), FakeClock())


def refused(catalog: Catalog, text: str) -> list[dict[str, Any]]:
    with pytest.raises(UsageError) as caught:
        catalog.add(text, "my.yaml")
    details: Any = caught.value.details
    return list(details)


def test_list_has_every_model_by_name(catalog: Catalog) -> None:
    names = [card.name for card in catalog.list("chat-completion")]
    assert names == sorted(names, key=str.lower)
    assert len(names) == 19
    assert {"SmolLM2-135M-Instruct", "Llama-3.1-8B-Instruct", "gemma-3-1b-it"} <= set(names)


def test_list_of_another_task_is_empty(catalog: Catalog) -> None:
    assert catalog.list("translation") == []


@pytest.mark.parametrize(
    "name",
    [
        "phi-3-MINI-4k-instruct",
        "Phi-3-mini-4k-instruct:15",
        "Phi-3-mini-4k-instruct:latest",
        "azureml://registries/azureml/models/Phi-3-mini-4k-instruct/versions/15",
        "azureml://registries/azureml/models/Phi-3-mini-4k-instruct/labels/latest",
    ],
)
def test_a_name_matches_whatever_its_case_and_keeps_its_spelling(catalog: Catalog, name: str) -> None:
    assert catalog.get(name).name == "Phi-3-mini-4k-instruct"


def test_get_of_an_unknown_model_names_the_nearest(catalog: Catalog) -> None:
    with pytest.raises(
        NotFound, match=r"no base model 'Phi-3-mini-4k' .*Did you mean 'Phi-3-mini-4k-instruct'"
    ):
        catalog.get("Phi-3-mini-4k")


def test_get_of_an_unknown_version_names_those_that_are(catalog: Catalog) -> None:
    with pytest.raises(NotFound, match=r"no version '14' of Phi-3-mini-4k-instruct\. There is: 15"):
        catalog.get("Phi-3-mini-4k-instruct:14")


def test_find_of_an_unknown_model_is_none(catalog: Catalog) -> None:
    assert catalog.find("nobody") is None


@pytest.mark.parametrize(
    "name",
    [
        "microsoft/Phi-3-mini-4k-instruct",
        "MICROSOFT/phi-3-mini-4k-instruct",
        "microsoft/Phi-3-mini-4k-instruct:15",
        "microsoft/Phi-3-mini-4k-instruct:latest",
    ],
)
def test_a_model_is_found_by_the_repository_of_its_weights(catalog: Catalog, name: str) -> None:
    """What a recipe has as `model: owner/name`, and a pasted call as `huggingface_id`."""
    assert catalog.get(name).name == "Phi-3-mini-4k-instruct"
    assert catalog.find(name) == catalog.get("Phi-3-mini-4k-instruct")


def test_every_shipped_repository_leads_to_one_model(catalog: Catalog) -> None:
    for card in catalog.list():
        for source in card.sources:
            if isinstance(source, HubSource):
                assert catalog.get(source.repository).name == card.name


def test_an_unknown_repository_is_told_with_what_to_add(catalog: Catalog) -> None:
    with pytest.raises(NotFound) as caught:
        catalog.get("microsoft/phi-0")
    assert str(caught.value).startswith(
        "No base model in the catalogue comes from the repository 'microsoft/phi-0'."
    )
    assert "tuneloop catalog add" in (caught.value.next_move or "")
    assert catalog.find("microsoft/phi-0") is None
    catalog.add(CARD.replace("nobody/tiny-chat", "microsoft/phi-0"))
    assert catalog.get("microsoft/phi-0").name == "Tiny-Chat"


def test_an_unknown_version_of_a_repository_names_those_that_are(catalog: Catalog) -> None:
    with pytest.raises(NotFound, match=r"no version '14' of Phi-3-mini-4k-instruct\. There is: 15"):
        catalog.get("microsoft/Phi-3-mini-4k-instruct:14")


def test_a_repository_of_several_models_is_refused_by_their_names(catalog: Catalog) -> None:
    catalog.add(CARD)
    catalog.add(CARD.replace('version: "9"', 'version: "10"'))
    assert catalog.get("nobody/tiny-chat").version == "10"
    catalog.add(CARD.replace("name: Tiny-Chat", "name: Other-Chat"))
    with pytest.raises(UsageError, match=r"Several base models come from .*: Other-Chat, Tiny-Chat"):
        catalog.get("nobody/tiny-chat")
    assert catalog.get("Tiny-Chat").version == "10"


def test_a_model_whose_folder_is_used_is_still_found_by_its_repository(
    catalog: Catalog, tmp_path: Path
) -> None:
    catalog.add(CARD)
    (tmp_path / "config.json").write_text("{}")
    catalog.use("nobody/tiny-chat", tmp_path)
    assert catalog.get("nobody/tiny-chat").sources[0] == FolderSource(path=str(tmp_path))


def test_an_added_card_is_found_and_listed(catalog: Catalog) -> None:
    added = catalog.add(CARD)
    assert catalog.get("tiny-chat") == added
    assert added in catalog.list()


def test_latest_is_the_newest_as_people_count(catalog: Catalog) -> None:
    for version in ("10", "9", "2"):
        catalog.add(CARD.replace('"9"', f'"{version}"'))
    assert catalog.get("Tiny-Chat").version == "10"
    assert catalog.get("Tiny-Chat:2").version == "2"
    assert [card.version for card in catalog.list() if card.name == "Tiny-Chat"] == ["10"]


def test_adding_the_same_card_twice_is_no_error(catalog: Catalog) -> None:
    assert catalog.add(CARD) == catalog.add(CARD)


def test_another_card_of_the_same_version_is_refused(catalog: Catalog) -> None:
    catalog.add(CARD)
    with pytest.raises(AlreadyExists, match="Tiny-Chat:9"):
        catalog.add(CARD.replace("license: mit", "license: apache-2.0"))


def test_a_shipped_card_is_not_replaced_by_adding_one(catalog: Catalog) -> None:
    with pytest.raises(AlreadyExists):
        catalog.add(CARD.replace("Tiny-Chat", "smollm2-135m-instruct").replace('"9"', '"1"'))


def test_all_mistakes_of_a_card_are_said_at_once(catalog: Catalog) -> None:
    found = refused(
        catalog,
        CARD.replace('"9"', "9")
        .replace("layers: 1", "layer: 1")
        .replace("repository: nobody/tiny-chat", "repo: nobody/tiny-chat")
        .replace("license: mit\n", "")
        + "defualts: {}\n",
    )
    assert [(item["line"], item["field"]) for item in found] == [
        (None, "license"),
        (2, "version"),
        (7, "architecture.layers"),
        (11, "architecture.layer"),
        (19, "sources[0].repository"),
        (20, "sources[0].repo"),
        (22, "defualts"),
    ]
    text = " ".join(item["message"] for item in found)
    assert "expected text (put it in quotes)" in text
    assert all(hint in text for hint in ("'layers'", "repository", "'defaults'"))


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("name: Tiny-Chat", "name: ../Tiny", "name"),
        ('version: "9"', "version: latest", "version"),
        ("layers: 1", "layers: 0", "architecture.layers"),
        ("parameters: 1000", "parameters: -1", "parameters"),
        (CARD[CARD.index("sources:") :], "sources: []\n", "sources"),
        ("type: hub", "type: ftp", "sources[0]"),
        ("nobody/tiny-chat", "../../etc", "sources[0].repository"),
        ("nobody/tiny-chat", "tiny-chat", "sources[0].repository"),
        ("0123456789abcdef0123456789abcdef01234567", "../main", "sources[0].revision"),
        ("0123456789abcdef0123456789abcdef01234567", "refs/../../x", "sources[0].revision"),
        ("template_family", "download_bytes: -1\ntemplate_family", "download_bytes"),
        ("layers: 1", "layers: 1\n  sliding_window: 0", "architecture.sliding_window"),
        ("template_family", "defaults: {learning_rat: 1}\ntemplate_family", "defaults"),
    ],
)
def test_a_rule_that_a_card_breaks_is_named(catalog: Catalog, old: str, new: str, field: str) -> None:
    assert field in [item["field"] for item in refused(catalog, CARD.replace(old, new))]


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/3"])
def test_a_branch_or_tag_is_a_revision_too(catalog: Catalog, revision: str) -> None:
    added = catalog.add(CARD.replace("0123456789abcdef0123456789abcdef01234567", revision))
    assert not added.sources[0].is_pinned  # type: ignore[union-attr]


def test_a_model_with_code_of_its_own_has_to_name_a_commit(catalog: Catalog) -> None:
    card = CARD.replace("template_family", "remote_code: true\ntemplate_family")
    assert catalog.add(card).remote_code
    moving = card.replace("0123456789abcdef0123456789abcdef01234567", "main")
    assert refused(catalog, moving)[0]["field"] == "sources[0].revision"


@pytest.mark.parametrize("text", ["", "- a\n", "name: [\n", "name: x\n\ttab: y\n"])
def test_what_is_no_card_is_one_clear_error(catalog: Catalog, text: str) -> None:
    assert len(refused(catalog, text)) == 1


def test_use_puts_a_folder_in_front(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    changed = catalog.use("smollm2-135m-instruct", tmp_path)
    assert changed.sources[0] == FolderSource(path=str(tmp_path))
    assert [source.type for source in changed.sources] == ["folder", "package", "hub"]
    assert catalog.get("SmolLM2-135M-Instruct") == changed


def test_use_again_takes_the_place_of_the_first(catalog: Catalog, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        catalog.use("SmolLM2-135M-Instruct", tmp_path / name)
    sources = catalog.get("SmolLM2-135M-Instruct").sources
    assert [source.type for source in sources] == ["folder", "package", "hub"]
    assert sources[0] == FolderSource(path=str(tmp_path / "two"))


def test_use_of_a_folder_without_a_config_is_refused(catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no config\.json"):
        catalog.use("SmolLM2-135M-Instruct", tmp_path)


def test_use_of_no_folder_is_refused(catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="There is no folder"):
        catalog.use("SmolLM2-135M-Instruct", tmp_path / "nowhere")


def test_use_of_a_relative_folder_is_refused(catalog: Catalog) -> None:
    with pytest.raises(UsageError, match="not absolute"):
        catalog.use("SmolLM2-135M-Instruct", "models/smol")


def test_use_of_an_unknown_model_is_refused(catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        catalog.use("nobody", tmp_path)
