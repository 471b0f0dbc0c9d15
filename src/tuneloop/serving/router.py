"""`python -m tuneloop.serving.router DIR`: the one address of all endpoints. No torch, no store.

Reads `DIR/router.json` (`core.types.RouterFile`), takes the folder (`core.process.claim`), listens on
127.0.0.1 and writes `DIR/ready.json`; when the port is taken, `DIR/error.json` and exit code 1. The route
table is watched; the demand file is written about once a second when it changes. SIGTERM lets requests in
flight end for a few seconds.

    POST /endpoints/NAME/score                  GET /health
    POST /endpoints/NAME/v1/chat/completions    GET /endpoints/NAME/v1/models

A request waits up to `hold_seconds` for a replica, so one that was killed is not noticed by callers. Where a
deployment has a limit of requests at once, what exceeds it waits in line for `max_queue_wait_seconds`. As
long as no byte of a reply has been sent, a broken connection leads to another try: a completion changes
nothing, so asking twice is safe. The deployment's request timeout counts from the arrival of the request to
the last byte of the reply, streams included.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
from aiohttp import web

from tuneloop.core.errors import PortTaken, TuneloopError
from tuneloop.core.process import claim, write_atomically
from tuneloop.core.types import (
    DemandFile,
    ErrorInfo,
    RouteDeployment,
    RouteEndpoint,
    RouteReplica,
    RouterFile,
)
from tuneloop.serving.exchange import (
    FORWARDED,
    Exchange,
    end_with,
    from_http,
    no_replica,
    payload,
    read_body,
    refuse_foreign,
    returned,
    too_many,
)
from tuneloop.serving.lifecycle import DRAIN_SECONDS, say, say_error, say_ready, stop_signal
from tuneloop.serving.mirror import Copy, Mirrors
from tuneloop.serving.routing import (
    Line,
    Load,
    RouteFile,
    Turns,
    check_key,
    choose_deployment,
    find_endpoint,
    model_names,
)
from tuneloop.serving.wire import (
    BODY_BYTES,
    DEPLOYMENT_HEADER,
    REPLICA_HEADER,
    REQUEST_ID_HEADER,
    Refused,
    error_body,
    read_object,
    request_id,
)

WATCH_SECONDS = 0.2
DEMAND_SECONDS = 1.0
IDLE_SECONDS = 75.0
"""A connection may take that long to its first request, between two, and for the head of one."""
CONNECT_SECONDS = 5.0
REPLAYS = 2
"""Tries after a connection broke with the request already sent: it may be the request that kills."""

Reply = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ReplicaGone(Exception):
    """The connection to a replica could not be made, or broke before its reply was whole."""


class Router:
    """The web application. `open` and `close` go around its life; `stop` is asked for by SIGTERM."""

    def __init__(self, file: RouterFile) -> None:
        self.file = file
        self.routes = RouteFile(Path(file.routes))
        self.turns = Turns()
        self.load = Load()
        self.is_stopping = False
        self.line = Line()
        self.mirrors = Mirrors(Path(file.mirrors) if file.mirrors else None, self._send_copy)
        self._scopes: set[asyncio.Timeout] = set()
        self._written: tuple[dict[str, int], tuple[str, ...]] | None = None

    def application(self) -> web.Application:
        app = web.Application(client_max_size=BODY_BYTES, middlewares=[self._answer_errors])
        app.router.add_get("/health", self._health)
        app.router.add_post("/endpoints/{endpoint}/score", self._score)
        app.router.add_post("/endpoints/{endpoint}/v1/chat/completions", self._chat)
        app.router.add_get("/endpoints/{endpoint}/v1/models", self._models)
        app.cleanup_ctx.append(self._life)
        return app

    async def _life(self, _app: web.Application) -> AsyncIterator[None]:
        self.routes.refresh()
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=15)
        self.session = aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)
        loops = [asyncio.create_task(self._watch()), asyncio.create_task(self._report())]
        yield
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
        await self.mirrors.close()
        await self.session.close()

    async def drain(self) -> None:
        """Let requests in flight end; cut what still runs after `DRAIN_SECONDS`, with an error event."""
        self.is_stopping = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + DRAIN_SECONDS
        while self.load.in_flight and loop.time() < deadline:
            await asyncio.sleep(0.02)
        for scope in list(self._scopes):
            scope.reschedule(loop.time())
        while self._scopes:
            await asyncio.sleep(0.01)

    # ---------------------------------------------------------------- files

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if self.routes.refresh():
                self.line.wake_all()

    async def _report(self) -> None:
        while True:
            await self.report()
            await self.mirrors.write(self.routes.table)
            await asyncio.sleep(DEMAND_SECONDS)

    async def report(self) -> None:
        """Write the demand file if it would say something new."""
        seen = (dict(self.load.in_flight), tuple(sorted(self.load.waiting)))
        if seen == self._written:
            return
        demand = DemandFile(at=datetime.now(UTC), in_flight=seen[0], wake=seen[1])
        try:
            # In a thread: an fsync on a busy disk would hold up every stream.
            await asyncio.to_thread(write_atomically, Path(self.file.demand), demand.model_dump_json())
        except OSError as problem:
            say(f"demand file not written: {problem}")
            return
        self._written = seen

    # ---------------------------------------------------------------- what is answered here

    @web.middleware
    async def _answer_errors(self, request: web.Request, handler: Reply) -> web.StreamResponse:
        request["id"] = request_id(request.headers.get(REQUEST_ID_HEADER))
        try:
            refuse_foreign(request)
            return await handler(request)
        except Refused as refused:
            error = refused
        except web.HTTPException as mistake:
            error = from_http(request, mistake)
        except Exception:
            traceback.print_exc()
            error = Refused(500, "internal", f"The router failed; its log has request {request['id']}.")
        headers = {**error.headers, REQUEST_ID_HEADER: request["id"]}
        return web.json_response(error_body(request.path, error), status=error.status, headers=headers)

    async def _health(self, _request: web.Request) -> web.Response:
        seen = {"endpoints": len(self.routes.table.endpoints), "routes": self.routes.digest}
        return web.json_response({"status": "ok", **seen})

    async def _models(self, request: web.Request) -> web.Response:
        """What the field `model` may say: the endpoint, its deployments, and their models."""
        name, endpoint = self._admit(request)
        models = [
            {"id": model, "object": "model", "created": 0, "owned_by": "tuneloop"}
            for model in dict.fromkeys([name, *model_names(endpoint)])
        ]
        return web.json_response(
            {"object": "list", "data": models}, headers={REQUEST_ID_HEADER: request["id"]}
        )

    def _admit(self, request: web.Request) -> tuple[str, RouteEndpoint]:
        name = request.match_info["endpoint"]
        endpoint = find_endpoint(self.routes.table, name)
        check_key(endpoint, request.headers)
        return name, endpoint

    # ---------------------------------------------------------------- what replicas answer

    async def _score(self, request: web.Request) -> web.StreamResponse:
        name, endpoint = self._admit(request)
        exchange = Exchange(request, "/score", name, await read_body(request))
        return await self._route(exchange, endpoint, model=None)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        name, endpoint = self._admit(request)
        exchange = Exchange(request, "/v1/chat/completions", name, await read_body(request))
        model = read_object(exchange.body).get("model")
        if model is not None and not isinstance(model, str):
            raise Refused(400, "invalid_value", "model: expected a string", param="model")
        return await self._route(exchange, endpoint, model)

    async def _route(
        self, exchange: Exchange, endpoint: RouteEndpoint, model: str | None
    ) -> web.StreamResponse:
        request = exchange.request
        pins = request.headers.getall(DEPLOYMENT_HEADER, [])
        model = model or None
        exchange.deployment = choose_deployment(exchange.endpoint, endpoint, pins, model, self.turns)
        exchange.headers = {name: request.headers[name] for name in FORWARDED if name in request.headers}
        exchange.headers[REQUEST_ID_HEADER] = request["id"]
        seconds = endpoint.deployments[exchange.deployment].request_timeout_seconds
        # A copy is made of what follows the traffic; who asks for a deployment by name means that one alone.
        if endpoint.mirror and not pins and model in (None, exchange.endpoint):
            exchange.copy = self.mirrors.begin(endpoint, exchange.copied, exchange.endpoint)
        with Load.counted(self.load.in_flight, exchange.key):
            if exchange.copy is None:
                return await self._within(seconds, exchange)
            return await self._beside(exchange.copy, seconds, exchange)

    async def _beside(self, copy: Copy, seconds: float, exchange: Exchange) -> web.StreamResponse:
        """As `_within`, and then the two replies are compared."""
        try:
            answer = await self._within(seconds, exchange)
        except Refused as refused:
            self.mirrors.compare(copy, refused.status)
            raise
        except BaseException:
            self.mirrors.abandon(copy)
            raise
        self.mirrors.compare(copy, answer.status)
        return answer

    async def _send_copy(self, copy: Copy) -> None:
        """See `mirror.Send`."""
        route = self.routes.table.endpoints.get(copy.endpoint)
        deployment = route.deployments.get(copy.deployment) if route else None
        now = asyncio.get_running_loop().time()
        replica = self.load.pick(deployment, now) if deployment else None
        token = self.routes.token(replica) if replica else None
        if deployment is None or replica is None or token is None:
            raise LookupError(copy.deployment)
        key = f"{copy.endpoint}/{copy.deployment}"
        headers = {**copy.headers, REPLICA_HEADER: token}
        with Load.counted(self.load.in_flight, key), Load.counted(self.load.per_replica, replica.id):
            try:
                async with (
                    asyncio.timeout(deployment.request_timeout_seconds),
                    self.session.post(
                        replica.address + copy.path, data=payload(copy.body), headers=headers
                    ) as answer,
                ):
                    copy.theirs.is_stream = answer.content_type == "text/event-stream"
                    async for piece in answer.content.iter_any():
                        copy.theirs.hear(piece)
                    copy.theirs.status = answer.status
            finally:
                self.line.wake(key)

    async def _within(self, seconds: float, exchange: Exchange) -> web.StreamResponse:
        """The reply, or 504 (an error event once a stream has begun) when it takes longer than that."""
        try:
            async with asyncio.timeout(seconds) as scope:
                self._scopes.add(scope)
                return await self._ask(exchange)
        except TimeoutError:
            error = self._timed_out(seconds, exchange)
        finally:
            self._scopes.discard(scope)
        if exchange.out is None:
            raise error
        return await end_with(exchange.out, error)

    def _timed_out(self, seconds: float, exchange: Exchange) -> Refused:
        headers = {DEPLOYMENT_HEADER: exchange.deployment}
        if self.is_stopping:
            return Refused(
                503, "stopping", "The router is being stopped.", headers={"Retry-After": "2", **headers}
            )
        if exchange.is_held:
            deployment = self._deployment(exchange)
            is_full = self.load.is_full(deployment, asyncio.get_running_loop().time())
            return too_many(exchange, deployment) if is_full else no_replica(exchange)
        message = (
            f"Deployment '{exchange.deployment}' did not finish within {seconds:g} s, its request timeout. "
            "Ask for fewer tokens, or deploy with a larger request_timeout_seconds."
        )
        return Refused(504, "timeout", message, headers=headers)

    async def _ask(self, exchange: Exchange) -> web.StreamResponse:
        loop = asyncio.get_running_loop()
        hold_until = loop.time() + self.file.hold_seconds
        replays = 0
        while True:
            replica, token = await self._find_replica(exchange, hold_until)
            try:
                with Load.counted(self.load.per_replica, replica.id):
                    return await self._exchange(exchange, replica, token)
            except aiohttp.ClientConnectorError:
                say(f"{replica.id} at {replica.address} refuses connections")
            except ReplicaGone as gone:
                say(f"{replica.id} at {replica.address}: {gone}")
                replays += 1
            finally:
                self.line.wake(exchange.key)
            self.load.suspect(replica, loop.time())
            if replays > REPLAYS:
                message = f"Deployment '{exchange.deployment}' lost {replays} replicas over this request."
                raise Refused(502, "replica_lost", message, headers={DEPLOYMENT_HEADER: exchange.deployment})

    async def _find_replica(self, exchange: Exchange, hold_until: float) -> tuple[RouteReplica, str]:
        """A replica and its token, as soon as there is one. Raises 503 when the hold is over, 429 when every
        replica is full and stays so."""
        loop = asyncio.get_running_loop()
        if self.line.is_empty(exchange.key):
            found = self._pick(exchange, loop.time())
            if found is not None:
                return found
        full_since: float | None = None
        exchange.is_held = True
        with Load.counted(self.load.waiting, exchange.key), self.line.joined(exchange.key) as place:
            while True:
                now, deployment = loop.time(), self._deployment(exchange)
                is_first = self.line.is_first(exchange.key, place)
                found = self._pick(exchange, now) if is_first else None
                if found is not None:
                    exchange.is_held = False
                    return found
                is_full = self.load.is_full(deployment, now, is_behind=not is_first)
                full_since = (full_since or now) if is_full else None
                until = hold_until if full_since is None else full_since + deployment.max_queue_wait_seconds
                if now >= until:
                    raise no_replica(exchange) if full_since is None else too_many(exchange, deployment)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(place.wait(), timeout=min(0.25, until - now))
                place.clear()

    def _pick(self, exchange: Exchange, now: float) -> tuple[RouteReplica, str] | None:
        """From the table of this moment. Raises 404 when the deployment was deleted meanwhile."""
        deployment = self._deployment(exchange)
        replica = self.load.pick(deployment, now)
        if replica is None:
            return None
        token = self.routes.token(replica)
        if token is None:
            self.load.suspect(replica, now)
            return None
        return replica, token

    def _deployment(self, exchange: Exchange) -> RouteDeployment:
        endpoint = self.routes.table.endpoints.get(exchange.endpoint)
        deployment = endpoint.deployments.get(exchange.deployment) if endpoint else None
        if deployment is None:
            message = f"Deployment '{exchange.deployment}' of endpoint '{exchange.endpoint}' was deleted."
            raise Refused(404, "deployment_not_found", message)
        return deployment

    async def _exchange(self, exchange: Exchange, replica: RouteReplica, token: str) -> web.StreamResponse:
        """One try with one replica. Raises `ReplicaGone` as long as nothing reached the caller."""
        headers = {**exchange.headers, REPLICA_HEADER: token}
        url = replica.address + exchange.path
        try:
            async with self.session.post(url, data=payload(exchange.body), headers=headers) as answer:
                if answer.status == 401:
                    # Another process on a dead replica's port: the caller's key is not what is wrong.
                    self.routes.forget(replica)
                    raise ReplicaGone("it does not know its token")
                if answer.status == 503:
                    raise ReplicaGone("it is stopping")
                if answer.content_type == "text/event-stream":
                    return await self._stream(exchange, answer)
                body = await answer.read()
                if exchange.copy is not None:
                    exchange.copy.ours.hear(body)
                return web.Response(status=answer.status, body=body, headers=returned(exchange, answer))
        except aiohttp.ClientConnectorError:
            raise
        except aiohttp.ClientError as problem:
            raise ReplicaGone(f"{type(problem).__name__}: {problem}") from None

    async def _stream(self, exchange: Exchange, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        """Every chunk as it comes. A stream that breaks ends in an error event, not in silence."""
        out = web.StreamResponse(status=answer.status, headers=returned(exchange, answer))
        await out.prepare(exchange.request)
        exchange.out = out
        heard = None if exchange.copy is None else exchange.copy.ours
        if heard is not None:
            heard.is_stream = True
        chunks = answer.content.iter_any()
        while True:
            try:
                chunk = await anext(chunks, b"")
            except aiohttp.ClientError:
                message = f"Deployment '{exchange.deployment}' lost the replica that was answering."
                return await end_with(out, Refused(502, "replica_lost", message))
            if not chunk:
                return out
            if heard is not None:
                heard.hear(chunk)
            try:
                await out.write(chunk)
            except ConnectionError:
                return out


# ---------------------------------------------------------------- the process


def listen(port: int) -> socket.socket:
    """A socket on 127.0.0.1. Raises `PortTaken`. What a killed router left behind is no obstacle."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen(1024)
    except OSError as problem:
        listener.close()
        if problem.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise PortTaken(
            f"Port {port} on 127.0.0.1 cannot be taken for the endpoints: {problem.strerror}.",
            next_move="Free it, or choose another with TUNELOOP_ROUTER_PORT (0: any), then: tuneloop up",
        ) from None
    return listener


async def serve(folder: Path, file: RouterFile, listener: socket.socket) -> None:
    """Until SIGTERM."""
    stop = stop_signal()
    router = Router(file)
    # Cancellation: a caller that leaves closes the connection to the replica, which stops generating.
    runner = web.AppRunner(
        router.application(),
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=1.0,
        keepalive_timeout=IDLE_SECONDS,
    )
    await runner.setup()
    site = web.SockSite(runner, listener, backlog=1024)
    await site.start()
    say_ready(folder, f"http://127.0.0.1:{listener.getsockname()[1]}")
    await stop.wait()
    await site.stop()
    await router.drain()
    await runner.cleanup()
    print("router stopped", flush=True)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(arguments[0]).resolve()
    file = RouterFile.model_validate_json((folder / "router.json").read_bytes())
    if not claim(folder, file.owner):
        return 0
    try:
        listener = listen(file.port)
    except TuneloopError as mistake:
        return say_error(folder, ErrorInfo.model_validate(mistake.to_json()))
    asyncio.run(serve(folder, file, listener))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
