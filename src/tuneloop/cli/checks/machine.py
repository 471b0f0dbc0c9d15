"""Checks of what Tuneloop stands on: Python, packages, torch, memory, open files, the clock."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tuneloop
from tuneloop.cli import output
from tuneloop.cli.checks.finding import Check

LOCKS = ("requirements.lock", "constraints.txt", "requirements.txt")
"""Where the pinned versions stand, in order, in the folder that holds `src/`."""

MINIMUM_PYTHON = (3, 11)

LITTLE_MEMORY = 2e9
"""Bytes: a step of the smallest model in the catalogue takes 1.7 GB."""

FEW_FILES = 1024
"""Descriptors: the server holds one per caller, a step one per shard of weights and data."""

TORCH_SECONDS = 120.0

BEFORE_US = 1_700_000_000
"""Seconds of 2023: no clock that is right shows less."""

CLOCK_SECONDS = 120.0
"""A file of the home may be younger than now by this much: clocks of file servers differ."""

_PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^\]]*\])?==([^\s;\\]+)")

_TORCH = """
import json, torch, warnings
warnings.simplefilter("ignore")
said = {"threads": torch.get_num_threads(), "cuda": torch.version.cuda, "hip": torch.version.hip, "why": None}
try:
    said["gpus"] = torch.cuda.device_count()
    if torch.version.cuda or torch.version.hip:
        torch.cuda.init()
except Exception as error:
    said["gpus"], said["why"] = 0, str(error).splitlines()[0]
print(json.dumps(said))
"""


def check_python() -> Check:
    version = ".".join(str(part) for part in sys.version_info[:3])
    if sys.version_info < MINIMUM_PYTHON:
        return Check(
            "python",
            "fail",
            f"{version} at {sys.executable}",
            "Make a new environment with Python 3.11 or newer.",
            "Tuneloop's code is not read by an older Python.",
        )
    return Check("python", "ok", f"{version} at {sys.executable}")


# ---------------------------------------------------------------- packages


def check_packages() -> Iterator[Check]:
    """What is missing or too old to run; then what is not what was tested."""
    wrong = list(_unmet())
    if wrong:
        yield Check(
            "packages",
            "fail",
            _some(wrong),
            how_to_install(),
            "With others a step or the server fails when it loads them.",
        )
    else:
        yield Check("packages", "ok", "all that Tuneloop asks for")
    lock = find_lock()
    if lock is None:
        yield Check("lock", "ok", "no lock file beside this installation; versions are not compared")
        return
    pins = read_pins(lock.read_text(encoding="utf-8"))
    other = [
        f"{name} {have} instead of {want}"
        for name, want in pins.items()
        if (have := _installed(name)) is not None and _public(have) != _public(want)
    ]
    if other:
        why = "These may work; the ones in the lock file are those that the tests were run with."
        yield Check("lock", "warn", _some(other), f"Install what was tested. {how_to_install()}", why)
    else:
        yield Check("lock", "ok", f"versions as in {lock.name}")


def _unmet() -> Iterator[str]:
    from packaging.requirements import InvalidRequirement, Requirement

    for text in _requirements():
        try:
            wanted = Requirement(text)
        except InvalidRequirement:
            continue
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        have = _installed(wanted.name)
        if have is None:
            yield f"{wanted.name} is missing"
        elif not wanted.specifier.contains(have, prereleases=True):
            yield f"{wanted.name} is {have}, needed is {wanted.specifier}"


def _requirements() -> list[str]:
    try:
        return importlib.metadata.requires("tuneloop") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _some(told: list[str]) -> str:
    return "; ".join(told[:5]) + (f"; and {len(told) - 5} more" if told[5:] else "")


def how_to_install() -> str:
    """The versions of the lock file where there is one, else those that the package asks for."""
    lock = find_lock()
    what = f"-r {shlex.quote(str(lock))}" if lock else "tuneloop"
    return f"Install it: {shlex.quote(sys.executable)} -m pip install {what}"


def find_lock() -> Path | None:
    root = Path(tuneloop.__path__[0]).parent.parent
    return next((root / name for name in LOCKS if (root / name).is_file()), None)


def read_pins(text: str) -> dict[str, str]:
    """`name==version` lines of a requirements file."""
    found = (_PIN.match(line.strip()) for line in text.splitlines())
    return {match[1]: match[2] for match in found if match}


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _public(version: str) -> str:
    """Without the build's label: `2.13.0+cpu` is `2.13.0`."""
    return version.partition("+")[0]


# ---------------------------------------------------------------- torch


def check_torch() -> Check:
    """Asked in a process of its own: torch takes seconds to load and may fail to."""
    version = _installed("torch")
    if version is None:
        return Check("torch", "fail", "not installed", how_to_install(), "Every step but the first needs it.")
    try:
        # In a folder that is surely there: the person's may have been deleted.
        asked = subprocess.run(
            [sys.executable, "-c", _TORCH],
            capture_output=True,
            text=True,
            timeout=TORCH_SECONDS,
            cwd=sys.prefix,
        )
        answer = json.loads(asked.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return Check(
            "torch",
            "fail",
            f"{version} does not load",
            f'See why: {shlex.quote(sys.executable)} -c "import torch"',
            "No model can be trained, scored or served.",
        )
    return judge_torch(version, answer, gpu_of_this_machine(), _cores())


def judge_torch(version: str, answer: dict[str, Any], gpu: str | None, cores: int) -> Check:
    """`answer` is what torch says of itself, `gpu` what the machine says of its GPU."""
    build = (
        f"CUDA {answer['cuda']}" if answer["cuda"] else f"ROCm {answer['hip']}" if answer["hip"] else "CPU"
    )
    found = f"{version} ({build} build), {answer['threads']} threads, {answer['gpus']} GPUs"
    if gpu and build == "CPU":
        fix = "Install the build for CUDA, as https://pytorch.org/get-started/locally says for this machine."
        return Check("torch", "warn", f"{found}, while there is {gpu}", fix, "Training runs on the CPU.")
    if build != "CPU" and not answer["gpus"]:
        if not gpu:
            return Check("torch", "ok", f"{found}; no GPU is seen on this machine")
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden is not None and hidden.strip() in ("", "-1"):
            why = f"CUDA_VISIBLE_DEVICES={hidden!r} hides {gpu}: training runs on the CPU."
            return Check("torch", "warn", found, "unset CUDA_VISIBLE_DEVICES", why)
        why = f"There is {gpu}, and torch cannot use it ({answer['why'] or 'it does not say why'})."
        fix = f"Install a driver that knows {build}, or a torch for your driver (nvidia-smi tells it)."
        return Check("torch", "warn", found, fix, f"{why} Training runs on the CPU.")
    if answer["threads"] > cores:
        why = "More threads than cores wait for each other: training becomes several times slower."
        return Check("torch", "warn", f"{found} on {cores} cores", f"export OMP_NUM_THREADS={cores}", why)
    return Check("torch", "ok", found)


def gpu_of_this_machine() -> str | None:
    """An NVIDIA GPU with its driver, as the kernel tells it; None where there is none."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    if not list(Path("/proc/driver/nvidia/gpus").glob("*")):
        return None
    driver = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return f"an NVIDIA GPU (driver {driver[1] if driver else 'unknown'})"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------- memory, files, clock


def check_memory() -> Check:
    import psutil

    from tuneloop.core.machine import group_memory

    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    limit = group_memory()
    if limit is not None and limit[0] < total:
        total, free = limit[0], min(free, max(0, limit[0] - limit[1]))
    found = f"{output.size(free)} free of {output.size(total)}"
    if limit is not None and limit[0] == total:
        found += " (the limit of this container)"
    if free < LITTLE_MEMORY:
        why = (
            "A step of the smallest model takes 1.7 GB; without it the step is killed and says step_vanished."
        )
        return Check(
            "memory", "warn", found, "End what holds it; the largest: ps aux --sort=-rss | head", why
        )
    return Check("memory", "ok", found)


def check_open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= FEW_FILES:
        return Check("open files", "ok", "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft}")
    why = "The server, the router and MLflow hold a file per caller; when there are none left, calls fail."
    could = (
        "" if hard == resource.RLIM_INFINITY or hard >= 4 * FEW_FILES else " (an administrator must allow it)"
    )
    restart = "then start the server from that shell"
    return Check("open files", "warn", f"at most {soft}", f"ulimit -n {4 * FEW_FILES}{could}, {restart}", why)


def check_clock(home: Path, now: float | None = None) -> Check:
    """Against a date that has surely passed, and against the youngest of our own files."""
    now = time.time() if now is None else now
    shown = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(now))
    set_it = "Set it: timedatectl set-ntp true"
    if now < BEFORE_US:
        why = "Certificates of the hub are not valid yet at that date, and times of jobs say nothing."
        return Check("clock", "fail", f"{shown}, which has long passed", set_it, why)
    ahead = (
        max((_age(home / name) for name in ("tuneloop.db", "server.json", "home.json")), default=0.0) - now
    )
    if ahead > CLOCK_SECONDS:
        why = "The clock was set back since: jobs would seem to end before they began."
        found = f"{shown}, and files of the home are {output.duration(ahead)} younger"
        return Check("clock", "warn", found, set_it, why)
    return Check("clock", "ok", shown)


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
