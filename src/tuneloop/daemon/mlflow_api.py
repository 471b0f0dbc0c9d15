"""The helper process that speaks MLflow's API for the Azure gateway, while it is asked for."""

from __future__ import annotations

import json
import signal
import threading
from datetime import UTC, datetime
from pathlib import Path

from tuneloop.core import settings as settings_module
from tuneloop.core.errors import TuneloopError
from tuneloop.core.types import ErrorInfo, ReadyFile


def speak_mlflow(folder: Path) -> int:
    """Serve until asked to end; the exit code."""
    from tuneloop.core.process import claim, write_atomically

    spec = json.loads((folder / "mlflow.json").read_text(encoding="utf-8"))
    if not claim(folder, spec["owner"]):
        return 0
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    from tuneloop.adapters.mlflow_api import serve

    def say_ready(port: int) -> None:
        ready = ReadyFile(address=f"http://127.0.0.1:{port}", at=datetime.now(UTC))
        write_atomically(folder / "ready.json", ready.model_dump_json())

    settings = settings_module.load(home=Path(spec["home"]))
    try:
        serve(settings.tracking_uri, settings.home / "mlflow" / "artifacts", spec["token"], say_ready, stop)
    except TuneloopError as mistake:
        error = ErrorInfo.model_validate(mistake.to_json())
        write_atomically(folder / "error.json", error.model_dump_json(exclude_none=True))
        return 1
    return 0
