"""What is read of a model's folder without torch: where its parts lie, its template, Tuneloop's note."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tuneloop.core.chat import ChatTemplate
from tuneloop.core.errors import ModelUnavailable

MODEL_NOTE = "tuneloop.json"
"""What Tuneloop knows about a model folder: base model, template digest, note, number of parameters."""


def resolve_folders(path: Path) -> tuple[Path, Path]:
    """(model folder, tokenizer folder) of a plain Hugging Face folder or of an MLflow model folder.
    Raises `ModelUnavailable` when it is neither."""
    if (path / "MLmodel").is_file():
        found = path / "model", path / "components" / "tokenizer"
    else:
        found = path, path
    for folder, file in ((found[0], "config.json"), (found[1], "tokenizer.json")):
        if not (folder / file).is_file():
            raise ModelUnavailable(f"{folder} holds no {file}, so it is not a model that can be loaded.")
    return found


def load_template(path: Path) -> ChatTemplate:
    """The chat template that belongs to the model in `path` (either layout)."""
    return ChatTemplate.from_folder(resolve_folders(path)[1])


def read_note(path: Path) -> dict[str, Any]:
    """`tuneloop.json` of a model folder (either layout); empty when Tuneloop did not write one."""
    file = path / MODEL_NOTE
    if not file.is_file():
        return {}
    note = json.loads(file.read_text(encoding="utf-8"))
    if note.get("format") != 1:
        raise ModelUnavailable(
            f"{file} has format {note.get('format')!r}; this version of Tuneloop reads format 1."
        )
    return dict(note)


def may_run_code(path: Path) -> bool:
    """Whether the model in `path` may bring its own code: only the import step writes so, when the card and
    the recipe both allow it."""
    return read_note(path).get("remote_code") is True
