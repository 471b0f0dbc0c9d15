"""One request on its way through the router: what is passed on, what comes back, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import io
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web

from tuneloop.core.callers import foreign
from tuneloop.core.types import RouteDeployment
from tuneloop.serving.mirror import Copy
from tuneloop.serving.wire import (
    BODY_BYTES,
    DEPLOYMENT_HEADER,
    REQUEST_ID_HEADER,
    Refused,
    error_event,
    too_large,
)

BODY_SECONDS = 60.0

FORWARDED = ("content-type", "accept", "user-agent", "traceparent", "tracestate")
"""Nothing else of a caller's headers reaches a replica: no key, no hop-by-hop header, no forged token."""
_HOP_BY_HOP = {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer"}
_NOT_RETURNED = _HOP_BY_HOP | {"transfer-encoding", "upgrade", "content-length", "date", "server"}


@dataclass
class Exchange:
    """One request on its way through the router."""

    request: web.Request
    path: str
    """The replica's path."""
    endpoint: str
    body: bytes
    deployment: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    is_held: bool = False
    """Whether it waits for a replica."""
    out: web.StreamResponse | None = None
    """Set once a stream has begun: from then on errors are events."""
    copy: Copy | None = None
    """Of a mirrored request: told what the caller got."""

    @property
    def key(self) -> str:
        return f"{self.endpoint}/{self.deployment}"

    def copied(self, deployment: str) -> Copy:
        """For the mirror `deployment`."""
        return Copy(
            endpoint=self.endpoint,
            deployment=deployment,
            primary=self.deployment,
            request_id=self.request["id"],
            path=self.path,
            body=self.body,
            headers=self.headers,
        )


def payload(body: bytes) -> bytes | io.BytesIO:
    """Sent at once when small, else in pieces, so that one large prompt holds up no stream."""
    return body if len(body) < 1 << 20 else io.BytesIO(body)


def refuse_foreign(request: web.Request) -> None:
    """No web page reaches an endpoint, whatever its name was made to lead to. The key would be enough against
    that; but which endpoints there are is no page's business either."""
    headers = {name.lower(): request.headers.getall(name) for name in request.headers}
    strange = foreign(headers)
    if strange is not None:
        raise Refused(403, "foreign_caller", strange)


async def read_body(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await request.read()
    except TimeoutError:
        message = f"The body did not arrive within {BODY_SECONDS:g} s."
        raise Refused(408, "slow_request", message, headers={"Connection": "close"}) from None


def no_replica(exchange: Exchange) -> Refused:
    message = (
        f"Deployment '{exchange.deployment}' of endpoint '{exchange.endpoint}' has no replica that is ready. "
        f"See: tuneloop deployments list --endpoint {exchange.endpoint}"
    )
    headers = {"Retry-After": "5", DEPLOYMENT_HEADER: exchange.deployment}
    return Refused(503, "no_replica", message, headers=headers)


async def end_with(out: web.StreamResponse, error: Refused) -> web.StreamResponse:
    with contextlib.suppress(ConnectionError):
        await out.write(error_event(error))
        await out.write_eof()
    return out


def returned(exchange: Exchange, answer: aiohttp.ClientResponse) -> dict[str, str]:
    dropped = _NOT_RETURNED | {
        name.strip().lower() for name in answer.headers.get("connection", "").split(",")
    }
    kept = {name: value for name, value in answer.headers.items() if name.lower() not in dropped}
    kept[DEPLOYMENT_HEADER] = exchange.deployment
    kept[REQUEST_ID_HEADER] = exchange.request["id"]
    return kept


def from_http(request: web.Request, mistake: web.HTTPException) -> Refused:
    if mistake.status == 413:
        return too_large(BODY_BYTES)
    if mistake.status == 404:
        message = f"{request.path} is no path here; see /health, /endpoints/NAME/v1/chat/completions."
        return Refused(404, "path_not_found", message)
    allow = {name: mistake.headers[name] for name in ("Allow",) if name in mistake.headers}
    return Refused(
        mistake.status, "http", f"{request.method} {request.path}: {mistake.reason}.", headers=allow
    )


def too_many(exchange: Exchange, deployment: RouteDeployment) -> Refused:
    message = (
        f"Every replica of deployment '{exchange.deployment}' has {deployment.max_concurrent_requests} "
        f"request(s), its max_concurrent_requests, and none became free within "
        f"{deployment.max_queue_wait_seconds:g} s, its max_queue_wait."
    )
    headers = {"Retry-After": "1", DEPLOYMENT_HEADER: exchange.deployment}
    return Refused(429, "too_many_requests", message, headers=headers)
