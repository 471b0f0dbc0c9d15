"""Hand-written stand-ins for the ports, held to the same contract suites as the real adapters."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from tuneloop.core.errors import AlreadyExists, NotFound, Stale
from tuneloop.core.names import did_you_mean
from tuneloop.core.ports import ProcessStatus
from tuneloop.core.types import Event, ProcessIdentity, Record, ResultFile

R = TypeVar("R", bound=Record)


class FakeClock:
    """Stands still until it is moved (time passes) or jumps (somebody sets the machine's clock)."""

    def __init__(self, now: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> None:
        self._now = now
        self._passed = 1000.0

    def now(self) -> datetime:
        return self._now

    def monotonic(self) -> float:
        return self._passed

    def move(self, seconds: float) -> None:
        self._now += timedelta(seconds=seconds)
        self._passed += seconds

    def jump(self, seconds: float) -> None:
        self._now += timedelta(seconds=seconds)


class FakeStore:
    """Records in a dictionary; a failed transaction puts everything back."""

    def __init__(self) -> None:
        self._records: dict[tuple[str, str], Record] = {}
        self._order: dict[tuple[str, str], int] = {}
        self._events: list[Event] = []
        self._counter = itertools.count(1)
        self._depth = 0

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        saved = (dict(self._records), dict(self._order), list(self._events)) if self._depth == 0 else None
        self._depth += 1
        try:
            yield
        except BaseException:
            if saved is not None:
                self._records, self._order, self._events = saved
            raise
        finally:
            self._depth -= 1

    def find(self, kind: type[R], key: str) -> R | None:
        found = self._records.get((kind.kind, key))
        return copy.deepcopy(found)  # type: ignore[return-value]

    def get(self, kind: type[R], key: str) -> R:
        found = self.find(kind, key)
        if found is None:
            keys = [known for (name, known) in self._records if name == kind.kind]
            raise NotFound(f"There is no {kind.kind} '{key}'.", next_move=did_you_mean(key, keys))
        return found

    def list(
        self,
        kind: type[R],
        *,
        parent: str | None = None,
        states: Iterable[str] | None = None,
        newest_first: bool = False,
        limit: int | None = None,
    ) -> list[R]:
        wanted = None if states is None else {str(state) for state in states}
        found = [
            record
            for (name, _), record in self._records.items()
            if name == kind.kind
            and (parent is None or record.parent == parent)
            and (wanted is None or record.state_name in wanted)
        ]
        found.sort(key=lambda record: self._order[(record.kind, record.key)], reverse=newest_first)
        return found[:limit]  # type: ignore[return-value]

    def insert(self, record: R) -> R:
        address = (record.kind, record.key)
        if address in self._records:
            raise AlreadyExists(f"There is a {record.kind} '{record.key}' already.")
        self._records[address] = record
        self._order[address] = next(self._counter)
        return record

    def update(self, record: R) -> R:
        self._check(record)
        following = record.model_copy(update={"version": record.version + 1})
        self._records[(record.kind, record.key)] = following
        return following

    def delete(self, record: Record) -> None:
        if (record.kind, record.key) not in self._records:
            return
        self._check(record)
        del self._records[(record.kind, record.key)]

    def append(self, event: Event) -> Event:
        numbered = event.model_copy(update={"sequence": len(self._events) + 1})
        self._events.append(numbered)
        return numbered

    def events(self, *, after: int = 0, subject: str | None = None, limit: int = 1000) -> list[Event]:
        found = [event for event in self._events if event.sequence > after]
        if subject is not None and subject.endswith("/"):
            found = [event for event in found if event.subject.startswith(subject)]
        elif subject is not None:
            found = [event for event in found if event.subject == subject]
        return found[:limit]

    def _check(self, record: Record) -> None:
        known = self._records.get((record.kind, record.key))
        if known is None:
            raise NotFound(f"The {record.kind} '{record.key}' is gone.")
        if known.version != record.version:
            raise Stale(f"The {record.kind} '{record.key}' was changed by somebody else meanwhile.")


class FakeExecutor:
    """Processes are entries; a test ends them as it likes."""

    def __init__(self) -> None:
        self.processes: dict[Path, ProcessStatus] = {}
        self.owners: dict[Path, str] = {}
        self.modules: dict[Path, str] = {}
        self.environments: dict[Path, dict[str, str]] = {}
        self.starts: list[Path] = []
        self.stopped: list[tuple[Path, bool]] = []
        self.ignores_stop = False
        self.refuses: Exception | None = None
        """What a start raises."""

    def ensure(self, owner: str, folder: Path, module: str, environment: Mapping[str, str]) -> None:
        if folder in self.processes:
            return
        if self.refuses is not None:
            raise self.refuses
        self.processes[folder] = "running"
        self.owners[folder] = owner
        self.modules[folder] = module
        self.environments[folder] = dict(environment)
        self.starts.append(folder)

    def status(self, owner: str, folder: Path) -> ProcessStatus:
        return self.processes.get(folder, "absent")

    def identity(self, folder: Path) -> ProcessIdentity | None:
        if folder not in self.starts:
            return None
        number = self.starts.index(folder) + 1
        return ProcessIdentity(pid=number, started_at=float(number), owner=self.owners[folder])

    def stop(self, owner: str, folder: Path, *, kill: bool = False) -> None:
        self.stopped.append((folder, kill))
        # What was not started yet can no longer be, as with the real one.
        if self.processes.get(folder, "absent") == "absent" or kill or not self.ignores_stop:
            self.processes[folder] = "ended"

    def last_lines(self, folder: Path, count: int = 20) -> list[str]:
        return []

    def end(self, folder: Path) -> None:
        self.processes[folder] = "ended"

    def running(self) -> list[Path]:
        return [folder for folder, status in self.processes.items() if status == "running"]


class FakeFiles:
    """Folders that exist by name only; results are put in by the test."""

    def __init__(self, home: Path = Path("/home-of-nobody")) -> None:
        self.home = home
        self.results: dict[Path, ResultFile] = {}
        self.artifacts: set[str] = set()
        self.written: dict[Path, str] = {}
        self.removed: list[Path] = []

    def folder(self, relative: str) -> Path:
        return self.home / relative

    def artifact_path(self, digest: str) -> Path:
        return self.home / "artifacts" / digest.removeprefix("sha256:")

    def has_artifact(self, digest: str) -> bool:
        return digest in self.artifacts

    def adopt(self, source: Path, digest: str) -> None:
        self.artifacts.add(digest)

    def ingest(self, source: Path, progress: Callable[[int], None] | None = None) -> tuple[str, int]:
        from tuneloop.core.digest import of_path

        digest, size = of_path(source)
        self.artifacts.add(digest)
        return digest, size

    def read_result(self, folder: Path) -> ResultFile | None:
        return self.results.get(folder)

    def write_json(self, path: Path, text: str, *, private: bool = False) -> None:
        self.written[path] = text

    def remove(self, path: Path) -> None:
        self.removed.append(path)
