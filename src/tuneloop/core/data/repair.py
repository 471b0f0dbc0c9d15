"""Repairs that cannot change what is learned, each of them named. A row that cannot be repaired so is
dropped, and that is named too.

Not done, since it would be a guess: joining turns, filling gaps, cutting texts, renaming columns, replacing
broken characters.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tuneloop.core.chat import ROLES, Finding
from tuneloop.core.data.reading import Source
from tuneloop.core.data.rows import Row
from tuneloop.core.data.rules import check_row, is_error
from tuneloop.core.errors import AlreadyExists
from tuneloop.core.types import Noun

MOST_CHANGES = 1000
"""More are counted, but not listed."""

_ALIASES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "developer": "system"}
"""Names that mean one role and no other: ShareGPT's, and OpenAI's newer name for system."""

Messages = list[Any]


# ---------------------------------------------------------------- a row


def fix(
    row: Row,
    findings: Iterable[Finding],
    column: str = "messages",
    check: Callable[[dict[str, Any]], list[Finding]] | None = None,
) -> tuple[dict[str, Any] | None, list[str]]:
    """The row repaired, or None to drop it, and what was changed. `findings` are those of reading and of
    every rule that it was held to; `check` holds a repaired row to the rules again."""
    findings = list(findings)
    if row.value is None:
        return None, [_dropped(findings)]
    bad = [finding for finding in findings if is_error(finding) or finding.rule == "last_turn"]
    if not bad:
        return row.value, []
    messages, changes = _repaired(row.value.get(column))
    if not changes:
        return (None, [_dropped(findings)]) if any(map(is_error, findings)) else (row.value, [])
    value = {**row.value, column: messages}
    left = [found for found in (check or (lambda each: check_row(each, column)))(value) if is_error(found)]
    return (None, [_dropped(left)]) if left else (value, changes)


def _dropped(findings: Iterable[Finding]) -> str:
    rules = dict.fromkeys(finding.rule for finding in findings if is_error(finding))
    return f"row dropped ({', '.join(rules)})"


def _repaired(messages: object) -> tuple[object, list[str]]:
    changes: list[str] = []
    if isinstance(messages, str) and isinstance(parsed := _parsed(messages), list):
        messages = parsed
        changes.append("messages read from the JSON in a string")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return messages, []
    repaired = [dict(message) for message in messages]
    for number, message in enumerate(repaired):
        where = f"messages[{number}]"
        changes += (
            _rename_role(where, message, number) + _unwrap(where, message) + _number_weight(where, message)
        )
    return repaired, changes + _drop_ends(repaired)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _rename_role(where: str, message: dict[str, Any], number: int) -> list[str]:
    written = message.get("role")
    if not isinstance(written, str) or written in ROLES:
        return []
    name = written.strip().lower()
    role = _ALIASES.get(name, name)
    # A system message that is not the first is left for a person to look at.
    if role not in ROLES or (role == "system" and name != role and number):
        return []
    message["role"] = role
    return [f"{where}.role {written!r} written as '{role}'"]


def _unwrap(where: str, message: dict[str, Any]) -> list[str]:
    """OpenAI's content parts, where there is one, and it is text: several could be joined in several ways."""
    content = message.get("content")
    if not isinstance(content, list) or len(content) != 1 or not isinstance(content[0], dict):
        return []
    part = content[0]
    if set(part) != {"type", "text"} or part["type"] != "text" or not isinstance(part["text"], str):
        return []
    message["content"] = part["text"]
    return [f"{where}.content taken out of its one text part"]


def _number_weight(where: str, message: dict[str, Any]) -> list[str]:
    if not isinstance(message.get("weight"), bool):
        return []
    message["weight"] = int(message["weight"])
    return [f"{where}.weight written as {message['weight']}"]


def _drop_ends(messages: Messages) -> list[str]:
    """Empty messages at either end, and what follows the last answer: nothing is learned from them."""
    changes = []
    if messages and messages[0].get("role") == "system" and _is_empty(messages[0]):
        messages.pop(0)
        changes.append("empty system message dropped")
    has_answer = any(message.get("role") == "assistant" and not _is_empty(message) for message in messages)
    while has_answer and (messages[-1].get("role") != "assistant" or _is_empty(messages[-1])):
        role = messages.pop().get("role")
        changes.append(f"messages[{len(messages)}] dropped: {role!r} after the last answer")
    return changes


def _is_empty(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return content is None or (isinstance(content, str) and not content.strip())


# ---------------------------------------------------------------- a file


class Change(Noun):
    line: int
    """0: the file as a whole."""
    row: int
    what: str


class Repaired(Noun):
    """What `repair_file` did."""

    file: str
    written: str
    rows: int
    rows_written: int
    rows_changed: int
    rows_dropped: int
    duplicates_dropped: int
    changes: tuple[Change, ...]
    """The first ones, in the order of the file."""
    changes_count: int
    by_rule_dropped: dict[str, int]


@dataclass
class _Work:
    seen: set[bytes] = field(default_factory=set)
    rows: int = 0
    rows_written: int = 0
    rows_changed: int = 0
    rows_dropped: int = 0
    duplicates_dropped: int = 0
    changes: list[Change] = field(default_factory=list)
    changes_count: int = 0
    by_rule: Counter[str] = field(default_factory=Counter)

    def tell(self, row: int, line: int, changes: Iterable[str]) -> None:
        for what in changes:
            self.changes_count += 1
            if len(self.changes) < MOST_CHANGES:
                self.changes.append(Change(row=row, line=line, what=what))


def repair_file(
    source: Source,
    target: Path,
    *,
    further: Callable[[dict[str, Any]], list[Finding]] | None = None,
) -> Repaired:
    """Write the good rows, and those that can be repaired, as JSON Lines in UTF-8. `further` are rules beyond
    `check_row`. The target is there whole or not at all.

    Memory: about 100 bytes a row. Raises `AlreadyExists` rather than overwrite, and what reading raises.
    """
    if target.exists() or target.is_symlink():
        raise AlreadyExists(f"{target} is there already.", next_move="Name another file, or remove this one.")
    work = _Work()
    work.tell(0, 0, _about_file(source))
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with open(unfinished, "xb") as file:
            for chunk in source.chunks():
                file.write(b"".join(_lines(chunk.rows(), source.column, further, work)))
            file.flush()
            os.fsync(file.fileno())
        _put_in_place(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
    return Repaired(
        file=source.shown,
        written=str(target),
        rows=work.rows,
        rows_written=work.rows_written,
        rows_changed=work.rows_changed,
        rows_dropped=work.rows_dropped,
        duplicates_dropped=work.duplicates_dropped,
        changes=tuple(work.changes),
        changes_count=work.changes_count,
        by_rule_dropped=dict(work.by_rule.most_common()),
    )


def _put_in_place(unfinished: Path, target: Path) -> None:
    try:
        os.link(unfinished, target)  # refuses, where a rename would replace what came meanwhile
    except FileExistsError:
        raise AlreadyExists(f"{target} is there already.", next_move="Name another file.") from None
    except OSError:  # a file system without hard links
        unfinished.rename(target)


def _about_file(source: Source) -> list[str]:
    changes = []
    if source.format != "jsonl":
        changes.append(f"{source.format} written as JSON Lines")
    if source.compression:
        changes.append("unpacked")
    if source.encoding != "utf-8":
        changes.append(f"{source.encoding} written as UTF-8")
    if source.look.has_mark:
        changes.append("byte order mark left out")
    if source.look.has_carriage_returns:
        changes.append("line ends written as \\n")
    return changes


def _lines(
    rows: Iterable[Row],
    column: str,
    further: Callable[[dict[str, Any]], list[Finding]] | None,
    work: _Work,
) -> Iterable[bytes]:
    def check(value: dict[str, Any]) -> list[Finding]:
        found = check_row(value, column)
        return found if further is None or any(map(is_error, found)) else [*found, *further(value)]

    for row in rows:
        work.rows += 1
        findings = list(row.findings) if row.value is None else check(row.value)
        value, changes = fix(row, findings, column, check)
        if value is None:
            work.rows_dropped += 1
            work.by_rule.update({finding.rule for finding in findings if is_error(finding)})
            work.tell(row.number, row.line, changes)
            continue
        line = _line(value, changes)
        key = _exact_key(value[column])
        if key in work.seen:
            work.duplicates_dropped += 1
            work.tell(row.number, row.line, ["row dropped: every letter of its messages was there before"])
            continue
        work.seen.add(key)
        work.rows_written += 1
        work.rows_changed += bool(changes)
        work.tell(row.number, row.line, changes)
        yield line


def _exact_key(messages: object) -> bytes:
    return blake2b(json.dumps(messages, sort_keys=True, default=str).encode(), digest_size=16).digest()


def _line(value: dict[str, Any], changes: list[str]) -> bytes:
    """What JSON has no word for is written as text or null, and said."""
    kinds: set[str] = set()

    def as_text(cell: object) -> str:
        kinds.add(f"a value of type {type(cell).__name__} written as text")
        return str(cell)

    try:
        line = json.dumps(value, ensure_ascii=False, allow_nan=False, default=as_text)
    except ValueError:
        kinds.add("NaN or infinity written as null")
        plain = json.loads(json.dumps(value, default=as_text), parse_constant=lambda _: None)
        line = json.dumps(plain, ensure_ascii=False)
    changes.extend(sorted(kinds))
    try:
        return line.encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair in another column: it stays the escape that it was
        return json.dumps(json.loads(line)).encode() + b"\n"
