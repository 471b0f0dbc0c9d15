"""Which machines take part in a run, and whether they are still there.

The first machine's launcher waits for the others', which prove that they hold the secret. Then each side
tells the other that it is there, once a second: who is silent for `SILENCE_SECONDS` is gone. A collective
alone would wait for it until its own timeout, minutes later, since a link that goes dark resets nothing.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from tuneloop import __version__
from tuneloop.core.errors import RankLost, Unavailable
from tuneloop.steps.launch.reports import Node
from tuneloop.steps.launch.wire import Channel, WrongSecret, welcome

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 10.0
CLOSED = "has closed the connection: its launcher ended"


class Link:
    """To the launcher of another node, over a channel of which both sides are known."""

    def __init__(self, channel: Channel, node: Node) -> None:
        self.node = node
        self.messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.lost: str | None = None
        """Why nothing more will come."""
        self._heard_at = time.monotonic()
        self._channel = channel
        self._is_closed = threading.Event()
        channel.wait_at_most(SILENCE_SECONDS)
        for work in (self._listen, self._beat):
            threading.Thread(target=work, daemon=True).start()

    @property
    def is_quiet(self) -> bool:
        """Overdue, and not yet given up."""
        return self.lost is None and time.monotonic() - self._heard_at > 3 * BEAT_SECONDS

    def send(self, message: dict[str, Any]) -> None:
        """What cannot be sent is told by `lost`, as the silence that it is."""
        try:
            self._channel.send(message)
        except OSError as error:
            self._lose(f"cannot be reached: {error}")

    def close(self) -> None:
        self._is_closed.set()
        self._channel.close()

    def _listen(self) -> None:
        try:
            while True:
                message = self._channel.receive()
                self._heard_at = time.monotonic()
                if message["type"] != "beat":
                    self.messages.put(message)
        except TimeoutError:
            self._lose(f"has not been heard for {SILENCE_SECONDS:g} s")
        except EOFError:
            self._lose(CLOSED)
        except (OSError, WrongSecret) as error:
            self._lose(f"cannot be heard: {error}")

    def _beat(self) -> None:
        while not self._is_closed.wait(BEAT_SECONDS) and self.lost is None:
            self.send({"type": "beat"})

    def _lose(self, why: str) -> None:
        if not self._is_closed.is_set() and self.lost is None:
            self.lost = why


def hello(number: int) -> dict[str, Any]:
    """What a guest says first. Machines of one run have equal versions, or their numbers would differ."""
    return {
        "type": "hello",
        "node": number,
        "host": socket.gethostname(),
        "versions": {"tuneloop": __version__, "torch": metadata.version("torch")},
    }


class Host:
    """`with Host(address, port, secret) as host: links = host.gather(...)`. Listens on that address alone."""

    def __init__(self, address: str, port: int, secret: str, say: Callable[[str], None]) -> None:
        """Raises `Unavailable` when the port cannot be had."""
        self._secret, self._say = secret, say
        self._links: dict[int, Link] = {}
        self._lock = threading.Lock()
        self.address = address
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            self._listener = socket.create_server((address, port), family=family, backlog=128)
        except OSError as error:
            raise Unavailable(
                f"{address}:{port}, where the other machines are to come, cannot be listened on: {error}.",
                next_move="Set TUNELOOP_NODE_PORT to a free port, and --join of the other machines to it.",
            ) from None
        self.port: int = self._listener.getsockname()[1]
        self._listener.settimeout(0.1)

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        for link in self._links.values():
            link.close()

    def gather(self, nodes: int, seconds: float) -> Sequence[Link]:
        """The links to nodes 1 to `nodes` - 1, in order. Raises `RankLost` with the names of those that have
        not come within so many seconds."""
        deadline = time.monotonic() + seconds
        while True:
            with self._lock:
                missing = [number for number in range(1, nodes) if not self._is_here(number)]
            if not missing:
                return [self._links[number] for number in range(1, nodes)]
            if time.monotonic() > deadline:
                raise self._absent(missing, nodes, seconds)
            with contextlib.suppress(TimeoutError):
                connection, _ = self._listener.accept()
                threading.Thread(target=self._welcome, args=(connection, nodes), daemon=True).start()

    def _is_here(self, number: int) -> bool:
        return number in self._links and self._links[number].lost is None

    def _absent(self, missing: Sequence[int], nodes: int, seconds: float) -> RankLost:
        names = ", ".join(f"node {number}" for number in missing)
        come = [str(link.node) for number, link in sorted(self._links.items()) if number not in missing]
        here = f" {', '.join(come)} came." if come else ""
        return RankLost(
            f"{names} of {nodes} did not come to {self.address}:{self.port} within {seconds:g} s.{here}",
            next_move=f"On each missing machine: python -m tuneloop.steps.launch --join "
            f"{self.address}:{self.port} --node-rank {missing[0]}",
            details={"missing": list(missing)},
        )

    def _welcome(self, connection: socket.socket, nodes: int) -> None:
        address = connection.getpeername()[0]
        try:
            channel = welcome(connection, self._secret)
            said = channel.receive()
        except (WrongSecret, OSError, EOFError, ValueError) as error:
            connection.close()
            self._say(f"{address} was turned away: {error or 'it went away'}")
            return
        node = Node(int(said["node"]), str(said["host"]), address)
        with self._lock:
            refused = self._why_not(said, nodes)
            if refused is None:
                self._links[node.number] = Link(channel, node)
        if refused is None:
            self._say(f"{node} is here")
        else:
            self._say(f"{node} was turned away: {refused}")
            with contextlib.suppress(OSError):
                channel.send({"type": "refused", "why": refused})
            channel.close()

    def _why_not(self, said: dict[str, Any], nodes: int) -> str | None:
        number = int(said["node"])
        if not 1 <= number < nodes:
            return f"this run has nodes 1 to {nodes - 1} beside the first, and it says that it is {number}"
        if self._is_here(number):
            return f"{self._links[number].node} is here already"
        own = hello(0)["versions"]
        if said.get("versions") != own:
            return f"it has {said.get('versions')}, and this machine has {own}: install the same"
        return None
