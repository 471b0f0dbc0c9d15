"""The Hugging Face hub: a repository at one commit, fetched so that it goes on where it was stopped, and used
only if every byte is the one that the hub lists.

    CACHE/models--OWNER--NAME/          the hub's own layout, so that other programs share it
      blobs/DIGEST                      a whole file
      blobs/DIGEST.partial              the beginning of one: a killed download goes on here
      snapshots/COMMIT/NAME             a link to a blob
      refs/BRANCH                       the commit that a branch or tag meant last

huggingface_hub finds files, names what is wrong and carries bodies over cut connections. It begins a file
anew in every process, though, and compares sizes only (2.4: `_download_to_tmp_and_move`); both are done here.
HF_TOKEN, HF_ENDPOINT, HF_HOME, HF_HUB_CACHE and HF_HUB_OFFLINE count.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from tuneloop.core.errors import ModelUnavailable, Unsupported
from tuneloop.core.types import HubSource
from tuneloop.steps.context import StepContext
from tuneloop.steps.hub import errors, fetch, listing
from tuneloop.steps.hub.cache import Listed, Repository, is_plain

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
"""Formats that run code when they are opened."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The weights in one file; the list of the files that they are split into."""

LAYOUT = (
    "A model folder holds config.json, tokenizer.json, tokenizer_config.json with a chat template (or "
    "chat_template.jinja) and model.safetensors, as transformers' save_pretrained writes them."
)


class Snapshot(NamedTuple):
    """A repository's files at one commit, each checked."""

    folder: Path
    commit: str


def snapshot(
    context: StepContext,
    source: HubSource,
    patterns: Sequence[str],
    *,
    look: Callable[[Path], None] = lambda folder: None,
    weights: bool = True,
) -> Snapshot:
    """The files of `source` that match `patterns`, and its weights where wanted, in a folder of links.

    `look` sees the folder before the weights are fetched, and may raise. Raises `ModelUnavailable`, saying
    whether it is a matter of access, name, network or disk, and `Unsupported` for pickled weights.
    """
    listing.tell_nothing_else()
    repository = Repository.of(source.repository, context)
    if errors.is_offline():
        return _from_cache(context, source, repository, "HF_HUB_OFFLINE is set", look, weights)
    try:
        commit = listing.commit_of(source)
        files = listing.files_of(source, commit)
    except Exception as error:
        if errors.is_unreachable(error) and repository.commit(source) is not None:
            why = f"the hub was not reached ({errors.reason(error)})"
            found = _from_cache(context, source, repository, why, look, weights)
            context.warn(f"{source.repository}: {why}; the copy in {found.folder} is used.")
            return found
        raise errors.explain(source, error) from error
    if not source.is_pinned:
        context.warn(
            f"{source.repository}: the card names '{source.revision}', which moves; it means {commit} now. "
            "Write that commit into the card to get the same weights every time."
        )
        repository.remember(source.revision, commit)
    return _fetched(context, source, repository, commit, files, patterns, look, weights)


def _fetched(
    context: StepContext,
    source: HubSource,
    repository: Repository,
    commit: str,
    files: dict[str, Listed],
    patterns: Sequence[str],
    look: Callable[[Path], None],
    weights: bool,
) -> Snapshot:
    """Small files first: what is wrong with a model shows in them, before gigabytes have come."""
    if weights:
        refuse_pickles(f"{source.repository} at {commit[:12]}", files)
    folder = repository.snapshot(commit)
    small = [file for name, file in files.items() if any(fnmatch(name, each) for each in patterns)]
    files_of = fetch.Fetch(context, source, repository, commit)
    files_of.all([file for file in small if not file.name.endswith(".safetensors")])
    look(folder)
    names = weight_files(folder, files) if weights else []
    missing = [name for name in names if name not in files]
    if missing:
        raise ModelUnavailable(f"{source.repository} lacks {', '.join(missing[:5])}, which {INDEX} names.")
    files_of.all([files[name] for name in names])
    return Snapshot(folder, commit)


def weight_files(folder: Path, names: Iterable[str]) -> list[str]:
    """What transformers would load, in its order of preference, and nothing that holds the same once more
    (`consolidated.safetensors`, ONNX, GGUF). Raises `ModelUnavailable` when there is no such file."""
    known = set(names)
    if SINGLE in known:
        return [SINGLE]
    if INDEX in known:
        return _named_in(folder / INDEX)
    others = sorted(name for name in known if name.endswith((".safetensors", ".gguf", ".onnx")))
    found = f" There is {', '.join(others[:5])}." if others else ""
    raise ModelUnavailable(f"{folder} holds no {SINGLE} and no {INDEX}.{found}", next_move=LAYOUT)


def _named_in(index: Path) -> list[str]:
    """The files of an index, each of them plainly named: an index must not reach out of its folder."""
    try:
        names = sorted(
            {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        )
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelUnavailable(f"{index} is not an index of weights: {error!r}.") from None
    for name in names:
        if not is_plain(name) or not name.endswith(".safetensors"):
            raise Unsupported(f"{index} names {name!r}; only safetensors files beside it are read.")
    return names


def refuse_pickles(place: str, names: Iterable[str]) -> None:
    """Raise `Unsupported` when the weights are there as pickles only."""
    known = set(names)
    if any(name.endswith(".safetensors") for name in known):
        return
    pickles = sorted(name for name in known if any(fnmatch(name, pattern) for pattern in PICKLES))
    if pickles:
        raise Unsupported(
            f"{place} holds its weights as {', '.join(pickles[:5])}: opening such files runs whatever code "
            "is in them, so Tuneloop never does.",
            next_move="Take the model's safetensors version, or convert it where you trust it and point at "
            "the folder: tuneloop catalog use NAME --source FOLDER",
        )


# ---------------------------------------------------------------- without the hub


def _from_cache(
    context: StepContext,
    source: HubSource,
    repository: Repository,
    why: str,
    look: Callable[[Path], None],
    weights: bool,
) -> Snapshot:
    """What an earlier download left, if it is whole. Its digests are the names of the blobs."""
    name = f"{source.repository} at {source.revision}"
    commit = repository.commit(source)
    folder = repository.snapshot(commit) if commit else None
    if commit is None or folder is None or not folder.is_dir():
        raise ModelUnavailable(
            f"{name}: {why}, and it is not in the cache, {repository.root}.",
            next_move=errors.offline_move(source),
        )
    names = [file.name for file in folder.iterdir() if file.is_file()]
    look(folder)
    missing = [each for each in weight_files(folder, names) if each not in names] if weights else []
    if missing:
        raise ModelUnavailable(
            f"{name}: {why}, and the copy in the cache lacks {', '.join(missing[:5])}.",
            next_move=errors.offline_move(source),
        )
    context.progress("verifying")
    for file in sorted(folder.iterdir()):
        if repository.is_damaged(file):
            raise ModelUnavailable(
                f"{name}: {why}, and the cached {file.name} is damaged: its content has another digest than "
                "its name in the cache.",
                next_move=f"Delete {file.resolve()} and run it again with a hub in reach. "
                f"{errors.own_copy(source)}",
            )
    return Snapshot(folder, commit)
