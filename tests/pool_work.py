"""Work for the pool's tests; here, because workers import it."""

from __future__ import annotations

import os
import signal
import threading

from tuneloop.core.errors import DataError


class Wait:
    def do(self, part: float) -> float:
        threading.Event().wait(part)
        return part


class Echo:
    def do(self, part: bytes) -> bytes:
        return part


class Pid:
    def do(self, part: bytes) -> int:
        return os.getpid()


class Fail:
    def do(self, part: str) -> str:
        if part == "refuse":
            raise DataError("row 7 is bad")
        if part == "defect":
            raise KeyError("nothing")
        if part == "exit":
            os._exit(5)
        if part == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return part
