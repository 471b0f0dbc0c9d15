"""What the tests of the data plane share: a router process, and replicas without a model."""

from __future__ import annotations

import asyncio
import atexit
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
from aiohttp import web

from tuneloop.core.keys import key_hash
from tuneloop.core.process import write_atomically
from tuneloop.core.types import (
    ReadyFile,
    ReplicaFile,
    RouteDeployment,
    RouteEndpoint,
    RouteReplica,
    RouterFile,
    RouteTable,
)

KEY = "the-right-key"
AUTH = {"authorization": f"Bearer {KEY}"}
HTTP = httpx.Client(trust_env=False, timeout=30)
"""One for all tests: making a client costs more than most requests."""
atexit.register(HTTP.close)

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class PlayedReplica:
    """A replica without a model: answers as the test says, and remembers what it was sent."""

    def __init__(self, folder: Path, name: str, answer: Answer | None = None) -> None:
        self.name = name
        self.requests: list[dict[str, object]] = []
        self.left = threading.Event()
        self.release = threading.Event()
        self.answer = answer or self._echo
        self.token = f"token-of-{name}"
        self.token_file = folder / f"{name}.json"
        file = ReplicaFile(replica=name, owner=name, model_path="/", model="m:1", token=self.token)
        self.token_file.write_text(file.model_dump_json())
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    @property
    def route(self) -> RouteReplica:
        return RouteReplica(id=self.name, address=self.address, token_file=str(self.token_file))

    def kill(self) -> None:
        """As `kill -9` does: the port refuses, open connections are reset."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/{path:.*}", self._handle)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.01, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.address = "http://{}:{}".format(*runner.addresses[0])
        self._ready.set()
        await self._stop.wait()
        await site.stop()
        for connection in runner.server.connections:  # type: ignore[union-attr]
            if connection.transport is not None:
                connection.transport.abort()
        await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("x-tuneloop-replica") != self.token:
            return web.json_response({"error": "token"}, status=401)
        self.requests.append(
            {"path": request.path, "headers": request.headers.copy(), "body": await request.read()}
        )
        try:
            return await self.answer(request)
        except asyncio.CancelledError:
            self.left.set()
            raise

    async def _echo(self, _request: web.Request) -> web.StreamResponse:
        return web.json_response({"replica": self.name})

    async def released(self) -> None:
        while not self.release.is_set():
            await asyncio.sleep(0.005)


class RouterProcess:
    """`python -m tuneloop.serving.router` on a folder, and the routes that it reads."""

    def __init__(self, folder: Path, port: int = 0, hold_seconds: float = 3.0) -> None:
        self.folder = folder / f"run-{time.monotonic_ns()}"
        self.folder.mkdir(parents=True)
        self.routes, self.demand = folder / "routes.json", folder / "demand.json"
        self.mirrors = folder / "mirrors"
        file = RouterFile(
            owner="router-test",
            port=port,
            routes=str(self.routes),
            demand=str(self.demand),
            mirrors=str(self.mirrors),
            hold_seconds=hold_seconds,
        )
        (self.folder / "router.json").write_text(file.model_dump_json())
        with open(self.folder / "log.txt", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tuneloop.serving.router", str(self.folder)],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait(self) -> str:
        until(lambda: (self.folder / "ready.json").exists(), "the router listens")
        self.url = ReadyFile.model_validate_json((self.folder / "ready.json").read_text()).address
        return self.url

    def endpoint(
        self,
        name: str,
        deployments: dict[str, list[RouteReplica]],
        traffic: dict[str, int] | None = None,
        timeout: float = 10.0,
        models: dict[str, str] | None = None,
        *,
        mirror: dict[str, int] | None = None,
        most: int | None = None,
        wait: float = 0.5,
    ) -> str:
        """Put an endpoint into the route table, wait until the router knows it; its URL."""
        table = RouteTable()
        if self.routes.exists():
            table = RouteTable.model_validate_json(self.routes.read_text())
        route = RouteEndpoint(
            key_hashes=(key_hash("another"), key_hash(KEY)),
            traffic=traffic if traffic is not None else dict.fromkeys(list(deployments)[:1], 100),
            mirror=mirror or {},
            deployments={
                deployment: RouteDeployment(
                    model=(models or {}).get(deployment, f"{deployment}-model:1"),
                    request_timeout_seconds=timeout,
                    max_concurrent_requests=most,
                    max_queue_wait_seconds=wait,
                    replicas=tuple(replicas),
                )
                for deployment, replicas in deployments.items()
            },
        )
        self.write(table.model_copy(update={"endpoints": {**table.endpoints, name: route}}))
        return f"{self.url}/endpoints/{name}"

    def write(self, table: RouteTable) -> None:
        """A marker endpoint says when the router has read this table."""
        marker = f"marker-{time.monotonic_ns()}"
        kept = {name: route for name, route in table.endpoints.items() if not name.startswith("marker-")}
        kept[marker] = RouteEndpoint(key_hashes=(key_hash(KEY),))
        write_atomically(self.routes, RouteTable(endpoints=kept).model_dump_json())
        url = f"{self.url}/endpoints/{marker}/v1/models"
        until(lambda: HTTP.get(url, headers=AUTH).status_code == 200, "the router reads the table")


def until(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s: {what}"
        time.sleep(0.02)
