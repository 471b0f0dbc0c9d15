"""`tuneloop mlflow`: MLflow's own pages on this workspace, in the foreground."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import click

from tuneloop.cli import checks, output, session
from tuneloop.core import settings as settings_module
from tuneloop.core.errors import NotFound, PortTaken, StepFailed

ENVIRONMENT = {
    # Nothing about this workspace is told to anybody.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    # Job execution would start eight more processes that a reader of pages has no use for.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "PYTHONWARNINGS": "ignore",
}
"""What MLflow's server gets besides the environment of the command."""

START_SECONDS = 120.0
DATABASE_SECONDS = 60.0
"""The tracker makes the database when the background server starts; that takes it some seconds."""
STOP_SECONDS = 20.0

RUNS = "#/experiments?workflowType=machine_learning"
"""Where runs and curves are: MLflow's first page is about agents and their traces."""


@click.command("mlflow")
@click.option(
    "--port", type=click.IntRange(1, 65535), default=5000, show_default=True, help="Port on 127.0.0.1."
)
def mlflow_(port: int) -> int:
    """Open MLflow's pages on this workspace: parameters, curves, evaluations, registered models.

    Starts MLflow's server in the foreground on this machine only, prints its address once it answers (it
    takes 15 seconds or so), and stops it on Ctrl-C. The workspace's own server is not needed for it.

    \b
    Examples:
      tuneloop mlflow
      tuneloop mlflow --port 5001
    """
    settings = settings_module.load()
    uri = settings.tracking_uri
    if uri.startswith(("http://", "https://")):
        output.say(f"This workspace writes to an MLflow server of yours: {uri}")
        return 0
    refuse_taken(port)
    wait_for_database(uri)
    folder = settings.home / "mlflow"
    output.note(f"Starting MLflow on {uri} ...")
    for sign in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, _interrupt)
    server = _start(uri, port, folder)
    try:
        _wait_until_it_answers(server, port)
        output.say(f"MLflow: http://127.0.0.1:{port}/{RUNS}   (Ctrl-C stops it)")
        return server.wait()
    except KeyboardInterrupt:
        output.note("Stopping MLflow.")
        return 0
    finally:
        _stop(server)


def _interrupt(*_: object) -> None:
    """A closed terminal or a `kill` must not leave MLflow behind."""
    raise KeyboardInterrupt


def wait_for_database(uri: str) -> None:
    """Until the tracker has made it: two makers would break it. Raises `NotFound` when there is none."""
    give_up = time.monotonic() + DATABASE_SECONDS
    is_told = False
    while checks.check_mlflow(uri).state != "ok" or not checks.mlflow_database(uri).exists():
        if session.find() is None or time.monotonic() > give_up:
            raise NotFound(
                "This workspace has no MLflow database yet; the background server makes it.",
                next_move=f"Run a job first, such as {session.program()} demo, then come back.",
            )
        if not is_told:
            output.note("Waiting for the tracker to make MLflow's database ...")
            is_told = True
        time.sleep(0.3)


def refuse_taken(port: int) -> None:
    """Raises `PortTaken` when something listens on 127.0.0.1:`port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise PortTaken(
                f"Port {port} cannot be used: {error.strerror}.",
                next_move=f"Choose another one: {session.program()} mlflow --port {port + 1}",
            ) from error


def _start(uri: str, port: int, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--uvicorn-opts", "--log-level warning"]
    environment = os.environ | ENVIRONMENT
    # A session of its own, so that stopping it takes its workers along.
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
    )


def _wait_until_it_answers(server: subprocess.Popen[bytes], port: int) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    give_up = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up:
        if server.poll() is not None:
            raise StepFailed(
                f"MLflow ended with exit code {server.returncode}; its own message stands above.",
                next_move=f"Check the installation: {session.program()} doctor",
            )
        try:
            with opener.open(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise StepFailed(f"MLflow did not answer on port {port} within {START_SECONDS:.0f} s.")


def _stop(server: subprocess.Popen[bytes]) -> None:
    """The whole group: MLflow's workers would outlive their parent."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, sign)
        except ProcessLookupError:
            break
        try:
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    server.wait()
