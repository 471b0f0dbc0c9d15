"""Messages between launchers: JSON over TCP, from and to those alone who hold the run's secret.

Both sides prove that they know the secret by an HMAC over two fresh numbers (RFC 2104); every later message
carries an HMAC over its direction, its number and its text, so that none is forged, repeated or left out.
Nothing is encrypted: a message holds paths, addresses and errors, and never the secret.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import secrets
import socket
import struct
import threading
from typing import Any

GREETING = b"tuneloop-nodes/1"
NONCE_BYTES = MAC_BYTES = 32
MOST_BYTES = 1 << 20
HANDSHAKE_SECONDS = 5.0


class WrongSecret(Exception):
    """The other side does not hold this run's secret, or is no launcher."""


class Channel:
    """One side of a connection whose other side is known. Raises `OSError` (`TimeoutError` after silence),
    `EOFError` when the other side is gone, and `WrongSecret` for a message that it did not write."""

    def __init__(self, connection: socket.socket, key: bytes, *, is_host: bool) -> None:
        self._connection, self._key = connection, key
        self._own, self._other = (b"host", b"guest") if is_host else (b"guest", b"host")
        self._sent = self._received = 0
        self._writing = threading.Lock()
        self.own_address: str = connection.getsockname()[0]
        self.other_address: str = connection.getpeername()[0]

    def send(self, message: dict[str, Any]) -> None:
        text = json.dumps(message).encode()
        with self._writing:
            mac = self._mac(self._own, self._sent, text)
            self._sent += 1
            self._connection.sendall(struct.pack("!I", len(text)) + mac + text)

    def receive(self) -> dict[str, Any]:
        (size,) = struct.unpack("!I", _read(self._connection, 4))
        if size > MOST_BYTES:
            raise WrongSecret(f"a message of {size} bytes; at most {MOST_BYTES} are read")
        mac, text = _read(self._connection, MAC_BYTES), _read(self._connection, size)
        if not hmac.compare_digest(mac, self._mac(self._other, self._received, text)):
            raise WrongSecret("a message that the other side did not write")
        self._received += 1
        message: dict[str, Any] = json.loads(text)
        return message

    def wait_at_most(self, seconds: float) -> None:
        self._connection.settimeout(seconds)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _mac(self, sender: bytes, number: int, text: bytes) -> bytes:
        return hmac.digest(self._key, sender + struct.pack("!Q", number) + text, hashlib.sha256)


def welcome(connection: socket.socket, secret: str) -> Channel:
    """The host's side of a connection that has just been accepted. Raises `WrongSecret`, `OSError`,
    `EOFError`."""
    connection.settimeout(HANDSHAKE_SECONDS)
    mine = secrets.token_bytes(NONCE_BYTES)
    connection.sendall(GREETING + mine)
    theirs, proof = _read(connection, NONCE_BYTES), _read(connection, MAC_BYTES)
    if not hmac.compare_digest(proof, _proof(secret, b"guest", mine, theirs)):
        raise WrongSecret("it does not hold this run's secret")
    connection.sendall(_proof(secret, b"host", mine, theirs))
    return Channel(connection, _proof(secret, b"session", mine, theirs), is_host=True)


def call(address: str, port: int, secret: str, source: str | None = None) -> Channel:
    """The guest's side. Raises `WrongSecret` when the host does not know the secret either, `OSError`."""
    bound = None if source is None else (source, 0)
    connection = socket.create_connection((address, port), timeout=HANDSHAKE_SECONDS, source_address=bound)
    try:
        if _read(connection, len(GREETING)) != GREETING:
            raise WrongSecret(f"{address}:{port} is no launcher of Tuneloop, or one of another version")
        theirs = _read(connection, NONCE_BYTES)
        mine = secrets.token_bytes(NONCE_BYTES)
        connection.sendall(mine + _proof(secret, b"guest", theirs, mine))
        try:
            proof = _read(connection, MAC_BYTES)
        except (EOFError, ConnectionResetError):
            proof = b""
        if not hmac.compare_digest(proof, _proof(secret, b"host", theirs, mine)):
            raise WrongSecret(f"{address}:{port} holds another secret")
        return Channel(connection, _proof(secret, b"session", theirs, mine), is_host=False)
    except BaseException:
        connection.close()
        raise


def _proof(secret: str, what: bytes, host: bytes, guest: bytes) -> bytes:
    return hmac.digest(secret.encode(), GREETING + what + host + guest, hashlib.sha256)


def _read(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(size - len(parts))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)
