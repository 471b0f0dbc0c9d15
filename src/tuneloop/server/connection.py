"""One connection to the API: it may not dawdle, and what is not HTTP is answered in our shape.

uvicorn cuts a connection that is idle after an answer, but waits for ever for a first request, or for the
rest of one whose head drips in. A few hundred of those and nobody else gets in.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tuneloop.core.errors import UsageError
from tuneloop.server.security import HEADERS, error_json

HEAD_SECONDS = 15.0
"""From the beginning of a connection, or the end of an answer, to the end of the next request's head."""


class Connection(H11Protocol):
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_a_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        before: Any = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._expect_nothing()

    def on_response_complete(self) -> None:
        # First, because the next request may already wait in the buffer; it is read by what follows.
        self._expect_a_head()
        super().on_response_complete()

    def told(self, mistake: str) -> bytes:
        """The body of a refusal of what is not HTTP."""
        return error_json(UsageError(mistake))

    def send_400_response(self, msg: str) -> None:
        body = self.told(msg)
        kind = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        head = h11.Response(
            status_code=400, reason=b"Bad Request", headers=[*kind, (b"connection", b"close"), *HEADERS]
        )
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _expect_a_head(self) -> None:
        self._expect_nothing()
        self._deadline = self.loop.call_later(HEAD_SECONDS, self._too_slow)

    def _expect_nothing(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        self.transport.close()
