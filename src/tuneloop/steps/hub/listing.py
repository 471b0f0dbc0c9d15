"""What the hub says of a repository: the commit that a revision means, and the files there."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

from tuneloop import __version__
from tuneloop.steps.hub import errors, fetch
from tuneloop.steps.hub.cache import Listed
from tuneloop.steps.hub.source import Source, kind_of

TIMEOUT_SECONDS = 20.0
"""For each answer about a repository."""


def tell_nothing_else() -> None:
    """huggingface_hub would look in the environment for programs that the hub has a list of, and say which it
    found, with the version of torch."""
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True


def commit_of(source: Source) -> str:
    """Asked for a pinned revision too: this is where the hub says that a repository is gated or gone."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=errors.endpoint(), library_name="tuneloop", library_version=__version__)
    ask: Any = api.dataset_info if kind_of(source) == "dataset" else api.model_info
    info = patiently(lambda: ask(source.repository, revision=source.revision, timeout=TIMEOUT_SECONDS))
    commit = str(info.sha)
    if not re.fullmatch(r"[0-9a-f]{40}", commit) or (source.is_pinned and commit != source.revision):
        raise errors.unavailable(
            source,
            f"{errors.endpoint()} answers with commit {commit[:50]!r} for {source.repository} at "
            f"{source.revision}.",
            f"It is no hub, or a faulty mirror: check HF_ENDPOINT. {errors.own_copy(source)}",
        )
    return commit


def files_of(source: Source, commit: str) -> dict[str, Listed]:
    """The files at the root of a model's repository; all files of a dataset's."""
    from huggingface_hub.utils import paginate

    kind = kind_of(source)
    url = f"{errors.endpoint()}/api/{kind}s/{source.repository}/tree/{commit}"
    asked = {"recursive": kind == "dataset", "expand": False}
    entries = list(paginate(url, asked, fetch.headers(), timeout=TIMEOUT_SECONDS))
    found = (Listed.read(entry, in_folders=kind == "dataset") for entry in entries)
    return {file.name: file for file in found if file is not None}


def patiently(ask: Callable[[], Any]) -> Any:
    for wait in fetch.RETRY_SECONDS:
        try:
            return ask()
        except Exception as error:
            if not errors.is_passing(error):
                raise
            time.sleep(wait)
    return ask()
