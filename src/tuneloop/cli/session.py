"""The door from a command to the server: settings, a client, and a server that is started when there is none.

The only module of the command line that reaches the heavy parts (`daemon`, `client`, process records), and it
does so when they are needed: a help page must not pay for them.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import tuneloop
from tuneloop.core import settings as settings_module
from tuneloop.core.errors import VersionMismatch
from tuneloop.core.settings import Settings

if TYPE_CHECKING:
    from tuneloop.client import Client, EndpointClient, Submission


@dataclass
class Session:
    """A command's connection. `client` is replaced when the server had to be started again."""

    settings: Settings
    client: Client

    def reconnect(self) -> None:
        """Start the server again: jobs and endpoints outlive it."""
        server = _daemon().ensure(self.settings)
        self.client.close()
        self.client = _client(server.url, server.token)


def connect() -> Session:
    """A session with this home's server, which is started when there is none.

    Raises `VersionMismatch` when another version of Tuneloop started it, unless a person at a terminal
    agrees to a restart.
    """
    settings = settings_module.load()
    found = _daemon().find(settings)
    if found is not None and found.version != tuneloop.__version__:
        _replace(settings, found)
        found = None
    server = found or _daemon().ensure(settings)
    if found is None:
        click.echo(
            f"Started the background server (pid {server.pid}); `{program()} down` stops it.", err=True
        )
    return Session(settings, _client(server.url, server.token))


def find() -> Session | None:
    """A session with this home's server, whatever its version, or None when there is none."""
    settings = settings_module.load()
    server = _daemon().find(settings)
    return None if server is None else Session(settings, _client(server.url, server.token))


def _replace(settings: Settings, server: Any) -> None:
    """Stop a server of another version, if the person agrees; jobs and endpoints go on meanwhile."""
    message = f"The background server is Tuneloop {server.version}, this command is {tuneloop.__version__}."
    restart = f"{program()} down --server-only && {program()} up"
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise VersionMismatch(message, next_move=f"Restart it (jobs and endpoints go on): {restart}")
    click.echo(message, err=True)
    if not click.confirm("Restart it in this version? Jobs and endpoints go on", default=True, err=True):
        raise VersionMismatch(message, next_move=f"When you are ready: {restart}")
    _client(server.url, server.token).shutdown("server")
    wait_until_gone([server.pid], seconds=20)


def endpoint_client(session: Session, name: str, deployment: str | None = None) -> EndpointClient:
    """A caller of one endpoint, with its primary key. Raises `NotFound`."""
    from tuneloop.client import EndpointClient

    endpoint = session.client.endpoint(name)
    caller = EndpointClient(endpoint, session.client.keys(name)["primary"], deployment=deployment)
    _close_at_the_end(caller)
    return caller


def prepared_home(settings: Settings) -> Path:
    """The home, made where it is missing. Raises `HomeUnusable` when it cannot be used by this version."""
    home: Path = _daemon().prepare_home(settings)
    return home


def submission(**fields: Any) -> Submission:
    """A recipe to submit from this process: its environment's allow-listed part goes along."""
    from tuneloop.client import Submission

    return Submission(environment=settings_module.passed_on(os.environ), **fields)


@dataclass(frozen=True)
class RecordedProcess:
    """A process that left its `process.json` in the home."""

    name: str
    """`step JOB/STEP (attempt 2)`, `replica demo/tuned/1`, `router`, ..."""
    folder: Path
    pid: int
    is_alive: bool


_RECORDS = ("jobs/*/*/*/process.json", "replicas/*/*/*/process.json", "services/**/process.json")


def recorded_processes(home: Path) -> list[RecordedProcess]:
    """Every step, replica and helper process that the home knows of, ended ones included."""
    from pydantic import ValidationError

    from tuneloop.core.process import is_alive
    from tuneloop.core.types import ProcessIdentity

    found = []
    for path in (path for pattern in _RECORDS for path in sorted(home.glob(pattern))):
        try:
            identity = ProcessIdentity.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValidationError):
            continue
        name = _process_name(path.parent.relative_to(home).parts)
        found.append(RecordedProcess(name, path.parent, identity.pid, is_alive(identity)))
    return found


def _process_name(parts: tuple[str, ...]) -> str:
    if parts[0] == "jobs" and len(parts) == 4:
        return f"step {parts[1]}/{parts[2]} (attempt {parts[3]})"
    if parts[0] == "replicas":
        return f"replica {'/'.join(parts[1:])}"
    return parts[1] if len(parts) > 1 else parts[0]


def wait_until_gone(pids: list[int], seconds: float) -> list[int]:
    """The pids that still run after at most `seconds`."""
    import psutil

    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return [process.pid for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def program() -> str:
    """How this command is typed from here: `tuneloop` when it is on the PATH, else its path."""
    started = Path(sys.argv[0])
    if started.name != "tuneloop":
        return "tuneloop"
    on_path = shutil.which("tuneloop")
    if on_path is not None and os.path.realpath(on_path) == os.path.realpath(started):
        return "tuneloop"
    try:
        relative = os.path.relpath(started)
        return shlex.quote(str(started.absolute()) if relative.startswith("..") else relative)
    except OSError:  # this folder was deleted
        return shlex.quote(str(started))


def pasteable(arguments: str) -> str:
    """A command line that works in any shell in this folder: with the home when it is not the default."""
    home = os.environ.get("TUNELOOP_HOME")
    prefix = f"TUNELOOP_HOME={shlex.quote(os.path.abspath(os.path.expanduser(home)))} " if home else ""
    return f"{prefix}{program()} {arguments}"


def _daemon() -> Any:
    """`tuneloop.daemon`, loaded when a server is needed."""
    from tuneloop import daemon

    return daemon


def _client(url: str, token: str) -> Client:
    from tuneloop.client import Client

    client = Client(url, token)
    _close_at_the_end(client)
    return client


def _close_at_the_end(connection: Client | EndpointClient) -> None:
    """When the command that runs now has ended."""
    context = click.get_current_context(silent=True)
    if context is not None:
        context.call_on_close(connection.close)
