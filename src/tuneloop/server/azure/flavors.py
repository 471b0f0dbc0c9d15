"""The flavours of an MLflow model, as its file MLmodel says them: the SDK cannot read a model without."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from tuneloop.server.azure.bodies import Body

LONGEST_BYTES = 1024 * 1024


def flavors_of(folder: Path) -> dict[str, Any]:
    """`{name: {"data": {...}}}`; empty where there is no MLmodel that can be read. An artifact never changes,
    so each is read once."""
    return dict(_read(folder))


@lru_cache(maxsize=256)
def _read(folder: Path) -> dict[str, Any]:
    file = folder / "MLmodel"
    try:
        if file.stat().st_size > LONGEST_BYTES:
            return {}
        written = yaml.safe_load(file.read_text(encoding="utf-8"))
        found = written["flavors"]
        return {str(name): {"data": _texts(data)} for name, data in found.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError, RecursionError):
        return {}


def _texts(data: Any) -> dict[str, str]:
    """Azure's are texts."""
    return {
        str(name): value if isinstance(value, str) else json.dumps(value, default=str)
        for name, value in dict(data or {}).items()
    }


def read_flavors(properties: Body) -> dict[str, Any]:
    """What a script says itself of a model that has no MLmodel."""
    found: dict[str, Any] = {}
    for name, flavor in properties.objects("flavors"):
        found[name] = {"data": flavor.texts("data")}
    return found
