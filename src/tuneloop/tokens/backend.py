"""The Rust tokenizer of a model, exactly the one that transformers would use, without importing torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from tuneloop.core import digest
from tuneloop.core.errors import ModelUnavailable
from tuneloop.core.process import write_atomically
from tuneloop.tokens.folders import may_run_code, resolve_folders

_READ = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "merges.txt",
)
"""What decides which tokenizer transformers builds."""


class Backend(NamedTuple):
    described: str
    """The tokenizer as JSON, ready for `Tokenizer.from_str` in any process."""
    special_tokens: tuple[str, ...]
    """Texts that are one token wherever they stand, the longest first."""
    model_max_length: int

    def tokenizer(self) -> Tokenizer:
        """A tokenizer of one's own that neither cuts nor pads."""
        built = Tokenizer.from_str(self.described)
        built.no_truncation()
        built.no_padding()
        return built


_ANSWER = {"tokenizer", "special_tokens", "model_max_length"}

_known: dict[str, Backend] = {}
"""The last one that this process asked for: a file of 30 MB is not read twice."""


def load_backend(path: Path, cache: Path | None = None) -> Backend:
    """Of the model in `path` (either layout). What transformers made of the same bytes before is taken from
    `cache`, a folder, where there is one. Raises `ModelUnavailable` when there is no fast tokenizer."""
    folder = resolve_folders(path)[1]
    runs_code = may_run_code(path)
    key = _key(folder, runs_code)
    if key not in _known:
        _known.clear()
        _known[key] = _ask(key, folder, cache, runs_code)
    return _known[key]


def _key(folder: Path, runs_code: bool) -> str:
    names = [*_READ, *(sorted(file.name for file in folder.glob("*.py")) if runs_code else ())]
    files = {name: digest.of_file(folder / name)[0] for name in names if (folder / name).is_file()}
    versions = {name: version(name) for name in ("transformers", "tokenizers")}
    return digest.of_json({"files": files, "versions": versions, "runs_code": runs_code})


def _ask(key: str, folder: Path, cache: Path | None, runs_code: bool) -> Backend:
    file = None if cache is None else cache / "tokenizers" / f"{key.removeprefix('sha256:')}.json"
    said = None if file is None else _read(file)
    if said is None:
        said = _ask_transformers(folder, runs_code)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(said))
    described = json.loads(said["tokenizer"])
    added = [each["content"] for each in described.get("added_tokens") or () if each.get("special")]
    special = {text for text in (*added, *said["special_tokens"]) if text}
    ordered = tuple(sorted(special, key=lambda text: (-len(text), text)))
    return Backend(said["tokenizer"], ordered, said["model_max_length"])


def _read(file: Path) -> dict[str, Any] | None:
    """None for what is not there, or was cut short."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) and set(said) >= _ANSWER else None


def _ask_transformers(folder: Path, runs_code: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="tuneloop-tokenizer-") as temporary:
        target = Path(temporary) / "answer.json"
        command = [sys.executable, "-P", "-m", "tuneloop.tokens.rebuild", str(folder.resolve()), str(target)]
        ended = subprocess.run(
            [*command, *(["--code"] if runs_code else [])],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"},
            check=False,
        )
        said = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else None
    if said is not None and "tokenizer" in said:
        return dict(said)
    if said is not None and said["error"] is None:
        raise ModelUnavailable(
            f"The tokenizer in {folder} has no fast form; Tuneloop needs a tokenizer.json that can be used."
        )
    words = ended.stderr.decode(errors="replace").strip().splitlines()
    reason = (
        said["error"] if said else f"exit {ended.returncode}: {words[-1] if words else 'it said nothing'}"
    )
    raise ModelUnavailable(
        f"The tokenizer in {folder} cannot be loaded: {reason}",
        next_move="Import the model again, or give a folder whose tokenizer transformers can load.",
    )
