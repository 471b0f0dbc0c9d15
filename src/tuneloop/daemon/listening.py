"""Sockets on loopback for the server's listeners."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from tuneloop.core.errors import PortTaken

HOST = "127.0.0.1"


def listen(ports: Sequence[int], setting: str) -> socket.socket:
    """On the first of `ports` that is free (0: any). Raises `PortTaken`, which names the setting."""
    for port in ports:
        # TCP by name: only then asyncio sets TCP_NODELAY, without which an answer takes 40 ms more.
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError:
            listener.close()
            continue
        listener.listen(128)
        listener.set_inheritable(False)
        return listener
    raise PortTaken(
        f"Port {ports[-1]} on {HOST} is taken by another program.",
        next_move=f"Choose another with {setting} (0 takes a free one).",
    )
