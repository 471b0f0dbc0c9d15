"""Nothing of a body is passed over in silence: an unknown field is refused by its name at every level, unless
`azure_loose` is set; addresses and queries are taken as Azure takes them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.contract.azure.direct import WORKSPACE, refusal, speaking_to, warnings_of
from tests.contract.azure.sdk import BASE, AzureWorld, Sdk

REGISTRY = "azureml://registries/azureml"
NODE = {
    "name": "chat",
    "type": "pipeline",
    "componentId": f"{REGISTRY}/components/chat_completion_pipeline/versions/0.0.82",
    "inputs": {
        "mlflow_model_path": {
            "job_input_type": "mlflow_model",
            "uri": f"{REGISTRY}/models/{BASE}/versions/15",
        },
        "num_train_epochs": {"job_input_type": "literal", "value": "1"},
    },
    "outputs": {"mlflow_model_folder": {"value": "${{parent.outputs.trained_model}}", "type": "literal"}},
}
BODIES: dict[str, dict[str, Any]] = {
    "computes/strict": {
        "location": "local",
        "properties": {
            "computeType": "AmlCompute",
            "properties": {"vmSize": "Standard_NC6s_v3", "scaleSettings": {"maxNodeCount": 2}},
        },
    },
    "data/strict/versions/1": {
        "properties": {"dataType": "uri_file", "dataUri": "azureml://datastores/workspaceblobstore/paths/x"}
    },
    "models/strict/versions/1": {
        "properties": {"modelType": "mlflow_model", "modelUri": "azureml://jobs/none/outputs/trained_model"}
    },
    "onlineEndpoints/strict": {
        "location": "local",
        "identity": {"type": "SystemAssigned"},
        "properties": {"authMode": "Key"},
    },
    "onlineEndpoints/strict-held/deployments/demo": {
        "location": "local",
        "sku": {"name": "Default", "capacity": 1},
        "properties": {
            "model": f"{WORKSPACE}/models/strict/versions/1",
            "endpointComputeType": "Managed",
            "instanceType": "Standard_NC6s_v3",
            "requestSettings": {"requestTimeout": "PT1M30S"},
            "livenessProbe": {"initialDelay": "PT10M"},
            "readinessProbe": {"initialDelay": "PT10S"},
            "scaleSettings": {"scaleType": "Default"},
        },
    },
    "jobs/strict": {
        "properties": {
            "jobType": "Pipeline",
            "experimentName": "strict",
            "outputs": {"trained_model": {"jobOutputType": "mlflow_model"}},
            "settings": {"force_rerun": False, "_source": "DSL"},
            "jobs": {"chat": NODE},
        }
    },
}
"""What is put where; each is right but for what it names, which is not there."""
MANY = ("properties.jobs",)
"""Where one more is not an unknown field but one too many."""


def places(value: object, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every object inside."""
    if isinstance(value, dict):
        yield at
        for name, inner in value.items():
            yield from places(inner, (*at, name))


LEVELS = [(address, at) for address, body in BODIES.items() for at in places(body)]


def surprised(body: dict[str, Any], at: tuple[str, ...]) -> dict[str, Any]:
    """The body with a field that nobody knows, inside of `at`."""
    changed = copy.deepcopy(body)
    inner = changed
    for name in at:
        inner = inner[name]
    inner["surprise"] = {"field": 1}
    return changed


@pytest.fixture(scope="module")
def wire(azure: AzureWorld) -> Iterator[httpx.Client]:
    """With an endpoint for the deployment that nobody makes."""
    with speaking_to(azure) as client:
        held = f"{WORKSPACE}/onlineEndpoints/strict-held"
        assert client.put(held, json=BODIES["onlineEndpoints/strict"]).is_success
        yield client
        client.delete(held)


# ---------------------------------------------------------------- strict


@pytest.mark.parametrize(
    ("address", "at"), LEVELS, ids=[f"{address}: {'.'.join(at) or 'body'}" for address, at in LEVELS]
)
def test_a_field_that_nobody_reads_is_refused_by_name(
    wire: httpx.Client, address: str, at: tuple[str, ...]
) -> None:
    answer = wire.put(f"{WORKSPACE}/{address}", json=surprised(BODIES[address], at))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    place = ".".join((*at, "surprise"))
    if ".".join(at) in MANY:
        assert (error["code"], error["target"]) == ("NotSupported", ".".join(at))
        assert "surprise" in error["message"]
        return
    told = [one for one in error["details"] if one["target"].startswith(place)]
    assert told, error
    assert place in error["message"]
    assert error["target"] == error["details"][0]["target"]


def test_the_refusal_is_what_the_sdk_shows(sdk: Sdk) -> None:
    """The SDK has no way to send an unknown field, but to put a key into what it made."""
    code = """
        made = AmlCompute(name='strict-sdk', size='Standard_NC6s_v3')
        whole = made._to_rest_object
        def changed():
            body = whole()
            body.properties.properties.isolated_network = True
            return body
        made._to_rest_object = changed
        ml.compute.begin_create_or_update(made)
    """
    error = sdk.run(code).failed()
    assert (error["code"], error["target"]) == ("NotSupported", "properties.properties.isolatedNetwork")
    assert "properties.properties.isolatedNetwork is True" in error["message"]


def test_what_says_nothing_is_no_unknown_field(azure: AzureWorld, wire: httpx.Client) -> None:
    """The SDK sends many fields that are null or empty."""
    body = copy.deepcopy(BODIES["computes/strict"])
    body["properties"] |= {"surprise": None, "another": {}, "third": []}
    answer = wire.put(f"{WORKSPACE}/computes/strict-empty", json=body)
    assert answer.status_code == 201, answer.text
    assert not any("surprise" in one for one in warnings_of(azure, "compute strict-empty"))


# ---------------------------------------------------------------- loose


@pytest.fixture(scope="module")
def loose(azure: AzureWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AzureWorld]:
    """A second workspace, whose settings say `azure_loose`. (After the first: that is not to have it.)"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNELOOP_AZURE_LOOSE", "true")
        world = AzureWorld(tmp_path_factory.mktemp("loose") / "world")
    yield world
    world.take_down()


def test_loose_makes_warnings_of_unknown_fields_and_of_nothing_else(loose: AzureWorld) -> None:
    body = surprised(surprised(BODIES["computes/strict"], ("properties", "properties")), ())
    with speaking_to(loose) as client:
        answer = client.put(f"{WORKSPACE}/computes/loose", json=body)
        assert answer.status_code == 201, answer.text
        told = warnings_of(loose, "compute loose")
        assert "surprise has no effect here." in told
        assert "properties.properties.surprise has no effect here." in told
        for address, at in LEVELS:
            if ".".join(at).endswith(("inputs", "outputs", "jobs")):
                continue  # One more of these is not a field.
            answer = client.put(f"{WORKSPACE}/{address}", json=surprised(BODIES[address], at))
            assert "surprise" not in answer.text or answer.is_success, (address, at, answer.text)
        # A value that cannot be obeyed is no unknown field.
        body["properties"]["properties"]["remoteLoginPortPublicAccess"] = "Enabled"
        error = refusal(client.put(f"{WORKSPACE}/computes/loose", json=body), 400, "NotSupported")
        assert error["target"] == "properties.properties.remoteLoginPortPublicAccess"


# ---------------------------------------------------------------- addresses and queries


@pytest.mark.parametrize(
    "address",
    [
        "/SUBSCRIPTIONS/S/resourcegroups/G/Providers/microsoft.machinelearningservices/Workspaces/LOCAL/Computes/Local",
        "/subscriptions/other/resourceGroups/another/providers/Microsoft.MachineLearningServices/workspaces/w/"
        "computes/LOCAL",
        f"{WORKSPACE}/computes/local/",
        f"{WORKSPACE}/computes/local?api-version=1999-01-01-preview",
        f"{WORKSPACE}/computes/local?api-version=",
        f"{WORKSPACE}/computes/local?API-VERSION=x&nothing=else",
    ],
)
def test_an_address_matches_whatever_its_case_and_its_version(wire: httpx.Client, address: str) -> None:
    answer = wire.get(address)
    assert answer.status_code == 200, answer.text
    assert answer.json()["name"] == "local"


def test_ids_are_spelled_as_the_caller_spells_the_workspace(wire: httpx.Client) -> None:
    inside = "providers/Microsoft.MachineLearningServices/workspaces/Mine"
    address = f"/subscriptions/S1/resourcegroups/My-Group/{inside}"
    assert wire.get(f"{address}/computes/LOCAL").json()["id"] == (
        f"/subscriptions/S1/resourceGroups/My-Group/{inside}/computes/local"
    )
    assert wire.get(address).json()["name"] == "Mine"


@pytest.mark.parametrize("family", ["computes", "jobs", "models", "data", "datastores", "onlineEndpoints"])
@pytest.mark.parametrize(
    "query", ["listViewType=ListViewType.ACTIVE_ONLY", "listViewType=All&$skip=&$top=5&count=5&x=%20"]
)
def test_a_list_takes_odd_queries(wire: httpx.Client, family: str, query: str) -> None:
    answer = wire.get(f"{WORKSPACE}/{family}?api-version=2023-04-01-preview&{query}")
    assert answer.status_code == 200, answer.text
    assert isinstance(answer.json()["value"], list)


def test_a_method_that_an_address_has_not_and_an_address_that_is_not_there(wire: httpx.Client) -> None:
    error = refusal(wire.delete(f"{WORKSPACE}/computes"), 405, "MethodNotAllowed")
    assert "takes GET, not DELETE" in error["message"]
    error = refusal(wire.get(f"{WORKSPACE}/unheardOf/x"), 404, "NotFound")
    assert "tuneloop azure coverage" in error["message"]
