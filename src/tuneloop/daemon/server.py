"""The server: adapters into the workspace, the workspace behind the routes, and the loop beside them."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneloop import __version__
from tuneloop.core import disk
from tuneloop.core.home import SCHEMA_VERSION, TokenFile, arrival, new_id, read_mark, settle
from tuneloop.core.machine import this_machine
from tuneloop.core.settings import Settings, tracking_fingerprint
from tuneloop.daemon.azure import AzureListener
from tuneloop.daemon.clock import SystemClock
from tuneloop.daemon.home import home_id, only_server, prepare_home
from tuneloop.daemon.listening import listen

if TYPE_CHECKING:
    from tuneloop.server.parts import Parts
    from tuneloop.workspace.reconcile import Reconciler

log = logging.getLogger("tuneloop.daemon")

STOP_TIMEOUT_SECONDS = 30.0


def serve(settings: Settings) -> None:
    """Run the server until it is asked to end, or until its home is not where it was."""
    from tuneloop.adapters.files import LocalFiles
    from tuneloop.core.process import write_atomically
    from tuneloop.server.home_watch import HomeWatch

    home = prepare_home(settings)
    # Steps, replicas and the tracker are started from here: they must mean the same home.
    os.environ["TUNELOOP_HOME"] = str(home)
    with disk.explained(home), only_server(home) as lock:
        _arrive(settings)
        LocalFiles(home).sweep()
        listener = _listen(settings, home)
        # A tracker of the last server goes on, until this is not what it was started with.
        write_atomically(home / "services" / "tracking", tracking_fingerprint(settings, os.environ))
        lifetime = Lifetime()
        parts, reconciler = assemble(settings, lifetime)
        thread = threading.Thread(target=reconciler.run, name="reconciler", daemon=True)
        azure = parts.azure
        assert isinstance(azure, AzureListener)
        azure.parts = parts
        azure.resume()
        _announce(home, listener)
        thread.start()
        watch = HomeWatch(home, lock, lambda: lifetime.shut_down("gone"))
        watch.start()
        try:
            lifetime.run(parts, listener)
        finally:
            watch.stop()
            azure.close()
            reconciler.stop()
            thread.join(timeout=10)
            if lifetime.mode == "all":
                _stop_everything(reconciler)
            if lifetime.mode == "gone":
                _end_all_of(parts.home_id)
            else:
                (home / "server.json").unlink(missing_ok=True)


def _arrive(settings: Settings) -> None:
    """The store in this code's schema, and what names the home by its path corrected where it was moved."""
    from tuneloop.adapters.local import LocalExecutor
    from tuneloop.adapters.relocation import relocate_mlflow
    from tuneloop.adapters.sql import SqlStore, schema_of
    from tuneloop.core.types import ServiceRecord

    home = settings.home
    mark = read_mark(home)
    assert mark is not None
    if schema_of(settings.database) not in (None, SCHEMA_VERSION):
        # A tracker that the last version left would write what that version knows.
        LocalExecutor().end_marked(f"{mark.id}/tracker/")
    store = SqlStore.open(settings.database)
    try:
        how = arrival(home, mark)
        if how != "same":
            count = relocate_mlflow(home / "mlflow" / "mlflow.db", Path(str(mark.place)), home)
            log.warning("the home was %s here from %s; %s places in MLflow corrected", how, mark.place, count)
        if how == "copied":
            # The original may be running: the copy takes a name and a port of its own, and no process of it.
            router = store.find(ServiceRecord, "router")
            if router is not None:
                store.update(router.model_copy(update={"port": None}))
            (home / "port").unlink(missing_ok=True)
            mark = settle(home, mark, id=new_id())
        settle(home, mark, place=str(home), schema=SCHEMA_VERSION)
    finally:
        store.close()


def _end_all_of(home_id: str) -> None:
    """By their mark: their folders are not where they were."""
    from tuneloop.adapters.local import LocalExecutor

    executor = LocalExecutor()
    deadline = time.monotonic() + 5.0
    executor.end_marked(f"{home_id}/")
    while time.monotonic() < deadline and _any_of(home_id):
        time.sleep(0.2)
    executor.end_marked(f"{home_id}/", kill=True)


def _any_of(home_id: str) -> bool:
    from tuneloop.adapters.local import LocalExecutor

    return LocalExecutor().count_marked(f"{home_id}/") > 0


class Lifetime:
    """Holds the web server, so that a request or a signal can end it."""

    def __init__(self) -> None:
        self.mode = "server"
        self.wake: threading.Event = threading.Event()
        self._server: Any = None

    def run(self, parts: Parts, listener: socket.socket) -> None:
        import uvicorn

        from tuneloop.server.app import create_app
        from tuneloop.server.connection import Connection

        config = uvicorn.Config(
            create_app(parts),
            http=Connection,
            ws="none",
            # Through our own formatter: what a caller wrote must not look like an entry.
            log_config=None,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=3,
            lifespan="off",
            server_header=False,
        )
        self._server = uvicorn.Server(config)
        self._server.run(sockets=[listener])

    def shut_down(self, mode: str) -> None:
        self.mode = mode
        if self._server is not None:
            self._server.should_exit = True


def assemble(settings: Settings, lifetime: Lifetime) -> tuple[Parts, Reconciler]:
    """Adapters into the workspace, the workspace into what the routes use."""
    from tuneloop.adapters.files import LocalFiles
    from tuneloop.adapters.gpus import gpus
    from tuneloop.adapters.local import LocalExecutor
    from tuneloop.adapters.sql import SqlStore
    from tuneloop.server.parts import Parts
    from tuneloop.workspace.catalog import Catalog
    from tuneloop.workspace.compute import Computes
    from tuneloop.workspace.data import Data
    from tuneloop.workspace.endpoints import Endpoints
    from tuneloop.workspace.jobs import Jobs
    from tuneloop.workspace.models import Models
    from tuneloop.workspace.reconcile import Reconciler
    from tuneloop.workspace.reconcile.limits import Limits

    home, machine = settings.home, this_machine()
    clock, files = SystemClock(), LocalFiles(home)
    executor = LocalExecutor(threads=machine.cores if machine.has_fewer_cores else None)
    store = SqlStore.open(settings.database)
    computes = Computes(store, clock)
    computes.declare_local(
        slots=settings.slots,
        cores=machine.cores,
        memory_bytes=settings.claimable_bytes(machine.memory_bytes),
        devices=gpus(),
        limited_by=machine.limited_by,
    )
    catalog, data = Catalog(store, clock), Data(store, files, clock)
    models = Models(store, files, clock)
    token = TokenFile(home / "token")
    secret = (home / "secret").read_text(encoding="utf-8").strip().encode()
    reconciler = Reconciler(
        store,
        executor,
        files,
        clock,
        home_id=home_id(home),
        router_port=settings.router_port,
        limits=Limits(max_attempts=settings.max_attempts),
    )
    parts = Parts(
        settings=settings,
        home_id=home_id(home),
        token=token.read(),
        current_token=token.read,
        started_at=clock.now(),
        store=store,
        files=files,
        executor=executor,
        catalog=catalog,
        computes=computes,
        data=data,
        jobs=Jobs(store, files, clock, catalog, data),
        models=models,
        endpoints=Endpoints(store, clock, models, secret, catalog),
        wake=reconciler.wake,
        azure=AzureListener(home, secret, port=settings.azure_port, is_loose=settings.azure_loose),
        shut_down=lifetime.shut_down,
    )
    return parts, reconciler


def _listen(settings: Settings, home: Path) -> socket.socket:
    """The port that was set, else the one this home had last, else a free one."""
    wishes = [settings.port] if settings.port else [_last_port(home), 0]
    return listen(wishes, "TUNELOOP_PORT")


def _last_port(home: Path) -> int:
    try:
        return int((home / "port").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return 0


def _announce(home: Path, listener: socket.socket) -> None:
    from tuneloop.core.process import write_atomically

    port = listener.getsockname()[1]
    facts = {"pid": os.getpid(), "port": port, "version": __version__, "started_at": time.time()}
    facts["home"] = str(home)
    write_atomically(home / "port", str(port))
    write_atomically(home / "server.json", json.dumps(facts), private=True)


def _stop_everything(reconciler: Reconciler) -> None:
    deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        if reconciler.stop_everything():
            return
        time.sleep(0.1)
    reconciler.kill_everything()
