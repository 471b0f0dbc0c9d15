"""The processes that this package is: see its docstring."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

from tuneloop.core import settings as settings_module
from tuneloop.core.errors import TuneloopError
from tuneloop.core.plain import LogFormatter
from tuneloop.daemon.mlflow_api import speak_mlflow
from tuneloop.daemon.server import serve
from tuneloop.daemon.tracker import rebuild_registry, track


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def main(arguments: list[str]) -> int:
    # Everything that is written from here on, by whatever is started from here, is its owner's alone.
    os.umask(0o077)
    _log_to_stderr()
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        if arguments == ["--rebuild-registry"]:
            print(json.dumps(rebuild_registry(settings_module.load())))
        elif arguments and (Path(arguments[0]) / "mlflow.json").exists():
            return speak_mlflow(Path(arguments[0]).resolve())
        elif arguments:
            track(Path(arguments[0]).resolve())
        else:
            serve(settings_module.load())
    except TuneloopError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return mistake.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
