"""Whole files held to the rules: every row, then what only shows over all of them.

    report = check_files({"train": open_source(...), "test": open_source(...)})

or in parts, so that other processes do the reading:

    checker = Checker()
    checker.begin("train", source)
    checker.add(check_chunk(chunk))     # check_chunk anywhere, add here and in order
    report = checker.finish()

Memory: 16 bytes a row (24 where rows are not lines), and as much again for a moment at the end.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tuneloop.core.chat import Finding
from tuneloop.core.data.identity import conversation_key
from tuneloop.core.data.reading import Source
from tuneloop.core.data.report import FileReport, Report, RowFinding, rule_counts
from tuneloop.core.data.rows import Chunk, Format, Row, id_of
from tuneloop.core.data.rules import RULES, Severity, check_row, is_error
from tuneloop.core.data.split import group_of
from tuneloop.core.data.statistics import Counts

MOST_FINDINGS = 1000
"""More are counted, and given to whoever listens, but not listed."""

Keys = npt.NDArray[np.uint64]


@dataclass
class Part:
    """What was found in rows that follow each other. Picklable, a few bytes for a good row."""

    keys: array[int] = field(default_factory=lambda: array("Q"))
    """Two for each row: the conversation's and the opening's; zeros for a bad row."""
    lines: array[int] = field(default_factory=lambda: array("Q"))
    findings: list[tuple[int, int, str | None, Finding]] = field(default_factory=list)
    """(row, line, id, finding)."""
    bad_rows: int = 0
    counts: Counts = field(default_factory=Counts)

    def add(self, row: Row, findings: Iterable[Finding], column: str = "messages") -> None:
        """`findings` are those of the row's reading and of every rule that it was held to."""
        is_bad = row.value is None
        for finding in findings:
            self.findings.append((row.number, row.line, id_of(row.value), finding))
            is_bad = is_bad or is_error(finding)
        self.lines.append(row.line)
        if row.value is not None:
            self.counts.add_columns(row.value)
        if is_bad or row.value is None:
            self.bad_rows += 1
            self.keys.extend((0, 0))
            return
        messages = row.value[column]
        self.keys.extend((conversation_key(messages), group_of(messages)))
        self.counts.add(row.value, column)


def check_chunk(
    chunk: Chunk, column: str = "messages", further: Callable[[Row], Iterable[Finding]] | None = None
) -> Part:
    """Hold the rows of a chunk to the rules that need no model, and those without errors to `further`."""
    part = Part()
    for row in chunk.rows():
        findings = list(row.findings) if row.value is None else check_row(row.value, column)
        if further is not None and row.value is not None and not any(map(is_error, findings)):
            findings.extend(further(row))
        part.add(row, findings, column)
    return part


@dataclass
class _Seen:
    """A file, as far as it is remembered."""

    role: str
    shown: str
    format: Format
    keys: array[int] = field(default_factory=lambda: array("Q"))
    lines: array[int] | None = None
    """None while row n is line n."""
    rows: int = 0
    bad_rows: int = 0
    counts: Counts = field(default_factory=Counts)

    def add(self, part: Part) -> None:
        if self.lines is None and part.lines and not _are_consecutive(part.lines, self.rows + 1):
            self.lines = array("Q", range(1, self.rows + 1))
        if self.lines is not None:
            self.lines.extend(part.lines)
        self.rows += len(part.lines)
        self.keys.extend(part.keys)
        self.bad_rows += part.bad_rows
        self.counts.merge(part.counts)

    def line_of(self, index: int) -> int:
        return self.lines[index] if self.lines is not None else index + 1

    @property
    def place(self) -> str:
        return "row" if self.format in ("parquet", "json") else "line"


def _are_consecutive(lines: array[int], first: int) -> bool:
    """Lines rise by one or more from `first` on, so that the last one tells."""
    return lines[-1] == first + len(lines) - 1


class Checker:
    """Collects over several files. `listen` is given every finding as it is found."""

    def __init__(
        self,
        budget: int = 0,
        most_findings: int = MOST_FINDINGS,
        listen: Callable[[RowFinding], None] | None = None,
        *,
        leaks_are_errors: bool = True,
    ) -> None:
        self._budget = budget
        self._leaks_are_errors = leaks_are_errors
        self._most_findings = most_findings
        self._listen = listen
        self._files: list[_Seen] = []
        self._findings: list[RowFinding] = []
        self._by_rule: Counter[tuple[str, Severity]] = Counter()

    def begin(self, role: str, source: Source) -> None:
        """What is added from now on stands in this file. Files of one role are one set of data."""
        self._files.append(_Seen(role, source.shown, source.format))

    def add(self, part: Part) -> None:
        file = self._files[-1]
        for row, line, name, finding in part.findings:
            self._tell(file, row, line, name, finding)
        file.add(part)

    def add_row(self, row: Row, findings: Iterable[Finding], column: str = "messages") -> None:
        part = Part()
        part.add(row, findings, column)
        self.add(part)

    def finish(self) -> Report:
        """Find duplicates and leakage, and report. Call it once."""
        roles = list(dict.fromkeys(file.role for file in self._files))
        sets = [_RoleSet([file for file in self._files if file.role == role]) for role in roles]
        for one in sets:
            self._find_duplicates(one)
        for number, later in enumerate(sets):
            leaked: set[int] = set()
            for earlier in sets[:number]:
                self._find_leaks(earlier, later, leaked)
            if self._leaks_are_errors:
                later.count_as_bad(leaked)
        return self._report()

    # ------------------------------------------------------------ over all rows

    def _find_duplicates(self, rows: _RoleSet) -> None:
        for index, first in rows.repeated():
            shown = f"the same conversation as {rows.place(first)}"
            fix = "Drop one of them: what is there twice is learned twice as hard."
            self._tell_at(rows, index, Finding("duplicate", "", shown, fix))

    def _find_leaks(self, earlier: _RoleSet, later: _RoleSet, leaked: set[int]) -> None:
        for index, first in earlier.shared(later, 0):
            leaked.add(index)
            shown = f"the conversation of {earlier.place(first)} ({earlier.role})"
            fix = f"Remove it from one of them: {later.role} has to be what {earlier.role} is not."
            self._tell_at(later, index, Finding("leak", "", shown, fix))
        for index, first in earlier.shared(later, 1):
            if index not in leaked:
                shown = f"the opening line of {earlier.place(first)} ({earlier.role})"
                fix = "Split by opening line (`tuneloop data split`), if the answers are alike."
                self._tell_at(later, index, Finding("opening_leak", "", shown, fix))

    # ------------------------------------------------------------ telling

    def _tell_at(self, rows: _RoleSet, index: int, finding: Finding) -> None:
        file, within = rows.file_of(index)
        self._tell(file, within + 1, file.line_of(within), None, finding)

    def _tell(self, file: _Seen, row: int, line: int, name: str | None, finding: Finding) -> None:
        severity = self._severity(finding)
        self._by_rule[finding.rule, severity] += 1
        is_listed = len(self._findings) < self._most_findings
        if not is_listed and self._listen is None:
            return
        told = RowFinding(
            file=file.shown,
            role=file.role,
            line=line,
            row=row,
            id=name,
            severity=severity,
            place="row" if file.place == "row" else "line",
            **finding._asdict(),
        )
        if is_listed:
            self._findings.append(told)
        if self._listen is not None:
            self._listen(told)

    def _severity(self, finding: Finding) -> Severity:
        """Of an unknown rule: an error, so that nothing passes because somebody forgot to list it."""
        if finding.rule == "leak" and not self._leaks_are_errors:
            return "warning"
        rule = RULES.get(finding.rule)
        return rule.severity if rule else "error"

    def _report(self) -> Report:
        bad_rows = sum(file.bad_rows for file in self._files)
        return Report(
            is_good=bad_rows <= self._budget,
            files=tuple(
                FileReport(
                    file=file.shown,
                    role=file.role,
                    format=file.format,
                    rows=file.rows,
                    bad_rows=file.bad_rows,
                    statistics=file.counts.statistics(),
                )
                for file in self._files
            ),
            rows=sum(file.rows for file in self._files),
            bad_rows=bad_rows,
            budget=self._budget,
            by_rule=rule_counts(dict(self._by_rule)),
            findings=tuple(self._findings),
            findings_count=self._by_rule.total(),
        )


class _RoleSet:
    """The rows of all files of one role, by an index over all of them."""

    def __init__(self, files: list[_Seen]) -> None:
        self.role = files[0].role
        self._files = files
        self._starts = np.cumsum([0, *(file.rows for file in files)])
        arrays = [np.frombuffer(file.keys, np.uint64).reshape(-1, 2) for file in files if file.rows]
        self._keys: Keys = (
            np.concatenate(arrays) if len(arrays) > 1 else (arrays or [np.zeros((0, 2), "u8")])[0]
        )

    def count_as_bad(self, rows: Iterable[int]) -> None:
        for index in rows:
            self.file_of(index)[0].bad_rows += 1

    def file_of(self, index: int) -> tuple[_Seen, int]:
        number = int(np.searchsorted(self._starts, index, "right")) - 1
        return self._files[number], index - int(self._starts[number])

    def place(self, index: int) -> str:
        file, within = self.file_of(index)
        return f"{file.shown} {file.place} {file.line_of(within)}"

    def repeated(self) -> Iterator[tuple[int, int]]:
        """(row, the first row like it), in the order of the rows."""
        keys = self._keys[:, 0]
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        is_again = np.zeros(len(keys), bool)
        is_again[1:] = (ordered[1:] == ordered[:-1]) & (ordered[1:] != 0)
        again = np.flatnonzero(is_again)
        firsts = order[np.searchsorted(ordered, ordered[again], "left")]
        rows = order[again]
        for position in np.argsort(rows):
            yield int(rows[position]), int(firsts[position])

    def shared(self, later: _RoleSet, which: int) -> Iterator[tuple[int, int]]:
        """(row of `later`, the first row here with the same key): 0 conversations, 1 openings."""
        keys = self._keys[:, which]
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        asked = later._keys[:, which]
        places = np.searchsorted(ordered, asked, "left")
        places[places == len(ordered)] = 0
        is_shared = (ordered[places] == asked) & (asked != 0) if len(ordered) else np.zeros(len(asked), bool)
        for index in np.flatnonzero(is_shared):
            yield int(index), int(order[places[index]])


def check_files(
    sources: Mapping[str, Source],
    *,
    column: str = "messages",
    budget: int = 0,
    most_findings: int = MOST_FINDINGS,
    listen: Callable[[RowFinding], None] | None = None,
    leaks_are_errors: bool = True,
) -> Report:
    """Read and check in this process, without a model. Raises what reading raises."""
    checker = Checker(budget, most_findings, listen, leaks_are_errors=leaks_are_errors)
    for role, source in sources.items():
        checker.begin(role, source)
        for chunk in source.chunks():
            checker.add(check_chunk(chunk, column))
    return checker.finish()
