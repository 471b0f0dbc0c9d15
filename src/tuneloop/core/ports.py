"""What the workspace needs from the world. `adapters/` holds the real ones, `tests/fakes.py` the fake ones,
and `tests/contract/` holds both to the same behaviour."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Literal, Protocol, TypeVar

from tuneloop.core.types import Event, ProcessIdentity, Record, ResultFile

R = TypeVar("R", bound=Record)


class Store(Protocol):
    """Records by key, with optimistic versions, and an append-only list of events."""

    def transaction(self) -> AbstractContextManager[None]:
        """All writes inside land together or not at all; may be nested, the outermost commits."""

    def find(self, kind: type[R], key: str) -> R | None: ...

    def get(self, kind: type[R], key: str) -> R:
        """Raises `NotFound`, naming the nearest key."""

    def list(
        self,
        kind: type[R],
        *,
        parent: str | None = None,
        states: Iterable[str] | None = None,
        newest_first: bool = False,
        limit: int | None = None,
    ) -> Sequence[R]:
        """In the order of creation."""

    def insert(self, record: R) -> R:
        """Raises `AlreadyExists`."""

    def update(self, record: R) -> R:
        """Writes `record` if the store still holds `record.version`; returns it with the next version.
        Raises `Stale` when somebody else wrote first, `NotFound` when it is gone."""

    def delete(self, record: Record) -> None:
        """Raises `Stale` when somebody else wrote first. Deleting what is gone is no error."""

    def append(self, event: Event) -> Event: ...

    def events(self, *, after: int = 0, subject: str | None = None, limit: int = 1000) -> Sequence[Event]:
        """`subject` matches exactly, or as a prefix when it ends in '/'."""


class Clock(Protocol):
    def now(self) -> datetime:
        """UTC, aware. For people and records only: the machine's clock may jump."""

    def monotonic(self) -> float:
        """Seconds that only grow, however the machine's clock jumps; for durations within one process."""


ProcessStatus = Literal["absent", "starting", "running", "ended"]


class Executor(Protocol):
    """Starts and stops processes on one kind of compute. Nothing here waits for them.

    A process belongs to a folder: it locks `folder/lock` for as long as it lives, and writes who it is to
    `folder/process.json` (`ProcessIdentity`) before anything else, so `ensure` twice is one process.
    """

    def ensure(self, owner: str, folder: Path, module: str, environment: Mapping[str, str]) -> None:
        """Start `python -m module folder` unless that folder's process was started already."""

    def status(self, owner: str, folder: Path) -> ProcessStatus: ...

    def identity(self, folder: Path) -> ProcessIdentity | None: ...

    def stop(self, owner: str, folder: Path, *, kill: bool = False) -> None:
        """Ask the process and its children to end (kill: now). Returns at once; ask `status` later."""

    def last_lines(self, folder: Path, count: int = 20) -> Sequence[str]:
        """The end of the process's log."""


class Files(Protocol):
    """The home's files: attempt folders and artifacts."""

    def folder(self, relative: str) -> Path:
        """The absolute path of a folder of the home, made when missing (owner only)."""

    def artifact_path(self, digest: str) -> Path: ...

    def has_artifact(self, digest: str) -> bool: ...

    def adopt(self, source: Path, digest: str) -> None:
        """Move `source` (file or folder) into the artifacts and leave a link behind. Twice is once."""

    def ingest(self, source: Path, progress: Callable[[int], None] | None = None) -> tuple[str, int]:
        """Copy a file or folder in; its digest and size in bytes."""

    def read_result(self, folder: Path) -> ResultFile | None: ...

    def write_json(self, path: Path, text: str, *, private: bool = False) -> None:
        """Atomically."""

    def remove(self, path: Path) -> None: ...


RunStatus = Literal["running", "finished", "failed", "killed"]


class UnderWay(Exception):
    """No failure: what was asked for takes long and goes on by itself. Ask again; the text says how far."""


@dataclass(frozen=True)
class Measurement:
    """A point of a curve. Its time belongs to it: sent twice, it is still one point."""

    name: str
    value: float
    at_ms: int
    step: int = 0


@dataclass(frozen=True)
class DatasetUse:
    """A dataset version that a run learned from or was judged by. No bytes travel."""

    name: str
    """`name:version`."""
    digest: str
    roles: tuple[str, ...]
    source_path: str
    rows: int | None = None


@dataclass(frozen=True)
class ModelEntry:
    """A version of a model in the tracking server's registry. `(name, version, digest)` says which it is."""

    name: str
    version: str
    """Ours, a free string."""
    digest: str
    number: int
    """Theirs, given by them."""
    description: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)


class TrackingServer(Protocol):
    """Where runs and models are shown to people: MLflow.

    `place` says which one it is: its address without a password; empty for the one in the home. What is known
    of runs there holds nowhere else.

    Everything may be said twice; the second time changes nothing. Any call may raise `Unavailable` (nobody
    answers: keep everything for later), `NotFound` (that run is gone without a trace) or `InvalidState` (a
    person deleted that run there: leave it alone). Another error concerns that one call only.
    """

    place: str

    def ensure_run(
        self, experiment: str, identity: str, name: str, tags: Mapping[str, str], started_at: datetime
    ) -> str:
        """The id of the run whose tag `identity` has the value that `tags` gives it; made, and running, when
        there is none."""

    def log(
        self,
        run_id: str,
        *,
        measurements: Sequence[Measurement] = (),
        parameters: Mapping[str, str] = MappingProxyType({}),
        tags: Mapping[str, str] = MappingProxyType({}),
    ) -> None: ...

    def log_datasets(self, run_id: str, datasets: Sequence[DatasetUse]) -> None: ...

    def log_picture(self, run_id: str, picture: Path, folder: str = "") -> None:
        """Among the run's artifacts, in `folder`. A server that takes no files over HTTP goes without."""

    def set_status(self, run_id: str, status: RunStatus, ended_at: datetime | None = None) -> None: ...

    def ensure_model_version(
        self,
        name: str,
        version: str,
        digest: str,
        *,
        source: Path,
        run_id: str | None,
        tags: Mapping[str, str],
        description: str,
    ) -> int:
        """Their number for it. One that is there already gets this description, and these tags beside its
        own. Raises `UnderWay` while its bytes travel."""

    def delete_model_version(self, name: str, version: str, digest: str, *, run_id: str | None) -> None:
        """And the model's name, when that was its last version. What is gone already is no error. `run_id` as
        it was registered with: bytes that arrived before the version was made lie there."""

    def model_entries(self) -> Sequence[ModelEntry]:
        """Every model version there that is one of ours."""
