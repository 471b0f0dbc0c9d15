"""The HTTPS listener of the server, for the official Azure ML SDK: opened by `tuneloop azure up`, and again
by every later server of the home until `tuneloop azure down`."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneloop.core.azure import Remembered, remember, remembered
from tuneloop.core.errors import Internal, TuneloopError
from tuneloop.core.private import keep_secret
from tuneloop.core.process import write_atomically
from tuneloop.daemon.listening import HOST, listen
from tuneloop.server.parts import AzureStatus

if TYPE_CHECKING:
    import uvicorn

    from tuneloop.server.azure.certificates import Certificates
    from tuneloop.server.parts import Parts

log = logging.getLogger("tuneloop.daemon")

USUAL_PORT = 8443
START_SECONDS = 20.0
STOP_SECONDS = 10.0
HANDSHAKE_SECONDS = 15.0
"""Until the two sides have agreed on their keys, and, at the end of a connection, on its end."""
SUBSCRIPTION = "00000000-0000-0000-0000-000000000000"
GROUP = "tuneloop"
WORKSPACE = "local"


@dataclass
class _Running:
    server: uvicorn.Server
    thread: threading.Thread
    port: int


class AzureListener:
    """Opens and closes the listener; everything that it needs lies in `azure/` of the home."""

    def __init__(self, home: Path, secret: bytes, *, port: int, is_loose: bool) -> None:
        """`port`: the setting azure_port; 0: the last one, 8443, or a free one."""
        self._folder = home / "azure"
        self._secret = secret
        self._port = port
        self._is_loose = is_loose
        self._running: _Running | None = None
        self._lock = threading.Lock()
        self.parts: Parts | None = None
        """Set once, before the first call."""

    # ------------------------------------------------------------ what the API asks

    def up(self) -> AzureStatus:
        """Open it; twice is once. Raises `PortTaken`."""
        with self._lock:
            if self._running is not None and not self._running.thread.is_alive():
                self._running = None
            if self._running is None:
                self._running = self._open()
                remember(self._folder, Remembered(self._running.port, is_up=True))
                log.warning("the Azure listener is open on port %s", self._running.port)
        return self.status()

    def down(self) -> AzureStatus:
        """Close it; what runs goes on. Twice is once."""
        with self._lock:
            if self._running is not None:
                self._close(self._running)
                self._running = None
            remember(self._folder, Remembered(remembered(self._folder).port, is_up=False))
        return self.status()

    def status(self) -> AzureStatus:
        running = self._running
        return AzureStatus(
            url=None if running is None else f"https://{HOST}:{running.port}",
            folder=self._folder,
            is_loose=self._is_loose,
        )

    # ------------------------------------------------------------ what the server's life asks

    def resume(self) -> None:
        """Open it when the last server of this home had it open; what hinders that is told, not fatal: jobs
        and endpoints do not need it."""
        if not remembered(self._folder).is_up:
            return
        try:
            self.up()
        except (TuneloopError, OSError, ValueError) as hindrance:
            log.error("the Azure listener stays closed: %s", hindrance)

    def close(self) -> None:
        """At the server's end; the next one opens it again."""
        with self._lock:
            if self._running is not None:
                self._close(self._running)
                self._running = None

    # ------------------------------------------------------------ inside

    def _open(self) -> _Running:
        from tuneloop.server.azure import create_gateway
        from tuneloop.server.azure.certificates import Certificates
        from tuneloop.server.azure.gateway import Gateway
        from tuneloop.server.azure.tokens import Tokens

        assert self.parts is not None
        certificates = Certificates(self._folder)
        self._keep_private(certificates.authority_key, certificates.key)
        certificates.ensure()
        identity = _secret_in(self._folder / "identity")
        listener = self._listen()
        try:
            port = int(listener.getsockname()[1])
            base = f"https://{HOST}:{port}"
            gateway = Gateway(
                parts=self.parts,
                base_url=base,
                folder=self._folder,
                secret=self._secret,
                tokens=Tokens(self._secret, self.parts.home_id, base),
                identity_secret=identity,
                is_loose=self._is_loose,
            )
            self._write_config()
            return _serve(create_gateway(gateway), certificates, listener)
        except BaseException:
            listener.close()
            raise

    def _keep_private(self, *keys: Path) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        os.chmod(self._folder, 0o700)
        for path in (*keys, self._folder / "identity"):
            for told in keep_secret(path):
                log.warning("%s", told)

    def _listen(self) -> socket.socket:
        last = remembered(self._folder).port
        wishes = [self._port] if self._port else [port for port in (last, USUAL_PORT) if port] + [0]
        return listen(wishes, "TUNELOOP_AZURE_PORT")

    def _close(self, running: _Running) -> None:
        running.server.should_exit = True
        running.thread.join(STOP_SECONDS)
        if running.thread.is_alive():
            running.server.force_exit = True
            running.thread.join(STOP_SECONDS)

    def _write_config(self) -> None:
        """What `MLClient.from_config` reads: names that are any names, since one home is one workspace."""
        facts = {"subscription_id": SUBSCRIPTION, "resource_group": GROUP, "workspace_name": WORKSPACE}
        write_atomically(self._folder / "config.json", json.dumps(facts, indent=2) + "\n", private=True)


def _serve(app: Any, certificates: Certificates, listener: socket.socket) -> _Running:
    """A server in a thread of its own that answers on `listener`, which is bound to loopback."""
    import uvicorn

    from tuneloop.server.azure.connection import AzureConnection

    config = uvicorn.Config(
        app,
        http=AzureConnection,
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=3,
        lifespan="off",
        server_header=False,
        ssl_certfile=certificates.certificate,
        ssl_keyfile=certificates.key,
    )
    config.load()
    assert isinstance(config.ssl, ssl.SSLContext)
    config.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
    server = uvicorn.Server(config)

    def run() -> None:
        with asyncio.Runner(loop_factory=_Loop) as runner:
            runner.run(server.serve(sockets=[listener]))

    thread = threading.Thread(target=run, name="azure", daemon=True)
    thread.start()
    deadline = time.monotonic() + START_SECONDS
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise Internal(
                "The Azure listener did not start.", next_move="Why is in logs/server.log of the home."
            )
        time.sleep(0.01)
    return _Running(server, thread, int(listener.getsockname()[1]))


class _Loop(asyncio.SelectorEventLoop):
    """asyncio waits a minute for whoever connects and then says nothing; uvicorn has no setting for it."""

    async def create_server(self, *arguments: Any, **options: Any) -> asyncio.Server:
        return await super().create_server(
            *arguments,
            **options,
            ssl_handshake_timeout=HANDSHAKE_SECONDS,
            ssl_shutdown_timeout=HANDSHAKE_SECONDS,
        )


def _secret_in(path: Path) -> str:
    """Made at the first call; only the owner can read it."""
    try:
        found = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        found = ""
    if len(found) < 32:
        found = secrets.token_urlsafe(32)
        write_atomically(path, found + "\n", private=True)
    return found
