"""Whole blobs: what is kept, names that could lead elsewhere, bounds, and what is refused by name."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import stat
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.blob_service import (
    BLOCK_BLOB,
    UPLOADS,
    Service,
    pieces,
    put_block,
    put_list,
    refusal,
    run_raw,
)
from tuneloop.core import disk
from tuneloop.server.azure import containers
from tuneloop.server.azure.blobs import operations, reading, store


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    return Service(tmp_path / "home", monkeypatch)


# ---------------------------------------------------------------- whole blobs


def test_a_blob_comes_back_as_it_was_sent_with_what_was_said_of_it(service: Service) -> None:
    content = os.urandom(3_000_000)
    digest = base64.b64encode(hashlib.md5(content).digest()).decode()
    said = {"x-ms-meta-upload_status": "completed", "x-ms-blob-content-type": "text/plain"}
    made = service.put("LocalUpload/x/my%20file.jsonl", content, **{**said, "content-md5": digest})
    assert made.status_code == 201, made.text
    assert made.headers["etag"].startswith('"0x')
    seen = service.send("HEAD", f"{UPLOADS}/LocalUpload/x/my%20file.jsonl")
    assert seen.status_code == 200
    assert int(seen.headers["content-length"]) == len(content)
    assert seen.headers["content-type"] == "text/plain"
    assert seen.headers["x-ms-meta-upload_status"] == "completed"
    assert seen.headers["x-ms-blob-type"] == "BlockBlob"
    assert seen.headers["etag"] == made.headers["etag"]
    assert service.get("LocalUpload/x/my%20file.jsonl").content == content
    assert service.left() == []


def test_what_is_stored_can_be_read_by_its_owner_only(service: Service) -> None:
    service.put("a/b", b"x")
    path = containers.uploads_folder(service.gateway) / "a" / "b"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_blob_that_is_there_is_not_replaced_when_nobody_may(service: Service) -> None:
    service.put("x", b"first")
    answer = service.put("x", b"second" * 1000, **{"if-none-match": "*"})
    assert "'x' already exists" in refusal(answer, 409, "BlobAlreadyExists")
    only_create = service.sas("c")
    path = f"{UPLOADS}/x"
    answer = service.send("PUT", path, token=only_create, content=b"second", headers=BLOCK_BLOB)
    refusal(answer, 409, "BlobAlreadyExists")
    assert service.get("x").content == b"first"
    made = service.send("PUT", f"{UPLOADS}/y", token=only_create, content=b"1", headers=BLOCK_BLOB)
    assert made.status_code == 201
    assert service.put("x", b"third").status_code == 201
    assert service.get("x").content == b"third"
    assert service.left() == []


def test_metadata_are_replaced_alone_and_headers_too(service: Service) -> None:
    service.put("x", b"1", **{"x-ms-meta-a": "1", "x-ms-blob-content-type": "text/plain"})
    before = service.send("HEAD", f"{UPLOADS}/x").headers["etag"]
    changed = service.send("PUT", f"{UPLOADS}/x?comp=metadata", headers={"x-ms-meta-b": "2"})
    assert changed.status_code == 200
    assert changed.headers["etag"] != before
    told = {"x-ms-blob-content-language": "yue"}
    assert service.send("PUT", f"{UPLOADS}/x?comp=properties", headers=told).status_code == 200
    seen = service.get("x").headers
    assert "x-ms-meta-a" not in seen
    assert (seen["x-ms-meta-b"], seen["content-language"]) == ("2", "yue")
    assert seen["content-type"] == "application/octet-stream"
    absent = service.send("PUT", f"{UPLOADS}/none?comp=metadata", headers={"x-ms-meta-b": "2"})
    refusal(absent, 404, "BlobNotFound")


def test_a_digest_that_is_not_the_bodys_is_refused_and_nothing_stays(service: Service) -> None:
    wrong = base64.b64encode(b"0" * 16).decode()
    refusal(service.put("x", b"abc", **{"content-md5": wrong}), 400, "Md5Mismatch")
    assert "Content-MD5" in refusal(
        service.put("x", b"abc", **{"content-md5": "?"}), 400, "InvalidHeaderValue"
    )
    refusal(service.get("x"), 404, "BlobNotFound")
    assert service.left() == []


def test_a_deleted_blob_is_gone_with_its_empty_folders_and_its_metadata(service: Service) -> None:
    service.put("a/b/c", b"1", **{"x-ms-meta-k": "v"})
    service.put("a/d", b"2")
    assert service.send("DELETE", f"{UPLOADS}/a/b/c").status_code == 202
    refusal(service.send("DELETE", f"{UPLOADS}/a/b/c"), 404, "BlobNotFound")
    assert service.list() == ["a/d"]
    assert not (containers.uploads_folder(service.gateway) / "a" / "b").exists()
    service.put("a/b/c", b"3")
    assert "x-ms-meta-k" not in service.get("a/b/c").headers


def test_a_server_killed_between_facts_and_blob_leaves_the_old_blob_with_its_own(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.put("x", b"old", **{"x-ms-meta-which": "old"})
    real = os.replace

    def killed(source: Any, target: Any) -> None:
        if str(source).endswith(".part"):
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(store.os, "replace", killed)
        written = service.home / "azure" / "blobs" / "uploads" / "one.part"
        written.write_bytes(b"new and longer")
        kept = store.of_home(service.gateway.folder, service.files.folder)
        with pytest.raises(KeyboardInterrupt):
            kept.commit("x", ("x",), written, store.Facts(metadata={"which": "new"}), lambda _before: None)
    seen = service.get("x")
    assert (seen.content, seen.headers["x-ms-meta-which"]) == (b"old", "old")


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "a/../../secret",
        "a/%2e%2e/%2e%2e/secret",
        "%2e%2e%2fsecret",
        "..%2f..%2fsecret",
        "..%5c..%5csecret",
        "a%5cb",
        "%2fetc%2fpasswd",
        "a//b",
        "a/./b",
        "a/..",
        "a%0ab",
        "a%00b",
        "%ff",
        "folder/",
        "x" * 1025,
        f"a/{'x' * 256}",
        f"a/{'%E5%AD%97' * 100}",
    ],
)
def test_a_name_that_could_lead_elsewhere_is_refused(service: Service, name: str) -> None:
    service.files.folder("azure")
    (service.home / "secret").write_text("secret")
    before = sorted(service.home.rglob("*"))
    sent: list[Any] = []
    asyncio.run(run_raw(service, name, 4, pieces([b"evil"]), sent))
    answer = httpx.Response(sent[0]["status"], headers=sent[0]["headers"], content=sent[1]["body"])
    refusal(answer, 400, "InvalidUri" if name in ("a%00b", "%ff") else "InvalidResourceName")
    read: list[Any] = []
    asyncio.run(run_raw(service, name, 0, pieces([b""]), read, method="GET"))
    assert read[0]["status"] in (400, 404)
    added = {path.name for path in sorted(service.home.rglob("*")) if path not in before}
    assert added <= {"blobs", "uploads"}
    assert (service.home / "secret").read_text() == "secret"


def test_a_link_is_no_blob_and_nothing_is_written_through_it(service: Service) -> None:
    service.put("real", b"1")
    outside = service.home / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"outside")
    root = containers.uploads_folder(service.gateway)
    (root / "link").symlink_to(outside)
    (root / "file").symlink_to(outside / "file")
    refusal(service.get("link/file"), 404, "BlobNotFound")
    refusal(service.get("file"), 404, "BlobNotFound")
    refusal(service.put("link/new", b"x"), 409, "ResourceTypeMismatch")
    refusal(service.put("file", b"x"), 409, "ResourceTypeMismatch")
    assert service.list() == ["real"]
    assert [path.name for path in outside.iterdir()] == ["file"]
    assert (outside / "file").read_bytes() == b"outside"


def test_a_blob_does_not_lie_below_another_one_or_above(service: Service) -> None:
    service.put("a/b", b"1")
    assert "below 'a'/" in refusal(service.put("a", b"2"), 409, "ResourceTypeMismatch")
    assert "is a blob" in refusal(service.put("a/b/c", b"3"), 409, "ResourceTypeMismatch")
    refusal(service.get("a"), 404, "BlobNotFound")
    assert service.list() == ["a/b"]
    assert service.left() == []


def test_upper_and_lower_case_are_two_names_or_one_is_refused(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.put("Data/One", b"upper")
    if service.get("data/one").status_code == 404:
        service.put("Data/one", b"lower")
        assert (service.get("Data/One").content, service.get("Data/one").content) == (b"upper", b"lower")
    # A file system that takes the one for the other answers to both, and lists one.
    root = containers.uploads_folder(service.gateway)
    for name in ("Data/One", "Data/oNE"):
        (root / name).write_bytes(b"same file")
    monkeypatch.setattr(store.os, "listdir", lambda folder: ["Data"] if folder == root else ["One"])
    assert "upper and lower case" in refusal(service.put("Data/oNE", b"x"), 409, "ResourceTypeMismatch")
    assert service.put("Data/One", b"again").status_code == 201


def test_there_are_two_containers_of_one_account(service: Service) -> None:
    there = "azureml-blobstore, azureml"
    elsewhere = service.get("x").request.url.path.replace("azureml-blobstore/x", "other/x")
    assert there in refusal(service.send("GET", elsewhere), 404, "ContainerNotFound")
    refusal(service.send("GET", "/blob/thief.blob.x/azureml-blobstore/x"), 404, "ResourceNotFound")
    refusal(service.send("GET", "/blob/store/azureml-blobstore"), 400, "InvalidUri")
    refusal(service.send("POST", f"{UPLOADS}/x"), 405, "UnsupportedHttpVerb")


# ---------------------------------------------------------------- bounds


def test_an_upload_is_bounded(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "MOST_BYTES", 1000)
    monkeypatch.setattr(operations, "MOST_BLOCK_BYTES", 600)
    message = refusal(service.put("x", b"1" * 1001), 413, "RequestBodyTooLarge")
    assert "1,001" in message
    assert "1,000" in message
    token = service.sas()
    refusal(put_block(service, "x", 1, b"1" * 601, token), 413, "RequestBodyTooLarge")
    assert put_block(service, "x", 1, b"1" * 600, token).status_code == 201
    assert put_block(service, "x", 2, b"1" * 600, token).status_code == 201
    assert "together" in refusal(put_list(service, "x", (1, 2), token), 413, "RequestBodyTooLarge")
    refusal(service.get("x"), 404, "BlobNotFound")


def test_a_body_of_unknown_length_is_refused(service: Service) -> None:
    answer = service.send("PUT", f"{UPLOADS}/x", content=iter([b"1", b"2"]), headers=BLOCK_BLOB)
    assert "Content-Length" in refusal(answer, 411, "MissingContentLengthHeader")
    assert answer.headers["connection"] == "close"


def test_an_upload_that_does_not_fit_is_refused_before_and_stopped_while_it_goes_on(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda _near: reading.RESERVE_BYTES + 999)
    message = refusal(service.put("x", b"1" * 1000), 413, "InsufficientStorage")
    assert "Free some space" in message
    assert service.put("y", b"1" * 999).status_code == 201
    looks = iter([10**12, 10**12, 5])
    monkeypatch.setattr(disk, "free_bytes", lambda _near: next(looks))
    monkeypatch.setattr(reading, "BATCH_BYTES", 1000)
    monkeypatch.setattr(reading, "LOOKED_BYTES", 2000)
    receive, sent = pieces([b"1" * 1000] * 10), []
    asyncio.run(run_raw(service, "x", 10_000, receive, sent))
    assert sent[0]["status"] == 413
    refusal(service.get("x"), 404, "BlobNotFound")
    assert service.left() == []


def test_a_full_disk_is_said_as_such(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reading.os, "writev", full)
    assert "Disk full" in refusal(service.put("x", b"1"), 413, "InsufficientStorage")
    assert service.left() == []


def test_an_upload_that_is_broken_off_leaves_nothing(service: Service) -> None:
    service.put("x", b"whole")
    asyncio.run(run_raw(service, "x", 1000, pieces([b"1" * 100] * 3, "leave"), []))
    assert service.get("x").content == b"whole"
    asyncio.run(run_raw(service, "y", 1000, pieces([b"1" * 100] * 3, "leave"), []))
    refusal(service.get("y"), 404, "BlobNotFound")
    assert service.left() == []


def test_an_upload_that_falls_silent_is_given_up(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "IDLE_SECONDS", 0.05)
    sent: list[Any] = []
    asyncio.run(run_raw(service, "x", 1000, pieces([b"1" * 100], "silence"), sent))
    headers = dict(sent[0]["headers"])
    assert (sent[0]["status"], headers[b"connection"]) == (408, b"close")
    assert headers[b"x-ms-error-code"] == b"OperationTimedOut"
    assert service.left() == []


def test_a_body_that_drips_in_is_written_piece_by_piece_and_whole(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the disk takes only a part of what is written at once."""
    most, real = [], os.writev

    def partly(file: int, views: list[memoryview]) -> int:
        most.append(len(views))
        return real(file, [views[0][: max(1, len(views[0]) // 2)]])

    monkeypatch.setattr(reading.os, "writev", partly)
    content = [bytes([number % 256]) * (number % 5 + 1) for number in range(1000)]
    sent: list[Any] = []
    asyncio.run(run_raw(service, "x", sum(map(len, content)), pieces(content), sent))
    assert sent[0]["status"] == 201
    assert max(most) == reading.BATCH_PIECES
    assert service.get("x").content == b"".join(content)


def test_a_body_longer_than_it_was_said_is_refused(service: Service) -> None:
    sent: list[Any] = []
    asyncio.run(run_raw(service, "x", 150, pieces([b"1" * 100] * 3), sent))
    assert sent[0]["status"] == 400
    refusal(service.get("x"), 404, "BlobNotFound")
    assert service.left() == []


def test_what_a_killed_server_was_writing_is_swept(service: Service) -> None:
    left = service.files.folder("azure/blobs/uploads") / "left.part"
    left.write_bytes(b"half")
    service.put("x", b"1")
    assert not left.exists()


# ---------------------------------------------------------------- strictness


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("x-ms-tags", "a=b"),
        ("x-ms-lease-id", "x"),
        ("x-ms-access-tier", "Cool"),
        ("x-ms-encryption-key", "x"),
        ("x-ms-copy-source", "https://elsewhere"),
        ("x-ms-content-crc64", "x"),
        ("x-ms-structured-body", "XSM/1.0; properties=crc64"),
        ("x-ms-something-new", "x"),
    ],
)
def test_a_header_that_would_be_ignored_is_refused_by_name(service: Service, header: str, value: str) -> None:
    assert header in refusal(service.put("x", b"1", **{header: value}), 400, "UnsupportedHeader")
    refusal(service.get("x"), 404, "BlobNotFound")


@pytest.mark.parametrize("kind", ["AppendBlob", "PageBlob", ""])
def test_other_kinds_of_blobs_are_refused(service: Service, kind: str) -> None:
    answer = service.send("PUT", f"{UPLOADS}/x", content=b"1", headers={"x-ms-blob-type": kind})
    assert "BlockBlob" in refusal(answer, 400, "InvalidHeaderValue")


@pytest.mark.parametrize("operation", ["lease", "snapshot", "tags", "tier", "page", "appendblock", "copy"])
def test_other_operations_are_refused_by_name(service: Service, operation: str) -> None:
    answer = service.send("PUT", f"{UPLOADS}/x?comp={operation}", content=b"1")
    assert operation in refusal(answer, 400, "InvalidQueryParameterValue")


def test_versions_and_snapshots_are_not_there(service: Service) -> None:
    service.put("x", b"1")
    for name in ("snapshot", "versionid"):
        assert name in refusal(service.get(f"x?{name}=2026"), 400, "InvalidQueryParameterValue")


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("x-ms-meta-1a", "x", "InvalidMetadata"),
        ("x-ms-meta-a.b", "x", "InvalidMetadata"),
        ("x-ms-meta-", "x", "InvalidMetadata"),
        ("x-ms-meta-a", "x" * 9000, "MetadataTooLarge"),
    ],
)
def test_metadata_are_checked(service: Service, name: str, value: str, code: str) -> None:
    refusal(service.put("x", b"1", **{name: value}), 400, code)
    assert service.left() == []
