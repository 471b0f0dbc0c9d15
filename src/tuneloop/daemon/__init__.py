"""The background server and the tracker: the only place where adapters meet the workspace.

    python -m tuneloop.daemon            the server of TUNELOOP_HOME, in the foreground
    python -m tuneloop.daemon DIR        the tracker; started by the reconciler with its folder

`find` and `ensure` are how the command line reaches the server of a home, starting it when there is none.
"""

from tuneloop.daemon.clock import SystemClock
from tuneloop.daemon.finding import Server, ensure, find, started
from tuneloop.daemon.home import is_locked, only_server, prepare_home, schema_of
from tuneloop.daemon.server import Lifetime, assemble

__all__ = [
    "Lifetime",
    "Server",
    "SystemClock",
    "assemble",
    "ensure",
    "find",
    "is_locked",
    "only_server",
    "prepare_home",
    "schema_of",
    "started",
]
