"""The application behind the HTTPS listener: who asks, what is asked, and Azure's shape for every error."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from tuneloop.core import disk
from tuneloop.core.callers import CHECKED, is_own_host
from tuneloop.core.errors import Internal, TuneloopError
from tuneloop.server.azure import table
from tuneloop.server.azure.blobs.errors import BlobError
from tuneloop.server.azure.bodies import Body
from tuneloop.server.azure.errors import Refusal, from_ours
from tuneloop.server.azure.gateway import Gateway
from tuneloop.server.azure.routing import OPEN, Answer, Operation, Request
from tuneloop.server.azure.tokens import Caller

log = logging.getLogger(__name__)

BODY_BYTES = 8 * 1024 * 1024
"""Of JSON. What is uploaded is bounded where it is taken in."""
BODY_SECONDS = 30.0
DRAINED_BYTES = 8 * BODY_BYTES
DEEPEST = 64
PATH_BYTES = 16 * 1024
HEADERS: Mapping[str, str] = {
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'; sandbox",
}


def create_gateway(gateway: Gateway) -> ASGIApp:
    return _Application(gateway)


class _Application:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._table = table.all_operations()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            return
        http = HttpRequest(scope, receive)
        request_id = str(uuid.uuid4())
        try:
            response = await self._answer(http)
        except ClientDisconnect:
            return
        except Exception as error:
            response = _failure(http, error, request_id)
        response.headers["x-ms-request-id"] = request_id
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        await response(scope, receive, send)

    async def _answer(self, http: HttpRequest) -> Response:
        _check_caller(http)
        # The address as it was sent: a name may hold an encoded slash.
        path = (http.scope.get("raw_path") or http.scope["path"].encode()).decode("latin-1").partition("?")[0]
        if len(path) + len(http.scope["query_string"]) > PATH_BYTES:
            raise Refusal(414, "UriTooLong", f"The address is longer than {PATH_BYTES} bytes.")
        found = self._table.find(http.method, path)
        if not isinstance(found, tuple):
            raise _unknown(http.method, path, found)
        operation, parts = found
        params = {name: _decoded(part) for name, part in parts.items()}
        if operation.is_raw:
            response: Response = await operation.handler(self._gateway, http, params)
            return response
        caller = None if operation.audience == OPEN else self._caller(http, operation)
        body = Body(await _read_json(http)) if http.method in ("PUT", "POST", "PATCH") else Body({})
        query = {name.lower(): value for name, value in http.query_params.items()}
        request = Request(http, params, query, body, caller)
        answer: Answer | Response = await run_in_threadpool(operation.handler, self._gateway, request)
        return _response(answer) if isinstance(answer, Answer) else answer

    def _caller(self, http: HttpRequest, operation: Operation) -> Caller:
        tokens = self._gateway.tokens
        scheme, _, token = http.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Refusal(401, "AuthenticationFailed", "A request needs 'Authorization: Bearer <token>'.")
        return tokens.verify(token.strip(), tokens.audiences[operation.audience])


def _check_caller(http: HttpRequest) -> None:
    """A page in a browser must not speak to us: no Origin is ours, and Host has to be this machine."""
    for name in CHECKED:
        if len(http.headers.getlist(name)) > 1:
            raise Refusal(400, "InvalidHeaderValue", f"The header {name} was sent more than once.")
    host = http.headers.get("host", "")
    if not is_own_host(host):
        told = f"Host {host[:200]!r} is not this machine; use 127.0.0.1 or localhost."
        raise Refusal(403, "AuthorizationFailed", told)
    if http.headers.get("origin") or http.headers.get("sec-fetch-site", "none") not in (
        "none",
        "same-origin",
    ):
        if _follows_a_link(http):
            return
        raise Refusal(403, "AuthorizationFailed", "Requests from web pages are not answered.")


def _follows_a_link(http: HttpRequest) -> bool:
    """A person who clicks on a job's page in a notebook: the address holds its secret, and no page can read
    or frame what is answered."""
    return (
        http.method == "GET"
        and http.url.path.startswith("/logs/")
        and not http.headers.get("origin")
        and http.headers.get("sec-fetch-mode") == "navigate"
        and http.headers.get("sec-fetch-dest") == "document"
    )


def _unknown(method: str, path: str, others: Any) -> Refusal:
    if others:
        return Refusal(405, "MethodNotAllowed", f"{path} takes {', '.join(others)}, not {method}.")
    return Refusal(
        404,
        "NotFound",
        f"There is nothing at {method} {path}. What there is: tuneloop azure coverage",
    )


def _decoded(part: str) -> str:
    try:
        text = unquote(part, errors="strict")
    except UnicodeDecodeError:
        raise Refusal(400, "InvalidUri", "The address is not UTF-8.") from None
    if "\0" in text:
        raise Refusal(400, "InvalidUri", "The address holds the character NUL.")
    return text


# ---------------------------------------------------------------- bodies


async def _read_json(http: HttpRequest) -> Any:
    """The body; an empty one is an empty object. Raises `Refusal`."""
    raw = await _read(http)
    if not raw.strip():
        return {}
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind and kind != "application/json" and not kind.endswith("+json"):
        raise Refusal(415, "UnsupportedMediaType", f"The body is {kind[:100]!r}; only JSON is read here.")
    if http.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise Refusal(415, "UnsupportedMediaType", "A compressed body is not read; send it as it is.")
    try:
        value = json.loads(raw.decode("utf-8-sig"), parse_constant=_no_constant)
    except RecursionError:
        raise _bad("is nested too deeply") from None
    except (UnicodeDecodeError, ValueError) as mistake:
        raise _bad(f"is not JSON: {mistake}") from None
    if not isinstance(value, dict):
        raise _bad("is not a JSON object")
    _check_depth(value)
    return value


async def _read(http: HttpRequest) -> bytes:
    pieces: list[bytes] = []
    total = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in http.stream():
                total += len(piece)
                if total <= BODY_BYTES:
                    pieces.append(piece)
                elif total > DRAINED_BYTES:
                    break
    except TimeoutError:
        raise Refusal(408, "RequestTimeout", f"The body did not arrive within {BODY_SECONDS:g} s.") from None
    # Some more was read and thrown away: who still sends when a connection is closed sees no answer.
    if total > BODY_BYTES:
        raise Refusal(413, "RequestBodyTooLarge", f"The body is larger than {BODY_BYTES} bytes.")
    return b"".join(pieces)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner += [*one, *one.values()]
            elif isinstance(one, list):
                inner += one
            elif isinstance(one, str):
                _check_text(one)
        if not inner:
            return
        level = inner
    raise _bad(f"is nested more than {DEEPEST} levels deep")


def _check_text(text: str) -> None:
    if text.isprintable():
        return
    if "\0" in text:
        raise _bad("holds the character NUL (\\u0000)")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _bad("holds half of a surrogate pair") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _bad(what: str) -> Refusal:
    return Refusal(400, "InvalidRequestContent", f"The body {what}.")


# ---------------------------------------------------------------- answers


def _response(answer: Answer) -> Response:
    if answer.body is None:
        return Response(status_code=answer.status, headers=dict(answer.headers))
    return JSONResponse(answer.body, status_code=answer.status, headers=dict(answer.headers))


def _failure(http: HttpRequest, error: Exception, request_id: str) -> Response:
    if isinstance(error, Refusal):
        refusal = error
    elif isinstance(error, TuneloopError):
        refusal = from_ours(error)
    elif isinstance(error, OSError) and disk.explain(error, _path_of(error)) is not None:
        known = disk.explain(error, _path_of(error))
        assert known is not None
        refusal = from_ours(known)
    else:
        log.error("%s %s failed (%s)", http.method, http.url.path, request_id, exc_info=error)
        refusal = from_ours(
            Internal(
                f"{type(error).__name__}: {error}",
                next_move="The traceback is in logs/server.log of the home.",
            )
        )
    headers = {"x-ms-error-code": refusal.code}
    if refusal.status == 401:
        headers["www-authenticate"] = "Bearer"
    if refusal.status in (408, 413):
        # The rest of the body is not read: the connection cannot be used again.
        headers["connection"] = "close"
    if http.url.path.lower().startswith("/blob/"):
        return BlobError(refusal.status, refusal.code, refusal.message, headers=headers).response()
    return Response(
        json.dumps(refusal.to_json()), refusal.status, headers=headers, media_type="application/json"
    )


def _path_of(error: OSError) -> Path:
    return Path(getattr(error, "filename", None) or "/")
