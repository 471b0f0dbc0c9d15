"""`python -m tuneloop.steps.pool_worker FD`: does the parts that come over a socket, one after another.

Started by `pool`. First comes the work, then parts; each is answered by (True, what came of it) or by (False,
why it failed).
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any

from tuneloop.core.errors import TuneloopError


def main(arguments: list[str]) -> int:
    # The step is told to stop, and lets go of its workers; one that went first would look like one that died.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(int(arguments[0]))
    arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, arrived), daemon=True).start()
    work = arrived.get()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while True:
            connection.send(_do(work, arrived.get()))
    return 0


def _receive(connection: Connection, arrived: queue.SimpleQueue[Any]) -> None:
    """Beside the work: who sends must not wait for a part to be done, whose answer waits for who sends."""
    try:
        while True:
            arrived.put(connection.recv())
    except (EOFError, OSError):
        # Nobody is there any more to take an answer.
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _do(work: Any, part: Any) -> tuple[bool, Any]:
    try:
        return True, work.do(part)
    except TuneloopError as mistake:
        return False, {"error": mistake.to_json()}
    except Exception as defect:
        traceback.print_exc()
        return False, {"kind": type(defect).__name__, "text": f"{type(defect).__name__}: {defect}"}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
