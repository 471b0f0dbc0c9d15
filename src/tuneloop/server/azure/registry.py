"""The system registry: the catalogue's cards as models, and the pipeline component. Nothing is written here:
the catalogue is kept with `tuneloop catalog`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tuneloop.core import sizes
from tuneloop.core.errors import NotFound
from tuneloop.core.types import Card, HubSource
from tuneloop.server.azure.component import NAME, OUTPUTS, VERSION, component_spec
from tuneloop.server.azure.errors import not_found
from tuneloop.server.azure.gateway import LOCATION, REGISTRY, Gateway
from tuneloop.server.azure.routing import ML, Answer, Request, Routes

routes = Routes()

_REGISTRIES = "/providers/Microsoft.MachineLearningServices/registries"
_DEFAULT_VERSION = "azureml_default"
"""What the SDK asks for when a script names no version of a component."""


# ---------------------------------------------------------------- the registry itself


@routes.add("GET", "/subscriptions/{subscription}/resourceGroups/{group}" + _REGISTRIES)
def list_registries(gateway: Gateway, request: Request) -> Answer:
    """The one registry, of a resource group"""
    return Answer({"value": [_registry_view(gateway, request)]})


@routes.add("GET", "/subscriptions/{subscription}" + _REGISTRIES)
def list_all_registries(gateway: Gateway, request: Request) -> Answer:
    """The one registry, of a subscription"""
    return Answer({"value": [_registry_view(gateway, request)]})


@routes.add("GET", "/subscriptions/{subscription}/resourceGroups/{group}" + _REGISTRIES + "/{registry}")
def get_registry(gateway: Gateway, request: Request) -> Answer:
    """The system registry"""
    _check_registry(request)
    return Answer(_registry_view(gateway, request))


def _registry_view(gateway: Gateway, request: Request) -> dict[str, Any]:
    group = request.params.get("group", "tuneloop")
    return {
        "id": f"/subscriptions/{request['subscription']}/resourceGroups/{group}{_REGISTRIES}/{REGISTRY}",
        "name": REGISTRY,
        "type": "Microsoft.MachineLearningServices/registries",
        "location": LOCATION,
        "tags": {},
        "properties": {
            "publicNetworkAccess": "Disabled",
            "discoveryUrl": f"{gateway.base_url}/registrymanagement/v1.0/registries/{REGISTRY}/discovery",
            "regionDetails": [{"location": LOCATION, "acrDetails": [], "storageAccountDetails": []}],
        },
    }


def _check_registry(request: Request) -> None:
    if request["registry"].lower() != REGISTRY:
        raise not_found(f"There is no registry {request['registry']!r}; there is: {REGISTRY}.", "registry")


# ---------------------------------------------------------------- models


@routes.add("GET", "{reg}/models", audience=ML)
def list_registry_models(gateway: Gateway, request: Request) -> Answer:
    """Base models of the catalogue"""
    _check_registry(request)
    return Answer({"value": [_model_container(request, card) for card in gateway.parts.catalog.list()]})


@routes.add("GET", "{reg}/models/{model}", audience=ML)
def get_registry_model_container(gateway: Gateway, request: Request) -> Answer:
    """A base model without its versions"""
    _check_registry(request)
    return Answer(_model_container(request, _versions(gateway, request["model"])[-1]))


@routes.add("GET", "{reg}/models/{model}/versions", audience=ML)
def list_registry_model_versions(gateway: Gateway, request: Request) -> Answer:
    """Versions of a base model, newest first; the label `latest` is the first"""
    _check_registry(request)
    newest_first = list(reversed(_versions(gateway, request["model"])))
    return Answer({"value": _top(request, [model_view(gateway, card) for card in newest_first])})


@routes.add("GET", "{reg}/models/{model}/versions/{version}", audience=ML)
def get_registry_model(gateway: Gateway, request: Request) -> Answer:
    """One version of a base model, with its tags"""
    _check_registry(request)
    versions = _versions(gateway, request["model"])
    found = next((card for card in versions if card.version == request["version"]), None)
    if found is None:
        there = ", ".join(card.version for card in versions)
        raise not_found(
            f"There is no version {request['version']!r} of {versions[0].name}; there is: {there}.", "version"
        )
    return Answer(model_view(gateway, found))


def _versions(gateway: Gateway, name: str) -> Sequence[Card]:
    """Oldest first. Raises `NotFound` with the nearest name."""
    if ":" in name or "/" in name:
        raise NotFound(
            f"There is no base model {name!r} in the catalogue.", next_move="See: tuneloop catalog list."
        )
    return gateway.parts.catalog.versions(name)


def _model_container(request: Request, card: Card) -> dict[str, Any]:
    return {
        "id": f"azureml://registries/{REGISTRY}/models/{card.name}",
        "name": card.name,
        "type": "Microsoft.MachineLearningServices/registries/models",
        "properties": {
            "description": card.description,
            "tags": {"task": card.task},
            "properties": {},
            "isArchived": False,
            "latestVersion": card.version,
            # The SDK asks for it before it uploads a model that has none; the upload is refused.
            "nextVersion": str(int(card.version) + 1) if card.version.isdecimal() else "1",
        },
        "systemData": {},
    }


def model_view(gateway: Gateway, card: Card) -> dict[str, Any]:
    """A card as a version of a registry's model. The weights stay where the card says."""
    return {
        "id": card.id,
        "name": card.version,
        "type": "Microsoft.MachineLearningServices/registries/models/versions",
        "properties": {
            "description": card.description,
            "tags": tags(card),
            "properties": properties(card),
            "isArchived": False,
            "isAnonymous": False,
            "modelType": "mlflow_model",
            "modelUri": _weights_at(gateway, card),
            # An object, or the SDK cannot read the model. No weights are there yet that could have one.
            "flavors": {},
            "stage": "Production",
            "provisioningState": "Succeeded",
        },
        "systemData": {},
    }


def _weights_at(gateway: Gateway, card: Card) -> str:
    """An address that the SDK can take apart: it asks us for it when a script downloads the model."""
    hub = next((source for source in card.sources if isinstance(source, HubSource)), None)
    if hub is not None:
        return f"https://huggingface.co/{hub.repository}/tree/{hub.revision}"
    return f"{gateway.base_url}/catalog/{card.name}/{card.version}"


def tags(card: Card) -> dict[str, str]:
    """What scripts look at. A card's own tags stand; what else it knows of the model is written as Azure's
    publisher writes it: mappings as JSON, everything else as Python shows it."""
    known: dict[str, str] = {
        "task": card.task,
        "license": card.license,
        "author": card.publisher,
        "textContextWindow": str(card.context_length),
    }
    if card.defaults:
        known["model_specific_defaults"] = json.dumps(card.defaults)
    return {**known, **card.tags}


def properties(card: Card) -> dict[str, str]:
    """The sizes of the allow lists, and the least that they have: `cores|GPUs|memory GB|disk GB`.

    Source of the rule: `confirm_min_sku_spec` of Azure/azureml-assets,
    scripts/azureml-assets/azureml/assets/validate_assets.py.
    """
    found: dict[str, str] = {}
    for what in ("finetune", "inference"):
        allowed = sizes.allow_list(card.tags, what)
        if not allowed:
            continue
        found[f"{what}-recommended-sku"] = ", ".join(allowed)
        least = least_of(allowed)
        if least is not None:
            found[f"{what}-min-sku-spec"] = least
        if what == "finetune":
            found["finetuning-tasks"] = card.task
    return found


def least_of(allowed: Sequence[str]) -> str | None:
    """None where a size is not in the table, or something about one of them is not published."""
    columns: list[tuple[int, int, int, int]] = []
    for name in allowed:
        size = sizes.find(name)
        if size is None or None in (size.cores, size.gpus, size.memory_gib, size.disk_gib):
            return None
        columns.append((size.cores or 0, size.gpus or 0, size.memory_gib or 0, size.disk_gib or 0))
    return "|".join(str(min(column)) for column in zip(*columns, strict=True))


# ---------------------------------------------------------------- components


@routes.add("GET", "{reg}/components", audience=ML)
def list_registry_components(gateway: Gateway, request: Request) -> Answer:
    """Components: there is one, the chat-completion pipeline"""
    _check_registry(request)
    spec = component_spec()
    described = {
        "description": spec["description"],
        "tags": {},
        "properties": {},
        "isArchived": False,
        "latestVersion": VERSION,
    }
    container = {
        "id": f"azureml://registries/{REGISTRY}/components/{NAME}",
        "name": NAME,
        "type": "Microsoft.MachineLearningServices/registries/components",
        "properties": described,
        "systemData": {},
    }
    return Answer({"value": [container]})


@routes.add("GET", "{reg}/components/{component}/versions", audience=ML)
def list_registry_component_versions(gateway: Gateway, request: Request) -> Answer:
    """Versions of a component; the label `latest` is the first"""
    _check_component(request)
    return Answer({"value": _top(request, [_component_view()])})


@routes.add("GET", "{reg}/components/{component}/versions/{version}", audience=ML)
def get_registry_component(gateway: Gateway, request: Request) -> Answer:
    """One version of a component with all of its inputs"""
    _check_component(request)
    if request["version"] not in (VERSION, _DEFAULT_VERSION):
        raise not_found(
            f"There is no version {request['version']!r} of {NAME}; there is: {VERSION}. "
            "Leave the version out, or ask for the label latest.",
            "version",
        )
    return Answer(_component_view())


def _check_component(request: Request) -> None:
    _check_registry(request)
    if request["component"].lower() != NAME:
        raise not_found(
            f"There is no component {request['component']!r} in the registry {REGISTRY}; there is: {NAME} "
            f"{VERSION}. It holds model import, preprocess, finetune, export and evaluation; its outputs are "
            f"{', '.join(OUTPUTS)}.",
            "component",
        )


def _component_view() -> dict[str, Any]:
    spec = component_spec()
    return {
        "id": f"azureml://registries/{REGISTRY}/components/{NAME}/versions/{VERSION}",
        "name": VERSION,
        "type": "Microsoft.MachineLearningServices/registries/components/versions",
        "properties": {
            "description": spec["description"],
            "tags": {},
            "properties": {},
            "isArchived": False,
            "isAnonymous": False,
            "componentSpec": spec,
            "provisioningState": "Succeeded",
        },
        "systemData": {},
    }


def _top(request: Request, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As many as the caller wants (`$top`); all where that is no number."""
    wanted = request.query.get("$top", "")
    return found[: int(wanted)] if wanted.isdigit() else found
