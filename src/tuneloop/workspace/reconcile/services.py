"""The helper processes: one tracker while there is a server, one router while there are endpoints, and one
that speaks MLflow's API while somebody asks for it."""

from __future__ import annotations

import json
import logging
import math
import secrets
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from tuneloop.core.errors import NotFound, Stale
from tuneloop.core.ports import Clock, Executor, Files, Store
from tuneloop.core.states import SERVICE_MOVES, ServiceState, check_move
from tuneloop.core.types import EndpointRecord, Event, ServiceRecord
from tuneloop.workspace.reconcile.limits import backoff_seconds
from tuneloop.workspace.reconcile.replicas import MIRRORS, ROUTES
from tuneloop.workspace.reconcile.reports import read_error, read_ready
from tuneloop.workspace.reconcile.stopping import Stopper

log = logging.getLogger(__name__)

ServiceName = Literal["tracker", "router", "mlflow"]
MODULES: dict[ServiceName, str] = {
    "tracker": "tuneloop.daemon",
    "router": "tuneloop.serving.router",
    "mlflow": "tuneloop.daemon",
}
UNASKED_SECONDS = 600.0
"""So long after it was last asked for, `mlflow` ends: it holds some 250 MB."""
HEALTHY_SECONDS = 60.0
"""A service that ran this long has not failed to start: the next start is tried at once."""
KEPT_FOLDERS = 3


class Services:
    def __init__(
        self,
        store: Store,
        executor: Executor,
        files: Files,
        clock: Clock,
        home_id: str,
        router_port: int,
    ) -> None:
        self._store = store
        self._executor = executor
        self._files = files
        self._clock = clock
        self._home_id = home_id
        self._router_port = router_port
        self._stopper = Stopper(executor, clock, grace_seconds=10.0)
        self._started: dict[ServiceName, float] = {}
        self._failures: dict[ServiceName, int] = {}

    def tick(self) -> None:
        has_endpoints = bool(self._store.list(EndpointRecord, limit=1))
        self._keep("tracker", wanted=True)
        self._keep("router", wanted=has_endpoints)
        self._keep("mlflow", wanted=self._is_asked_for())

    def is_busy(self) -> bool:
        return bool(self._store.list(ServiceRecord, states=[ServiceState.CLAIMED], limit=1))

    def stop_all(self, *, kill: bool = False) -> bool:
        done = True
        for record in self._store.list(ServiceRecord):
            if record.state is ServiceState.STOPPED:
                continue
            if kill:
                self._executor.stop(self._owner(record), self._folder(record), kill=True)
            else:
                done &= self._stop(record)
        return done

    def _is_asked_for(self) -> bool:
        record = self._store.find(ServiceRecord, "mlflow")
        if record is None or record.asked_at is None:
            return False
        return (self._clock.now() - record.asked_at).total_seconds() < UNASKED_SECONDS

    def _keep(self, name: ServiceName, *, wanted: bool) -> None:
        try:
            record = self._store.find(ServiceRecord, name)
            if wanted and (record is None or record.state is ServiceState.STOPPED):
                self._claim(name, record)
            elif wanted and record is not None:
                self._observe(name, record)
            elif record is not None and record.state is not ServiceState.STOPPED:
                self._stop(record)
        except (Stale, NotFound) as lost:
            log.info("service %s: somebody else moved first: %s", name, lost)

    def _claim(self, name: ServiceName, record: ServiceRecord | None) -> None:
        starts = 1 if record is None else record.starts + 1
        folder = f"services/{name}/{starts}"
        if record is None:
            record = self._store.insert(
                ServiceRecord(created_at=self._clock.now(), name=name, starts=starts, folder=folder)
            )
        else:
            record = self._move(record, ServiceState.CLAIMED, starts=starts, folder=folder, process=None)
        self._forget(name, starts)
        self._started[name] = self._clock.monotonic()
        self._ensure(record)

    def _observe(self, name: ServiceName, record: ServiceRecord) -> None:
        folder = self._folder(record)
        status = self._executor.status(self._owner(record), folder)
        if status == "absent":
            self._ensure(record)
        elif status == "running" and record.state is ServiceState.CLAIMED:
            self._note_running(record, folder)
        elif status == "ended":
            self._replace(name, record, folder)

    def _note_running(self, record: ServiceRecord, folder: Path) -> None:
        identity = self._executor.identity(folder)
        if record.name == "tracker":
            self._move(record, ServiceState.RUNNING, process=identity, error=None)
            return
        ready = read_ready(folder)
        if ready is None:
            return
        # The port is kept: a router that replaces this one listens where its clients expect it.
        port = urlsplit(ready.address).port
        self._move(record, ServiceState.RUNNING, port=port, process=identity, error=None)

    def _replace(self, name: ServiceName, record: ServiceRecord, folder: Path) -> None:
        # One that an earlier server started is taken for one that ran long.
        ran_seconds = self._clock.monotonic() - self._started.get(name, -math.inf)
        if record.state is ServiceState.RUNNING or ran_seconds >= HEALTHY_SECONDS:
            self._failures[name] = 0
        if ran_seconds < backoff_seconds(self._failures.get(name, 0)):
            return
        self._failures[name] = self._failures.get(name, 0) + 1
        error = read_error(folder)
        log.warning("service %s ended; starting it again: %s", name, error.message if error else "no reason")
        self._append(name, "replaced")
        self._claim(name, self._store.update(record.model_copy(update={"error": error})))

    def _stop(self, record: ServiceRecord) -> bool:
        if not self._stopper.is_stopped(self._owner(record), self._folder(record)):
            return False
        self._move(record, ServiceState.STOPPED, process=None)
        return True

    def _ensure(self, record: ServiceRecord) -> None:
        folder = self._folder(record)
        spec = folder / f"{record.name}.json"
        # Its token is another one each time: what the process may have read already stands.
        if record.name != "mlflow" or not spec.exists():
            self._files.write_json(spec, json.dumps(self._spec(record)), private=True)
        self._executor.ensure(self._owner(record), folder, MODULES[record.name], {})

    def _spec(self, record: ServiceRecord) -> dict[str, str | int]:
        if record.name == "tracker":
            return {"owner": self._owner(record), "home": str(self._files.folder("."))}
        if record.name == "mlflow":
            # Every other program of this machine can reach its port.
            token = secrets.token_urlsafe(32)
            return {"owner": self._owner(record), "home": str(self._files.folder(".")), "token": token}
        return {
            "owner": self._owner(record),
            "port": record.port or self._router_port,
            "routes": str(self._files.folder(ROUTES) / "routes.json"),
            "demand": str(self._files.folder(ROUTES) / "demand.json"),
            "mirrors": str(self._files.folder(MIRRORS)),
        }

    def _forget(self, name: ServiceName, starts: int) -> None:
        old = starts - KEPT_FOLDERS
        if old > 0:
            self._files.remove(self._files.folder(f"services/{name}/{old}"))

    def _owner(self, record: ServiceRecord) -> str:
        return f"{self._home_id}/{record.name}/{record.starts}"

    def _folder(self, record: ServiceRecord) -> Path:
        return self._files.folder(record.folder)

    def _move(self, record: ServiceRecord, state: ServiceState, **changes: object) -> ServiceRecord:
        check_move(SERVICE_MOVES, f"Service {record.name}", record.state, state)
        return self._store.update(record.model_copy(update={"state": state, **changes}))

    def _append(self, name: str, what: str) -> None:
        self._store.append(Event(at=self._clock.now(), subject=f"service/{name}", what=what))
