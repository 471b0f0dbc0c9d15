"""Data assets: made of local files and folders and of addresses, read, listed, archived, refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.contract.azure.direct import WORKSPACE, refusal, speaking_to
from tests.contract.azure.sdk import AzureWorld, Sdk

PATHS = "azureml://datastores/workspaceblobstore/paths"


@pytest.fixture(scope="module")
def wire(azure: AzureWorld) -> Iterator[httpx.Client]:
    with speaking_to(azure) as client:
        yield client


@pytest.fixture(scope="module")
def uploaded(azure: AzureWorld) -> str:
    """The path in the datastore of a file that was uploaded."""
    path = azure.folder / "uploaded.jsonl"
    path.write_text("{}\n", encoding="utf-8")
    code = (
        f"result = ml.data.create_or_update(Data(name='uploaded', type='uri_file', path={str(path)!r})).path"
    )
    return str(azure.sdk("new").run(code).ok()).partition("/paths/")[2]


def body(uri: str, kind: str = "uri_file", **more: Any) -> dict[str, Any]:
    return {"properties": {"dataUri": uri, "dataType": kind, **more}}


def put(wire: httpx.Client, name: str, version: str, content: dict[str, Any]) -> httpx.Response:
    return wire.put(f"{WORKSPACE}/data/{name}/versions/{version}", json=content)


# ---------------------------------------------------------------- through the SDK


@pytest.mark.verbs("data.create_or_update", "data.get", "data.list")
def test_a_local_file_becomes_a_data_asset_with_and_without_a_version(azure: AzureWorld, sdk: Sdk) -> None:
    name = f"data-file-{sdk.which}"
    path = azure.folder / f"{name}.jsonl"
    path.write_text('{"a": 1}\n', encoding="utf-8")
    found = sdk.run(
        f"""
        told = dict(name={name!r}, path={str(path)!r}, type="uri_file")
        said = dict(description="Rows", tags={{"a": "b"}}, properties={{"p": "q"}})
        named = ml.data.create_or_update(Data(**told, **said, version="2026-07"))
        first = ml.data.create_or_update(Data(**told))
        second = ml.data.create_or_update(Data(**told))
        got = ml.data.get({name!r}, version="2026-07")
        latest = ml.data.get({name!r}, label="latest")
        result = {{
            "versions": [named.version, first.version, second.version, latest.version],
            "got": [got.path, got.type, got.description, got.tags, got.properties, got.id],
            "listed": [[one.version, one.path == got.path] for one in ml.data.list({name!r})],
            "all": [[one.name, one.latest_version] for one in ml.data.list() if one.name == {name!r}],
        }}
        """
    ).ok()
    assert found["versions"] == ["2026-07", "1", "2", "2"]
    uri, kind, description, tags, properties, identity = found["got"]
    assert uri.startswith("azureml://subscriptions/00000000-")
    assert uri.endswith(f"/{name}.jsonl")
    assert (kind, description, tags, properties) == ("uri_file", "Rows", {"a": "b"}, {"p": "q"})
    assert identity.endswith(f"/workspaces/local/data/{name}/versions/2026-07")
    assert found["listed"] == [["2", True], ["1", True], ["2026-07", True]]
    assert found["all"] == [[name, "2"]]
    stored = azure.azure_folder / "blobs" / "files" / uri.partition("/paths/")[2]
    assert stored.read_bytes() == path.read_bytes()


def test_a_local_folder_becomes_one_and_its_files_arrive(azure: AzureWorld, sdk: Sdk) -> None:
    name = f"data-folder-{sdk.which}"
    folder = azure.folder / name
    (folder / "deeper").mkdir(parents=True)
    (folder / "one.jsonl").write_text("1")
    (folder / "deeper" / "two words.jsonl").write_text("2")
    asset = f"Data(name={name!r}, path={str(folder)!r}, type='uri_folder')"
    uri = sdk.run(f"result = ml.data.create_or_update({asset}).path").ok()
    stored = azure.azure_folder / "blobs" / "files" / uri.partition("/paths/")[2]
    assert {one.relative_to(stored).as_posix(): one.read_text() for one in stored.rglob("*.jsonl")} == {
        "one.jsonl": "1",
        "deeper/two words.jsonl": "2",
    }


def test_a_data_asset_may_name_what_is_uploaded_already(uploaded: str, sdk: Sdk) -> None:
    name = f"data-address-{sdk.which}"
    asset = f"Data(name={name!r}, version='1', type='uri_file', path={{!r}})"
    code = f"result = ml.data.create_or_update({asset}).path"
    short = f"{PATHS}/{uploaded}"
    made = sdk.run(code.format(short)).ok()
    assert made.endswith(f"/datastores/workspaceblobstore/paths/{uploaded}")
    assert sdk.run(code.format(made)).ok() == made, "the same under a longer address"


@pytest.mark.verbs("data.archive", "data.restore")
def test_data_assets_are_archived_and_restored(uploaded: str, sdk: Sdk) -> None:
    name = f"data-archive-{sdk.which}"
    found = sdk.run(
        f"""
        from azure.ai.ml.constants import ListViewType
        for version in ("1", "2"):
            ml.data.create_or_update(Data(name={name!r}, version=version, type="uri_file",
                                          tags={{"t": version}}, path="{PATHS}/{uploaded}"))
        def listed(view=ListViewType.ACTIVE_ONLY):
            return [one.version for one in ml.data.list({name!r}, list_view_type=view)]
        def there():
            return {name!r} in [one.name for one in ml.data.list()]
        ml.data.archive({name!r}, version="2")
        one = [listed(), listed(ListViewType.ARCHIVED_ONLY), listed(ListViewType.ALL), there()]
        ml.data.restore({name!r}, version="2")
        ml.data.archive({name!r})
        all_of_it = [listed(), there(), ml.data.get({name!r}, version="2").tags]
        ml.data.restore({name!r})
        result = [one, all_of_it, listed(), there()]
        """
    ).ok()
    assert found == [
        [["1"], ["2"], ["2", "1"], True],
        [[], False, {"t": "2"}],
        ["2", "1"],
        True,
    ]


def test_a_version_keeps_what_it_names(uploaded: str, azure: AzureWorld, sdk: Sdk) -> None:
    name = f"data-kept-{sdk.which}"
    other = azure.folder / f"{name}-other.jsonl"
    other.write_text("other\n")
    error = sdk.run(
        f"""
        ml.data.create_or_update(Data(name={name!r}, version="1", type="uri_file", path="{PATHS}/{uploaded}"))
        ml.data.create_or_update(Data(name={name!r}, version="1", type="uri_file", path={str(other)!r}))
        """
    ).failed()
    assert (error["status"], error["code"], error["target"]) == (409, "UserError", "properties.dataUri")
    assert "Give another version" in error["message"]


def test_tables_are_refused_with_a_reason(azure: AzureWorld, sdk: Sdk) -> None:
    folder = azure.folder / "table"
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("{}\n")
    (folder / "MLTable").write_text(
        "type: mltable\npaths:\n  - file: ./rows.jsonl\ntransformations:\n  - read_json_lines:\n"
        "      encoding: utf8\n"
    )
    error = sdk.run(
        f"""
        table = Data(name="table", path={str(folder)!r}, type="mltable")
        table._skip_validation = True
        ml.data._try_get_mltable_metadata_jsonschema = lambda _url: None
        ml.data.create_or_update(table)
        """
    ).failed()
    assert (error["status"], error["code"], error["target"]) == (400, "NotSupported", "properties.dataType")
    assert "uri_file" in error["message"]


def test_what_is_not_there_says_what_is(uploaded: str, sdk: Sdk) -> None:
    error = sdk.run("ml.data.get('data-nowhere', version='1')").failed()
    assert (error["status"], error["code"], error["target"]) == (404, "ResourceNotFound", "data")
    error = sdk.run("ml.data.get('uploaded', version='7')").failed()
    assert (error["code"], error["target"]) == ("ResourceNotFound", "version")
    assert "there is: 1" in error["message"]


# ---------------------------------------------------------------- what the SDK does not send


@pytest.mark.parametrize(
    ("content", "code", "target"),
    [
        (body("https://example.com/rows.jsonl"), "InvalidInput", "properties.dataUri"),
        (body("wasbs://container@account.blob.core.windows.net/x"), "InvalidInput", "properties.dataUri"),
        (body(f"{PATHS}/../../identity"), "InvalidInput", "uri"),
        (body(f"{PATHS}/nowhere/x.jsonl"), "ResourceNotFound", "uri"),
        (body("azureml://datastores/other/paths/x"), "ResourceNotFound", "uri"),
        (body("azureml:other:1"), "InvalidInput", "properties.dataUri"),
        (body("azureml://jobs/nobody/outputs/x"), "InvalidInput", "uri"),
        ({"properties": {"dataType": "uri_file"}}, "InvalidInput", "properties.dataUri"),
        (body("x", "parquet"), "InvalidInput", "properties.dataType"),
        (body("x", autoDeleteSetting={"value": "30d"}), "NotSupported", "properties.autoDeleteSetting"),
        (body("x", tags={"a": 1}), "InvalidInput", "properties.tags.a"),
        (body("x", surprise=1), "NotSupported", "properties.surprise"),
    ],
)
def test_a_data_asset_that_cannot_be_had_is_refused(
    wire: httpx.Client, content: dict[str, Any], code: str, target: str
) -> None:
    answer = put(wire, "data-refused", "1", content)
    status = 404 if code == "ResourceNotFound" or "jobs" in str(content) else 400
    assert refusal(answer, status, code)["target"] == target
    refusal(wire.get(f"{WORKSPACE}/data/data-refused"), 404, "ResourceNotFound")


def test_a_file_is_no_folder(wire: httpx.Client, uploaded: str) -> None:
    error = refusal(
        put(wire, "data-kind", "1", body(f"{PATHS}/{uploaded}", "uri_folder")), 400, "InvalidInput"
    )
    assert error["target"] == "properties.dataType"
    assert "uri_file" in error["message"]
    folder = uploaded.rpartition("/")[0]
    error = refusal(put(wire, "data-kind", "1", body(f"{PATHS}/{folder}/")), 400, "InvalidInput")
    assert "uri_folder" in error["message"]


@pytest.mark.parametrize(
    ("name", "version"),
    [("data-names", "latest"), ("data-names", "a b"), ("-x", "1"), ("x" * 129, "1"), ("data%2F..", "1")],
)
def test_names_and_versions_are_checked(wire: httpx.Client, uploaded: str, name: str, version: str) -> None:
    answer = put(wire, name, version, body(f"{PATHS}/{uploaded}"))
    refusal(answer, 400, "BadArgument" if version == "latest" else "InvalidResourceName")


def test_names_match_whatever_their_case_and_keep_their_spelling(wire: httpx.Client, uploaded: str) -> None:
    put(wire, "Data-Case", "V1", body(f"{PATHS}/{uploaded}"))
    found = wire.get(f"{WORKSPACE.upper()}/DATA/data-case/versions/v1").json()
    assert found["id"].endswith("/data/Data-Case/versions/V1")
    assert wire.get(f"{WORKSPACE}/data/DATA-CASE").json()["name"] == "Data-Case"
