"""One process of Azure's SDK: in which Python, with which signals, and what it should be told at its end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING

from tuneloop.cli import output
from tuneloop.cli.session import Session
from tuneloop.core.errors import NotFound, TuneloopError, Unavailable

if TYPE_CHECKING:
    from tuneloop.client.views import AzureWarningView

PROBE = """
import importlib.util, json, sys
def has(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False
print(json.dumps([sys.version.split()[0], [name for name in sys.argv[1:] if has(name)]]))
"""
PROBE_SECONDS = 60.0
STDERR = 2
WARNINGS_OF_A_PAGE = 1000


def find_python(written: str | None, modules: Sequence[str], package: str) -> str:
    """The Python that was named, else the one on the PATH. Raises `NotFound` when there is none, and
    `Unavailable` when it has none of `modules`, which come with `package`."""
    candidates = [written] if written is not None else ["python", "python3"]
    found = next((path for one in candidates if (path := shutil.which(os.path.expanduser(one)))), None)
    found = found and os.path.abspath(found)
    if found is None:
        told = f"{written!r} is no program." if written else "There is no python on your PATH."
        raise NotFound(told, next_move="Name the Python that has azure-ai-ml with --python.")
    version, there = _probe(found, modules)
    if not there:
        raise Unavailable(
            f"{package} cannot be imported by {found} (Python {version}).",
            next_move=_how_to_have(package, found),
        )
    return found


def _probe(python: str, modules: Sequence[str]) -> tuple[str, list[str]]:
    try:
        asked = subprocess.run(
            [python, "-c", PROBE, *modules],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            check=True,
        )
        version, there = json.loads(asked.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as broken:
        raise Unavailable(
            f"{python} is no Python that works: {broken}.",
            next_move="Name the Python that has azure-ai-ml with --python.",
        ) from None
    return version, there


def _how_to_have(package: str, python: str) -> str:
    if os.path.realpath(os.path.dirname(python)) == os.path.realpath(os.path.dirname(sys.executable)):
        # The SDK needs other versions of what we need.
        return (
            "That is Tuneloop's own; make another: python3 -m venv ~/azure && "
            "~/azure/bin/pip install azure-ai-ml azure-identity, then use --python ~/azure/bin/python"
        )
    more = " azure-identity" if package == "azure-ai-ml" else ""
    return f"{python} -m pip install {package}{more}; or name another Python with --python."


# ---------------------------------------------------------------- running


def run_script(command: Sequence[str], environment: Mapping[str, str], *, quiet: bool) -> int:
    """The exit code, as a shell would say it. `quiet`: what it prints goes to stderr."""
    # In our process group, so that it may read the terminal.
    child = subprocess.Popen(command, env=environment, stdout=STDERR if quiet else None)
    with _signals_for(child):
        code = child.wait()
    return 128 - code if code < 0 else code


@contextlib.contextmanager
def _signals_for(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Signals are the script's: it decides what they end."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        # Ctrl-C in a terminal reaches the script by itself; twice would be another thing.
        if number == signal.SIGINT and _is_in_the_foreground():
            return
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_in_the_foreground() -> bool:
    try:
        with open("/dev/tty", "rb") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


def warnings_since(connection: Session, number: int) -> list[AzureWarningView]:
    """What the dialect told since. A server that is gone by now tells nothing more."""
    found: list[AzureWarningView] = []
    try:
        while page := connection.client.azure_warnings(number):
            found += page
            number = page[-1]["number"]
            if len(page) < WARNINGS_OF_A_PAGE:
                break
    except TuneloopError as error:
        output.note(f"The warnings cannot be had: {error.message}")
    return found


def in_command(python: str, arguments: Sequence[str]) -> list[str]:
    """This command again, as a command line that any program can start."""
    return [sys.executable, "-P", "-m", "tuneloop.cli", "azure", "run", "--python", python, *arguments]
