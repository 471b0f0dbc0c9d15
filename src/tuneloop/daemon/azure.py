"""The HTTPS listener of the server, for the official Azure ML SDK: opened by `tuneloop azure up`, and again
by every later server of the home until `tuneloop azure down`."""

from __future__ import annotations

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

from tuneloop.core.errors import Internal, PortTaken
from tuneloop.core.process import write_atomically
from tuneloop.server.parts import AzureStatus

if TYPE_CHECKING:
    import uvicorn

    from tuneloop.server.parts import Parts

log = logging.getLogger("tuneloop.daemon")

USUAL_PORT = 8443
HOST = "127.0.0.1"
START_SECONDS = 20.0
STOP_SECONDS = 10.0
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
            if self._running is None:
                self._running = self._open()
                self._write({"port": self._running.port, "up": True})
                log.warning("the Azure listener is open on port %s", self._running.port)
        return self.status()

    def down(self) -> AzureStatus:
        """Close it; what runs goes on. Twice is once."""
        with self._lock:
            if self._running is not None:
                self._close(self._running)
                self._running = None
            self._write({**self._read(), "up": False})
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
        """Open it when the last server of this home had it open; a taken port is told, not fatal."""
        if not self._read().get("up"):
            return
        try:
            self.up()
        except PortTaken as taken:
            log.error("the Azure listener stays closed: %s", taken)

    def close(self) -> None:
        """At the server's end; the next one opens it again."""
        with self._lock:
            if self._running is not None:
                self._close(self._running)
                self._running = None

    # ------------------------------------------------------------ inside

    def _open(self) -> _Running:
        import uvicorn

        from tuneloop.server.azure import create_gateway
        from tuneloop.server.azure.certificates import Certificates
        from tuneloop.server.azure.gateway import Gateway
        from tuneloop.server.azure.tokens import Tokens

        assert self.parts is not None
        certificates = Certificates(self._folder)
        certificates.ensure()
        listener = self._listen()
        port = int(listener.getsockname()[1])
        base = f"https://{HOST}:{port}"
        gateway = Gateway(
            parts=self.parts,
            base_url=base,
            folder=self._folder,
            secret=self._secret,
            tokens=Tokens(self._secret, self.parts.home_id, base),
            identity_secret=_secret_in(self._folder / "identity"),
            is_loose=self._is_loose,
        )
        self._write_config()
        config = uvicorn.Config(
            create_gateway(gateway),
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
        thread = threading.Thread(
            target=server.run, kwargs={"sockets": [listener]}, name="azure", daemon=True
        )
        thread.start()
        deadline = time.monotonic() + START_SECONDS
        while not server.started:
            if not thread.is_alive() or time.monotonic() > deadline:
                raise Internal(
                    "The Azure listener did not start.", next_move="Why is in logs/server.log of the home."
                )
            time.sleep(0.01)
        return _Running(server, thread, port)

    def _listen(self) -> socket.socket:
        last = self._read().get("port", 0)
        wishes = [self._port] if self._port else [port for port in (last, USUAL_PORT) if port] + [0]
        for wanted in wishes:
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((HOST, wanted))
            except OSError:
                listener.close()
                continue
            listener.listen(128)
            listener.set_inheritable(False)
            return listener
        raise PortTaken(
            f"Port {self._port} on {HOST} is taken by another program.",
            next_move="Choose another with TUNELOOP_AZURE_PORT (0 takes a free one).",
        )

    def _close(self, running: _Running) -> None:
        running.server.should_exit = True
        running.thread.join(STOP_SECONDS)
        if running.thread.is_alive():
            running.server.force_exit = True
            running.thread.join(STOP_SECONDS)

    def _write_config(self) -> None:
        """What `MLClient.from_config` reads: names that are any names, since one home is one workspace."""
        facts = {"subscription_id": SUBSCRIPTION, "resource_group": GROUP, "workspace_name": WORKSPACE}
        write_atomically(self._folder / "config.json", json.dumps(facts, indent=2) + "\n")

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads((self._folder / "listener.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, facts: dict[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        os.chmod(self._folder, 0o700)
        write_atomically(self._folder / "listener.json", json.dumps(facts))


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
