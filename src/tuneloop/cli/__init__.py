"""The command line: arguments to client to text. `main` is the entry point of the `tuneloop` command.

One module per noun, loaded only when its command is used: `tuneloop --help` imports click and nothing heavy.
Nothing here knows the workspace or an adapter; the server is found and started through `daemon`, everything
else goes over HTTP by `client`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and leave the process with its exit code."""
    try:
        # Here and not at the top: Ctrl-C while Python loads a command is told in a word, too.
        root = importlib.import_module("tuneloop.cli.root")
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    root.main(arguments)
