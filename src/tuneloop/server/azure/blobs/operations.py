"""The operations of the blob service: one address, and what its query and headers make of it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from tuneloop.server.azure.blobs import answers, listing, staging
from tuneloop.server.azure.blobs.errors import NOT_FULLY_READ, BlobError, Gone, blob_not_found, translated
from tuneloop.server.azure.blobs.reading import (
    MOST_BLOCK_BYTES,
    MOST_BYTES,
    Incoming,
    drain,
    expected_length,
    write_body,
)
from tuneloop.server.azure.blobs.requests import (
    BLOB_HEADERS,
    METADATA,
    Call,
    Conditions,
    read_blob_headers,
    read_call,
    read_conditions,
    read_metadata,
    read_range,
)
from tuneloop.server.azure.blobs.sas import Grant
from tuneloop.server.azure.blobs.store import Blob, Facts, Store, of_home
from tuneloop.server.azure.blobs.trees import FolderTree, MadeTree
from tuneloop.server.azure.containers import UPLOADS, BadName, check_name
from tuneloop.server.azure.gateway import Gateway
from tuneloop.server.azure.routing import ANY, Routes

log = logging.getLogger(__name__)
routes = Routes()

CONTAINER = "/blob/{account}/{container}"
BLOB = "/blob/{account}/{container}/{blob:path}"
BLOCK_LIST_BYTES = 8 * 1024 * 1024
VERSION = "2024-11-04"
"""Of the service, said to whoever names none."""

Operation = Callable[[Call], Awaitable[Response]]


async def _answered(
    gateway: Gateway, http: HttpRequest, params: Mapping[str, str], operation: Operation
) -> Response:
    """The operation's answer, or its refusal in the service's own shape."""
    incoming = Incoming(http.receive)
    try:
        call = read_call(gateway, HttpRequest(http.scope, incoming), params)
        response = await operation(call)
    except (Gone, ClientDisconnect):
        response = Response(status_code=400, headers=NOT_FULLY_READ)
    except Exception as error:
        refusal = translated(error, gateway.folder)
        if refusal is None:
            log.error("%s %s failed", http.method, http.url.path, exc_info=error)
            told = "The server failed; the traceback is in logs/server.log of the home."
            refusal = BlobError(500, "InternalError", told)
        response = refusal.response()
        if "connection" not in refusal.headers and not await drain(incoming):
            response.headers.update(NOT_FULLY_READ)
    response.headers["x-ms-version"] = http.headers.get("x-ms-version", VERSION)
    request_id = http.headers.get("x-ms-client-request-id")
    if request_id is not None and len(request_id) <= 1024:
        response.headers["x-ms-client-request-id"] = request_id
    return response


# ---------------------------------------------------------------- containers


@routes.raw("GET", CONTAINER)
async def list_blobs(gateway: Gateway, http: HttpRequest, params: Mapping[str, str]) -> Response:
    """Blobs: names by prefix, delimiter and marker"""
    return await _answered(gateway, http, params, _get_container)


@routes.raw("HEAD", CONTAINER)
async def get_container(gateway: Gateway, http: HttpRequest, params: Mapping[str, str]) -> Response:
    """Blobs: whether a container is there"""
    return await _answered(gateway, http, params, _get_container)


async def _get_container(call: Call) -> Response:
    if call.query.get("restype", "").lower() != "container":
        told = "The address names no blob; for the container itself add restype=container."
        raise BlobError(400, "InvalidUri", told)
    if not call.operation:
        call.expect()
        call.grant("rl", below="")
        headers = {"x-ms-lease-status": "unlocked", "x-ms-lease-state": "available"}
        modified = answers.when(call.gateway.parts.started_at)
        return Response(headers={**headers, "etag": '"0x1"', "last-modified": modified})
    if call.operation != "list":
        raise _not_here(call)
    call.expect(query=listing.LIST_PARAMETERS)
    call.grant("l", below=call.query.get("prefix", ""))
    text = await run_in_threadpool(_listed, call)
    return Response(text, media_type="application/xml")


def _listed(call: Call) -> str:
    if call.datastore is UPLOADS:
        store = _store(call.gateway)
        return listing.list_blobs(call, FolderTree(store.files), lambda name: _find(call, name))
    made = MadeTree(call.gateway)
    return listing.list_blobs(call, made, lambda name: _find(call, name, made))


# ---------------------------------------------------------------- reading


@routes.raw("HEAD", BLOB)
async def get_blob_properties(gateway: Gateway, http: HttpRequest, params: Mapping[str, str]) -> Response:
    """Blobs: headers and metadata of one"""
    return await _answered(gateway, http, params, _head)


async def _head(call: Call) -> Response:
    if call.operation:
        raise _not_here(call)
    call.expect()
    call.grant("r")
    call.parts(of_read=True)
    blob = await run_in_threadpool(_find, call, call.blob)
    if blob is None:
        raise blob_not_found(call.blob)
    read_conditions(call.http).check_read(blob)
    return Response(headers={**answers.described(blob), "content-length": str(blob.size)})


@routes.raw("GET", BLOB)
async def get_blob(gateway: Gateway, http: HttpRequest, params: Mapping[str, str]) -> Response:
    """Blobs: the bytes of one, or a range of them"""
    return await _answered(gateway, http, params, _get)


async def _get(call: Call) -> Response:
    if call.operation == "blocklist":
        return await _get_blocks(call)
    if call.operation:
        raise _not_here(call)
    call.expect(headers=("x-ms-range", "x-ms-range-get-content-md5"))
    call.grant("r")
    content, blob = await run_in_threadpool(_open, call)
    try:
        return await _sent(call, content, blob)
    except BaseException:
        if isinstance(content, int):
            os.close(content)
        raise


async def _sent(call: Call, content: int | bytes, blob: Blob) -> Response:
    """Takes the descriptor over when it returns."""
    read_conditions(call.http).check_read(blob)
    wanted = read_range(call.http)
    first, count = answers.span(blob, wanted)
    headers = answers.described(blob)
    if wanted is not None:
        headers["content-range"] = f"bytes {first}-{first + count - 1}/{blob.size}"
        if "content-md5" in headers:
            headers["x-ms-blob-content-md5"] = headers.pop("content-md5")
    status = 200 if wanted is None else 206
    if call.http.headers.get("x-ms-range-get-content-md5", "").lower() == "true":
        if wanted is None or count > answers.MOST_DIGESTED_BYTES:
            told = "x-ms-range-get-content-md5 needs a range of at most 4 MiB."
            raise BlobError(400, "InvalidHeaderValue", told)
        if isinstance(content, int):
            taken = await run_in_threadpool(os.pread, content, count, first)
        else:
            taken = content[first : first + count]
        headers["content-md5"] = answers.digest_of(taken)
    if isinstance(content, int):
        return answers.FileBody(content, first, count, status, headers)
    return Response(content[first : first + count], status, headers=headers)


async def _get_blocks(call: Call) -> Response:
    call.expect(query=("blocklisttype",))
    grant = call.grant("r")
    call.parts()
    kind = call.query.get("blocklisttype", "committed").lower()
    if kind != "uncommitted":
        told = "The blocks of a blob that is there are not kept; ask for blocklisttype=uncommitted."
        raise BlobError(400, "InvalidQueryParameterValue", told)
    blocks = await run_in_threadpool(_staging(call, grant).blocks)
    return Response(listing.list_blocks(blocks), media_type="application/xml")


def _open(call: Call) -> tuple[int | bytes, Blob]:
    parts = call.parts(of_read=True)
    if call.datastore is UPLOADS:
        return _store(call.gateway).open(call.blob, parts)
    content = MadeTree(call.gateway).content(parts)
    if isinstance(content, bytes):
        return content, _of_bytes(call, call.blob, content)
    if content is None or not content.is_file():
        raise blob_not_found(call.blob)
    file = os.open(content, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    return file, _of_file(call.blob, os.fstat(file))


def _find(call: Call, name: str, made: MadeTree | None = None) -> Blob | None:
    """None also for a name that no blob can have."""
    try:
        parts = check_name(name)
    except BadName:
        return None
    if call.datastore is UPLOADS:
        return _store(call.gateway).find(name, parts)
    content = (made or MadeTree(call.gateway)).content(parts)
    if isinstance(content, bytes):
        return _of_bytes(call, name, content)
    return None if content is None or not content.is_file() else _of_file(name, content.stat())


def _of_file(name: str, found: os.stat_result) -> Blob:
    etag = f'"0x{found.st_mtime_ns:X}{found.st_size:X}"'
    return Blob(name, found.st_size, found.st_mtime, etag)


def _of_bytes(call: Call, name: str, content: bytes) -> Blob:
    etag = f'"0x{hashlib.sha256(content).hexdigest()[:16].upper()}"'
    return Blob(name, len(content), call.gateway.now().timestamp(), etag)


# ---------------------------------------------------------------- writing


@routes.raw("PUT", BLOB)
async def put_blob(gateway: Gateway, http: HttpRequest, params: Mapping[str, str]) -> Response:
    """Blobs: a whole one, a block, a list of blocks, metadata, headers"""
    return await _answered(gateway, http, params, _put)


async def _put(call: Call) -> Response:
    if call.datastore is UPLOADS:
        staging.sweep_sometimes(call.gateway.folder / "blobs")
    writers: dict[str, Operation] = {
        "": _put_whole,
        "block": _put_block,
        "blocklist": _put_block_list,
        "metadata": _put_metadata,
        "properties": _put_headers,
    }
    writer = writers.get(call.operation)
    if writer is None:
        raise _not_here(call)
    return await writer(call)


async def _put_whole(call: Call) -> Response:
    call.expect(headers=("x-ms-blob-type", METADATA, *BLOB_HEADERS))
    grant = call.grant("wc")
    parts = call.parts()
    kind = call.http.headers.get("x-ms-blob-type", "")
    if kind.lower() != "blockblob":
        told = f"The header x-ms-blob-type is {kind[:50]!r}; the only kind of blob here is BlockBlob."
        raise BlobError(400, "InvalidHeaderValue", told)
    facts = _facts(call.http)
    check = _check(call.http, grant)
    store = _store(call.gateway)
    length = expected_length(call.http, MOST_BYTES)
    # Before the body, so that a blob that is there already is not sent for nothing; and when it is put.
    check(await run_in_threadpool(store.find, call.blob, parts))
    part = store.part()
    await write_body(call.http, part, length, is_durable=True)
    return answers.written(await run_in_threadpool(_committed, store, call, parts, part, facts, check))


def _committed(
    store: Store,
    call: Call,
    parts: tuple[str, ...],
    part: Path,
    facts: Facts,
    check: Callable[[Blob | None], None],
) -> Blob:
    try:
        return store.commit(call.blob, parts, part, facts, check)
    finally:
        part.unlink(missing_ok=True)


async def _put_block(call: Call) -> Response:
    # The SDK sends the blob's metadata with every block; they are taken from the list.
    call.expect(query=("blockid",), headers=(METADATA,))
    grant = call.grant("wc")
    call.parts()
    block_id = staging.read_id(call.query.get("blockid", ""))
    part = _store(call.gateway).part()
    await write_body(call.http, part, expected_length(call.http, MOST_BLOCK_BYTES), is_durable=False)
    try:
        await run_in_threadpool(_staging(call, grant).add, block_id, part)
    finally:
        part.unlink(missing_ok=True)
    return Response(status_code=201, headers={"x-ms-request-server-encrypted": "false"})


async def _put_block_list(call: Call) -> Response:
    call.expect(headers=(METADATA, *BLOB_HEADERS))
    grant = call.grant("wc")
    parts = call.parts()
    ids = listing.read_block_list(await _small_body(call.http))
    facts = replace(_facts(call.http), block_list=listing.digest_of_list(ids, _staging(call, grant).key))
    check = _check(call.http, grant)
    return answers.written(await run_in_threadpool(_put_together, call, grant, parts, ids, facts, check))


def _put_together(
    call: Call,
    grant: Grant,
    parts: tuple[str, ...],
    ids: list[bytes],
    facts: Facts,
    check: Callable[[Blob | None], None],
) -> Blob:
    store = _store(call.gateway)
    staged = _staging(call, grant)
    # A client that waits no longer sends the list again while the first is being done: the second waits.
    with call.gateway.lock(f"blocks/{staged.key[:2]}"):
        before = store.find(call.blob, parts)
        # The answer to the same list was lost: its blocks are gone, and the blob is there.
        if before is not None and before.facts.block_list == facts.block_list and not staged.blocks():
            return before
        check(before)
        part = store.part()
        try:
            staged.put_together(ids, part, MOST_BYTES)
            made = store.commit(call.blob, parts, part, facts, check)
        finally:
            part.unlink(missing_ok=True)
        staged.clear()
        return made


async def _put_metadata(call: Call) -> Response:
    call.expect(headers=(METADATA,))
    metadata = read_metadata(call.http)
    return await _changed(call, lambda facts: replace(facts, metadata=metadata))


async def _put_headers(call: Call) -> Response:
    call.expect(headers=tuple(BLOB_HEADERS))
    headers = read_blob_headers(call.http)
    return await _changed(call, lambda facts: replace(facts, headers=headers))


async def _changed(call: Call, change: Callable[[Facts], Facts]) -> Response:
    call.grant("w")
    parts = call.parts()
    store = _store(call.gateway)
    check = read_conditions(call.http).check_write
    blob = await run_in_threadpool(store.set_metadata, call.blob, parts, change, check)
    return answers.written(blob, 200)


@routes.raw("DELETE", BLOB)
async def delete_blob(gateway: Gateway, http: HttpRequest, params: Mapping[str, str]) -> Response:
    """Blobs: remove one of what was uploaded"""
    return await _answered(gateway, http, params, _delete)


async def _delete(call: Call) -> Response:
    if call.operation:
        raise _not_here(call)
    call.expect(headers=("x-ms-delete-snapshots",))
    call.grant("d")
    parts = call.parts()
    check = read_conditions(call.http).check_write
    await run_in_threadpool(_store(call.gateway).delete, call.blob, parts, check)
    return Response(status_code=202, headers={"x-ms-delete-type-permanent": "true"})


# ---------------------------------------------------------------- what is not there


@routes.raw(ANY, "/blob/{rest:path}")
async def blob_service_rest(gateway: Gateway, http: HttpRequest, params: Mapping[str, str]) -> Response:
    """Blobs: everything else, refused in the service's own shape"""

    async def refuse(_call: Call) -> Response:
        told = f"{http.method} of this address is not done here. What is: docs/reference/azure-coverage.md."
        raise BlobError(405, "UnsupportedHttpVerb", told)

    names = params["rest"].split("/")
    found = {"account": names[0], "container": names[1] if len(names) > 1 else ""}
    return await _answered(gateway, http, found, refuse)


def _not_here(call: Call) -> BlobError:
    told = f"comp={call.operation[:50]!r} is not there for {call.http.method} of this address."
    return BlobError(400, "InvalidQueryParameterValue", told)


# ---------------------------------------------------------------- pieces


def _store(gateway: Gateway) -> Store:
    return of_home(gateway.folder, gateway.parts.files.folder)


def _staging(call: Call, grant: Grant) -> staging.Staging:
    folder = call.gateway.folder / "blobs"

    def ensure(name: str) -> Path:
        return call.gateway.parts.files.folder(f"azure/blobs/{name}")

    return staging.Staging(folder, ensure, call.blob, grant.signature)


def _facts(http: HttpRequest) -> Facts:
    return Facts(headers=read_blob_headers(http), metadata=read_metadata(http))


def _check(http: HttpRequest, grant: Grant) -> Callable[[Blob | None], None]:
    conditions = read_conditions(http)
    if not grant.may_replace:
        conditions = Conditions(none_match=("*",))
    return conditions.check_write


async def _small_body(http: HttpRequest) -> bytes:
    """Of a list of blocks. Raises `BlobError`."""
    if int(http.headers.get("content-length", "0") or 0) > BLOCK_LIST_BYTES:
        told = f"The list of blocks has more than {BLOCK_LIST_BYTES:,} bytes."
        raise BlobError(413, "RequestBodyTooLarge", told)
    pieces: list[bytes] = []
    async for piece in http.stream():
        pieces.append(piece)
        if sum(map(len, pieces)) > BLOCK_LIST_BYTES:
            told = f"The list of blocks has more than {BLOCK_LIST_BYTES:,} bytes."
            raise BlobError(413, "RequestBodyTooLarge", told)
    content = b"".join(pieces)
    wanted = http.headers.get("content-md5")
    if wanted is not None and not _is_digest(wanted, content):
        raise BlobError(400, "Md5Mismatch", "The digest of the body is not the one in Content-MD5.")
    return content


def _is_digest(text: str, content: bytes) -> bool:
    try:
        return base64.b64decode(text, validate=True) == hashlib.md5(content, usedforsecurity=False).digest()
    except (binascii.Error, ValueError):
        return False
