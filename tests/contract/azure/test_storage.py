"""Datastores and uploads: by the SDK, and what becomes of an upload whose server or client is killed."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from xml.etree import ElementTree

import httpx
import psutil
import pytest

from tests.blob_service import BLOCK_BLOB, UPLOADS, block_id, block_list
from tests.contract.azure.direct import WORKSPACE, refusal, speaking_to
from tests.contract.azure.sdk import AzureWorld, Sdk, python_of
from tests.loop.world import wait_for

STORE = f"{WORKSPACE}/datastores/workspaceblobstore"


@pytest.fixture(scope="module")
def wire(azure: AzureWorld) -> Iterator[httpx.Client]:
    with speaking_to(azure) as client:
        yield client


def signature(wire: httpx.Client, datastore: str = "workspaceblobstore") -> str:
    answer = wire.post(f"{WORKSPACE}/datastores/{datastore}/listSecrets", json={"expirableSecret": True})
    assert answer.status_code == 200, answer.text
    assert answer.json()["secretsType"] == "Sas"
    return str(answer.json()["sasToken"])


def blob_error(answer: httpx.Response, status: int, code: str) -> None:
    assert (answer.status_code, answer.headers.get("x-ms-error-code")) == (status, code), answer.text
    assert ElementTree.fromstring(answer.text).findtext("Code") == code


def server_kinds(azure: AzureWorld) -> set[str]:
    """What lies in the folder of blobs beside blobs and their facts."""
    root = azure.azure_folder / "blobs"
    return {one.parent.parent.name + "/" + one.suffix for one in root.rglob("*.part")}


# ---------------------------------------------------------------- datastores


@pytest.mark.verbs("datastores.list", "datastores.get", "datastores.get_default")
def test_there_are_two_datastores_and_a_default(azure: AzureWorld, sdk: Sdk) -> None:
    found = sdk.run(
        """
        default = ml.datastores.get_default(include_secrets=True)
        made = ml.datastores.get("WorkspaceArtifactStore")
        result = {
            "names": [one.name for one in ml.datastores.list()],
            "default": [default.name, str(default.type), default.account_name, default.container_name],
            "token": default.credentials.sas_token,
            "made": [made.name, made.container_name, made.description],
        }
        """
    ).ok()
    assert found["names"] == ["workspaceblobstore", "workspaceartifactstore"]
    assert found["default"][0] == "workspaceblobstore"
    assert found["default"][2:] == [f"{azure.url.removeprefix('https://')}/blob/store", "azureml-blobstore"]
    assert {"sig", "se", "sp", "sv"} <= {part.split("=")[0] for part in found["token"].split("&")}
    assert found["made"][:2] == ["workspaceartifactstore", "azureml"]


def test_a_datastore_that_is_not_there_says_which_are(sdk: Sdk) -> None:
    error = sdk.run("ml.datastores.get('mine')").failed()
    assert (error["status"], error["code"], error["target"]) == (404, "ResourceNotFound", "datastore")
    assert "workspaceblobstore, workspaceartifactstore" in error["message"]


@pytest.mark.refuses("datastores.create_or_update", "datastores.delete")
def test_datastores_are_neither_made_nor_deleted(sdk: Sdk) -> None:
    other = "AzureBlobDatastore(name='mine', account_name='a', container_name='c')"
    error = sdk.run(f"ml.datastores.create_or_update({other})").failed()
    assert (error["status"], error["code"], error["target"]) == (400, "NotSupported", "datastore")
    assert "mine" in error["message"]
    error = sdk.run("ml.datastores.delete('workspaceblobstore')").failed()
    assert (error["status"], error["code"]) == (400, "NotSupported")


def test_secrets_are_given_for_a_stated_time_to_who_has_a_token(wire: httpx.Client) -> None:
    for hours in (0, 1000, "1"):
        answer = wire.post(f"{STORE}/listSecrets", json={"expireAfterHours": hours})
        refusal(answer, 400, "InvalidInput")
    refusal(wire.post(f"{STORE}/listSecrets", json={"permanent": True}), 400, "NotSupported")
    refusal(wire.post(f"{STORE}/listSecrets", headers={"authorization": ""}), 401, "AuthenticationFailed")


# ---------------------------------------------------------------- through the SDK


def test_the_sdk_uploads_lists_reads_and_deletes(sdk: Sdk) -> None:
    found = sdk.run(
        f"""
        import os
        from azure.core.exceptions import ResourceExistsError, ResourceNotFoundError
        from azure.storage.blob import ContainerClient, ContentSettings
        store = ml.datastores.get_default(include_secrets=True)
        container = ContainerClient(
            f"https://{{store.account_name}}.blob.tuneloop.local", store.container_name,
            store.credentials.sas_token, max_single_put_size=1_000_000, max_block_size=700_000,
        )
        base = "storage-{sdk.which}"
        big = os.urandom(6_000_000)
        container.upload_blob(f"{{base}}/big", big, max_concurrency=4, validate_content=True,
                              metadata={{"a": "1"}}, content_settings=ContentSettings(content_type="x/y"))
        container.upload_blob(f"{{base}}/folder/ä b.txt", b"small", validate_content=True)
        container.upload_blob(f"{{base}}/folder/empty", b"")
        try:
            container.upload_blob(f"{{base}}/big", big)
            again = "replaced"
        except ResourceExistsError as error:
            again = error.error_code
        properties = container.get_blob_client(f"{{base}}/big").get_blob_properties()
        read = container.download_blob(f"{{base}}/big", max_concurrency=4)
        small = container.download_blob(f"{{base}}/folder/ä b.txt", validate_content=True)
        names = [one.name for one in container.list_blobs(name_starts_with=base, results_per_page=1)]
        walked = sorted(one.name for one in container.walk_blobs(name_starts_with=base + "/"))
        container.delete_blob(f"{{base}}/folder/empty")
        try:
            container.download_blob(f"{{base}}/folder/empty").readall()
            gone = "there"
        except ResourceNotFoundError as error:
            gone = error.error_code
        result = {{
            "same": read.readall() == big, "again": again, "metadata": properties.metadata,
            "size": properties.size, "type": properties.content_settings.content_type,
            "small": small.readall().decode(),
            "names": names, "walked": walked, "gone": gone,
            "container": container.exists(),
        }}
        """
    ).ok()
    base = f"storage-{sdk.which}"
    assert found == {
        "same": True,
        "again": "BlobAlreadyExists",
        "metadata": {"a": "1"},
        "size": 6_000_000,
        "type": "x/y",
        "small": "small",
        "names": [f"{base}/big", f"{base}/folder/empty", f"{base}/folder/ä b.txt"],
        "walked": [f"{base}/big", f"{base}/folder/"],
        "gone": "BlobNotFound",
        "container": True,
    }


def test_a_file_is_sent_once_however_often_it_is_used(azure: AzureWorld, sdk: Sdk) -> None:
    """Its name is a digest of what it holds: whoever has it sends nothing."""
    path = azure.folder / f"once-{sdk.which}.jsonl"
    path.write_text(f"{sdk.which}\n" * 1000, encoding="utf-8")
    code = f"result = ml.data.create_or_update(Data(name='once-{sdk.which}', path={str(path)!r})).path"
    code = code.replace("path=", "type='uri_file', path=", 1)
    first = sdk.run(code).ok()
    stored = azure.azure_folder / "blobs" / "files" / first.partition("/paths/")[2]
    written_at = stored.stat().st_mtime_ns
    assert stored.read_bytes() == path.read_bytes()
    assert sdk.run(code).ok() == first
    assert stored.stat().st_mtime_ns == written_at


# ---------------------------------------------------------------- what no SDK sends


def test_a_signature_of_one_container_does_not_open_the_other(wire: httpx.Client) -> None:
    made = signature(wire, "workspaceartifactstore")
    blob_error(wire.get(f"{UPLOADS}/x?{made}"), 403, "AuthenticationFailed")
    blob_error(wire.put(f"{UPLOADS}/x?{made}", content=b"1", headers=BLOCK_BLOB), 403, "AuthenticationFailed")
    blob_error(wire.get(f"{UPLOADS}/x"), 401, "NoAuthenticationInformation")
    tampered = signature(wire).replace("sp=racwdl", "sp=racwdlx")
    blob_error(wire.get(f"{UPLOADS}/x?{tampered}"), 403, "AuthenticationFailed")


def test_errors_of_the_listener_have_the_blob_services_shape_too(wire: httpx.Client) -> None:
    blob_error(wire.get(f"{UPLOADS}/%00?{signature(wire)}"), 400, "InvalidUri")
    blob_error(wire.get(f"{UPLOADS}/{'x' * 20_000}"), 414, "UriTooLong")
    blob_error(wire.get(f"{UPLOADS}/x", headers={"host": "evil.example"}), 403, "AuthorizationFailed")


def test_traversal_over_the_wire_reads_and_writes_nothing(azure: AzureWorld, wire: httpx.Client) -> None:
    token = signature(wire)
    target = azure.azure_folder / "identity"
    before = target.read_bytes()
    for name in ("%2e%2e/%2e%2e/identity", "..%2f..%2fidentity", "a%2f..%2f..%2f..%2fidentity"):
        blob_error(wire.get(f"{UPLOADS}/{name}?{token}"), 400, "InvalidResourceName")
        answer = wire.put(f"{UPLOADS}/{name}?{token}", content=b"evil", headers=BLOCK_BLOB)
        blob_error(answer, 400, "InvalidResourceName")
    assert target.read_bytes() == before


def test_of_two_uploads_at_once_one_wins_whole(azure: AzureWorld, wire: httpx.Client) -> None:
    """As whole blobs and as blocks with the same ids, to the same name, over connections of their own."""

    def whole(letter: bytes) -> int:
        with speaking_to(azure) as client:
            url = f"{UPLOADS}/race/whole?{signature(client)}"
            return client.put(url, content=letter * 3_000_000, headers=BLOCK_BLOB).status_code

    def blocks(letter: bytes) -> int:
        with speaking_to(azure) as client:
            token = signature(client)
            for number in range(6):
                url = f"{UPLOADS}/race/blocks?comp=block&blockid={block_id(number)}&{token}"
                assert client.put(url, content=letter * 300_000).status_code == 201
            url = f"{UPLOADS}/race/blocks?comp=blocklist&{token}"
            return client.put(url, content=block_list(*range(6))).status_code

    letters = [b"a", b"b", b"c", b"d"]
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(whole, letters)) == {201}
        assert set(pool.map(blocks, letters)) == {201}
    for name, size in (("whole", 3_000_000), ("blocks", 1_800_000)):
        content = wire.get(f"{UPLOADS}/race/{name}?{signature(wire)}").content
        assert len(content) == size
        assert len(set(content)) == 1, "pieces of several uploads"
    assert server_kinds(azure) == set()


def test_an_upload_whose_client_is_killed_leaves_nothing(azure: AzureWorld, wire: httpx.Client) -> None:
    script = (
        "import socket, ssl, sys, time\n"
        "host, path, bundle = sys.argv[1:]\n"
        "address, port = host.split(':')\n"
        "trusted = ssl.create_default_context(cafile=bundle)\n"
        "plain = socket.create_connection((address, int(port)))\n"
        "sock = trusted.wrap_socket(plain, server_hostname=address)\n"
        "head = f'PUT {path} HTTP/1.1\\r\\nHost: {host}\\r\\nContent-Length: 9000000\\r\\n'\n"
        "sock.sendall((head + 'x-ms-blob-type: BlockBlob\\r\\n\\r\\n').encode() + b'x' * 4000000)\n"
        "print('sent', flush=True)\n"
        "time.sleep(60)\n"
    )
    path = f"{UPLOADS}/killed/client?{signature(wire)}"
    child = subprocess.Popen(
        [python_of("new"), "-c", script, azure.url.removeprefix("https://"), path, azure_bundle(azure)],
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"sent\n"
    wait_for(lambda: server_kinds(azure), "the upload to begin", 10)
    child.kill()
    child.wait()
    child.stdout.close()
    wait_for(lambda: not server_kinds(azure), "what was begun to be removed", 10)
    blob_error(wire.get(f"{UPLOADS}/killed/client?{signature(wire)}"), 404, "BlobNotFound")


def azure_bundle(azure: AzureWorld) -> str:
    return str(azure.azure_folder / "bundle.pem")


def test_a_server_killed_between_blocks_and_list_goes_on_where_it_was(azure: AzureWorld) -> None:
    """And of what it was writing nothing looks like a blob."""
    with speaking_to(azure) as client:
        token = signature(client)
        for number in range(3):
            url = f"{UPLOADS}/killed/server?comp=block&blockid={block_id(number)}&{token}"
            assert client.put(url, content=bytes([number]) * 1000).status_code == 201
    half = azure.azure_folder / "blobs" / "uploads" / "half.part"
    half.write_bytes(b"half")
    killed = psutil.Process(azure.server_pid())
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait(10)
    azure.restart_server()
    wait_for(lambda: azure.client.azure()["url"], "the listener", 20)
    with speaking_to(azure) as client:
        assert client.base_url == azure.url
        blob_error(client.get(f"{UPLOADS}/killed/server?{token}"), 404, "BlobNotFound")
        listed = client.get(f"{UPLOADS}?restype=container&comp=list&prefix=killed/&{token}").text
        assert "<Blob>" not in listed
        made = client.put(f"{UPLOADS}/killed/server?comp=blocklist&{token}", content=block_list(0, 1, 2))
        assert made.status_code == 201, made.text
        content = client.get(f"{UPLOADS}/killed/server?{token}").content
        assert content == b"\0" * 1000 + b"\1" * 1000 + b"\2" * 1000
        assert not half.exists()


def test_signatures_are_not_in_the_servers_log(azure: AzureWorld, wire: httpx.Client) -> None:
    token = signature(wire)
    secret = dict(part.split("=", 1) for part in token.split("&"))["sig"]
    wire.get(f"{UPLOADS}/none?{token}")
    wire.get(f"{UPLOADS}/none?comp=lease&{token}")
    logged = "".join(path.read_text() for path in (azure.home / "logs").glob("*.log"))
    assert secret not in logged
    assert "sig=" not in logged


def test_memory_does_not_grow_with_what_is_uploaded(azure: AzureWorld) -> None:
    """40 MB in one piece and 40 MB in blocks; the server may keep some of the buffers."""
    sdk = azure.sdk("new")
    server = psutil.Process(azure.server_pid())
    code = """
        import os
        from azure.storage.blob import ContainerClient
        store = ml.datastores.get_default(include_secrets=True)
        address = f"https://{store.account_name}.blob.tuneloop.local"
        for name, put in (("whole", 64_000_000), ("blocks", 1_000_000)):
            client = ContainerClient(address, store.container_name, store.credentials.sas_token,
                                     max_single_put_size=put)
            client.upload_blob("memory/" + name, os.urandom(40_000_000), overwrite=True, max_concurrency=4)
            client.delete_blob("memory/" + name)
    """
    sdk.run(code.replace("40_000_000", "8_000_000")).ok()
    before = server.memory_info().rss
    sdk.run(code).ok()
    assert server.memory_info().rss - before < 30_000_000
