"""The tracker: the only writer to MLflow, and what brings the registry back from it."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from datetime import UTC, datetime
from pathlib import Path

from tuneloop.core import settings as settings_module
from tuneloop.core.settings import Settings, tracking_fingerprint
from tuneloop.daemon.clock import SystemClock

log = logging.getLogger("tuneloop.daemon")


def track(folder: Path) -> None:
    """Carry what happens to MLflow until asked to end; then once more, so that nothing is left waiting."""
    from tuneloop.core.process import claim, write_atomically

    spec = json.loads((folder / "tracker.json").read_text(encoding="utf-8"))
    # Before the heavy imports: who comes second should not take long to see it.
    if not claim(folder, spec["owner"]):
        return
    from tuneloop.adapters.files import LocalFiles
    from tuneloop.adapters.mlflow import open_server
    from tuneloop.adapters.sql import SqlStore
    from tuneloop.workspace.tracking import Tracker

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    settings = settings_module.load(home=Path(spec["home"]))
    store = SqlStore.open(settings.database)
    server = open_server(settings.tracking_uri, settings.home / "mlflow" / "artifacts")
    tracker = Tracker(store, LocalFiles(settings.home), server, SystemClock())
    fingerprint = tracking_fingerprint(settings, os.environ)
    told: tuple[str, ...] = ()
    lag_bytes = 0
    under_way: tuple[str, ...] = ()
    while True:
        is_last = stop.is_set()
        if _read(settings.home / "services" / "tracking") not in ("", fingerprint):
            log.warning("MLflow's address or credentials changed: another tracker takes over")
            return
        try:
            report = tracker.tick()
            problems, lag_bytes = tuple(report.problems), report.lag_bytes
            under_way = report.under_way
        except Exception as broken:
            log.exception("a round failed; the next one tries again")
            problems = (str(broken),)
        if problems != told:
            log.warning("%s", "; ".join(problems) or "MLflow answers again")
            told = problems
        state = {"at": datetime.now(UTC).isoformat(), "lag_bytes": lag_bytes, "problems": problems}
        state["under_way"] = under_way
        try:
            write_atomically(folder / "state.json", json.dumps(state))
        except OSError as broken:
            # A full disk, say: what is carried does not depend on what is told.
            log.warning("%s cannot be written: %s", folder / "state.json", broken)
        if is_last:
            return
        stop.wait(1.0)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def rebuild_registry(settings: Settings) -> list[str]:
    """For `doctor --fix`: models that MLflow's tags know and the store has lost come back; what was done."""
    from tuneloop.adapters.mlflow import open_server
    from tuneloop.adapters.sql import SqlStore
    from tuneloop.workspace.tracking import rebuild

    store = SqlStore.open(settings.database)
    try:
        server = open_server(settings.tracking_uri, settings.home / "mlflow" / "artifacts")
        return rebuild(store, server, SystemClock())
    finally:
        store.close()
