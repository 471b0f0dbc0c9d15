"""The system registry as the SDK sees it: base models with Azure's tags, the component with its inputs."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import httpx
import pytest

from tests.contract.azure.direct import refusal, speaking_to
from tests.contract.azure.sdk import BASE, AzureWorld, Sdk
from tuneloop.core.recipe.component import ADVISED, INPUTS
from tuneloop.server.azure.component import NAME, VERSION

ID = f"azureml://registries/azureml/models/{BASE}/versions/15"
REGISTRY = (
    "/mferp/managementfrontend/subscriptions/s/resourceGroups/g/providers/"
    "Microsoft.MachineLearningServices/registries/azureml"
)


@pytest.fixture(scope="module")
def wire(azure: AzureWorld) -> Iterator[httpx.Client]:
    with speaking_to(azure) as client:
        yield client


# ---------------------------------------------------------------- models


@pytest.mark.verbs("registry.models.get")
def test_a_base_model_by_label_and_by_version(sdk: Sdk) -> None:
    code = f"""
        found = [registry.models.get({BASE!r}, label='latest'), registry.models.get({BASE.upper()!r}, '15')]
        result = [[m.name, m.version, m.id, m.type, m.tags, m.properties] for m in found]
    """
    latest, exact = sdk.run(code).ok()
    assert latest[:4] == [BASE, "15", ID, "mlflow_model"]
    assert exact == latest
    tags, properties = latest[4:]
    assert tags["task"] == "chat-completion"
    assert ast.literal_eval(tags["finetune_compute_allow_list"])[0] == "Standard_NC24ads_A100_v4"
    defaults = ast.literal_eval(tags["model_specific_defaults"])
    assert (defaults["precision"], defaults["apply_lora"], defaults["learning_rate"]) == (16, "true", 5e-6)
    assert properties["finetune-min-sku-spec"] == "24|1|220|64"
    assert properties["inference-min-sku-spec"] == "6|1|112|64"
    assert set(properties["finetune-recommended-sku"].split(", ")) == set(
        ast.literal_eval(tags["finetune_compute_allow_list"])
    )


@pytest.mark.verbs("registry.models.list")
def test_the_catalogue_is_listed_and_a_model_with_its_versions(sdk: Sdk) -> None:
    code = f"""
        listed = {{m.name: m.latest_version for m in registry.models.list()}}
        result = [listed, [[m.name, m.version] for m in registry.models.list({BASE!r})]]
    """
    listed, versions = sdk.run(code).ok()
    assert listed[BASE] == "15"
    assert {"SmolLM2-135M-Instruct", "Tiny-Chat"} <= set(listed)
    assert versions == [[BASE, "15"]]


def test_a_model_without_tags_of_azure_has_those_that_its_card_knows(sdk: Sdk) -> None:
    code = "result = registry.models.get('SmolLM2-135M-Instruct', label='latest').tags"
    tags = sdk.run(code).ok()
    assert tags == {
        "task": "chat-completion",
        "license": "apache-2.0",
        "author": "Hugging Face",
        "textContextWindow": "8192",
    }


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("'Phi-3-mini-4k-instrct', label='latest'", "Did you mean 'Phi-3-mini-4k-instruct'?"),
        (f"{BASE!r}, version='7'", f"There is no version '7' of {BASE}; there is: 15."),
        ("'azureml:Phi', version='1'", "There is no base model 'azureml:Phi' in the catalogue."),
    ],
)
def test_a_model_that_is_not_there_is_told_with_the_nearest(sdk: Sdk, asked: str, told: str) -> None:
    error = sdk.run(f"registry.models.get({asked})").failed()
    assert (error["code"], error["status"]) == ("ResourceNotFound", 404)
    assert told in error["message"]


def test_a_registry_of_another_name_is_told(sdk: Sdk) -> None:
    error = sdk.run("MLClient(credential, registry_name='azureml-meta')").failed()
    assert (error["code"], error["target"]) == ("ResourceNotFound", "registry")
    assert "there is: azureml" in error["message"]


def test_the_registry_is_matched_whatever_its_case(wire: httpx.Client) -> None:
    answer = wire.get(REGISTRY.upper() + f"/MODELS/{BASE.lower()}/Versions/15?api-version=2099-01-01")
    assert (answer.status_code, answer.json()["id"]) == (200, ID)
    refusal(wire.get(REGISTRY.replace("azureml", "other") + "/models"), 404, "ResourceNotFound")


@pytest.mark.parametrize("query", ["", "?$top=1&$orderBy=createdtime desc", "?$top=x&listViewType=Nothing"])
def test_odd_queries_are_taken(wire: httpx.Client, query: str) -> None:
    answer = wire.get(f"{REGISTRY}/models/{BASE}/versions{query}")
    assert [one["name"] for one in answer.json()["value"]] == ["15"]


# ---------------------------------------------------------------- the component


@pytest.mark.verbs("registry.components.get")
def test_the_component_by_label_by_version_and_without_either(sdk: Sdk) -> None:
    code = f"""
        asked = [{{'label': 'latest'}}, {{'version': {VERSION!r}}}, {{}}]
        found = [registry.components.get({NAME!r}, **one) for one in asked]
        result = [[c.name, c.version, c.type, c.id, len(c.inputs), sorted(c.outputs)] for c in found]
    """
    found = sdk.run(code).ok()
    assert found[0] == [
        NAME,
        VERSION,
        "pipeline",
        f"azureml://registries/azureml/components/{NAME}/versions/{VERSION}",
        71,
        ["evaluation_result", "mlflow_model_folder", "pytorch_model_folder"],
    ]
    assert found[1:] == [found[0], found[0]]


@pytest.mark.verbs("registry.components.list", "registry.components.download")
def test_components_are_listed_and_downloaded(sdk: Sdk) -> None:
    code = f"""
        import pathlib
        listed = [[c.name, c.latest_version] for c in registry.components.list()]
        versions = [c.version for c in registry.components.list({NAME!r})]
        registry.components.download({NAME!r}, 'component-{sdk.which}', version={VERSION!r})
        text = pathlib.Path('component-{sdk.which}/component_spec.yaml').read_text()
        result = [listed, versions, text]
    """
    listed, versions, text = sdk.run(code).ok()
    assert (listed, versions) == ([[NAME, VERSION]], [VERSION])
    assert "per_device_train_batch_size:" in text


@pytest.mark.verbs("components.validate")
def test_every_input_can_be_passed_in_the_pipeline_language(sdk: Sdk) -> None:
    code = f"""
        from azure.ai.ml import dsl
        component = registry.components.get({NAME!r}, label='latest')

        def value(input):
            if input.type in ('mlflow_model', 'custom_model'):
                return Input(type=input.type, path={ID!r})
            if input.type in ('uri_file', 'mltable'):
                return Input(type=input.type, path='azureml://datastores/workspaceblobstore/paths/x')
            if input.enum:
                return input.enum[0]
            return {{'integer': 3, 'number': 0.5, 'string': 'text'}}[input.type]

        given = {{name: value(input) for name, input in component.inputs.items()}}

        @dsl.pipeline
        def whole():
            node = component(**given)
            return {{'trained': node.outputs.mlflow_model_folder, 'scores': node.outputs.evaluation_result}}

        (node,) = whole().jobs.values()
        sent = node._to_rest_object()
        result = [sorted(sent['inputs']), sent['componentId'], sent['inputs']['learning_rate']['value'],
                  sorted(node.outputs), ml.components.validate(component).passed]
    """
    sent, component, rate, outputs, is_valid = sdk.run(code).ok()
    assert sent == sorted([*INPUTS, *ADVISED])
    assert len(sent) == 71
    assert component.endswith(f"/{NAME}/versions/{VERSION}")
    assert (rate, is_valid) == ("0.5", True)
    assert outputs == ["evaluation_result", "mlflow_model_folder", "pytorch_model_folder"]


def test_the_models_defaults_can_be_spread_into_the_call(sdk: Sdk) -> None:
    """As the document does, with its own values beside them and Python's True."""
    code = f"""
        import ast
        from azure.ai.ml import dsl
        model = registry.models.get({BASE!r}, label='latest')
        component = registry.components.get({NAME!r}, label='latest')
        parameters = {{'apply_lora': True, 'num_train_epochs': 3, 'learning_rate': 5e-6}}
        parameters.update(ast.literal_eval(model.tags['model_specific_defaults']))
        parameters['apply_lora'] = True

        @dsl.pipeline
        def tuned():
            component(mlflow_model_path=Input(type='mlflow_model', path=model.id), **parameters)

        (node,) = tuned().jobs.values()
        result = {{name: one.get('value') for name, one in node._to_rest_object()['inputs'].items()}}
    """
    sent = sdk.run(code).ok()
    assert sent["apply_lora"] == "True"
    assert (sent["precision"], sent["deepspeed_stage"]) == ("16", "2")
    assert (sent["learning_rate_min"], sent["learning_rate_max"]) == ("5e-07", "5e-05")


def test_an_input_that_the_component_has_not_fails_at_the_sdk(sdk: Sdk) -> None:
    code = f"""
        from azure.ai.ml import dsl
        component = registry.components.get({NAME!r}, label='latest')

        @dsl.pipeline
        def wrong():
            component(batch_sise=3)

        wrong()
    """
    error = sdk.run(code).failed()
    assert error["type"] == "UnexpectedKeywordError"
    assert "batch_sise" in error["message"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("'chat_completion_finetune', label='latest'", f"there is: {NAME} {VERSION}"),
        ("'question_answering_pipeline', version='0.0.1'", f"there is: {NAME} {VERSION}"),
        (f"{NAME!r}, version='0.0.57'", f"there is: {VERSION}"),
    ],
)
def test_another_component_is_told_with_the_one_that_there_is(sdk: Sdk, asked: str, told: str) -> None:
    error = sdk.run(f"registry.components.get({asked})").failed()
    assert (error["code"], error["status"]) == ("ResourceNotFound", 404)
    assert told in error["message"]


@pytest.mark.refuses(
    "registry.models.create_or_update",
    "registry.data.create_or_update",
    "registry.environments.create_or_update",
)
@pytest.mark.parametrize(
    "code",
    [
        f"registry.models.create_or_update(Model(name={BASE!r}, version='16', path='written.bin'))",
        f"registry.models.create_or_update(Model(name={BASE!r}, path='written.bin'))",
        "registry.data.create_or_update(Data(name='d', version='1', path='written.bin', type='uri_file'))",
        "registry.environments.create_or_update(Environment(name='e', version='1', image='x'))",
    ],
)
def test_nothing_is_written_to_the_registry(sdk: Sdk, code: str) -> None:
    sdk.run("open('written.bin', 'wb').write(b'x')").ok()
    error = sdk.run(code).failed()
    assert (error["code"], error["target"]) == ("NotSupported", "registryWrites"), error["trace"]
    assert "tuneloop catalog add card.yaml" in error["message"]


# ---------------------------------------------------------------- what is above both


@pytest.mark.verbs("registries.get", "registries.list")
def test_the_registry_itself(sdk: Sdk) -> None:
    code = """
        one = ml.registries.get('AzureML')
        result = [one.name, one.location, [r.name for r in ml.registries.list()]]
    """
    assert sdk.run(code).ok() == ["azureml", "local", ["azureml"]]
    error = sdk.run("ml.registries.get('mine')").failed()
    assert (error["code"], error["target"]) == ("ResourceNotFound", "registry")


@pytest.mark.verbs("workspaces.list", "workspaces.get")
def test_a_home_is_one_workspace_under_every_name(sdk: Sdk) -> None:
    code = """
        listed = [w.name for w in ml.workspaces.list()]
        result = [listed, ml.workspaces.get('Any_Name').name, ml.workspaces.get('local').location]
    """
    assert sdk.run(code).ok() == [["local"], "Any_Name", "local"]
