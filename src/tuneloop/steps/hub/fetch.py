"""Files of one repository, fetched side by side; each goes on where it was stopped, and is checked."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, cast

from tuneloop import __version__
from tuneloop.steps.context import StepContext
from tuneloop.steps.hub import errors
from tuneloop.steps.hub.cache import Listed, Repository, digest_of
from tuneloop.steps.hub.source import Source, kind_of

RETRY_SECONDS = (1.0, 3.0, 9.0)
"""Waits between attempts when the hub answers 5xx or the connection breaks."""

AT_ONCE = 4
"""Files that are fetched side by side."""

_CHUNK_BYTES = 1 << 16
"""A killed process loses less than this of each file."""

_WORTH_TELLING_BYTES = 100 << 20
_RATE_SECONDS = 10.0
_TELL_SECONDS = 0.25
_LOG_SECONDS = 30.0


def headers() -> dict[str, str]:
    """With a token only when there is one."""
    from huggingface_hub.utils import build_hf_headers

    return dict(build_hf_headers(library_name="tuneloop", library_version=__version__))


class _Stopped(Exception):
    """Another file failed: the rest is not fetched to its end."""


class _Sink:
    """The file that `http_get` writes to: counts what arrives, and stops when it is told to."""

    def __init__(self, file: BinaryIO, arrived: Callable[[int], None], stop: threading.Event) -> None:
        self._file = file
        self._arrived = arrived
        self._stop = stop

    def write(self, chunk: bytes) -> int:
        if self._stop.is_set():
            raise _Stopped
        self._arrived(len(chunk))
        return self._file.write(chunk)

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, position: int) -> int:
        """Backwards only: the server sent the whole file where a part was asked for."""
        self._arrived(position - self._file.tell())
        return self._file.seek(position)

    def truncate(self) -> int:
        return self._file.truncate()


class Fetch:
    """Files of one repository at one commit."""

    def __init__(self, context: StepContext, source: Source, repository: Repository, commit: str) -> None:
        self._context = context
        self._source = source
        self._repository = repository
        self._commit = commit
        self._lock = threading.Lock()
        self._done = 0

    def all(self, files: Sequence[Listed]) -> None:
        """Until each is there and is what the hub lists. A damaged one is deleted and fetched once more."""
        for is_last in (False, True):
            self._get([file for file in files if not self._is_there(file)])
            damaged = self._damaged(files)
            for file, found in damaged:
                self._repository.forget(self._commit, file)
                message = (
                    f"{self._source.repository}: {file.name} has the {file.method} digest {found}, and the "
                    f"hub lists {file.digest} for {self._commit[:12]}"
                )
                if is_last:
                    raise errors.unavailable(
                        self._source,
                        f"{message}. It was deleted, and nothing of it is used.",
                        "A mirror or a proxy changes files: check HF_ENDPOINT and proxies, then "
                        f"{errors.repeat(self._source)}. {errors.own_copy(self._source)}",
                    )
                self._context.warn(f"{message}: it is deleted and fetched again.")
            if not damaged:
                return

    def _is_there(self, file: Listed) -> bool:
        pointer = self._repository.snapshot(self._commit) / file.name
        if pointer.is_file():
            return pointer.stat().st_size == file.size
        return self._repository.blob(file).is_file() and self._link(file)

    def _link(self, file: Listed) -> bool:
        self._repository.link(self._commit, file)
        return True

    def _damaged(self, files: Sequence[Listed]) -> list[tuple[Listed, str]]:
        total = sum(file.size for file in files)
        done, found = 0, []
        for file in files:
            if not done or file.size > _WORTH_TELLING_BYTES:
                self._context.progress("verifying", done=done, total=total, unit="bytes")
            digest = digest_of(self._repository.snapshot(self._commit) / file.name, file.method)
            if digest != file.digest:
                found.append((file, digest))
            done += file.size
        return found

    # ------------------------------------------------------------ in threads

    def _get(self, files: Sequence[Listed]) -> None:
        """In threads of their own: the main thread reports, and is where an interruption arrives."""
        if not files:
            return
        self._check_space(files)
        total = sum(file.size for file in files)
        self._done = sum(self._repository.partial_size(file) for file in files)
        self._announce(files, total)
        waiting = sorted(files, key=lambda file: file.size)
        stop, failed = threading.Event(), list[BaseException]()
        ended = queue.SimpleQueue[None]()
        count = min(AT_ONCE, len(files))
        with _quiet():
            for _ in range(count):
                work = (waiting, stop, failed, ended)
                threading.Thread(target=self._work, args=work, daemon=True).start()
            try:
                self._report(total, count, ended, failed)
            finally:
                stop.set()
        if failed:
            raise errors.explain(self._source, failed[0]) from failed[0]

    def _work(
        self,
        waiting: list[Listed],
        stop: threading.Event,
        failed: list[BaseException],
        ended: queue.SimpleQueue[None],
    ) -> None:
        try:
            while waiting and not stop.is_set():
                with contextlib.suppress(IndexError):
                    self._one(waiting.pop(), stop)
        except _Stopped:
            pass
        except BaseException as error:
            failed.append(error)
        ended.put(None)

    def _one(self, file: Listed, stop: threading.Event) -> None:
        with self._repository.locked(file):
            if not self._repository.blob(file).is_file():
                self._patiently(file, stop)
                os.replace(self._repository.partial(file), self._repository.blob(file))
            self._link(file)

    def _patiently(self, file: Listed, stop: threading.Event) -> None:
        for wait in (*RETRY_SECONDS, None):
            try:
                self._body(file, stop)
                return
            except Exception as error:
                if errors.is_of_another_size(error):
                    # What is there is not the beginning of this file.
                    self._drop_partial(file)
                if wait is None or not (errors.is_passing(error) or errors.is_of_another_size(error)):
                    raise
                if stop.wait(wait):
                    raise _Stopped from None

    def _drop_partial(self, file: Listed) -> None:
        self._arrived(-self._repository.partial_size(file))
        self._repository.partial(file).unlink(missing_ok=True)

    def _body(self, file: Listed, stop: threading.Event) -> None:
        """The rest of the file behind what is there of it."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get

        partial = self._repository.partial(file)
        if self._repository.partial_size(file) > file.size:
            self._drop_partial(file)
        url = hf_hub_url(
            self._source.repository,
            file.name,
            repo_type=kind_of(self._source),
            revision=self._commit,
            endpoint=errors.endpoint(),
        )
        with open(partial, "ab") as opened:
            try:
                http_get(
                    url,
                    cast(BinaryIO, _Sink(opened, self._arrived, stop)),
                    resume_size=opened.tell(),
                    headers=headers(),
                    expected_size=file.size,
                    displayed_filename=file.name,
                )
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise OSError(error.errno, error.strerror, str(partial)) from error
                raise
            opened.flush()
            os.fsync(opened.fileno())

    def _arrived(self, count: int) -> None:
        with self._lock:
            self._done += count

    # ------------------------------------------------------------ what is said

    def _check_space(self, files: Sequence[Listed]) -> None:
        try:
            self._repository.make()
        except OSError as error:
            raise errors.unavailable(
                self._source,
                f"{self._source.repository}: the cache {self._repository.root} cannot be written: "
                f"{error.strerror}.",
                "Give it to your account, or use another: export HF_HOME=/another/folder",
            ) from error
        missing = sum(file.size - self._repository.partial_size(file) for file in files)
        free = shutil.disk_usage(self._repository.root).free
        if missing > free:
            raise errors.unavailable(
                self._source,
                f"{self._source.repository}: {spelled(missing)} are to be fetched into "
                f"{self._repository.root}, and that disk has {spelled(free)} left.",
                "Free some space, or put the cache on another disk (export HF_HOME=/another/disk); "
                "what was fetched so far is kept.",
            )

    def _announce(self, files: Sequence[Listed], total: int) -> None:
        held = f", {spelled(self._done)} of them are here from before" if self._done else ""
        count = "1 file" if len(files) == 1 else f"{len(files)} files"
        print(
            f"fetching {count} of {self._source.repository} at {self._commit[:12]} from "
            f"{errors.endpoint()}: {spelled(total)}{held}",
            flush=True,
        )

    def _report(
        self, total: int, working: int, ended: queue.SimpleQueue[None], failed: list[BaseException]
    ) -> None:
        """Until the threads have ended or one has failed: bytes, rate over the last seconds, time left; and a
        line in the log now and then."""
        stage = f"downloading {self._source.repository}"
        history = [(time.monotonic(), self._done)]
        said, logged_at = -1, time.monotonic()
        while working and not failed:
            with contextlib.suppress(queue.Empty):
                ended.get(timeout=_TELL_SECONDS)
                working -= 1
            now, done = time.monotonic(), self._done
            history = [*(each for each in history if now - each[0] <= _RATE_SECONDS), (now, done)]
            if done != said:
                said = done
                self._tell(stage, done, total, _rate(history))
            if now - logged_at > _LOG_SECONDS:
                logged_at = now
                print(
                    f"{stage}: {spelled(done)} of {spelled(total)}, {spelled(_rate(history))}/s", flush=True
                )

    def _tell(self, stage: str, done: int, total: int, rate: float) -> None:
        values = {"bytes_per_second": rate} if rate else {}
        left = (total - done) / rate if rate else None
        self._context.progress(stage, done=done, total=total, unit="bytes", remaining_seconds=left, **values)


def _rate(history: Sequence[tuple[float, int]]) -> float:
    """Bytes per second; 0 while it is not known."""
    (began, first), (ended, last) = history[0], history[-1]
    return max(0.0, (last - first) / (ended - began)) if ended > began else 0.0


def spelled(count: float) -> str:
    """`812 B`, `4.2 MB`, `16.1 GB` (decimal)."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """huggingface_hub's bars have no place in a log, and its pieces of 10 MB are too large to be watched."""
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    was_disabled, was_bytes = are_progress_bars_disabled(), constants.DOWNLOAD_CHUNK_SIZE
    disable_progress_bars()
    constants.DOWNLOAD_CHUNK_SIZE = _CHUNK_BYTES
    try:
        yield
    finally:
        constants.DOWNLOAD_CHUNK_SIZE = was_bytes
        if not was_disabled:
            enable_progress_bars()
