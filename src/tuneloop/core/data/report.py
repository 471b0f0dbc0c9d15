"""What a check of files says: JSON for programs, sentences for people."""

from __future__ import annotations

from typing import Literal

from tuneloop.core.data.rows import Format
from tuneloop.core.data.rules import RULES, Severity
from tuneloop.core.types import Noun, RowStatistics


class RowFinding(Noun):
    """A finding and the place it is about."""

    file: str
    role: str
    """`train`, `validation`, `test`, or whatever the file was given for."""
    line: int
    """Where the row begins; in Parquet and JSON arrays the number of the row."""
    row: int
    id: str | None = None
    """What the row calls itself (`prompt_id`, `id`, `uuid`, `conversation_id`)."""
    field: str
    rule: str
    severity: Severity
    value: str
    fix: str
    place: Literal["line", "row"] = "line"
    """What `line` counts."""

    def sentence(self) -> str:
        """`train.jsonl line 112: messages[2].content: found "" (rule content_not_empty). Write the text.`"""
        where = f"{self.field}: " if self.field else ""
        named = f" (id {short_id(self.id)})" if self.id else ""
        return (
            f"{self.file} {self.place} {self.line}{named}: {where}found {self.value} "
            f"(rule {self.rule}). {self.fix}"
        )


def short_id(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:12]}..."


class RuleCount(Noun):
    rule: str
    severity: Severity
    findings: int
    what: str
    """What the rule asks for."""


class FileReport(Noun):
    file: str
    role: str
    format: Format
    rows: int
    bad_rows: int
    statistics: RowStatistics


class Report(Noun):
    """`is_good`: no more bad rows than the budget."""

    is_good: bool
    files: tuple[FileReport, ...]
    rows: int
    bad_rows: int
    """Rows with an error; warnings make no row bad."""
    budget: int
    by_rule: tuple[RuleCount, ...]
    """Errors first, the most frequent first."""
    findings: tuple[RowFinding, ...]
    """The first ones; `findings_count` counts all."""
    findings_count: int

    @property
    def errors(self) -> int:
        return sum(each.findings for each in self.by_rule if each.severity == "error")

    @property
    def warnings(self) -> int:
        return sum(each.findings for each in self.by_rule if each.severity == "warning")


def rule_counts(counts: dict[tuple[str, Severity], int]) -> tuple[RuleCount, ...]:
    rows = [
        RuleCount(
            rule=name, severity=severity, findings=count, what=RULES[name].what if name in RULES else ""
        )
        for (name, severity), count in counts.items()
    ]
    return tuple(sorted(rows, key=lambda each: (each.severity, -each.findings, each.rule)))
