"""A dataset's repository at one commit: its files as they are listed, what stands at their ends, and, whole
and checked, those that are asked for.

Beside the hub's own cache layout lies `listings/COMMIT.json`: names, sizes and digests, and the rows of
Parquet files, so that what was fetched once can be used without the hub.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tuneloop.core.errors import StepFailed
from tuneloop.core.process import write_atomically
from tuneloop.steps.context import StepContext
from tuneloop.steps.hub import errors, fetch, listing
from tuneloop.steps.hub.cache import Listed, Repository, digest_of
from tuneloop.steps.hub.data_files import README
from tuneloop.steps.hub.source import DatasetSource

TAIL_BYTES = 1 << 16
"""Asked for of every Parquet file: most footers are smaller."""

MOST_FOOTER_BYTES = 64 << 20

AT_ONCE = 8
"""Ends of files that are asked for side by side."""


class HubFiles:
    """The files of a dataset's repository. Only the thread of the step uses it."""

    def __init__(
        self,
        context: StepContext,
        source: DatasetSource,
        repository: Repository,
        commit: str,
        files: dict[str, Listed],
        why_offline: str | None,
    ) -> None:
        self.place = source.repository
        self.commit = commit
        self.names = list(files)
        self._context = context
        self._source = source
        self._repository = repository
        self._files = files
        self._why_offline = why_offline
        self._rows: dict[str, int] = {}

    def size(self, name: str) -> int:
        return self._files[name].size

    def readme(self) -> str | None:
        if README not in self._files:
            return None
        return self.get([README])[0].read_text(encoding="utf-8", errors="replace")

    def get(self, names: Sequence[str]) -> list[Path]:
        """The files themselves, fetched where they are not here, each with the digest that the hub lists."""
        wanted = [self._files[name] for name in names]
        if self._why_offline:
            for file in wanted:
                self._check_cached(file, self._why_offline)
        else:
            fetch.Fetch(self._context, self._source, self._repository, self.commit).all(wanted)
        return [self._repository.snapshot(self.commit) / name for name in names]

    def count_rows(self, names: Sequence[str]) -> list[int] | None:
        """Rows of Parquet files, told by their ends, without the files themselves. None where that cannot be
        told: the server sends no parts of files."""
        unknown = [self._files[name] for name in names if self._files[name].digest not in self._rows]
        if unknown and self._why_offline:
            self._rows.update({file.digest: self._rows_of_cached(file) for file in unknown})
        elif unknown:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                for done, (file, rows) in enumerate(
                    zip(unknown, pool.map(self._rows_at_end, unknown), strict=True)
                ):
                    if rows is None:
                        return None
                    self._rows[file.digest] = rows
                    self._context.progress("counting rows", done=done + 1, total=len(unknown), unit="files")
            self.remember()
        return [self._rows[self._files[name].digest] for name in names]

    # ------------------------------------------------------------ the ends of files

    def _rows_at_end(self, file: Listed) -> int | None:
        here = self._repository.snapshot(self.commit) / file.name
        if here.is_file():
            return _rows_in(here)
        try:
            tail = listing.patiently(lambda: self._tail(file, TAIL_BYTES))
            if tail is not None and (needed := _footer_bytes(tail)) > len(tail):
                tail = listing.patiently(lambda: self._tail(file, needed))
            return None if tail is None else _rows_in(io.BytesIO(tail))
        except ValueError as error:
            raise errors.unavailable(
                self._source,
                f"{self.place}: {file.name} is no Parquet file: {errors.reason(error)}.",
                f"Take another revision with --revision. {errors.own_copy(self._source)}",
            ) from None
        except Exception as error:
            raise errors.explain(self._source, error) from error

    def _tail(self, file: Listed, size: int) -> bytes | None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import get_session, hf_raise_for_status

        url = hf_hub_url(
            self._source.repository,
            file.name,
            repo_type="dataset",
            revision=self.commit,
            endpoint=errors.endpoint(),
        )
        asked = {**fetch.headers(), "Range": f"bytes={max(0, file.size - size)}-{file.size - 1}"}
        session: Any = get_session()
        with session.stream(
            "GET", url, headers=asked, follow_redirects=True, timeout=listing.TIMEOUT_SECONDS
        ) as response:
            hf_raise_for_status(response)
            return bytes(response.read()) if response.status_code == 206 else None

    # ------------------------------------------------------------ without the hub

    def remember(self) -> None:
        listed = {name: [file.size, file.digest] for name, file in self._files.items()}
        path = _listing_path(self._repository, self.commit)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"format": 1, "files": listed, "rows": self._rows}))

    def recall(self) -> None:
        """The rows that were counted before."""
        found = _read_listing(self._repository, self.commit)
        self._rows = dict(found["rows"]) if found else {}

    def _check_cached(self, file: Listed, why: str) -> None:
        here = self._repository.snapshot(self.commit) / file.name
        if not here.is_file():
            raise self._not_cached(file, why)
        if digest_of(here, file.method) != file.digest:
            raise errors.unavailable(
                self._source,
                f"{self.place}: {why}, and the cached {file.name} is damaged: it has another digest than the "
                "hub listed.",
                f"Delete {here.resolve()} and run it again with a hub in reach.",
            )

    def _rows_of_cached(self, file: Listed) -> int:
        self._check_cached(file, str(self._why_offline))
        return _rows_in(self._repository.snapshot(self.commit) / file.name)

    def _not_cached(self, file: Listed, why: str) -> StepFailed:
        return errors.unavailable(
            self._source,
            f"{self.place}: {why}, and {file.name} is not in the cache, {self._repository.root}.",
            errors.offline_move(self._source),
        )


def open_dataset(context: StepContext, source: DatasetSource) -> HubFiles:
    """The files of a dataset at a revision, listed by the hub, or by the cache where the hub is out of reach.

    Raises `DatasetUnavailable`, saying whether it is a matter of access, name, network or disk.
    """
    listing.tell_nothing_else()
    repository = Repository.of(source.repository, context, "dataset")
    if errors.is_offline():
        return _from_cache(context, source, repository, "HF_HUB_OFFLINE is set")
    try:
        commit = listing.commit_of(source)
        files = listing.files_of(source, commit)
    except Exception as error:
        if errors.is_unreachable(error) and _known(repository, source) is not None:
            why = f"the hub was not reached ({errors.reason(error)})"
            found = _from_cache(context, source, repository, why)
            context.warn(f"{source.repository}: {why}; what is cached of {found.commit[:12]} is used.")
            return found
        raise errors.explain(source, error) from error
    found = HubFiles(context, source, repository, commit, files, None)
    found.recall()
    found.remember()
    if not source.is_pinned:
        repository.remember(source.revision, commit)
    return found


def _known(repository: Repository, source: DatasetSource) -> str | None:
    commit = repository.commit(source)
    return commit if commit and _listing_path(repository, commit).is_file() else None


def _from_cache(context: StepContext, source: DatasetSource, repository: Repository, why: str) -> HubFiles:
    commit = _known(repository, source)
    found = _read_listing(repository, commit) if commit else None
    if commit is None or found is None:
        raise errors.unavailable(
            source,
            f"{source.repository} at {source.revision}: {why}, and it is not in the cache, "
            f"{repository.root}.",
            errors.offline_move(source),
        )
    files = {name: Listed(name, size, digest) for name, (size, digest) in found["files"].items()}
    cached = HubFiles(context, source, repository, commit, files, why)
    cached.recall()
    return cached


def _listing_path(repository: Repository, commit: str) -> Path:
    return repository.snapshot(commit).parent.parent / "listings" / f"{commit}.json"


def _read_listing(repository: Repository, commit: str) -> dict[str, Any] | None:
    try:
        found = json.loads(_listing_path(repository, commit).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("format") == 1 else None


def _footer_bytes(tail: bytes) -> int:
    """How much of the end of a Parquet file its footer takes. Raises `ValueError` when it is none."""
    if len(tail) < 12 or tail[-4:] != b"PAR1":
        found = re.sub(r"[^ -~]", ".", tail[-4:].decode("latin-1"))
        raise ValueError(f"it ends with '{found}'")
    needed = int.from_bytes(tail[-8:-4], "little") + 8
    if needed > MOST_FOOTER_BYTES:
        raise ValueError(f"its footer would have {needed:,} bytes")
    return needed


def _rows_in(file: Path | io.BytesIO) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(file).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(str(error)) from None
