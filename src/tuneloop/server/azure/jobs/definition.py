"""What a job is, to be compared with what a later request says it is; and a recipe's text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any


def comparable(value: Any) -> Any:
    """The same request comes back from the SDK with texts for numbers."""
    if isinstance(value, Mapping):
        return {key: comparable(one) for key, one in value.items() if key != "display_name"}
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(float(value))
    if isinstance(value, str):
        try:
            return repr(float(value))
        except ValueError:
            return value.lower() if value.lower() in ("true", "false") else value
    return value


def differences(old: Any, new: Any, place: str = "") -> Iterator[str]:
    """Where two definitions differ, in words: `component.learning_rate is 1e-4, not 2e-5`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            yield from differences(old.get(key), new.get(key), f"{place}.{key}".lstrip("."))
    elif old != new:
        yield f"{place} is {_short(old)} there and {_short(new)} here"


def _short(value: object) -> str:
    text = "left out" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def as_yaml(recipe: Mapping[str, Any]) -> str:
    """JSON is YAML but for characters outside the first plane, which YAML 1.1 writes as \\UXXXXXXXX."""
    text = json.dumps(recipe)
    return re.sub(
        r"\\u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})",
        lambda pair: "\\U%08x" % (0x10000 + ((int(pair[1], 16) - 0xD800) << 10) + int(pair[2], 16) - 0xDC00),
        text,
    )
