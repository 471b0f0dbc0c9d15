"""Jobs that are not run here and jobs that are written wrongly: refused at once, by name, code and target."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.contract.azure.direct import WORKSPACE, refusal, speaking_to
from tests.contract.azure.pipelines import MODEL, request, try_to_submit
from tests.contract.azure.sdk import AzureWorld, Sdk

NODE = "properties.jobs.tune"
NOWHERE = "azureml://datastores/workspaceblobstore/paths/LocalUpload/0/train.jsonl"


@pytest.fixture
def wire(azure: AzureWorld) -> Iterator[httpx.Client]:
    with speaking_to(azure) as client:
        yield client


def put(wire: httpx.Client, body: Any) -> httpx.Response:
    return wire.put(f"{WORKSPACE}/jobs/test_job_refusals", json=body)


def targets(error: dict[str, Any]) -> set[str]:
    return {one["target"] for one in error["details"]}


# ---------------------------------------------------------------- what scripts write


def test_every_mistake_of_a_call_reaches_the_script_at_once(sdk: Sdk) -> None:
    error = try_to_submit(
        sdk, "wrong", learning_rate="fast", max_seq_length=100_000, compute_finetune="nowhere", seed=-1
    ).failed()
    assert (error["type"], error["status"]) == ("HttpResponseError", 400)
    for told in (
        "inputs.learning_rate is 'fast', expected a number.",
        "inputs.seed is '-1', must be 0 or more.",
        "inputs.compute_finetune is 'nowhere', which is no compute of the workspace.",
    ):
        assert told in error["message"], error["message"]


def test_what_would_be_ignored_is_refused_by_its_name(sdk: Sdk) -> None:
    error = try_to_submit(sdk, "ignored", evaluation_config_params="{}").failed()
    assert (error["code"], error["status"]) == ("NotSupported", 400)
    assert error["target"] == "properties.jobs.node.inputs.evaluation_config_params"
    assert "what is measured is set under evaluate" in error["message"]


def test_own_code_is_refused_before_anything_is_uploaded_or_run(sdk: Sdk) -> None:
    error = sdk.run(
        """
        from azure.ai.ml import command
        ml.jobs.create_or_update(command(command="echo hi", environment="azureml:mine:1", compute="local"))
        """
    ).failed()
    assert error["status"] in (400, 404), error
    assert error["code"] in ("NotSupported", "ResourceNotFound"), error


@pytest.mark.refuses("jobs.begin_delete")
def test_jobs_are_kept(azure: AzureWorld, completed: str) -> None:
    error = azure.sdk("new").run(f"ml.jobs.begin_delete({completed!r}).result()").failed()
    assert (error["code"], error["status"]) == ("NotSupported", 400)
    assert "Archive it" in error["message"]
    assert azure.state(completed) == "completed"


# ---------------------------------------------------------------- what the SDK never sends


@pytest.mark.parametrize(
    "kind", ["Command", "Sweep", "AutoML", "Spark", "FineTuning", "Labeling", "Base", "X"]
)
def test_other_kinds_of_jobs_are_refused(wire: httpx.Client, kind: str) -> None:
    error = refusal(put(wire, {"properties": {"jobType": kind, "command": "x"}}), 400, "NotSupported")
    assert error["target"] == "properties.jobType"
    assert "chat_completion_pipeline" in error["message"]


def test_a_malformed_graph_is_refused_with_every_mistake(wire: httpx.Client) -> None:
    body = request(
        NOWHERE,
        learning_rate="${{parent.inputs.rate}}",
        warmup_steps="${{parent.inputs.warmup}}",
        max_steps="${{parent.jobs.tune.outputs.steps}}",
        properties={
            "inputs": {"rate": {"jobInputType": "literal", "value": "${{parent.inputs.rate}}"}},
            "settings": {"retries": 3},
        },
    )
    error = refusal(put(wire, body), 400, "InvalidInput")
    assert targets(error) == {
        "properties.inputs.rate.value",
        f"{NODE}.inputs.learning_rate.value",
        f"{NODE}.inputs.warmup_steps.value",
        f"{NODE}.inputs.max_steps.value",
        f"{NODE}.inputs.train_file_path",
        "properties.settings.retries",
    }


def test_two_nodes_no_node_and_a_node_without_a_component_are_refused(wire: httpx.Client) -> None:
    node = request(NOWHERE)["properties"]["jobs"]["tune"]
    nodes: list[tuple[dict[str, Any], str]] = [
        ({"a": node, "b": node}, "properties.jobs"),
        ({}, "properties.jobs"),
        ({"a": {**node, "componentId": None}}, "properties.jobs.a.componentId"),
        ({"a": {**node, "componentId": "azureml:mine:1"}}, "properties.jobs.a.componentId"),
        ({"a": {**node, "type": "command"}}, "properties.jobs.a.type"),
    ]
    for jobs, target in nodes:
        answer = put(wire, request(NOWHERE, properties={"jobs": jobs, "outputs": {}}))
        assert answer.status_code == 400
        assert targets(answer.json()["error"]) == {target}


@pytest.mark.parametrize(
    "text",
    [
        '{"properties": {"jobType": "Pipeline", "jobs": {"a": NaN}}}',
        '{"properties": {"jobType": "Pipeline", "jobs": ' + "[" * 100 + "]" * 100 + "}}",
        '{"properties": {"jobType": "Pipeline", "tags": {"a": "' + "b" * 300_000 + '"}}}',
        '{"properties": {"jobType": "Pipeline", "jobs": 3, "inputs": [], "outputs": "x", "settings": 1}}',
        '{"properties": {"jobType": "Pipeline", "jobs": {"a": {"inputs": {"x": 1}, "outputs": {"y": 2}}}}}',
        '{"properties": {"jobType": 3}}',
        '{"properties": []}',
        "[]",
        "",
    ],
)
def test_what_is_no_job_is_refused(wire: httpx.Client, text: str) -> None:
    answer = wire.put(
        f"{WORKSPACE}/jobs/test_job_refusals", content=text, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_a_name_that_cannot_be_a_name_is_refused(wire: httpx.Client, train: str) -> None:
    for name in ("a%20b", "..%2fx", "%C3%BC", "x" * 200):
        error = refusal(wire.put(f"{WORKSPACE}/jobs/{name}", json=request(train)), 400, "InvalidResourceName")
        assert "not allowed" in error["message"]


def test_nothing_is_left_of_a_job_that_was_refused(wire: httpx.Client) -> None:
    refusal(wire.get(f"{WORKSPACE}/jobs/test_job_refusals"), 404, "ResourceNotFound")
    listed = [one["name"] for one in wire.get(f"{WORKSPACE}/jobs?listViewType=All").json()["value"]]
    assert "test_job_refusals" not in listed


def test_lists_refuse_what_they_do_not_know(wire: httpx.Client) -> None:
    error = refusal(wire.get(f"{WORKSPACE}/jobs?listViewType=Some"), 400, "InvalidInput")
    assert error["target"] == "listViewType"
    refusal(wire.get(f"{WORKSPACE}/jobs?$skip=-1"), 400, "InvalidInput")
    assert wire.get(f"{WORKSPACE}/jobs?jobType=Command").json()["value"] == []
    assert wire.get(f"{WORKSPACE}/jobs?tag=nobody_has_this").json()["value"] == []


def test_a_model_of_the_workspace_is_no_base_model(wire: httpx.Client, train: str) -> None:
    own = "/subscriptions/s/resourceGroups/g/providers/x/workspaces/w/models/mine/versions/1"
    for uri, told in (
        (own, "registry azureml"),
        (MODEL.replace("azureml/models", "other/models"), "registry azureml"),
        (MODEL.replace("latest", "99"), "versions"),
    ):
        body = request(train, mlflow_model_path={"job_input_type": "mlflow_model", "uri": uri})
        answer = put(wire, body)
        assert targets(answer.json()["error"]) == {f"{NODE}.inputs.mlflow_model_path"}
        assert told in answer.json()["error"]["message"] or "no version" in answer.json()["error"]["message"]
