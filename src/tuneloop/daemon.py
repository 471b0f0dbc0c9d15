"""The background server and the tracker: the only place where adapters meet the workspace.

    python -m tuneloop.daemon            the server of TUNELOOP_HOME, in the foreground
    python -m tuneloop.daemon DIR        the tracker; started by the reconciler with its folder

`find` and `ensure` are how the command line reaches the server of a home, starting it when there is none.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tuneloop import __version__
from tuneloop.core import settings as settings_module
from tuneloop.core.errors import HomeUnusable, PortTaken, ServerUnreachable, TuneloopError
from tuneloop.core.settings import Settings

if TYPE_CHECKING:
    from tuneloop.server.parts import Parts
    from tuneloop.workspace.reconcile import Reconciler

log = logging.getLogger("tuneloop.daemon")

START_TIMEOUT_SECONDS = 60.0
STOP_TIMEOUT_SECONDS = 30.0


# ---------------------------------------------------------------- finding and starting the server


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    url: str
    token: str
    version: str
    pid: int


def find(settings: Settings) -> Server | None:
    """The running server of this home, or None. Quick: one look at a file and one request to loopback."""
    try:
        facts = json.loads((settings.home / "server.json").read_text(encoding="utf-8"))
        token = (settings.home / "token").read_text(encoding="utf-8").strip()
        home_id = json.loads((settings.home / "home.json").read_text(encoding="utf-8"))["id"]
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, KeyError):
        return None
    url = f"http://127.0.0.1:{facts['port']}"
    health = _health(url)
    if health is None or health.get("home_id") != home_id:
        return None
    return Server(url=url, token=token, version=str(health["version"]), pid=int(health["pid"]))


def ensure(settings: Settings) -> Server:
    """The server of this home, started in the background when there is none. Two callers at once get the same
    one. Raises `ServerUnreachable` with the end of its log when it does not come up."""
    found = find(settings)
    if found is not None:
        return found
    home = prepare_home(settings)
    log_path = home / "logs" / "server.log"
    begin = log_path.stat().st_size if log_path.exists() else 0
    child = _spawn(settings, log_path)
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        found = find(settings)
        if found is not None:
            return found
        # Another caller's server may hold the home; then our child has ended and theirs comes up.
        if child.poll() is not None and not _is_locked(home):
            break
        time.sleep(0.05)
    raise _did_not_start(log_path, begin)


def _health(url: str) -> dict[str, Any] | None:
    try:
        # A proxy of the environment is not asked for the way to our own machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{url}/api/health", timeout=2) as answer:
            read: dict[str, Any] = json.load(answer)
            return read
    except (OSError, urllib.error.URLError, json.JSONDecodeError):
        return None


def _spawn(settings: Settings, log_path: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "TUNELOOP_HOME": str(settings.home), "PYTHONUNBUFFERED": "1"}
    with open(log_path, "ab") as output:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "tuneloop.daemon"],
            cwd=settings.home,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    # Kept, so that Python does not warn of a child that is meant to outlive us.
    _started.append(child)
    return child


_started: list[subprocess.Popen[bytes]] = []


def _did_not_start(log_path: Path, begin: int) -> ServerUnreachable:
    with open(log_path, "rb") as handle:
        handle.seek(begin)
        lines = handle.read().decode("utf-8", "replace").strip().splitlines()
    reason = lines[-1].removeprefix("error: ") if lines else "it said nothing"
    return ServerUnreachable(
        f"The server did not start: {reason}", next_move=f"Its log: {log_path}. Also try: tuneloop doctor"
    )


# ---------------------------------------------------------------- the home


def prepare_home(settings: Settings) -> Path:
    """Make what is missing of the home. Raises `HomeUnusable` when it cannot be written."""
    home = settings.home
    try:
        for folder in (home, *(home / name for name in ("logs", "jobs", "services", "cache", "mlflow"))):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _secret_file(home / "token", secrets.token_urlsafe(32))
        _secret_file(home / "secret", secrets.token_hex(32))
        _secret_file(home / "home.json", json.dumps({"id": secrets.token_hex(8), "format": 1}))
    except (FileExistsError, NotADirectoryError):
        raise HomeUnusable(
            f"The home {home} is not a folder, or lies in what is none.",
            next_move="Choose a folder with TUNELOOP_HOME.",
        ) from None
    except OSError as broken:
        raise HomeUnusable(
            f"The home {home} cannot be written: {broken.strerror}.",
            next_move="Make it writable, or choose another with TUNELOOP_HOME.",
        ) from broken
    return home


def _secret_file(path: Path, text: str) -> None:
    """Owner-only, and written whole or not at all; of two writers at once the first wins."""
    if path.exists():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    with contextlib.suppress(FileExistsError):
        os.link(temporary, path)
    temporary.unlink()


def _home_id(home: Path) -> str:
    return str(json.loads((home / "home.json").read_text(encoding="utf-8"))["id"])


def _is_locked(home: Path) -> bool:
    with open(home / "server.lock", "a", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        return False


@contextlib.contextmanager
def _only_server(home: Path) -> Iterator[IO[str]]:
    """One server per home; a second one ends with a sentence."""
    with open(home / "server.lock", "a", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise HomeUnusable(
                f"A server of the home {home} is running already.", next_move="See: tuneloop status"
            ) from None
        yield handle


# ---------------------------------------------------------------- the server


def serve(settings: Settings) -> None:
    """Run the server until it is asked to end."""
    home = prepare_home(settings)
    # Steps, replicas and the tracker are started from here: they must mean the same home.
    os.environ["TUNELOOP_HOME"] = str(home)
    with _only_server(home):
        listener = _listen(settings, home)
        lifetime = _Lifetime()
        parts, reconciler = assemble(settings, lifetime)
        thread = threading.Thread(target=reconciler.run, name="reconciler", daemon=True)
        _announce(home, listener)
        thread.start()
        try:
            lifetime.run(parts, listener)
        finally:
            reconciler.stop()
            thread.join(timeout=10)
            if lifetime.mode == "all":
                _stop_everything(reconciler)
            (home / "server.json").unlink(missing_ok=True)


class _Lifetime:
    """Holds the web server, so that a request or a signal can end it."""

    def __init__(self) -> None:
        self.mode = "server"
        self.wake: threading.Event = threading.Event()
        self._server: Any = None

    def run(self, parts: Parts, listener: socket.socket) -> None:
        import uvicorn

        from tuneloop.server.app import create_app

        config = uvicorn.Config(
            create_app(parts),
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


def assemble(settings: Settings, lifetime: _Lifetime) -> tuple[Parts, Reconciler]:
    """Adapters into the workspace, the workspace into what the routes use."""
    import psutil

    from tuneloop.adapters.files import LocalFiles
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

    home = settings.home
    clock, files, executor = SystemClock(), LocalFiles(home), LocalExecutor()
    store = SqlStore.open(settings.database)
    computes = Computes(store, clock)
    computes.declare_local(
        slots=settings.slots,
        cores=len(psutil.Process().cpu_affinity() or [0])
        if hasattr(psutil.Process, "cpu_affinity")
        else os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
    )
    catalog, data = Catalog(store, clock), Data(store, files, clock)
    models = Models(store, files, clock)
    secret = (home / "secret").read_text(encoding="utf-8").strip().encode()
    reconciler = Reconciler(
        store,
        executor,
        files,
        clock,
        home_id=_home_id(home),
        router_port=settings.router_port,
        limits=Limits(max_attempts=settings.max_attempts),
    )
    parts = Parts(
        settings=settings,
        home_id=_home_id(home),
        token=(home / "token").read_text(encoding="utf-8").strip(),
        started_at=clock.now(),
        store=store,
        files=files,
        executor=executor,
        catalog=catalog,
        computes=computes,
        data=data,
        jobs=Jobs(store, files, clock, catalog, data),
        models=models,
        endpoints=Endpoints(store, clock, models, secret),
        wake=reconciler.wake,
        shut_down=lifetime.shut_down,
    )
    return parts, reconciler


class SystemClock:
    """UTC, as the machine tells it."""

    def now(self) -> datetime:
        return datetime.now(UTC)


def _listen(settings: Settings, home: Path) -> socket.socket:
    """The port that was set, else the one this home had last, else a free one."""
    wanted = settings.port or _last_port(home)
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", wanted))
    except OSError:
        if settings.port:
            raise PortTaken(
                f"Port {wanted} on 127.0.0.1 is taken by another program.",
                next_move="Choose another with TUNELOOP_PORT (0 takes a free one).",
            ) from None
        listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    listener.set_inheritable(False)
    return listener


def _last_port(home: Path) -> int:
    try:
        return int((home / "port").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return 0


def _announce(home: Path, listener: socket.socket) -> None:
    from tuneloop.core.process import write_atomically

    port = listener.getsockname()[1]
    facts = {"pid": os.getpid(), "port": port, "version": __version__, "started_at": time.time()}
    write_atomically(home / "port", str(port))
    write_atomically(home / "server.json", json.dumps(facts), private=True)


def _stop_everything(reconciler: Reconciler) -> None:
    deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        if reconciler.stop_everything():
            return
        time.sleep(0.1)
    reconciler.kill_everything()


# ---------------------------------------------------------------- the tracker


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
    told: tuple[str, ...] = ()
    lag_bytes = 0
    while True:
        is_last = stop.is_set()
        try:
            report = tracker.tick()
            problems, lag_bytes = tuple(report.problems), report.lag_bytes
        except Exception as broken:
            log.exception("a round failed; the next one tries again")
            problems = (str(broken),)
        if problems != told:
            log.warning("%s", "; ".join(problems) or "MLflow answers again")
            told = problems
        state = {"at": datetime.now(UTC).isoformat(), "lag_bytes": lag_bytes, "problems": problems}
        write_atomically(folder / "state.json", json.dumps(state))
        if is_last:
            return
        stop.wait(1.0)


def main(arguments: list[str]) -> int:
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        if arguments:
            track(Path(arguments[0]).resolve())
        else:
            serve(settings_module.load())
    except TuneloopError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return mistake.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
