"""What can be counted of rows without a tokenizer, nearly for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tuneloop.core.chat import ROLES
from tuneloop.core.types import RowStatistics

MOST_COLUMNS = 200
"""More columns are not listed: a file may give every row another."""

_KINDS = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    list: "list",
    dict: "object",
    type(None): "null",
    bytes: "bytes",
}


@dataclass
class Counts:
    """`RowStatistics` while they grow. Picklable, and parts add up."""

    rows: int = 0
    messages: int = 0
    characters: int = 0
    learned_characters: int = 0
    by_role: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ROLES, 0))
    most_messages: int = 0
    most_characters: int = 0
    columns: dict[tuple[str, type], None] = field(default_factory=dict)

    def add(self, value: Mapping[str, Any], column: str) -> None:
        messages = value[column]
        characters = 0
        for message in messages:
            role, length = message["role"], len(message["content"])
            characters += length
            self.by_role[role] += 1
            if role == "assistant" and message.get("weight", 1) != 0:
                self.learned_characters += length
        self.rows += 1
        self.messages += len(messages)
        self.characters += characters
        self.most_messages = max(self.most_messages, len(messages))
        self.most_characters = max(self.most_characters, characters)

    def add_columns(self, value: Mapping[str, Any]) -> None:
        for name, cell in value.items():
            if (name, type(cell)) not in self.columns and len(self.columns) < MOST_COLUMNS:
                self.columns[name, type(cell)] = None

    def merge(self, other: Counts) -> None:
        self.rows += other.rows
        self.messages += other.messages
        self.characters += other.characters
        self.learned_characters += other.learned_characters
        for role, count in other.by_role.items():
            self.by_role[role] += count
        self.most_messages = max(self.most_messages, other.most_messages)
        self.most_characters = max(self.most_characters, other.most_characters)
        for seen in other.columns:
            if len(self.columns) < MOST_COLUMNS:
                self.columns[seen] = None

    def statistics(self) -> RowStatistics:
        kinds: dict[str, set[str]] = {}
        for name, kind in self.columns:
            kinds.setdefault(name, set()).add(_KINDS.get(kind, kind.__name__))
        return RowStatistics(
            rows=self.rows,
            messages=self.messages,
            characters=self.characters,
            learned_characters=self.learned_characters,
            messages_by_role={role: count for role, count in self.by_role.items() if count},
            most_messages=self.most_messages,
            most_characters=self.most_characters,
            columns={name: " | ".join(sorted(names)) for name, names in kinds.items()},
        )
