"""Online endpoints and their deployments through the official SDK: made, changed, called, taken down."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.contract.azure.sdk import AzureWorld, Sdk
from tests.contract.azure.wire import WORKSPACE, Wire
from tests.loop.world import wait_for
from tuneloop.core.errors import NotFound

ENDPOINT = "served-by-sdk"
MODEL = "endpoint-tests"
QUESTION = [{"role": "user", "content": "What is colour 3?"}]
NESTED = {
    "input_data": {
        "input_string": [QUESTION],
        "parameters": {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "max_new_tokens": 8},
    },
    "params": {},
}
"""The document's request."""
DEPLOYMENTS = f"{WORKSPACE}/onlineEndpoints/{ENDPOINT}/deployments"


def arm_id(model: str) -> str:
    name, _, version = model.partition(":")
    return f"{WORKSPACE}/models/{name}/versions/{version}"


@pytest.fixture(scope="module")
def wire(azure: AzureWorld) -> Iterator[Wire]:
    with Wire(azure) as opened:
        yield opened


@pytest.fixture(scope="module")
def model(azure: AzureWorld, completed: str) -> str:
    """`name:version` of a registered model."""
    return azure.client.register(completed, "trained_model", MODEL).key


@pytest.fixture(scope="module")
def request_file(azure: AzureWorld) -> str:
    path = azure.folder / "sample_score.json"
    path.write_text(json.dumps(NESTED), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def served(azure: AzureWorld, model: str) -> Iterator[str]:
    """An endpoint as the document makes it, with the deployment `demo` that gets all traffic."""
    made = azure.sdk("new").run(f"""
        endpoint = ManagedOnlineEndpoint(
            name="{ENDPOINT}", description="Online endpoint for a tuned model", auth_mode="key")
        ml.begin_create_or_update(endpoint).wait()
        deployment = ManagedOnlineDeployment(
            name="demo", endpoint_name="{ENDPOINT}", model="{arm_id(model)}",
            instance_type="Standard_NC6s_v3", instance_count=1,
            liveness_probe=ProbeSettings(initial_delay=600),
            request_settings=OnlineRequestSettings(request_timeout_ms=90000))
        made = ml.online_deployments.begin_create_or_update(deployment).result()
        endpoint.traffic = {{"demo": 100}}
        ml.begin_create_or_update(endpoint).result()
        result = made.provisioning_state
    """)
    assert made.ok() == "Succeeded"
    yield ENDPOINT
    azure.client.delete_endpoint(ENDPOINT)


# ---------------------------------------------------------------- what the document does


@pytest.mark.verbs("online_endpoints.begin_create_or_update", "online_endpoints.get", "online_endpoints.list")
def test_an_endpoint_is_shown_as_it_was_made(sdk: Sdk, served: str) -> None:
    found = sdk.run(f"""
        found = ml.online_endpoints.get("{served}")
        names = [one.name for one in ml.online_endpoints.list()]
        result = [found.description, found.auth_mode, found.traffic, found.mirror_traffic,
                  str(found.provisioning_state).rpartition(".")[2].lower(), found.scoring_uri,
                  "{served}" in names, found.identity.type, found.location]
    """).ok()
    assert found[:5] == ["Online endpoint for a tuned model", "key", {"demo": 100}, {}, "succeeded"]
    assert found[5].endswith(f"/endpoints/{served}/score")
    assert found[6:] == [True, "system_assigned", "local"]


@pytest.mark.verbs(
    "online_deployments.begin_create_or_update", "online_deployments.get", "online_deployments.list"
)
def test_a_deployment_is_shown_as_it_was_made(sdk: Sdk, served: str, model: str) -> None:
    found = sdk.run(f"""
        found = ml.online_deployments.get("demo", "{served}")
        listed = [one.name for one in ml.online_deployments.list("{served}")]
        result = dict(type=found.instance_type, count=found.instance_count, model=found.model,
                      timeout=found.request_settings.request_timeout_ms,
                      delay=found.liveness_probe.initial_delay, scale=found.scale_settings.type,
                      endpoint=found.endpoint_name, state=str(found.provisioning_state).rpartition(".")[2],
                      listed=listed)
    """).ok()
    assert found.pop("state").lower() == "succeeded"
    assert "demo" in found.pop("listed")
    assert found == {
        "type": "Standard_NC6s_v3",
        "count": 1,
        "model": arm_id(model),
        "timeout": 90000,
        "delay": 600,
        "scale": "default",
        "endpoint": served,
    }


@pytest.mark.verbs("online_endpoints.invoke")
def test_the_documents_request_is_answered(sdk: Sdk, served: str, request_file: str) -> None:
    said = sdk.run(f"""
        result = ml.online_endpoints.invoke(
            endpoint_name="{served}", deployment_name="demo", request_file="{request_file}")
    """).ok()
    assert isinstance(json.loads(said)["output"], str)


def test_the_name_of_a_deployment_sticks_to_the_sdk_and_the_answer_says_where_it_is_not(
    sdk: Sdk, served: str, request_file: str
) -> None:
    error = sdk.run(f"""
        ml.begin_create_or_update(ManagedOnlineEndpoint(name="sticky-{sdk.which}")).wait()
        ml.online_endpoints.invoke("{served}", deployment_name="demo", request_file="{request_file}")
        try:
            ml.online_endpoints.invoke("sticky-{sdk.which}", request_file="{request_file}")
        finally:
            from azure.ai.ml.constants._endpoint import EndpointInvokeFields
            EndpointInvokeFields.DEFAULT_HEADER.pop(EndpointInvokeFields.MODEL_DEPLOYMENT)
            ml.online_endpoints.begin_delete("sticky-{sdk.which}").wait()
    """).failed()
    assert "has no deployment 'demo'; it has none yet" in error["message"]


def test_an_unknown_deployment_and_a_wrong_key_are_refused(
    sdk: Sdk, served: str, request_file: str, azure: AzureWorld
) -> None:
    error = sdk.run(f"""
        ml.online_endpoints.invoke("{served}", deployment_name="nobody", request_file="{request_file}")
    """).failed()
    assert (error["type"], "nobody not found" in error["message"]) == ("ValidationException", True)
    url = azure.client.endpoint(served)["scoring_uri"]
    assert url is not None
    wrong = httpx.post(url, json=NESTED, headers={"authorization": "Bearer wrong"})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_key")


# ---------------------------------------------------------------- keys


@pytest.mark.verbs("online_endpoints.get_keys", "online_endpoints.begin_regenerate_keys")
def test_a_regenerated_key_is_a_new_one_at_once_and_the_other_goes_on(
    sdk: Sdk, served: str, azure: AzureWorld
) -> None:
    before, after = sdk.run(f"""
        def keys():
            found = ml.online_endpoints.get_keys("{served}")
            return found.primary_key, found.secondary_key
        before = keys()
        ml.online_endpoints.begin_regenerate_keys("{served}", key_type="primary").wait()
        result = [before, keys()]
    """).ok()
    assert after[0] not in before
    assert after[1] == before[1]
    url = str(azure.client.endpoint(served)["scoring_uri"])
    asked = [
        httpx.post(url, json={}, headers={"authorization": f"Bearer {key}"}).status_code
        for key in (before[0], after[0], after[1])
    ]
    assert asked == [401, 400, 400]


def test_a_key_of_ones_own_and_a_token_are_refused(wire: Wire, served: str) -> None:
    address = f"{WORKSPACE}/onlineEndpoints/{served}"
    refused = wire.post(f"{address}/regenerateKeys", {"keyType": "Primary", "keyValue": "mine"})
    assert wire.error(refused, 400) == ("NotSupported", "keyValue")
    assert wire.error(wire.post(f"{address}/token"), 400) == ("NotSupported", "authMode")
    refused = wire.post(f"{address}/regenerateKeys", {"keyType": "Third"})
    assert wire.error(refused, 400) == ("InvalidInput", "keyType")


@pytest.mark.parametrize("mode", ["aml_token", "aad_token"])
def test_an_endpoint_without_keys_is_refused_by_name(sdk: Sdk, mode: str) -> None:
    error = sdk.run(f"""
        ml.begin_create_or_update(ManagedOnlineEndpoint(name="tokens", auth_mode="{mode}")).result()
    """).failed()
    assert (error["code"], error["target"]) == ("NotSupported", "properties.authMode")


# ---------------------------------------------------------------- changes


def test_what_was_read_can_be_sent_back_changed_and_no_replica_restarts(
    sdk: Sdk, served: str, azure: AzureWorld
) -> None:
    pid = azure.client.deployment(served, "demo")["replica_states"][-1]["pid"]
    found = sdk.run(f"""
        found = ml.online_deployments.get("demo", "{served}")
        found.tags = {{"by": "{sdk.which}"}}
        found.description = "changed by {sdk.which}"
        found.request_settings.request_timeout_ms = 45000
        ml.online_deployments.begin_create_or_update(found).result()
        again = ml.online_deployments.get("demo", "{served}")
        endpoint = ml.online_endpoints.get("{served}")
        endpoint.tags = {{"by": "{sdk.which}"}}
        told = ml.begin_create_or_update(endpoint).result()
        result = [again.tags, again.description, again.request_settings.request_timeout_ms,
                  again.liveness_probe.initial_delay, told.tags, told.traffic, told.description]
    """).ok()
    by = {"by": sdk.which}
    assert found[:4] == [by, f"changed by {sdk.which}", 45000, 600]
    assert found[4:] == [by, {"demo": 100}, "Online endpoint for a tuned model"]
    assert azure.client.deployment(served, "demo")["replica_states"][-1]["pid"] == pid


def test_the_number_of_instances_changes_in_place(wire: Wire, served: str, azure: AzureWorld) -> None:
    found = wire.get(f"{DEPLOYMENTS}/demo").json()
    more = wire.put(f"{DEPLOYMENTS}/demo", {**found, "sku": {"name": "Default", "capacity": 2}})
    assert (more.status_code, more.json()["sku"]["capacity"]) == (200, 2)
    assert more.json()["properties"]["provisioningState"] == "Creating"
    assert wire.get(more.headers["azure-asyncoperation"]).json() == {"name": "demo", "status": "InProgress"}
    # One answers all the while; the other goes again before it has loaded.
    assert wire.finished(wire.put(f"{DEPLOYMENTS}/demo", found))["status"] == "Succeeded"
    states = [one["state"] for one in azure.client.deployment(served, "demo")["replica_states"]]
    assert states.count("ready") == 1


def test_another_model_for_replicas_that_run_is_a_conflict(
    sdk: Sdk, served: str, azure: AzureWorld, completed: str
) -> None:
    other = azure.client.register(completed, "trained_model", f"other-{sdk.which}").key
    before = azure.client.deployment(served, "demo")
    error = sdk.run(f"""
        found = ml.online_deployments.get("demo", "{served}")
        found.environment_variables = {{"A": "b"}}
        ml.online_deployments.begin_create_or_update(found).result()
    """).failed()
    assert (error["code"], error["status"]) == ("Conflict", 409)
    assert "its environment variables cannot be changed while its replicas run" in error["message"]
    # Two names of one artifact are one model for who serves it.
    found = sdk.run(f"""
        found = ml.online_deployments.get("demo", "{served}")
        found.model = "{arm_id(other)}"
        result = ml.online_deployments.begin_create_or_update(found).result().model
    """).ok()
    assert found == arm_id(other)
    assert azure.client.deployment(served, "demo")["artifact"] == before["artifact"]


def test_traffic_that_cannot_be_is_refused(sdk: Sdk, served: str) -> None:
    code = """
        found = ml.online_endpoints.get("{}")
        found.traffic = {}
        ml.begin_create_or_update(found).result()
    """
    short = sdk.run(code.format(served, {"demo": 90})).failed()
    assert (short["code"], "adds up to 90" in short["message"]) == ("BadArgument", True)
    unknown = sdk.run(code.format(served, {"nobody": 100})).failed()
    assert (unknown["code"], unknown["target"]) == ("ResourceNotFound", "properties.traffic")
    assert unknown["status"] == 400
    early = sdk.run("""
        ml.begin_create_or_update(ManagedOnlineEndpoint(name="too-early", traffic={"demo": 100})).result()
    """).failed()
    assert (early["code"], early["target"]) == ("InvalidInput", "properties.traffic.demo")


@pytest.mark.verbs("online_deployments.begin_delete")
def test_a_deployment_with_traffic_stays_and_one_without_goes(sdk: Sdk, served: str) -> None:
    error = sdk.run(f"""ml.online_deployments.begin_delete("demo", "{served}").result()""").failed()
    assert (error["status"], error["code"]) == (409, "ResourceNotReady")
    assert "receives 100 % of the traffic" in error["message"]
    missing = sdk.run(f"""ml.online_deployments.begin_delete("nobody", "{served}").result()""").failed()
    assert (missing["type"], missing["code"]) == ("ResourceNotFoundError", "ResourceNotFound")


# ---------------------------------------------------------------- mirrored traffic and logs


@pytest.mark.verbs("online_deployments.get_logs")
def test_mirrored_requests_reach_the_mirror_are_compared_and_shown_in_its_log(
    azure: AzureWorld, served: str, model: str
) -> None:
    sdk = azure.sdk("new")
    mirrored = sdk.run(f"""
        ml.online_deployments.begin_create_or_update(ManagedOnlineDeployment(
            name="next", endpoint_name="{served}", model="azureml:{model}", instance_count=1)).result()
        found = ml.online_endpoints.get("{served}")
        found.traffic = {{"demo": 100}}
        found.mirror_traffic = {{"next": 50}}
        told = ml.begin_create_or_update(found).result()
        result = [told.traffic, told.mirror_traffic, ml.online_endpoints.get("{served}").mirror_traffic]
    """).ok()
    assert mirrored == [{"demo": 100}, {"next": 50}, {"next": 50}]
    url = str(azure.client.endpoint(served)["scoring_uri"])
    key = azure.client.keys(served)["secondary"]
    greedy = {"input_data": {"input_string": QUESTION, "parameters": {"max_new_tokens": 4}}}
    for _ in range(4):
        answer = httpx.post(url, json=greedy, headers={"authorization": f"Bearer {key}"}, timeout=60)
        assert (answer.status_code, answer.headers["azureml-model-deployment"]) == (200, "demo")
    code = f"""result = ml.online_deployments.get_logs("next", "{served}", 50)"""
    log = wait_for(
        lambda: [line for line in sdk.run(code).ok().split("\n") if line.startswith('{"at"')][1:],
        "two mirrored requests in the log",
        seconds=30,
    )
    line = json.loads(log[-1])
    # The same model behind both, asked without chance: the same reply.
    assert (line["beside"], line["is_same"], line["mirror_status"]) == ("demo", True, 200)
    refused = sdk.run(f"""ml.online_deployments.begin_delete("next", "{served}").result()""").failed()
    assert (refused["status"], "mirrored" in refused["message"]) == (409, True)
    assert sdk.run(f"""
        found = ml.online_endpoints.get("{served}")
        found.mirror_traffic = {{}}
        ml.begin_create_or_update(found).result()
        ml.online_deployments.begin_delete("next", "{served}").result()
        result = [one.name for one in ml.online_deployments.list("{served}")]
    """).ok() == ["demo"]


def test_a_log_begins_with_what_is_done_in_another_way(sdk: Sdk, served: str) -> None:
    log = sdk.run(f"""result = ml.online_deployments.get_logs("demo", "{served}", lines=5)""").ok()
    first, *rest = log.split("\n")
    assert first.startswith("warning: properties.instanceType is Standard_NC6s_v3: it is noted")
    assert any("== replica" in line or "score 200" in line for line in rest)
    refused = sdk.run(
        f"""ml.online_deployments.get_logs("demo", "{served}", 5, container_type="storage-initializer")"""
    ).failed()
    assert (refused["code"], refused["target"]) == ("NotSupported", "containerType")


# ---------------------------------------------------------------- what is refused, and what is told

BODY: dict[str, Any] = {
    "location": "local",
    "sku": {"name": "Default", "capacity": 1},
    "properties": {"endpointComputeType": "Managed", "instanceType": "Standard_NC6s_v3"},
}


@pytest.mark.parametrize(
    ("said", "target"),
    [
        ({"codeConfiguration": {"codeId": "x", "scoringScript": "score.py"}}, "properties.codeConfiguration"),
        ({"environmentId": "azureml:AzureML-sklearn:1"}, "properties.environmentId"),
        ({"endpointComputeType": "Kubernetes"}, "properties.endpointComputeType"),
        ({"appInsightsEnabled": True}, "properties.appInsightsEnabled"),
        ({"egressPublicNetworkAccess": "Disabled"}, "properties.egressPublicNetworkAccess"),
        ({"dataCollector": {"collections": {}, "samplingRate": 1.0}}, "properties.dataCollector"),
        ({"modelMountPath": "/models"}, "properties.modelMountPath"),
        ({"scaleSettings": {"scaleType": "TargetUtilization"}}, "properties.scaleSettings.scaleType"),
        ({"somethingNew": 1}, "properties.somethingNew"),
    ],
)
def test_what_a_replica_would_not_have_is_refused_by_its_name(
    wire: Wire, served: str, model: str, said: dict[str, Any], target: str
) -> None:
    body = {**BODY, "properties": {**BODY["properties"], "model": arm_id(model), **said}}
    assert wire.error(wire.put(f"{DEPLOYMENTS}/never", body), 400) == ("NotSupported", target)
    assert wire.get(f"{DEPLOYMENTS}/never").status_code == 404


@pytest.mark.parametrize(
    ("said", "code", "at"),
    [
        ({"model": "azureml:nobody:1"}, "ResourceNotFound", "model"),
        ({"model": "what?"}, "InvalidInput", "model"),
        ({"model": None}, "InvalidInput", "model"),
        ({"model": "azureml://registries/azureml/models/Nobody/versions/1"}, "ResourceNotFound", "model"),
        ({"instanceType": "Standard_Nothing"}, "ResourceNotFound", "instanceType"),
        ({"requestSettings": {"requestTimeout": "PT2H"}}, "BadArgument", None),
        ({"requestSettings": {"requestTimeout": "soon"}}, "InvalidInput", "requestSettings.requestTimeout"),
        ({"livenessProbe": {"failureThreshold": 0}}, "InvalidInput", "livenessProbe.failureThreshold"),
        ({"environmentVariables": {"TUNELOOP_HOME": "/"}}, "BadArgument", None),
    ],
)
def test_wrong_values_are_refused_where_they_stand(
    wire: Wire, served: str, model: str, said: dict[str, Any], code: str, at: str | None
) -> None:
    body = {**BODY, "properties": {**BODY["properties"], "model": arm_id(model), **said}}
    target = None if at is None else f"properties.{at}"
    assert wire.error(wire.put(f"{DEPLOYMENTS}/never", body), 400) == (code, target)


def test_a_base_model_of_the_registry_is_served_though_the_server_is_killed_after_the_put(
    wire: Wire, served: str, azure: AzureWorld, completed: str
) -> None:
    job = azure.client.job(completed)
    card = str(job["base_model"])
    body = {
        **BODY,
        "properties": {
            "endpointComputeType": "Managed",
            "model": "azureml://registries/azureml/models/{}/versions/{}".format(*card.split(":")),
            "instanceType": "Standard_D12_v2",
            "requestSettings": {"maxConcurrentRequestsPerInstance": 1, "maxQueueWait": "PT1S"},
            "readinessProbe": {"initialDelay": "PT30S", "period": "PT10S"},
            "environmentVariables": {"OMP_NUM_THREADS": "1"},
        },
    }
    made = wire.put(f"{DEPLOYMENTS}/base", body)
    assert made.status_code == 201, made.text
    assert made.json()["properties"]["provisioningState"] == "Creating"
    _kill_server(azure)
    assert wire.finished(made) == {"name": "base", "status": "Succeeded"}
    found = azure.client.deployment(served, "base")
    assert found["model"] == f"base:{card}"
    assert (found["max_concurrent_requests"], found["environment"]) == (1, {"OMP_NUM_THREADS": "1"})
    told = [
        one["text"] for one in azure.client.azure_warnings() if one["about"] == f"deployment {served}/base"
    ]
    assert any("readinessProbe.initialDelay is 'PT30S'" in text for text in told)
    assert not any("readinessProbe.period" in text for text in told)
    gone = wire.delete(f"{DEPLOYMENTS}/base")
    assert gone.status_code == 202
    assert wire.delete(f"{DEPLOYMENTS}/base").status_code == 202
    wire.vanished(gone)
    assert wire.get(f"{DEPLOYMENTS}/base").status_code == 404


# ---------------------------------------------------------------- failure, and the end


@pytest.mark.verbs("online_endpoints.begin_delete")
def test_a_deployment_that_fails_says_why_can_be_mended_and_goes_with_its_endpoint(
    azure: AzureWorld, completed: str, model: str
) -> None:
    facts = _facts_of(azure, model)
    whole = facts.read_text(encoding="utf-8")
    os.chmod(facts, 0o600)
    try:
        facts.write_text(json.dumps({**json.loads(whole), "template_digest": "sha256:" + "0" * 64}))
        wrong = azure.client.register(completed, "trained_model", "another-template").key
    finally:
        facts.write_text(whole, encoding="utf-8")
    sdk = azure.sdk("older")
    error = sdk.run(f"""
        ml.begin_create_or_update(ManagedOnlineEndpoint(name="comes-and-goes")).wait()
        ml.online_deployments.begin_create_or_update(ManagedOnlineDeployment(
            name="first", endpoint_name="comes-and-goes", model="{arm_id(wrong)}",
            instance_count=1)).result()
    """).failed()
    assert f"is not the one that '{wrong}' was registered with" in error["message"]
    state, mended = sdk.run(f"""
        found = ml.online_deployments.get("first", "comes-and-goes")
        found.model = "{arm_id(model)}"
        result = [str(found.provisioning_state).rpartition(".")[2],
                  ml.online_deployments.begin_create_or_update(found).result().model]
    """).ok()
    assert (state.lower(), mended) == ("failed", arm_id(model))
    error = sdk.run("""
        ml.online_endpoints.begin_delete("comes-and-goes").result()
        ml.online_endpoints.get("comes-and-goes")
    """).failed()
    assert (error["type"], error["code"]) == ("ResourceNotFoundError", "ResourceNotFound")
    with pytest.raises(NotFound):
        azure.client.endpoint("comes-and-goes")
    assert not [owner for owner in azure.processes() if owner.startswith("comes-and-goes")]
    assert not (azure.home / "replicas" / "comes-and-goes").exists()
    missing = sdk.run("""ml.online_endpoints.begin_delete("comes-and-goes").result()""").failed()
    assert missing["status"] == 404


def _facts_of(azure: AzureWorld, model: str) -> Any:
    digest = azure.client.model(*model.split(":")).artifact.removeprefix("sha256:")
    return azure.home / "artifacts" / digest[:2] / digest / "tuneloop.json"


def test_addresses_match_whatever_their_case(wire: Wire, served: str) -> None:
    found = wire.get(f"{DEPLOYMENTS}/demo".lower().replace(served, served.upper()))
    assert (found.status_code, found.json()["name"]) == (200, "demo")


def _kill_server(azure: AzureWorld) -> None:
    os.kill(azure.server_pid(), signal.SIGKILL)
    wait_for(lambda: not _is_up(azure), "the server to be gone")
    azure.restart_server()


def _is_up(azure: AzureWorld) -> bool:
    try:
        azure.client.status()
    except Exception:
        return False
    return True
