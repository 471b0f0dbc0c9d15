"""Looks: a step process that a command runs by hand, before there is any job.

What needs a tokenizer or a model (checking data, measuring this machine) never happens in the command itself
nor in the server, but in `python -m tuneloop.steps DIR`, as every step does. Its folder is
`cache/looks/KIND-KEY` in the home; the key is made of kind, version, parameters and what the inputs
look like from outside (path, size, time of change): asking the same question again answers at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tuneloop.cli import output, session
from tuneloop.core import digest
from tuneloop.core import settings as settings_module
from tuneloop.core.errors import NotFound, StepFailed, from_json

if TYPE_CHECKING:
    from tuneloop.core.types import ProgressLine, ResultFile

VERSIONS: Mapping[str, int] = {"tokenizer": 1, "check": 1, "probe": 1, "dataset_download": 1}
"""Raise a kind's number when the same parameters and inputs lead to other outputs than before."""

KEPT = 50
"""Looks that are remembered; the ones that were not asked for the longest go first."""

POLL_SECONDS = 0.1
LINE_SECONDS = 5.0
"""Between two lines of progress where nothing can be drawn over."""


def run(
    kind: str,
    parameters: Mapping[str, Any],
    inputs: Mapping[str, Path],
    outputs: Mapping[str, str],
    *,
    label: str,
    cached: bool = True,
) -> Path:
    """The folder of a look that succeeded: its outputs lie in `outputs/NAME`, its summary in `result.json`.

    `outputs` maps a name to `file` or `folder`; `label` is what a person sees while it runs. Without `cached`
    it runs again, whatever is remembered. Raises what the step raised, and `StepFailed` when it vanished.
    """
    settings = settings_module.load()
    home = session.prepared_home(settings)
    seen = {name: _seen(path) for name, path in inputs.items()}
    key = digest.of_json([kind, VERSIONS[kind], dict(parameters), seen, dict(outputs)])
    folder = home / "cache" / "looks" / f"{kind}-{key.removeprefix('sha256:')[:24]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder, label):
        if cached and _succeeded(folder) is not None:
            os.utime(folder)
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        _write_step(folder, kind, parameters, inputs, seen, outputs, home / "cache")
        _attempt(folder, label)
    _forget_old(folder.parent)
    return folder


def tokenizer(model: str) -> Path:
    """The folder with the tokenizer of a base model, fetched without its weights, or a folder that is named.
    Raises `NotFound` where there is neither."""
    if Path(model).expanduser().is_dir():
        return Path(model).expanduser().resolve()
    from tuneloop.core.recipe import ImportedCard

    card = session.connect().client.card(model)
    parameters = {"card": ImportedCard.of(card).model_dump(mode="json")}
    outputs = {"tokenizer": "folder"}
    folder = run("tokenizer", parameters, {}, outputs, label=f"Fetching the tokenizer of {card.name}")
    return folder / "outputs" / "tokenizer"


def result(folder: Path) -> ResultFile:
    """What `run`'s folder says of itself."""
    found = _succeeded(folder)
    assert found is not None
    return found


def output_json(folder: Path, name: str) -> Any:
    """An output that is a JSON file."""
    return json.loads((folder / "outputs" / name).read_text(encoding="utf-8"))


def _seen(path: Path) -> str:
    try:
        about = path.stat()
    except OSError as broken:
        raise NotFound(f"{path} cannot be looked at: {broken.strerror}.") from None
    if path.is_dir():
        inside = sorted(
            (str(each.relative_to(path)), each.stat().st_size, each.stat().st_mtime_ns)
            for each in path.rglob("*")
            if each.is_file()
        )
        return digest.of_json([str(path.resolve()), inside])
    return digest.of_json([str(path.resolve()), about.st_size, about.st_mtime_ns, about.st_ino])


@contextlib.contextmanager
def _alone(folder: Path, label: str) -> Iterator[None]:
    """Two commands that ask the same at once: the second waits, then finds the answer."""
    with open(folder.with_name(f".{folder.name}.lock"), "a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            output.note(f"{label}: another command is at it; waiting for its answer.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write_step(
    folder: Path,
    kind: str,
    parameters: Mapping[str, Any],
    inputs: Mapping[str, Path],
    seen: Mapping[str, str],
    outputs: Mapping[str, str],
    cache: Path,
) -> None:
    from tuneloop.core.types import StepFile

    step = StepFile.model_validate(
        {
            "attempt": f"look/{kind}/1",
            "attempt_id": f"look-{folder.name}",
            "kind": kind,
            "parameters": dict(parameters),
            "inputs": {
                name: {"path": str(path.resolve()), "digest": seen[name], "name": str(path)}
                for name, path in inputs.items()
            },
            "outputs": dict(outputs),
            "cache_folder": str(cache),
        }
    )
    (folder / "step.json").write_text(step.model_dump_json(indent=1, exclude_none=True), encoding="utf-8")


def _attempt(folder: Path, label: str) -> None:
    with open(folder / "log.txt", "ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "tuneloop.steps", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Ctrl-C is ours to pass on: once, as the signal that a step knows.
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "passive"},
        )
    watch = _Watch(folder, label)
    try:
        while child.poll() is None:
            watch.look()
            time.sleep(POLL_SECONDS)
    except BaseException:
        _end(child)
        raise
    finally:
        watch.close()
    _raise_failure(folder)


def _end(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGTERM)
    try:
        child.wait(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _read_result(folder: Path) -> ResultFile | None:
    from tuneloop.core.types import ResultFile

    try:
        return ResultFile.model_validate_json((folder / "result.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _succeeded(folder: Path) -> ResultFile | None:
    found = _read_result(folder)
    return found if found is not None and found.status == "succeeded" else None


def _raise_failure(folder: Path) -> None:
    found = _read_result(folder)
    if found is not None and found.status == "succeeded":
        return
    if found is not None and found.error is not None:
        raise from_json(found.error.model_dump(mode="json"))
    lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
    said = "\n  ".join(lines) if lines else "it said nothing"
    raise StepFailed(
        "The process ended without an answer; it was killed, perhaps because memory ran out. It said last:\n"
        f"  {said}",
        next_move=f"Its folder: {folder}",
    )


class _Watch:
    """Progress of a look on stderr: one line drawn over itself, or a plain line now and then."""

    def __init__(self, folder: Path, label: str) -> None:
        self._path = folder / "progress.jsonl"
        self._label = label
        self._position = 0
        self._draws = output.is_drawable(sys.stderr)
        self._width = 0
        self._next_line_at = time.monotonic() + LINE_SECONDS

    def look(self) -> None:
        line = self._last_line()
        if line is None:
            return
        text = self._text(line)
        if self._draws:
            room = shutil.get_terminal_size().columns - 1
            click.echo("\r" + text[:room].ljust(self._width), err=True, nl=False)
            self._width = len(text[:room])
        elif time.monotonic() >= self._next_line_at:
            self._next_line_at = time.monotonic() + LINE_SECONDS
            output.note(text)

    def close(self) -> None:
        if self._width:
            click.echo("\r" + " " * self._width + "\r", err=True, nl=False)

    def _last_line(self) -> ProgressLine | None:
        from tuneloop.core.types import ProgressLine

        try:
            with open(self._path, "rb") as handle:
                handle.seek(self._position)
                fresh = handle.read()
        except FileNotFoundError:
            return None
        whole, newline, _ = fresh.rpartition(b"\n")
        if not newline:
            return None
        self._position += len(whole) + 1
        return ProgressLine.model_validate_json(whole.rpartition(b"\n")[2])

    def _text(self, line: ProgressLine) -> str:
        from tuneloop.cli import live

        return f"{self._label}: {live.stage_text(line.model_dump(mode='json'), percent=True)}"  # type: ignore[arg-type]


def _forget_old(folder: Path) -> None:
    looks = [each for each in folder.iterdir() if each.is_dir()]
    looks.sort(key=lambda each: each.stat().st_mtime, reverse=True)
    for old in looks[KEPT:]:
        with open(folder / f".{old.name}.lock", "a", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            shutil.rmtree(old, ignore_errors=True)
