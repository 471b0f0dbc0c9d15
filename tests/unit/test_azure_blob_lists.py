"""Blocks and their lists, lists of blobs, ranges and conditions, and what the workspace has made."""

from __future__ import annotations

import base64
import hashlib
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from xml.etree import ElementTree

import httpx
import pytest

from tests.blob_service import (
    BLOCK_BLOB,
    DIGEST,
    MADE,
    UPLOADS,
    Service,
    block_id,
    put_block,
    put_list,
    refusal,
)
from tuneloop.core.types import Artifact
from tuneloop.server.azure.blobs import operations, staging, store
from tuneloop.server.azure.blobs.trees import FolderTree, walk


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    return Service(tmp_path / "home", monkeypatch)


# ---------------------------------------------------------------- blocks


def test_blocks_become_a_blob_in_the_order_of_their_list(service: Service) -> None:
    token = service.sas()
    contents = {number: os.urandom(100_000 + number) for number in range(5)}
    for number in (3, 0, 4, 1, 2):
        assert put_block(service, "x", number, contents[number], token).status_code == 201
    refusal(service.get("x"), 404, "BlobNotFound")
    assert service.list() == []
    made = put_list(service, "x", (4, 3, 2, 1), token, **{"x-ms-meta-a": "1"})
    assert made.status_code == 201, made.text
    assert service.get("x").content == b"".join(contents[number] for number in (4, 3, 2, 1))
    assert service.get("x").headers["x-ms-meta-a"] == "1"
    assert service.left() == []


def test_a_block_that_is_sent_again_replaces_the_first(service: Service) -> None:
    token = service.sas()
    put_block(service, "x", 1, b"first", token)
    put_block(service, "x", 1, b"again", token)
    path = f"{UPLOADS}/x?comp=blocklist&blocklisttype=uncommitted"
    told = ElementTree.fromstring(service.send("GET", path, token=token).text)
    assert [(one.findtext("Name"), one.findtext("Size")) for one in told.iter("Block")] == [
        (block_id(1), "5")
    ]
    assert put_list(service, "x", (1,), token).status_code == 201
    assert service.get("x").content == b"again"
    committed = service.send("GET", f"{UPLOADS}/x?comp=blocklist", token=token)
    assert "not kept" in refusal(committed, 400, "InvalidQueryParameterValue")


def test_a_list_sent_again_after_its_answer_was_lost_is_answered_again(service: Service) -> None:
    token = service.sas()
    put_block(service, "x", 1, b"1", token)
    first = put_list(service, "x", (1,), token)
    again = put_list(service, "x", (1,), token)
    assert (again.status_code, again.headers["etag"]) == (201, first.headers["etag"])
    other = put_list(service, "x", (1, 1), token)
    refusal(other, 400, "InvalidBlockList")


def test_a_list_sent_again_while_it_is_being_done_waits_for_the_first(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the SDK does after 60 s without an answer."""
    token = service.sas()
    put_block(service, "x", 1, b"1", token)
    begun, real = threading.Event(), staging.Staging.put_together

    def slow(*given: Any) -> None:
        begun.set()
        time.sleep(0.2)
        real(*given)

    monkeypatch.setattr(staging.Staging, "put_together", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(put_list, service, "x", (1,), token, **{"if-none-match": "*"})
        begun.wait(5)
        second = pool.submit(put_list, service, "x", (1,), token, **{"if-none-match": "*"})
        assert (first.result().status_code, second.result().status_code) == (201, 201)
    refusal(put_list(service, "x", (1,), service.sas()), 400, "InvalidBlockList")
    assert service.get("x").content == b"1"


def test_two_uploads_of_one_blob_at_once_share_no_blocks(service: Service) -> None:
    one, two = service.sas(), service.sas()
    put_block(service, "x", 1, b"a1", one)
    put_block(service, "x", 1, b"b1", two)
    put_block(service, "x", 2, b"b2", two)
    put_block(service, "x", 2, b"a2", one)
    assert put_list(service, "x", (1, 2), one, **{"if-none-match": "*"}).status_code == 201
    assert service.get("x").content == b"a1a2"
    answer = put_list(service, "x", (1, 2), two, **{"if-none-match": "*"})
    refusal(answer, 409, "BlobAlreadyExists")
    assert service.get("x").content == b"a1a2"
    assert put_list(service, "x", (1, 2), two).status_code == 201
    assert service.get("x").content == b"b1b2"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "InvalidXmlDocument"),
        (b"<BlockList><Latest>", "InvalidXmlDocument"),
        (b"not xml", "InvalidXmlDocument"),
        (b"<Other/>", "InvalidXmlNodeValue"),
        (b"<BlockList><Newest>MDAwMDAx</Newest></BlockList>", "InvalidXmlNodeValue"),
        (b"<BlockList><Latest><b/></Latest></BlockList>", "InvalidXmlNodeValue"),
        (b"<BlockList><Committed>MDAwMDAx</Committed></BlockList>", "InvalidBlockList"),
        (b"<BlockList><Latest>MDAwMDA5</Latest></BlockList>", "InvalidBlockList"),
        (b"<BlockList><Latest>!!</Latest></BlockList>", "InvalidQueryParameterValue"),
        (
            b'<!DOCTYPE b [<!ENTITY a "aa"><!ENTITY b "&a;&a;">]><BlockList><Latest>&b;</Latest></BlockList>',
            "InvalidXmlDocument",
        ),
        (
            b'<!DOCTYPE b SYSTEM "file:///etc/passwd"><BlockList/>',
            "InvalidXmlDocument",
        ),
    ],
)
def test_a_list_that_is_none_is_refused_and_the_blocks_stay(
    service: Service, content: bytes, code: str
) -> None:
    token = service.sas()
    put_block(service, "x", 1, b"1", token)
    answer = service.send("PUT", f"{UPLOADS}/x?comp=blocklist", token=token, content=content)
    refusal(answer, 400, code)
    assert put_list(service, "x", (1,), token).status_code == 201


def test_a_list_is_bounded_and_so_are_ids(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    token = service.sas()
    long_id = urlencode({"blockid": base64.b64encode(b"x" * 65).decode()})
    answer = service.send("PUT", f"{UPLOADS}/x?comp=block&{long_id}", token=token, content=b"1")
    refusal(answer, 400, "InvalidQueryParameterValue")
    refusal(
        service.send("PUT", f"{UPLOADS}/x?comp=block", token=token, content=b"1"),
        400,
        "InvalidQueryParameterValue",
    )
    monkeypatch.setattr(operations, "BLOCK_LIST_BYTES", 10)
    refusal(put_list(service, "x", (1,), token), 413, "RequestBodyTooLarge")


def test_blocks_that_nobody_asks_for_are_swept_after_a_week(service: Service) -> None:
    put_block(service, "old", 1, b"1", service.sas())
    (old,) = (service.home / "azure" / "blobs" / "blocks").iterdir()
    put_block(service, "new", 1, b"1", service.sas())
    week_ago = time.time() - staging.KEPT_SECONDS - 60
    os.utime(old, (week_ago, week_ago))
    staging.sweep(service.home / "azure" / "blobs")
    assert len(service.left()) == 1
    assert not old.exists()


# ---------------------------------------------------------------- lists


def test_blobs_are_listed_in_the_order_of_their_names(service: Service) -> None:
    for name in ("b", "a/z", "a-b", "a/b/c", "a.txt", "B", "%C3%A9"):
        service.put(name, b"1", **{"x-ms-meta-k": f"<{name}>"})
    names = ["B", "a-b", "a.txt", "a/b/c", "a/z", "b", "é"]
    assert service.list() == names
    assert service.list("&maxresults=1") == names
    assert service.list("&maxresults=3") == names
    assert service.list("&prefix=a/") == ["a/b/c", "a/z"]
    assert service.list("&prefix=a&delimiter=/") == ["a-b", "a.txt", "a/"]
    assert service.list("&delimiter=/&maxresults=2") == ["B", "a-b", "a.txt", "a/", "b", "é"]
    assert service.list("&prefix=a/b/c") == ["a/b/c"]
    assert service.list("&prefix=../") == []
    assert service.list("&prefix=a/../") == []
    page = service.send("GET", f"{UPLOADS}?restype=container&comp=list&include=metadata&prefix=a/z").text
    assert "<Metadata><k>&lt;a/z&gt;</k></Metadata>" in page
    assert "<Content-Length>1</Content-Length>" in page
    assert "Metadata" not in service.send("GET", f"{UPLOADS}?restype=container&comp=list").text


def test_pages_hold_every_name_once_whatever_the_names(tmp_path: Path) -> None:
    chosen = random.Random(7)
    for _ in range(30):
        root = tmp_path / str(chosen.random())
        names = set()
        for _ in range(40):
            name = "/".join(
                "".join(chosen.choices("ab-.", k=chosen.randint(1, 3))).strip(".") or "q"
                for _ in range(chosen.randint(1, 3))
            )
            path = root / name
            if not any(parent.is_file() for parent in path.parents) and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("")
                names.add(name)
        for prefix in ("", "a", "a/", "b-", "q/"):
            for size in (1, 3, 100):
                found: list[str] = []
                marker = ""
                while True:
                    page = [one.name for one in walk(FolderTree(root), prefix, marker, is_flat=True)]
                    found += page[:size]
                    if len(page) <= size:
                        break
                    marker = page[size]
                assert found == sorted(name for name in names if name.startswith(prefix))


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("&delimiter=-", "InvalidQueryParameterValue"),
        ("&maxresults=0", "OutOfRangeQueryParameterValue"),
        ("&maxresults=x", "OutOfRangeQueryParameterValue"),
        ("&include=uncommittedblobs", "InvalidQueryParameterValue"),
        ("&prefix=a&prefix=b", "InvalidQueryParameterValue"),
        ("&where=x", "InvalidQueryParameterValue"),
    ],
)
def test_a_list_that_cannot_be_had_is_refused(service: Service, query: str, code: str) -> None:
    refusal(service.send("GET", f"{UPLOADS}?restype=container&comp=list{query}"), 400, code)


# ---------------------------------------------------------------- reading


def test_a_range_is_a_part_and_says_of_what(service: Service) -> None:
    content = bytes(range(256)) * 100
    service.put("x", content)

    def part(text: str, **more: str) -> httpx.Response:
        return service.get("x", headers={"x-ms-range": text, **more})

    answer = part("bytes=10-19")
    assert (answer.status_code, answer.content) == (206, content[10:20])
    assert answer.headers["content-range"] == f"bytes 10-19/{len(content)}"
    assert part("bytes=25590-").content == content[25590:]
    assert part("bytes=25590-99999999").headers["content-range"] == f"bytes 25590-25599/{len(content)}"
    digested = part("bytes=0-99", **{"x-ms-range-get-content-md5": "true"})
    assert digested.headers["content-md5"] == base64.b64encode(hashlib.md5(content[:100]).digest()).decode()
    assert service.get("x", headers={"range": "bytes=1-2"}).content == content[1:3]
    outside = part("bytes=25600-")
    refusal(outside, 416, "InvalidRange")
    assert outside.headers["content-range"] == "bytes */25600"
    for wrong in ("bytes=-5", "bytes=5-1", "items=1-2", "bytes=1-2,4-5"):
        refusal(part(wrong), 400, "InvalidHeaderValue")


def test_an_empty_blob_has_no_range(service: Service) -> None:
    service.put("x", b"")
    assert service.get("x").content == b""
    refusal(service.get("x", headers={"x-ms-range": "bytes=0-10"}), 416, "InvalidRange")


def test_conditions_are_obeyed(service: Service) -> None:
    made = service.put("x", b"1")
    etag = made.headers["etag"]
    assert service.get("x", headers={"if-match": etag}).status_code == 200
    refusal(service.get("x", headers={"if-match": '"0x1"'}), 412, "ConditionNotMet")
    assert service.get("x", headers={"if-none-match": etag}).status_code == 304
    past, future = "Wed, 01 Jan 2020 00:00:00 GMT", "Tue, 01 Jan 2999 00:00:00 GMT"
    assert service.get("x", headers={"if-modified-since": past}).status_code == 200
    assert service.get("x", headers={"if-modified-since": future}).status_code == 304
    refusal(service.get("x", headers={"if-unmodified-since": past}), 412, "ConditionNotMet")
    refusal(service.get("x", headers={"if-unmodified-since": "soon"}), 400, "InvalidHeaderValue")
    refusal(service.put("x", b"2", **{"if-match": '"0x1"'}), 412, "ConditionNotMet")
    refusal(service.put("y", b"2", **{"if-match": "*"}), 412, "ConditionNotMet")
    assert service.put("x", b"2", **{"if-match": etag}).status_code == 201


def test_who_reads_a_blob_while_it_is_replaced_reads_the_one_it_began(service: Service) -> None:
    kept = store.of_home(service.gateway.folder, service.files.folder)
    service.put("x", b"old")
    file, blob = kept.open("x", ("x",))
    service.put("x", b"newer")
    assert (os.read(file, 10), blob.size) == (b"old", 3)
    os.close(file)


# ---------------------------------------------------------------- what the workspace has made


@pytest.fixture
def artifact(service: Service) -> Path:
    """A folder among the artifacts, with a link in it that leads out."""
    folder = service.files.artifact_path(f"sha256:{DIGEST}")
    (folder / "model").mkdir(parents=True)
    (folder / "MLmodel").write_text("flavors: {}\n")
    (folder / "model" / "weights").write_bytes(b"w" * 100)
    (service.home / "secret").write_text("secret")
    (folder / "link").symlink_to(service.home / "secret")
    (folder / "up").symlink_to(service.home)
    service.store.insert(
        Artifact(created_at=service.now, digest=f"sha256:{DIGEST}", type="mlflow_model", size_bytes=112)
    )
    return folder


def test_artifacts_are_read_by_their_digest(service: Service, artifact: Path) -> None:
    token = service.sas("rl", container="azureml")
    base = f"artifacts/{DIGEST}"
    assert service.list(at=MADE, token=token, query=f"&prefix={base}/") == [
        f"{base}/MLmodel",
        f"{base}/model/weights",
    ]
    named = service.list(at=MADE, token=token, query=f"&prefix=named/{DIGEST}/trained_model/")
    assert named == [f"named/{DIGEST}/trained_model/{one}" for one in ("MLmodel", "model/weights")]
    read = service.send("GET", f"{MADE}/{named[1]}", token=token, headers={"x-ms-range": "bytes=90-"})
    assert (read.status_code, read.content) == (206, b"w" * 10)
    for missing in (
        f"{base}/link",
        f"{base}/up/secret",
        f"{base}/none",
        base,
        f"artifacts/{'0' * 64}/x",
        f"artifacts/{DIGEST.upper()}/MLmodel",
        "artifacts/..",
        "other/x",
    ):
        answer = service.send("GET", f"{MADE}/{missing}", token=token)
        assert answer.status_code in (400, 404), missing
    refusal(service.send("GET", f"{MADE}/{base}/%2e%2e/x", token=token), 400, "InvalidResourceName")


def test_nobody_writes_to_them(service: Service, artifact: Path) -> None:
    token = service.sas("racwdl", container="azureml")
    path = f"{MADE}/artifacts/{DIGEST}/MLmodel"
    denied = "AuthorizationPermissionMismatch"
    for query, headers in (("", BLOCK_BLOB), ("?comp=metadata", {}), ("?comp=block&blockid=MDAwMDAx", {})):
        answer = service.send("PUT", path + query, token=token, content=b"evil", headers=headers)
        assert "read-only" in refusal(answer, 403, denied)
    assert "read-only" in refusal(service.send("DELETE", path, token=token), 403, denied)
    assert (artifact / "MLmodel").read_text() == "flavors: {}\n"
