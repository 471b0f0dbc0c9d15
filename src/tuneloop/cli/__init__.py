"""The command line: arguments to client to text. `main` is the entry point of the `tuneloop` command.

One module per noun, loaded only when its command is used: `tuneloop --help` imports click and nothing heavy.
Nothing here knows the workspace or an adapter; the server is found and started through `daemon`, everything
else goes over HTTP by `client`.
"""

from tuneloop.cli.root import main

__all__ = ["main"]
