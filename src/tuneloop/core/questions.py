"""Questions with the facts that a right answer holds, one JSON object a line:

    {"id": "capital", "kind": "everyday", "question": "What is the capital of France?", "facts": [["Paris"]]}

Checked when a job is submitted, and read again by the evaluate step.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tuneloop.core.errors import DataError

_SHAPE = '{"id": "capital", "kind": "everyday", "question": "...?", "facts": [["Paris"]]}'


@dataclass(frozen=True)
class Question:
    id: str
    kind: str
    question: str
    facts: list[list[str]]
    """Every inner list needs one of its alternatives in the reply."""

    def is_right(self, reply: str) -> bool:
        said = reply.lower()
        return all(any(alternative.lower() in said for alternative in fact) for fact in self.facts)


def read_questions(lines: Iterable[bytes], shown: str) -> list[Question]:
    """The questions of a file that people call `shown`. Raises `DataError` with every mistake in it."""
    questions: list[Question] = []
    findings: list[dict[str, Any]] = []
    for line, text in enumerate(lines, 1):
        if not text.strip():
            continue
        read = _read(text)
        if isinstance(read, Question):
            questions.append(read)
        else:
            field, value, fix = read
            finding = {"file": shown, "line": line, "field": field, "rule": "question", "value": value}
            findings.append(finding | {"fix": fix})
    if findings:
        bad = f"{len(findings)} line{'' if len(findings) == 1 else 's'} of {shown}"
        raise DataError(f"{bad} cannot be asked.\n  {_sentence(findings[0])}", details=findings)
    return questions


def _sentence(finding: dict[str, Any]) -> str:
    field = f"{finding['field']}: " if finding["field"] else ""
    found = f"found {finding['value']} (rule {finding['rule']})."
    return f"{finding['file']} line {finding['line']}: {field}{found} {finding['fix']}"


def _read(text: bytes) -> Question | tuple[str, str, str]:
    """The question in one line, or (field, value, fix)."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        shown = json.dumps(text.decode("utf-8", "replace").strip(), ensure_ascii=False)
        return "", _short(shown), f"Write one JSON object a line: {_SHAPE}"
    for field in ("id", "question"):
        if not isinstance(value.get(field), str) or not value[field].strip():
            return field, _shown(value, field), f"Give every question a text as '{field}': {_SHAPE}"
    if not isinstance(value.get("kind", ""), str):
        return "kind", _shown(value, "kind"), f"Write a text, or leave it out: {_SHAPE}"
    facts = value.get("facts")
    if not isinstance(facts, list) or not facts or not all(_is_fact(fact) for fact in facts):
        fix = f"Write a list of facts, each a list of alternatives in words: {_SHAPE}"
        return "facts", _shown(value, "facts"), fix
    unknown = sorted(set(value) - {"id", "kind", "question", "facts"})
    if unknown:
        fix = "Remove it; a question has id, kind, question and facts."
        return unknown[0], _shown(value, unknown[0]), fix
    return Question(value["id"], value.get("kind", ""), value["question"], facts)


def _is_fact(value: object) -> bool:
    is_list = isinstance(value, list) and bool(value)
    return is_list and all(isinstance(text, str) and text.strip() for text in value)  # type: ignore[attr-defined]


def _shown(row: dict[str, Any], field: str) -> str:
    return _short(json.dumps(row[field], ensure_ascii=False)) if field in row else "nothing"


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
