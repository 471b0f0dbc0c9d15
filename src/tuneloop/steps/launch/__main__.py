"""`python -m tuneloop.steps.launch --join HOST:PORT --node-rank N`: what the other machines of a training run
keep running. It waits for the first machine's steps, starts this machine's processes for each, and ends them
when any of the others is gone.

TUNELOOP_NODE_SECRET holds the secret of the first machine. The home lies on storage that all machines share,
under the same path. Exit codes: 0 done (with --once), 1 a run failed (with --once), 2 wrong usage,
5 another secret, 143 told to end.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from tuneloop.core.errors import NotAllowed, TuneloopError, Unsupported, UsageError
from tuneloop.steps.launch.group import Ended, Group
from tuneloop.steps.launch.nodes import CLOSED, Link, hello
from tuneloop.steps.launch.reports import Failure, Node, Run, read_run
from tuneloop.steps.launch.settings import addresses, weak_secret
from tuneloop.steps.launch.wire import WrongSecret, call

POLL_SECONDS = 0.1
RETRY_SECONDS = 1.0
FOLDER_SECONDS = 5.0
"""How long shared storage may take to show what another machine wrote."""


class Told(BaseException):
    """SIGTERM or Ctrl-C arrived."""


def main(arguments: Sequence[str]) -> int:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _end)
    try:
        guest = Guest.of(_parse(arguments), os.environ)
        return guest.attend()
    except TuneloopError as error:
        _say(f"error: {error}")
        return error.exit_code
    except Told:
        return 143


def _end(_signal: int, _frame: FrameType | None) -> NoReturn:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    raise Told


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tuneloop.steps.launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--join", required=True, metavar="HOST:PORT", help="where the first machine waits")
    parser.add_argument(
        "--node-rank", type=int, help="this machine's number, from 1 (TUNELOOP_NODE_RANK, SLURM_NODEID)"
    )
    parser.add_argument("--interface", help="the network interface to go through, such as eth0")
    parser.add_argument("--once", action="store_true", help="end after one run")
    return parser.parse_args(arguments)


class Guest:
    """The launcher of a machine that is not the first."""

    def __init__(
        self,
        address: str,
        port: int,
        number: int,
        secret: str,
        source: str | None = None,
        *,
        once: bool = False,
    ) -> None:
        self._address, self._port, self._number = address, port, number
        self._secret, self._source, self._once = secret, source, once
        self._ended: Ended | None = None

    @staticmethod
    def of(options: argparse.Namespace, environment: Mapping[str, str]) -> Guest:
        """Raises `UsageError` for what cannot be meant."""
        host, _, port = options.join.rpartition(":")
        if not host or not port.isdigit():
            raise UsageError(f"--join is {options.join!r}; expected HOST:PORT, such as 10.0.0.1:29471.")
        secret = environment.get("TUNELOOP_NODE_SECRET", "")
        for reason in weak_secret(secret):
            raise UsageError(reason)
        number = options.node_rank
        if number is None:
            written = environment.get("TUNELOOP_NODE_RANK") or environment.get("SLURM_NODEID") or ""
            number = int(written) if written.isdigit() else 0
        if number < 1:
            raise UsageError(f"--node-rank is {number}; expected 1 or more: 0 is the machine with the home.")
        source = None if options.interface is None else _address_on(options.interface)
        return Guest(host.strip("[]"), int(port), number, secret, source, once=options.once)

    def attend(self) -> int:
        """Run after run, until told to end."""
        is_told = False
        while True:
            link = self._connect()
            if link is None:
                if not is_told:
                    _say(f"waiting for a run at {self._address}:{self._port}")
                is_told = True
                time.sleep(RETRY_SECONDS)
                continue
            is_told = False
            self._take_part(link)
            if self._once and self._ended is not None:
                return 1 if self._ended.failures else 0

    def _connect(self) -> Link | None:
        try:
            channel = call(self._address, self._port, self._secret, self._source)
        except WrongSecret as error:
            raise NotAllowed(
                f"{error}.", next_move="Set TUNELOOP_NODE_SECRET to what the first machine has."
            ) from None
        except (OSError, EOFError):
            return None
        self._own_address = channel.own_address
        link = Link(channel, Node(0, self._address, channel.other_address))
        link.send(hello(self._number))
        _say(f"joined {self._address}:{self._port} as node {self._number}, from {channel.own_address}")
        return link

    def _take_part(self, link: Link) -> None:
        """Until the first machine has no more for this one to do."""
        part = Part(link, self._number)
        try:
            while link.lost is None or not link.messages.empty():
                while not link.messages.empty():
                    part.hear(link.messages.get())
                part.look()
                time.sleep(POLL_SECONDS)
            # At the end of a step the first machine hangs up.
            if part.is_running or link.lost != CLOSED:
                _say(f"{link.node} {link.lost}: no process of this machine goes on")
            if part.is_running:
                part.lose(str(link.lost))
        finally:
            part.end()
            link.close()
            self._ended = part.ended or self._ended


class Part:
    """This machine's part in the runs of one connection."""

    def __init__(self, link: Link, number: int) -> None:
        self._link, self._number = link, number
        self._group: Group | None = None
        self._started: set[int] = set()
        self.ended: Ended | None = None
        """How the last run came out here."""

    @property
    def is_running(self) -> bool:
        return self._group is not None and self.ended is None

    def hear(self, message: Mapping[str, Any]) -> None:
        if message["type"] == "refused":
            raise Unsupported(f"The first machine turned this one away: {message['why']}.")
        if message["type"] == "run":
            self._begin(Path(message["folder"]), Run.from_json(message["run"]))
        elif message["type"] == "end":
            self.end()

    def _begin(self, folder: Path, run: Run) -> None:
        self.end()
        self.ended, self._started = None, set()
        if not _is_shared(folder, run):
            self._tell(run, Ended((_not_shared(folder, self._number, run),)))
            return
        _say(f"{folder}: starting {run.processes} of {run.world} processes")
        self._group = Group(folder, run, self._number)

    def look(self) -> None:
        if self._group is None or self.ended is not None:
            return
        started = set(self._group.reports())
        if started != self._started:
            self._started = started
            self._link.send({"type": "started", "token": self._group.run.token, "ranks": sorted(started)})
        ended = self._group.poll()
        if ended is not None:
            self._tell(self._group.run, ended)

    def _tell(self, run: Run, ended: Ended) -> None:
        self.ended = ended
        failures = [failure.to_json() for failure in ended.failures]
        self._link.send({"type": "ended", "token": run.token, "failures": failures})
        for failure in ended.failures:
            who = run.nodes[failure.node] if failure.rank is None else run.describe(failure.rank)
            _say(f"{who} {failure.what}")

    def lose(self, why: str) -> None:
        """The run ends here for a reason of the first machine's."""
        self.ended = Ended((Failure(0, why),))

    def end(self) -> None:
        """No process of this machine is left."""
        if self._group is not None:
            if self.ended is None:
                self.ended = Ended((Failure(0, "has ended the run"),))
            self._group.kill()
            self._group = None


def _is_shared(folder: Path, run: Run) -> bool:
    deadline = time.monotonic() + FOLDER_SECONDS
    while True:
        found = read_run(folder)
        if found is not None and found.token == run.token:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)


def _not_shared(folder: Path, number: int, run: Run) -> Failure:
    error = Unsupported(
        f"{run.nodes[number]} does not see {folder} as {run.nodes[0]} does.",
        next_move="Put the home on storage that all machines share, under the same path on each.",
    )
    return Failure(number, f"failed: {error.message}", error=error.to_json())


def _address_on(interface: str) -> str:
    here = [address for address, name in addresses().items() if name == interface]
    if not here:
        raise UsageError(
            f"--interface is {interface!r}; this machine has {', '.join(sorted(set(addresses().values())))}."
        )
    return min(here, key=lambda address: ":" in address)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"{socket.gethostname()}: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
