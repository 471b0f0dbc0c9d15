"""Who may speak to the API: whoever holds the token, from this machine, and not through a foreign web page.

The token is worth a shell: a recipe may name any file that its owner can read. It lies in a file that only
its owner can read. Host and Origin are checked against DNS rebinding and cross-site requests.
"""

from __future__ import annotations

import hmac
import json
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from tuneloop.core.errors import ForeignCaller, NotAllowed, TuneloopError

LOCAL_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})
OPEN_PATHS = frozenset({"/api/health"})


class Guard:
    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        refusal = self._refusal(scope["path"], headers)
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await _answer(refusal, send)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> TuneloopError | None:
        host = headers.get(b"host", b"").decode("latin-1")
        if _name_of(f"//{host}") not in LOCAL_NAMES:
            return ForeignCaller(f"Host {host!r} is not this machine; use 127.0.0.1 or localhost.")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and _name_of(origin) not in LOCAL_NAMES:
            return ForeignCaller(f"Requests from pages of {origin!r} are not answered.")
        if path in OPEN_PATHS or self._has_token(headers.get(b"authorization", b"")):
            return None
        return NotAllowed(
            "The API needs the token of this home.",
            next_move="Send 'Authorization: Bearer <token>'; the token is in the file 'token' of the home.",
        )

    def _has_token(self, header: bytes) -> bool:
        scheme, _, given = header.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._token)


def _name_of(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


async def _answer(error: TuneloopError, send: Send) -> None:
    body = json.dumps({"error": error.to_json()}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.http_status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
