"""How long a person waits before anything happens: `tuneloop --help` and the background server.

    .venv/bin/python benchmarks/startup.py [--repeats 5]

Prints CPU seconds of `--help`, wall seconds from asking for a server until it answers, and the server's
resident memory then: median, minimum and maximum over the repeats, each in a fresh home.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

TUNELOOP = [sys.executable, "-m", "tuneloop.cli"]


def help_cpu_seconds() -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*TUNELOOP, "--help"], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)


def server_start() -> tuple[float, float]:
    """Wall seconds until the server answers, and its resident megabytes then."""
    from tuneloop import daemon
    from tuneloop.client import Client
    from tuneloop.core.settings import Settings

    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(home=Path(folder) / "home")
        began = time.perf_counter()
        server = daemon.ensure(settings)
        took = time.perf_counter() - began
        memory = psutil.Process(server.pid).memory_info().rss / 1e6
        with Client(server.url, server.token) as client:
            client.shutdown("all")
        while daemon._is_locked(settings.home):
            time.sleep(0.05)
    return took, memory


def show(name: str, unit: str, values: list[float]) -> None:
    middle = statistics.median(values)
    print(f"{name:<22} median {middle:8.3f}  min {min(values):8.3f}  max {max(values):8.3f} {unit}")


def repeat(measure: Callable[[], float], times: int) -> list[float]:
    return [measure() for _ in range(times)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    os.environ.pop("TUNELOOP_HOME", None)
    print(f"{psutil.cpu_count()} cores, Python {sys.version.split()[0]}, {repeats} repeats")
    show("tuneloop --help", "s CPU", repeat(help_cpu_seconds, repeats))
    starts = [server_start() for _ in range(repeats)]
    show("server answers after", "s", [start for start, _ in starts])
    show("server's memory", "MB", [memory for _, memory in starts])


if __name__ == "__main__":
    main()
