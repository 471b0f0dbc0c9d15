"""What a serving process or a service leaves in its folder: that it answers, or why it does not."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from tuneloop.core.types import ErrorInfo, ReadyFile


def read_ready(folder: Path) -> ReadyFile | None:
    try:
        return ReadyFile.model_validate_json((folder / "ready.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError):
        return None


def read_error(folder: Path) -> ErrorInfo | None:
    try:
        return ErrorInfo.model_validate(json.loads((folder / "error.json").read_text(encoding="utf-8")))
    except (FileNotFoundError, ValidationError, json.JSONDecodeError):
        return None
