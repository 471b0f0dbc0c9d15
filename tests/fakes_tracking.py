"""A stand-in for MLflow, held to the same contract suite as the real adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from types import MappingProxyType

from tuneloop.core.errors import InvalidState, NotFound, Unavailable
from tuneloop.core.ports import DatasetUse, Measurement, ModelEntry, RunStatus, UnderWay

_NOTHING: Mapping[str, str] = MappingProxyType({})


class Killed(BaseException):
    """The tracker process ends here."""


@dataclass
class FakeRun:
    id: str
    experiment: str
    name: str
    started_at: datetime
    tags: dict[str, str]
    status: RunStatus = "running"
    ended_at: datetime | None = None
    parameters: dict[str, str] = field(default_factory=dict)
    points: set[Measurement] = field(default_factory=set)
    datasets: dict[str, DatasetUse] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)
    is_deleted: bool = False

    def curve(self, name: str) -> list[tuple[int, float]]:
        return sorted((point.step, point.value) for point in self.points if point.name == name)

    def value(self, name: str) -> float:
        return self.curve(name)[-1][1]


@dataclass
class FakeModelVersion:
    entry: ModelEntry
    source: Path
    run_id: str | None


class FakeTrackingServer:
    """Remembers everything; fails as it is told to."""

    def __init__(self, place: str = "") -> None:
        self.place = place
        self.runs: dict[str, FakeRun] = {}
        self.models: dict[str, list[FakeModelVersion]] = {}
        self.is_reachable = True
        self.broken: set[str] = set()
        """Runs (by name) and models whose calls fail with an error of their own."""
        self.travelling: set[str] = set()
        """Models whose bytes are on their way."""
        self.calls = 0
        self.killed_before: int | None = None
        """The process that wants to make this call ends without having made it."""
        self.killed_after: int | None = None
        """The process that makes this call gets no answer any more: the call is done, its caller is gone."""

    # ------------------------------------------------------------ the port

    def ensure_run(
        self, experiment: str, identity: str, name: str, tags: Mapping[str, str], started_at: datetime
    ) -> str:
        with self._call(name):
            for run in self.runs.values():
                is_meant = run.experiment == experiment and run.tags.get(identity) == tags[identity]
                if is_meant and not run.is_deleted:
                    return run.id
            run = FakeRun(f"{len(self.runs) + 1:032x}", experiment, name, started_at, dict(tags))
            self.runs[run.id] = run
            return run.id

    def log(
        self,
        run_id: str,
        *,
        measurements: Sequence[Measurement] = (),
        parameters: Mapping[str, str] = _NOTHING,
        tags: Mapping[str, str] = _NOTHING,
    ) -> None:
        with self._call_about(run_id) as run:
            changed = {name for name, value in parameters.items() if run.parameters.get(name, value) != value}
            if changed:
                raise ValueError(f"parameters cannot be changed: {sorted(changed)}")
            run.points.update(measurements)
            run.parameters.update(parameters)
            run.tags.update(tags)

    def log_datasets(self, run_id: str, datasets: Sequence[DatasetUse]) -> None:
        with self._call_about(run_id) as run:
            run.datasets.update({dataset.name: dataset for dataset in datasets})

    def log_picture(self, run_id: str, picture: Path, folder: str = "") -> None:
        with self._call_about(run_id) as run:
            run.pictures[f"{folder}/{picture.name}" if folder else picture.name] = picture.read_bytes()

    def set_status(self, run_id: str, status: RunStatus, ended_at: datetime | None = None) -> None:
        with self._call_about(run_id) as run:
            run.status = status
            run.ended_at = ended_at

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
        with self._call(name):
            known = self.models.setdefault(name, [])
            for one in known:
                if (one.entry.version, one.entry.digest) == (version, digest):
                    one.entry = replace(one.entry, description=description, tags={**one.entry.tags, **tags})
                    return one.entry.number
            if name in self.travelling:
                raise UnderWay("is uploaded to MLflow: 1 of 2 MB")
            number = max((one.entry.number for one in known), default=0) + 1
            entry = ModelEntry(name, version, digest, number, description, dict(tags))
            known.append(FakeModelVersion(entry, source, run_id))
            return number

    def delete_model_version(self, name: str, version: str, digest: str, *, run_id: str | None) -> None:
        with self._call(name):
            left = [
                one
                for one in self.models.get(name, [])
                if (one.entry.version, one.entry.digest) != (version, digest)
            ]
            self.models[name] = left
            if not left:
                del self.models[name]

    def model_entries(self) -> list[ModelEntry]:
        with self._call("models"):
            return [one.entry for known in self.models.values() for one in known]

    # ------------------------------------------------------------ for tests

    def run_with(self, tag: str, value: str) -> FakeRun:
        (found,) = [run for run in self.runs.values() if run.tags.get(tag) == value]
        return found

    def lose_everything(self) -> None:
        """As when somebody throws the database away."""
        self.runs.clear()
        self.models.clear()

    @contextmanager
    def _call(self, subject: str) -> Iterator[None]:
        if not self.is_reachable:
            raise Unavailable("nobody answers")
        if subject in self.broken:
            raise ValueError(f"{subject} is broken")
        self.calls += 1
        if self.calls == self.killed_before:
            raise Killed
        yield
        if self.calls == self.killed_after:
            raise Killed

    @contextmanager
    def _call_about(self, run_id: str) -> Iterator[FakeRun]:
        run = self.runs.get(run_id)
        with self._call("" if run is None else run.name):
            if run is None:
                raise NotFound(f"Run {run_id} is not there.")
            if run.is_deleted:
                raise InvalidState(f"Run {run_id} was deleted.")
            yield run
