"""Data: files are checked row by row and brought in (copied, digested) when a job is submitted, so that a job
works on what was there at that moment, whatever happens to the file later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tuneloop.core.data.check import check_files
from tuneloop.core.data.detecting import stamp
from tuneloop.core.data.reading import Source, open_source
from tuneloop.core.data.report import FileReport, Report, RowFinding
from tuneloop.core.errors import DataError, NotFound
from tuneloop.core.names import check_name, did_you_mean
from tuneloop.core.ports import Clock, Files, Store
from tuneloop.core.questions import read_questions
from tuneloop.core.types import Artifact, ArtifactInput, Dataset, dump

MAX_FINDINGS = 100
"""More are counted but not listed."""


@dataclass(frozen=True)
class ChatFiles:
    """Files of conversations by what they are for: `train`, `validation`, `test`."""

    paths: Mapping[str, Path]
    shown: Mapping[str, str]
    """What each is called in messages."""
    column: str = "messages"
    """Where in a row the conversation is."""
    bad_rows: int = 0
    """So many rows may be bad, in all files together; they are left out, and it is said."""


@dataclass(frozen=True)
class Brought:
    """What was brought in, by what it is for."""

    inputs: dict[str, ArtifactInput]
    datasets: dict[str, Dataset]
    warnings: tuple[str, ...] = ()


class Data:
    def __init__(self, store: Store, files: Files, clock: Clock) -> None:
        self._store = store
        self._files = files
        self._clock = clock

    def list(self) -> Sequence[Dataset]:
        return self._store.list(Dataset)

    def get(self, name: str) -> Dataset:
        """`NAME:VERSION`, or `NAME`: the one that was stored last. Raises `NotFound` with the nearest."""
        wanted, _, version = name.partition(":")
        found = [each for each in self.list() if each.name == wanted]
        chosen = next((each for each in reversed(found) if version in ("", each.dataset_version)), None)
        if chosen is not None:
            return chosen
        if found:
            known = ", ".join(each.dataset_version for each in found)
            raise NotFound(f"There is no version '{version}' of {wanted}.", next_move=f"There is: {known}.")
        hint = did_you_mean(wanted, {each.name for each in self.list()})
        raise NotFound(
            f"There is no data named '{wanted}'.",
            next_move=hint or "Register a file: tuneloop data register FILE",
        )

    def check_questions(self, path: Path, shown: str) -> None:
        """Refuse what `bring_in_questions` would refuse; nothing is stored."""
        stamp(path, shown)
        read_questions(path.read_bytes().splitlines(), shown)

    def check_chat(self, files: ChatFiles) -> tuple[str, ...]:
        """Refuse what `bring_in_chat` would refuse; nothing is stored. Its warnings."""
        return check_chat_files(_sources(files), files).warnings

    def bring_in_chat(self, files: ChatFiles) -> Brought:
        """Store files of conversations as they are, and check every row of them. Raises `DataError` with the
        findings, `NotFound` where there is no such file, `Unsupported` for a format that is not read."""
        _sources(files)
        inputs = {role: self.bring_in_file(path, files.shown[role]) for role, path in files.paths.items()}
        # What was stored is what is checked: the original may change between two looks.
        stored = {role: self._files.artifact_path(given.digest) for role, given in inputs.items()}
        checked = check_chat_files(_sources(files, stored), files)
        datasets = {
            each.role: self._dataset(files.paths[each.role], inputs[each.role].digest, each)
            for each in checked.report.files
        }
        return Brought(inputs, datasets, checked.warnings)

    def register(
        self,
        path: Path,
        shown: str,
        *,
        name: str | None = None,
        license: str | None = None,
        bad_rows: int = 0,
    ) -> Dataset:
        """Check one file, store it, and give it a name; the version is its content's. Raises as
        `bring_in_chat` does, and `InvalidName`."""
        if name is not None:
            check_name(name, "dataset")
        files = ChatFiles({"data": path}, {"data": shown}, bad_rows=bad_rows)
        _sources(files)
        given = self.bring_in_file(path, shown)
        checked = check_chat_files(_sources(files, {"data": self._files.artifact_path(given.digest)}), files)
        return self._dataset(path, given.digest, checked.report.files[0], name, license)

    def bring_in_questions(self, path: Path, shown: str) -> ArtifactInput:
        """Check a file of questions with facts and store it. Raises `DataError` and `NotFound`."""
        artifact = self.bring_in_file(path, shown)
        read_questions(self._files.artifact_path(artifact.digest).read_bytes().splitlines(), shown)
        return artifact

    def bring_in_file(self, path: Path, shown: str) -> ArtifactInput:
        stamp(path, shown)
        digest, size_bytes = self._files.ingest(path)
        with self._store.transaction():
            if self._store.find(Artifact, digest) is None:
                self._store.insert(
                    Artifact(
                        created_at=self._clock.now(),
                        digest=digest,
                        type="file",
                        size_bytes=size_bytes,
                        name=path.name,
                    )
                )
        return ArtifactInput(digest=digest, name=shown)

    def _dataset(
        self, path: Path, digest: str, seen: FileReport, name: str | None = None, license: str | None = None
    ) -> Dataset:
        """Name and version by content: the same bytes under the same name are the same version."""
        version = digest.removeprefix("sha256:")[:12]
        dataset = Dataset(
            created_at=self._clock.now(),
            name=name or path.stem,
            dataset_version=version,
            artifact=digest,
            source_path=str(path),
            rows=seen.rows,
            bad_rows=seen.bad_rows,
            columns=tuple(seen.statistics.columns),
            format=seen.format,
            statistics=seen.statistics,
            license=license,
        )
        with self._store.transaction():
            found = self._store.find(Dataset, dataset.key)
            if found is None:
                return self._store.insert(dataset)
            if license is None or license == found.license:
                return found
            return self._store.update(found.model_copy(update={"license": license}))


def _sources(files: ChatFiles, paths: Mapping[str, Path] | None = None) -> dict[str, Source]:
    return {
        role: open_source(path, files.shown[role], column=files.column)
        for role, path in (paths or files.paths).items()
    }


# ---------------------------------------------------------------- checking


@dataclass(frozen=True)
class Checked:
    report: Report
    warnings: tuple[str, ...]


def check_chat_file(path: Path, shown: str) -> Report:
    """One file, without a budget for bad rows. Raises `DataError` with the findings."""
    files = ChatFiles({"data": path}, {"data": shown})
    return check_chat_files(_sources(files), files).report


def check_chat_files(sources: Mapping[str, Source], files: ChatFiles) -> Checked:
    """Raises `DataError` with the first findings when more rows are bad than allowed, or a file has none that
    is good. Duplicates and leakage between files are warnings: the data may be meant so."""
    same = _same_files(sources)
    firsts = _Firsts(silent_leaks=frozenset(same))
    report = check_files(
        sources,
        column=files.column,
        budget=files.bad_rows,
        most_findings=MAX_FINDINGS,
        listen=firsts.hear,
        leaks_are_errors=False,
    )
    for each in report.files:
        if each.rows == 0:
            raise DataError(
                f"{each.file} has no rows.", next_move="Give a file with one conversation per line."
            )
    bad = [each for each in report.files if each.bad_rows]
    if bad and (not report.is_good or any(each.bad_rows == each.rows for each in bad)):
        raise DataError(_summary(bad, firsts, files.bad_rows), details=firsts.listed())
    told = (
        f"{later} and {earlier} are the same file, {sources[later].shown}: {_MEANING[earlier == 'train']}"
        for later, earlier in same.items()
    )
    return Checked(report, (*told, *firsts.warnings(report)))


_MEANING = {
    True: "its scores are of rows that were learned.",
    False: "what one of them helps to choose, the other does not judge independently.",
}


def _same_files(sources: Mapping[str, Source]) -> dict[str, str]:
    """Role to an earlier role that has the same file."""
    found: dict[str, str] = {}
    roles = list(sources)
    for number, later in enumerate(roles):
        for earlier in roles[:number]:
            if sources[later].path.samefile(sources[earlier].path):
                found.setdefault(later, earlier)
    return found


@dataclass
class _Firsts:
    """Of all findings, those to tell: the first errors, and the first of each file and rule."""

    errors: list[RowFinding] = field(default_factory=list)
    of_rule: dict[tuple[str, str], RowFinding] = field(default_factory=dict)
    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    silent_leaks: frozenset[str] = frozenset()
    """Roles whose file is another role's too: one sentence says so, not one for each row."""

    def hear(self, finding: RowFinding) -> None:
        if finding.rule in ("leak", "opening_leak") and finding.role in self.silent_leaks:
            return
        key = (finding.file, finding.rule)
        self.of_rule.setdefault(key, finding)
        self.counts[key] = self.counts.get(key, 0) + 1
        if finding.severity == "error" and len(self.errors) < MAX_FINDINGS:
            self.errors.append(finding)

    def first_error(self, file: str) -> RowFinding:
        return next(found for (named, _), found in self.of_rule.items() if named == file and _is_error(found))

    def listed(self) -> list[dict[str, object]]:
        return [dump(found) for found in self.errors]

    def warnings(self, report: Report) -> list[str]:
        told = []
        for (file, rule), first in self.of_rule.items():
            count = self.counts[file, rule]
            if _is_error(first):
                told.append(f"{file}: bad rows are left out ({count}, rule {rule}). {first.sentence()}")
            elif count == 1:
                told.append(first.sentence())
            else:
                told.append(f"{file}: {count} findings of the rule {rule}. The first: {first.sentence()}")
        return told


def _is_error(finding: RowFinding) -> bool:
    return finding.severity == "error"


def _summary(bad: Sequence[FileReport], firsts: _Firsts, allowed: int) -> str:
    """Counts the rows; the first finding of each file is told, the others are in the error's details."""
    limit = f" ({allowed} allowed)" if allowed else ""
    return "\n".join(
        f"{each.bad_rows} of {each.rows} rows of {each.file} cannot be learned from{limit}; "
        f"nothing was started.\n  {firsts.first_error(each.file).sentence()}"
        for each in bad
    )
