"""A base model's sources, and the small files of its folder: what importing a model and looking at its
tokenizer have in common. Never imports torch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tuneloop.core.chat import ChatTemplate
from tuneloop.core.errors import ModelUnavailable, Unsupported
from tuneloop.core.recipe import ImportedCard
from tuneloop.core.types import CardSource, FolderSource, HubSource, PackageSource
from tuneloop.steps import hub
from tuneloop.steps.context import StepContext
from tuneloop.steps.hub import errors, fetch
from tuneloop.tokens import MODEL_NOTE

COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*", "README.md")
"""Files of a model folder that are taken besides its weights; pickles and other formats are left behind."""

CODE = ("*.py",)
"""Taken only where the model may run it."""

_UNBOUNDED = 10**9
"""transformers writes 1e30 where a tokenizer's longest input is not known."""


# ---------------------------------------------------------------- sources


def first_of(
    context: StepContext, card: ImportedCard, take: Callable[[CardSource], dict[str, Any]]
) -> dict[str, Any]:
    """What `take` gives for the first of the card's sources that can be had: what is written down about where
    the model came from. Raises what the only source raised, or `ModelUnavailable` with every reason."""
    try:
        return _first_of(context, card, take, (card.source, *card.fallbacks))
    except (ModelUnavailable, Unsupported) as error:
        # Who fetches knows a repository; the command wants the model's name.
        command = f"catalog use {card.name} --source"
        error.next_move = (error.next_move or errors.OWN_COPY).replace("catalog use NAME --source", command)
        raise


def _first_of(
    context: StepContext,
    card: ImportedCard,
    take: Callable[[CardSource], dict[str, Any]],
    sources: tuple[CardSource, ...],
) -> dict[str, Any]:
    reasons = []
    for number, each in enumerate(sources, 1):
        try:
            found = take(each)
        except ModelUnavailable as error:
            if len(sources) == 1:
                raise
            reasons.append((each, error))
            _say_next(context, card, each, error, sources[number:])
            continue
        # The key of this step promises what the first source gives.
        context.is_repeatable = number == 1
        return found
    raise ModelUnavailable(
        f"None of the {len(reasons)} sources of {card.name} can be had. "
        + " ".join(f"{named(each)}: {error.message}" for each, error in reasons),
        next_move=reasons[0][1].next_move,
    )


def _say_next(
    context: StepContext,
    card: ImportedCard,
    source: CardSource,
    error: ModelUnavailable,
    rest: tuple[CardSource, ...],
) -> None:
    if rest:
        context.warn(
            f"{card.name} cannot be had from {named(source)}: {error.message} Its next source is "
            f"tried instead, {named(rest[0])}: the weights may differ, and other jobs do not reuse them."
        )


def named(source: CardSource) -> str:
    """A source, for people."""
    match source:
        case PackageSource():
            return f"package {source.package} {source.version}"
        case HubSource():
            return f"hub {source.repository} at {source.revision[:12]}"
        case FolderSource():
            return f"folder {source.path}"


# ---------------------------------------------------------------- a folder


def copy(
    context: StepContext, source: Path, target: Path, patterns: tuple[str, ...], *, weights: bool = True
) -> None:
    """Copy what a model needs. Raises `Unsupported` for a link that leaves its folder."""
    names = {file.name for pattern in patterns for file in source.glob(pattern) if file.is_file()}
    if weights:
        names.update(hub.weight_files(source, [file.name for file in source.iterdir()]))
    files = sorted(source / name for name in names)
    for file in files:
        refuse_outside(file)
    total = sum(file.stat().st_size for file in files)
    free = shutil.disk_usage(target).free
    if total > free:
        raise ModelUnavailable(
            f"{fetch.spelled(total)} are to be copied into {target}, and that disk has "
            f"{fetch.spelled(free)} left.",
            next_move="Free some space, then retry the job; what was fetched is kept.",
        )
    done = 0
    for file in files:
        context.progress("copying", done=done, total=total, unit="bytes")
        # What a link points to is copied: an artifact holds no links.
        shutil.copyfile(file, target / file.name)
        done += file.stat().st_size
    (target / MODEL_NOTE).unlink(missing_ok=True)


def refuse_outside(file: Path) -> None:
    """Raise `Unsupported` for a link to somewhere else. A snapshot of the hub's cache points to its blobs."""
    folder, found = file.parent.resolve(), file.resolve()
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if found.parent not in (folder, blobs):
        raise Unsupported(
            f"{file} is a link to {found}, outside of its folder: files from elsewhere are not taken into a "
            "model.",
            next_move="Put the file itself there, or point at the folder that holds the files.",
        )


def check_folder(folder: Path) -> None:
    """Raise unless `folder` holds the small files of a chat model, naming what is missing."""
    if not folder.is_dir():
        raise ModelUnavailable(
            f"{folder} is not a folder.", next_move="tuneloop catalog use NAME --source FOLDER"
        )
    for file in ("config.json", "tokenizer.json"):
        if not (folder / file).is_file():
            raise ModelUnavailable(f"{folder} holds no {file}.", next_move=hub.LAYOUT)
    read_config(folder)
    ChatTemplate.from_folder(folder)


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelUnavailable(f"{path} is not JSON: {error}.", next_move="Fetch it again.") from None
    if not isinstance(config, dict):
        raise ModelUnavailable(f"{path} is not an object.", next_move=hub.LAYOUT)
    return config


# ---------------------------------------------------------------- the tokenizer


def adapt_tokenizer(tokenizer: Any, metadata: dict[str, Any]) -> None:
    """Of a GGUF file: what transformers does not bring over from its metadata."""
    if metadata.get("tokenizer.ggml.pre") == "smollm":
        _split_digits(tokenizer)


def _split_digits(tokenizer: Any) -> None:
    """SmolLM's tokenizer takes every digit by itself; transformers does not bring that over from GGUF."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def write_template(target: Path) -> ChatTemplate:
    """Put the template into its own file, wherever it stood."""
    template = ChatTemplate.from_folder(target)
    (target / "chat_template.jinja").write_text(template.source, encoding="utf-8")
    return template


def bound_tokenizer(target: Path) -> None:
    """The longest input is lost in GGUF and left out by some models: the context length bounds it."""
    path = target / "tokenizer_config.json"
    written = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    context_length = json.loads((target / "config.json").read_text(encoding="utf-8")).get(
        "max_position_embeddings"
    )
    known = written.get("model_max_length")
    if context_length and (known is None or known > _UNBOUNDED):
        write_json(path, {**written, "model_max_length": context_length})


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
