"""What went wrong with the hub, as an error that says what to do."""

from __future__ import annotations

import os
from typing import Any

from tuneloop.core.errors import DatasetUnavailable, ModelUnavailable, StepFailed, TuneloopError
from tuneloop.steps.hub.source import Kind, Source, kind_of, path_of

_HUGGING_FACE = "https://huggingface.co"
_PASSING = (408, 429, 500, 502, 503, 504)


def endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or _HUGGING_FACE).rstrip("/")


def is_offline() -> bool:
    written = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return written.upper() in ("1", "ON", "YES", "TRUE")


def reason(error: BaseException) -> str:
    """Its first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def status_of(error: BaseException) -> int | None:
    response: Any = getattr(error, "response", None)
    return getattr(response, "status_code", None)


def is_passing(error: BaseException) -> bool:
    """Whether it may be over in a moment: a broken connection, a busy or stumbling server."""
    return _is_network(error) or status_of(error) in _PASSING


def is_of_another_size(error: BaseException) -> bool:
    """Whether the server has a file of another size than it lists (`http_get` says so in words only)."""
    return status_of(error) == 416 or (isinstance(error, OSError) and "onsistency check failed" in str(error))


def is_unreachable(error: BaseException) -> bool:
    """Whether the hub said nothing about the repository at all."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    return is_passing(error) or isinstance(error, OfflineModeIsEnabled)


def _is_network(error: BaseException) -> bool:
    import httpx2

    return isinstance(error, httpx2.TransportError) and not isinstance(error, httpx2.UnsupportedProtocol)


def unavailable(source: Source, message: str, next_move: str | None = None) -> StepFailed:
    """The error of a model's or of a dataset's repository."""
    if kind_of(source) == "dataset":
        return DatasetUnavailable(message, next_move=next_move)
    return ModelUnavailable(message, next_move=next_move)


OWN_COPY = "Or bring your own copy: tuneloop catalog use NAME --source FOLDER"
"""Of a model, whatever it was to come from."""

_OWN_COPY: dict[Kind, str] = {
    "model": OWN_COPY,
    "dataset": "Or bring your own copy: tuneloop data download FOLDER --to DIR",
}
_REPEAT: dict[Kind, str] = {"model": "retry the job", "dataset": "run it again"}
_CHOOSE_COMMIT: dict[Kind, str] = {
    "model": "write one into the card.",
    "dataset": "give one with --revision.",
}


def own_copy(source: Source) -> str:
    return _OWN_COPY[kind_of(source)]


def repeat(source: Source) -> str:
    """The next move, in the middle of a sentence: `retry the job`, `run it again`."""
    return _REPEAT[kind_of(source)]


def offline_move(source: Source) -> str:
    return (
        "Unset HF_HUB_OFFLINE or check the network (HF_ENDPOINT, proxies), and run it once with the hub "
        f"reachable. {own_copy(source)}"
    )


def explain(source: Source, error: BaseException) -> BaseException:
    """`ModelUnavailable` or `DatasetUnavailable` with the next move; what is no matter of the hub comes back
    as it is."""
    from huggingface_hub import errors

    if isinstance(error, TuneloopError):
        return error
    if isinstance(error, errors.GatedRepoError):
        return _gated(source)
    if isinstance(error, errors.RevisionNotFoundError | errors.RepositoryNotFoundError):
        return _not_there(source, error)
    name = f"{source.repository} at {source.revision}"
    again = repeat(source)
    if isinstance(error, errors.RemoteEntryNotFoundError):
        compare = f"Compare with {_page(source)}. {own_copy(source)}"
        return unavailable(source, f"{name}: {reason(error)}.", compare)
    status = status_of(error)
    if status is not None:
        return _answered(source, name, status)
    if is_unreachable(error):
        return unavailable(
            source,
            f"{name}: {endpoint()} was not reached: {reason(error)}.",
            f"Check the network, HF_ENDPOINT and proxies, then {again}; what was fetched is kept. "
            f"{own_copy(source)}",
        )
    if isinstance(error, errors.HFValidationError):
        return unavailable(source, f"{source.repository!r} is not the name of a repository: {reason(error)}.")
    if isinstance(error, OSError) and error.errno is None:
        move = f"{again.capitalize()}; what was fetched is kept. {own_copy(source)}"
        return unavailable(source, f"{name}: {reason(error)}.", move)
    return error


def _page(source: Source) -> str:
    return f"{endpoint()}/{path_of(source)}"


def _not_there(source: Source, error: BaseException) -> StepFailed:
    from huggingface_hub import errors

    if isinstance(error, errors.RevisionNotFoundError):
        return unavailable(
            source,
            f"{source.repository}: the hub has no revision '{source.revision}' of it.",
            f"Its commits are on {_page(source)}/commits/main; {_CHOOSE_COMMIT[kind_of(source)]} "
            f"{own_copy(source)}",
        )
    return unavailable(
        source,
        f"{source.repository}: {endpoint()} has no such repository, or it is private and "
        f"{_token_of('may not see it', 'there is no HF_TOKEN')}.",
        f"Check the name on {_page(source)}. If it is private, HF_TOKEN has to be a token for it. "
        f"{own_copy(source)}",
    )


def _answered(source: Source, name: str, status: int) -> StepFailed:
    again = repeat(source)
    if status in (401, 403):
        return unavailable(
            source,
            f"{name}: {endpoint()} answers {status}: {_token_of('is not accepted', 'there is no HF_TOKEN')}.",
            f"Make a token that may read it ({endpoint()}/settings/tokens), then: export HF_TOKEN=...",
        )
    if status == 429:
        return unavailable(
            source,
            f"{name}: {endpoint()} answers 429: too many requests from here.",
            f"Wait some minutes and {again}; what was fetched is kept. With HF_TOKEN more is allowed.",
        )
    return unavailable(
        source,
        f"{name}: {endpoint()} answers {status} again and again.",
        f"{again.capitalize()} later; what was fetched is kept. {own_copy(source)}",
    )


def _gated(source: Source) -> StepFailed:
    message = f"{source.repository} is gated: the hub gives it only to accounts that accepted its terms"
    if has_token():
        return unavailable(
            source,
            f"{message}, and the account of HF_TOKEN has not, or its token may not read gated repositories.",
            f"Open {_page(source)}, accept the terms with that account (some publishers take days), then "
            f"{repeat(source)}. {own_copy(source)}",
        )
    return unavailable(
        source,
        f"{message}, and there is no HF_TOKEN.",
        f"Open {_page(source)} and accept the terms, make a token that may read "
        f"({endpoint()}/settings/tokens), export HF_TOKEN=... and run it again. {own_copy(source)}",
    )


def has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _token_of(with_one: str, without: str) -> str:
    return f"HF_TOKEN {with_one}" if has_token() else without
