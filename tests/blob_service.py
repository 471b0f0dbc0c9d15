"""The blob service of the dialect over a home of its own, without TLS: its application and requests to it."""

from __future__ import annotations

import asyncio
import base64
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import urlencode
from xml.etree import ElementTree

import httpx
import pytest
from starlette.testclient import TestClient

from tests.fakes import FakeStore
from tuneloop.adapters.files import LocalFiles
from tuneloop.server.azure import create_gateway
from tuneloop.server.azure.blobs import sas
from tuneloop.server.azure.gateway import Gateway
from tuneloop.server.azure.tokens import Tokens
from tuneloop.server.parts import Parts

BASE = "https://127.0.0.1:8443"
UPLOADS = "/blob/store.blob.tuneloop.local/azureml-blobstore"
MADE = "/blob/store.blob.tuneloop.local/azureml"
BLOCK_BLOB = {"x-ms-blob-type": "BlockBlob", "x-ms-version": "2026-02-06"}
DIGEST = "ab" * 32


class Service:
    """The listener's application without its TLS, over a home of its own."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home = home
        self.files = LocalFiles(home)
        self.store = FakeStore()
        self.now = datetime(2026, 7, 1, 12, tzinfo=UTC)
        monkeypatch.setattr(Gateway, "now", lambda _gateway: self.now)
        parts = SimpleNamespace(files=self.files, store=self.store, started_at=self.now)
        secret = b"s" * 32
        self.gateway = Gateway(
            parts=cast(Parts, parts),
            base_url=BASE,
            folder=home / "azure",
            secret=secret,
            tokens=Tokens(secret, "home", BASE),
            identity_secret="identity",
        )
        self.app = create_gateway(self.gateway)
        self.http = TestClient(self.app, base_url=BASE, raise_server_exceptions=False)

    def sas(self, permissions: str = "racwdl", container: str = "azureml-blobstore", **more: Any) -> str:
        return sas.issue(self.gateway, container, permissions, seconds=more.pop("seconds", 3600), **more)

    def send(self, method: str, path: str, *, token: str | None = None, **more: Any) -> httpx.Response:
        """`path` as it goes over the wire, its query included."""
        token = self.sas() if token is None else token
        joined = f"{path}{'&' if '?' in path else '?'}{token}" if token else path
        return self.http.request(method, joined, **more)

    def put(self, name: str, content: bytes, **headers: str) -> httpx.Response:
        return self.send("PUT", f"{UPLOADS}/{name}", content=content, headers={**BLOCK_BLOB, **headers})

    def get(self, name: str, **more: Any) -> httpx.Response:
        return self.send("GET", f"{UPLOADS}/{name}", **more)

    def list(self, query: str = "", at: str = UPLOADS, token: str | None = None) -> list[str]:
        names: list[str] = []
        marker = ""
        while True:
            page = self.send("GET", f"{at}?restype=container&comp=list&marker={marker}{query}", token=token)
            assert page.status_code == 200, page.text
            tree = ElementTree.fromstring(page.text)
            blobs = tree.find("Blobs")
            assert blobs is not None
            names += [str(one.findtext("Name")) for one in blobs]
            marker = tree.findtext("NextMarker") or ""
            if not marker:
                return names

    def left(self) -> list[str]:
        """Files in the folder of blobs, what is committed and its facts left out."""
        root = self.home / "azure" / "blobs"
        found = [one.relative_to(root).as_posix() for one in root.rglob("*") if one.is_file()]
        return [one for one in found if one.split("/")[0] in ("uploads", "blocks")]


def refusal(answer: httpx.Response, status: int, code: str) -> str:
    """The message of an error in the service's own shape."""
    assert answer.status_code == status, (answer.status_code, answer.text)
    assert answer.headers["x-ms-error-code"] == code, answer.text
    assert answer.headers["x-ms-request-id"]
    assert answer.headers["content-type"].startswith("application/xml")
    tree = ElementTree.fromstring(answer.text)
    assert (tree.tag, tree.findtext("Code")) == ("Error", code)
    message = tree.findtext("Message")
    assert message
    return message


def block_id(number: int) -> str:
    return base64.b64encode(f"{number:06d}".encode()).decode()


def block_list(*numbers: int) -> bytes:
    inner = "".join(f"<Latest>{block_id(number)}</Latest>" for number in numbers)
    return f'<?xml version="1.0" encoding="utf-8"?><BlockList>{inner}</BlockList>'.encode()


def put_block(service: Service, name: str, number: int, content: bytes, token: str) -> httpx.Response:
    query = urlencode({"comp": "block", "blockid": block_id(number)})
    return service.send("PUT", f"{UPLOADS}/{name}?{query}", token=token, content=content)


def put_list(service: Service, name: str, numbers: tuple[int, ...], token: str, **headers: str) -> Any:
    path = f"{UPLOADS}/{name}?comp=blocklist"
    return service.send("PUT", path, token=token, content=block_list(*numbers), headers=headers)


def pieces(bodies: list[bytes], then: str = "end") -> Any:
    """An ASGI `receive` that gives these and then ends, leaves, or falls silent."""
    waiting = list(bodies)

    async def receive() -> dict[str, Any]:
        if waiting:
            body = waiting.pop(0)
            return {"type": "http.request", "body": body, "more_body": bool(waiting) or then != "end"}
        if then == "silence":
            await asyncio.sleep(3600)
        return {"type": "http.disconnect"}

    return receive


async def run_raw(
    service: Service, name: str, length: int, receive: Any, sent: list[Any], method: str = "PUT"
) -> None:
    """As it goes over the wire: no client has tidied up the address."""
    path = f"{UPLOADS}/{name}"
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": service.sas().encode(),
        "headers": [
            (b"host", b"127.0.0.1:8443"),
            (b"content-length", str(length).encode()),
            (b"x-ms-blob-type", b"BlockBlob"),
        ],
        "server": ("127.0.0.1", 8443),
        "scheme": "https",
    }

    async def send(message: Any) -> None:
        sent.append(message)

    await service.app(scope, receive, send)
