"""Models of the workspace: registered from jobs and from local files, described, archived, downloaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.contract.azure.direct import WORKSPACE, refusal, speaking_to
from tests.contract.azure.sdk import BASE, AzureWorld, Sdk
from tests.loop.world import wait_for
from tuneloop.core.types import ModelRecord


@pytest.fixture(scope="module")
def wire(azure: AzureWorld) -> Iterator[httpx.Client]:
    with speaking_to(azure) as client:
        yield client


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        one.relative_to(folder).as_posix(): one.read_bytes() for one in folder.rglob("*") if one.is_file()
    }


def artifact(azure: AzureWorld, record: ModelRecord) -> Path:
    value = record.artifact.removeprefix("sha256:")
    return azure.home / "artifacts" / value[:2] / value


def put(wire: httpx.Client, name: str, version: str, uri: str, **more: Any) -> httpx.Response:
    body = {"properties": {"modelUri": uri, "modelType": "custom_model", **more}}
    return wire.put(f"{WORKSPACE}/models/{name}/versions/{version}", json=body)


# ---------------------------------------------------------------- from a job


@pytest.mark.verbs("models.create_or_update", "models.get", "models.list", "models.download")
def test_a_jobs_output_becomes_a_model_with_lineage_and_comes_back_whole(
    azure: AzureWorld, sdk: Sdk, completed: str, tmp_path: Path
) -> None:
    name, version = f"models-job-{sdk.which}", "1767225600"
    found = sdk.run(
        f"""
        made = ml.models.create_or_update(Model(
            path="azureml://jobs/{completed}/outputs/trained_model", type=AssetTypes.MLFLOW_MODEL,
            name={name!r}, version={version!r}, description="Tuned", tags={{"a": "b"}},
            properties={{"mine": "yes"}}))
        got = ml.models.get({name!r}, version={version!r})
        latest = ml.models.get({name!r}, label="latest")
        ml.models.download({name!r}, version={version!r}, download_path={str(tmp_path)!r})
        result = {{
            "made": [made.id, made.name, made.version, made.type, made.description, made.tags, made.path],
            "properties": got.properties, "flavors": got.flavors, "job": got.job_name,
            "latest": latest.version,
            "listed": [[one.version, one.type] for one in ml.models.list({name!r})],
            "all": [[one.name, one.latest_version] for one in ml.models.list() if one.name == {name!r}],
        }}
        """
    ).ok()
    identity, *rest, uri = found["made"]
    assert identity.endswith(f"/workspaces/local/models/{name}/versions/{version}")
    assert rest == [name, version, "mlflow_model", "Tuned", {"a": "b"}]
    assert "/datastores/workspaceartifactstore/paths/" in uri
    record = azure.client.model(name, version)
    lineage = found["properties"]
    assert lineage["mine"] == "yes"
    assert lineage["tuneloop.job"] == completed == found["job"] == record.lineage.job
    assert lineage["tuneloop.output"] == "trained_model"
    assert lineage["tuneloop.base_model"] == f"{BASE}:15"
    assert lineage["tuneloop.data.train"].startswith("train")
    assert lineage["tuneloop.artifact"] == record.artifact
    assert "tuneloop.not_served" not in lineage
    assert {"transformers", "python_function"} <= set(found["flavors"])
    assert (found["latest"], found["listed"]) == (version, [[version, "mlflow_model"]])
    assert found["all"] == [[name, version]]
    assert files_in(tmp_path / name / "trained_model") == files_in(artifact(azure, record))


def test_the_same_again_is_no_error_and_other_files_are(
    azure: AzureWorld, sdk: Sdk, completed: str, tmp_path: Path
) -> None:
    name = f"models-again-{sdk.which}"
    (tmp_path / "other.txt").write_text("other")
    code = (
        f"made = ml.models.create_or_update(Model(name={name!r}, version='1', type='mlflow_model', "
        f"path='azureml://jobs/{completed}/outputs/trained_model', description={{!r}}))\n"
        "result = [made.description, made.path]"
    )
    first = sdk.run(code.format("one")).ok()
    assert sdk.run(code.format("two")).ok() == ["two", first[1]]
    assert azure.client.model(name, "1").description == "two"
    error = sdk.run(
        f"ml.models.create_or_update(Model(name={name!r}, version='1', path={str(tmp_path / 'other.txt')!r}))"
    ).failed()
    assert (error["status"], error["code"], error["target"]) == (409, "UserError", "properties.modelUri")
    assert "Give another version" in error["message"]
    assert azure.client.model(name, "1").lineage.job == completed


def test_an_output_that_is_no_model_or_not_there_is_refused(wire: httpx.Client, completed: str) -> None:
    answer = put(wire, "models-output", "1", f"azureml://jobs/{completed}/outputs/nothing")
    assert refusal(answer, 404, "InvalidInput")["target"] == "properties.modelUri"
    answer = put(wire, "models-output", "1", "azureml://jobs/nobody/outputs/trained_model")
    refusal(answer, 404, "InvalidInput")
    refusal(wire.get(f"{WORKSPACE}/models/models-output"), 404, "ResourceNotFound")


# ---------------------------------------------------------------- from local files


def test_a_local_mlflow_model_is_uploaded_and_can_be_served(
    azure: AzureWorld, sdk: Sdk, completed: str, tmp_path: Path
) -> None:
    name = f"models-mlflow-{sdk.which}"
    trained = tmp_path / "trained"
    sdk.run(
        f"""
        ml.models.create_or_update(Model(name={name!r}, version="job", type="mlflow_model",
                                         path="azureml://jobs/{completed}/outputs/trained_model"))
        """
    ).ok()
    shutil.copytree(artifact(azure, azure.client.model(name, "job")), trained)
    (trained / "note.txt").write_text("changed by hand")
    found = sdk.run(
        f"""
        made = ml.models.create_or_update(Model(name={name!r}, path={str(trained)!r}, type="mlflow_model"))
        result = [made.version, made.properties, sorted(made.flavors)]
        """
    ).ok()
    assert found[0] == "1"
    assert "tuneloop.not_served" not in found[1]
    assert "tuneloop.job" not in found[1]
    assert found[1]["tuneloop.template_digest"] == azure.client.model(name, "job").template_digest
    assert "transformers" in found[2]
    wait_for(lambda: azure.client.model(name, "1").state == "registered", "MLflow to have it", 60)


def test_a_local_hugging_face_model_can_be_served(azure: AzureWorld, sdk: Sdk) -> None:
    name = f"models-hf-{sdk.which}"
    model = f"Model(name={name!r}, path={str(azure.model)!r}, type='custom_model')"
    properties = sdk.run(f"result = ml.models.create_or_update({model}).properties").ok()
    assert "tuneloop.not_served" not in properties
    assert files_in(artifact(azure, azure.client.model(name))) == files_in(azure.model)


def test_other_files_are_kept_and_say_that_they_cannot_be_served(
    azure: AzureWorld, sdk: Sdk, tmp_path: Path
) -> None:
    name = f"models-files-{sdk.which}"
    folder = tmp_path / "things"
    (folder / "deep").mkdir(parents=True)
    (folder / "model.pkl").write_bytes(b"\x80pickle")
    (folder / "deep" / "empty").write_bytes(b"")
    single = tmp_path / "one file.bin"
    single.write_bytes(b"single")
    found = sdk.run(
        f"""
        made = ml.models.create_or_update(Model(name={name!r}, path={str(folder)!r}, stage="Production"))
        file = ml.models.create_or_update(Model(name={name!r}, path={str(single)!r}))
        for one in (made, file):
            ml.models.download({name!r}, one.version, download_path={str(tmp_path)!r} + "/" + one.version)
        result = [made.version, file.version, made.type, made.stage, made.properties["tuneloop.not_served"]]
        """
    ).ok()
    assert found[:4] == ["1", "2", "custom_model", "Production"]
    assert "config.json" in found[4]
    assert files_in(tmp_path / "1" / name / "things") == files_in(folder)
    assert files_in(tmp_path / "2" / name) == {"one file.bin": b"single"}
    wait_for(lambda: azure.client.model(name, "2").state == "registered", "MLflow to have it", 60)
    error = sdk.run(
        f"""
        ml.online_endpoints.begin_create_or_update(ManagedOnlineEndpoint(name="files-{sdk.which}")).wait()
        try:
            ml.online_deployments.begin_create_or_update(ManagedOnlineDeployment(
                name="none", endpoint_name="files-{sdk.which}", model="azureml:{name}:1",
                instance_type="Standard_NC6s_v3", instance_count=1)).result()
        finally:
            ml.online_endpoints.begin_delete("files-{sdk.which}").wait()
        """
    ).failed()
    assert "cannot be served" in error["message"]
    assert "downloaded" in error["message"]


def test_an_mlflow_model_needs_its_file(azure: AzureWorld, sdk: Sdk, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("x")
    model = f"Model(name='models-bad', path={str(tmp_path / 'folder')!r}, type={{!r}})"
    code = f"ml.models.create_or_update({model})"
    error = sdk.run(code.format("mlflow_model")).failed()
    assert (error["status"], error["code"], error["target"]) == (400, "InvalidInput", "properties.modelType")
    assert "MLmodel" in error["message"]
    error = sdk.run(code.format("triton_model")).failed()
    assert (error["status"], error["code"], error["target"]) == (400, "NotSupported", "properties.modelType")


# ---------------------------------------------------------------- what becomes of them


@pytest.mark.verbs("models.archive", "models.restore")
def test_models_are_described_archived_and_restored(azure: AzureWorld, sdk: Sdk, completed: str) -> None:
    name = f"models-archive-{sdk.which}"
    found = sdk.run(
        f"""
        from azure.ai.ml.constants import ListViewType
        for version in ("1", "2"):
            ml.models.create_or_update(Model(name={name!r}, version=version, type="mlflow_model",
                path="azureml://jobs/{completed}/outputs/trained_model", properties={{"mine": version}}))
        def listed(view=ListViewType.ACTIVE_ONLY):
            return [one.version for one in ml.models.list({name!r}, list_view_type=view)]
        def there():
            return {name!r} in [one.name for one in ml.models.list()]
        changed = ml.models.get({name!r}, version="2")
        changed.description, changed.tags = "new words", {{"stage": "2"}}
        ml.models.create_or_update(changed)
        ml.models.archive({name!r}, version="2")
        one = [listed(), listed(ListViewType.ARCHIVED_ONLY), listed(ListViewType.ALL), there()]
        ml.models.restore({name!r}, version="2")
        ml.models.archive({name!r})
        all_of_it = [listed(), there()]
        ml.models.restore({name!r})
        last = ml.models.get({name!r}, version="2")
        result = [one, all_of_it, listed(), there(), [last.description, last.tags, last.properties["mine"],
                  last.properties["tuneloop.job"]]]
        """
    ).ok()
    assert found == [
        [["1"], ["2"], ["2", "1"], True],
        [[], False],
        ["2", "1"],
        True,
        ["new words", {"stage": "2"}, "2", completed],
    ]


def test_what_is_not_there_says_what_is(sdk: Sdk) -> None:
    error = sdk.run("ml.models.get('models-nowhere', version='1')").failed()
    assert (error["status"], error["code"], error["target"]) == (404, "ResourceNotFound", "model")
    error = sdk.run("ml.models.get('models-nowhere', label='latest')").failed()
    assert "models-nowhere" in error["message"]


# ---------------------------------------------------------------- what the SDK does not send


@pytest.mark.parametrize(
    ("uri", "more", "code", "target"),
    [
        ("runs:/abc/model", {}, "InvalidInput", "properties.modelUri"),
        ("https://huggingface.co/x", {}, "InvalidInput", "properties.modelUri"),
        ("azureml://registries/azureml/models/x/versions/1", {}, "InvalidInput", "properties.modelUri"),
        (
            "azureml://datastores/workspaceblobstore/paths/%2e%2e/x",
            {},
            "ResourceNotFound",
            "properties.modelUri",
        ),
        (
            "azureml://datastores/workspaceblobstore/paths/../../identity",
            {},
            "InvalidInput",
            "properties.modelUri",
        ),
        (
            f"azureml://datastores/workspaceartifactstore/paths/artifacts/{'0' * 64}/",
            {},
            "ResourceNotFound",
            "properties.modelUri",
        ),
        ("", {}, "InvalidInput", "properties.modelUri"),
        ("x", {"modelType": "onnx"}, "InvalidInput", "properties.modelType"),
        ("x", {"jobName": "made_up"}, "NotSupported", "properties.jobName"),
        (
            "x",
            {"properties": {"tuneloop.job": "made_up"}},
            "InvalidInput",
            "properties.properties.tuneloop.job",
        ),
        (
            "x",
            {"defaultDeploymentTemplate": {"a": 1}},
            "NotSupported",
            "properties.defaultDeploymentTemplate",
        ),
        ("x", {"surprise": 1}, "NotSupported", "properties.surprise"),
    ],
)
def test_a_model_that_cannot_be_had_is_refused(
    wire: httpx.Client, uri: str, more: dict[str, Any], code: str, target: str
) -> None:
    answer = put(wire, "models-refused", "1", uri, **more)
    assert refusal(answer, 404 if code == "ResourceNotFound" else 400, code)["target"] == target
    assert wire.get(f"{WORKSPACE}/models/models-refused/versions").json() == {"value": []}


def test_a_version_is_deleted_unless_it_is_served(
    azure: AzureWorld, wire: httpx.Client, completed: str
) -> None:
    uri = f"azureml://jobs/{completed}/outputs/trained_model"
    assert put(wire, "Models-Delete", "V1", uri, modelType="mlflow_model").status_code == 201
    found = wire.get(f"{WORKSPACE}/models/models-delete/versions/v1").json()
    assert found["id"].endswith("/models/Models-Delete/versions/V1")
    assert wire.delete(f"{WORKSPACE}/models/models-delete/versions/v1").status_code == 200
    refusal(wire.get(f"{WORKSPACE}/models/models-delete/versions/v1"), 404, "ResourceNotFound")
    assert wire.delete(f"{WORKSPACE}/models/models-delete/versions/v1").status_code == 204


@pytest.mark.parametrize(("name", "version"), [("a b", "1"), ("models-names", "latest"), ("x" * 129, "1")])
def test_names_and_versions_are_checked(wire: httpx.Client, completed: str, name: str, version: str) -> None:
    answer = put(wire, name, version, f"azureml://jobs/{completed}/outputs/trained_model")
    refusal(answer, 400, "BadArgument" if version == "latest" else "InvalidResourceName")
