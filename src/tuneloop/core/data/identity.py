"""When two rows are the same conversation. When they begin alike, `split.group_of` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any


def conversation_key(messages: Sequence[Mapping[str, Any]]) -> int:
    """64 bits of roles and texts, without the space around a text; never 0. Rows with equal keys are
    duplicates: among a million different rows, a pair is equal by chance once in 37 million times."""
    parts: list[str] = []
    for message in messages:
        parts += (message["role"], message["content"].strip())
        if len(message) > 2 and message.get("weight") == 0:
            parts.append("0")
        parts.append("")
    whole = "\x1f".join(parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(whole, digest_size=8).digest(), "little") or 1
