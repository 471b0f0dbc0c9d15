"""The control plane: catalogue, jobs, models, endpoints and deployments over the API."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Self, TypeVar, cast
from urllib.parse import quote

import httpx
from pydantic import ValidationError

from tuneloop.client.views import (
    AzureView,
    AzureWarningView,
    ComputeView,
    DeploymentView,
    EndpointView,
    FileEntry,
    HealthView,
    JobSummary,
    JobView,
    KeysView,
    LogPage,
    ProgressPage,
    Resolution,
    StatusView,
)
from tuneloop.client.wire import error_of
from tuneloop.core.errors import (
    AlreadyExists,
    NotAllowed,
    ServerUnreachable,
    TuneloopError,
    Unavailable,
    UsageError,
    VersionMismatch,
)
from tuneloop.core.types import Card, Dataset, Event, MetricLine, ModelRecord, Noun

N = TypeVar("N", bound=Noun)
V = TypeVar("V")

QUICK_SECONDS = 30.0
SUBMIT_SECONDS = 600.0
"""A submission copies and digests its data before it answers."""


@dataclass(frozen=True)
class Submission:
    """A recipe as a person wrote it, and where its relative paths start."""

    text: str
    path: str
    folder: str
    overrides: Mapping[str, str] = field(default_factory=dict)
    experiment: str | None = None
    force_rerun: bool = False
    priority: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


class Client:
    """The control plane: catalogue, jobs, models, endpoints, deployments."""

    def __init__(self, url: str, token: str, *, transport: httpx.BaseTransport | None = None) -> None:
        self.url = url.rstrip("/")
        # trust_env=False: a proxy of the environment must not see calls to this machine.
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=QUICK_SECONDS,
            trust_env=False,
            transport=transport,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # ------------------------------------------------------------ server

    def health(self) -> HealthView:
        return self._view(HealthView, "GET", "/api/health")

    def status(self) -> StatusView:
        return self._view(StatusView, "GET", "/api/status")

    def azure(self) -> AzureView:
        """Of the HTTPS listener for Azure's SDK."""
        return self._view(AzureView, "GET", "/api/azure")

    def azure_up(self) -> AzureView:
        return self._view(AzureView, "POST", "/api/azure/up")

    def azure_down(self) -> AzureView:
        return self._view(AzureView, "POST", "/api/azure/down")

    def azure_warnings(self, after: int = 0) -> list[AzureWarningView]:
        return self._views(AzureWarningView, "GET", "/api/azure/warnings", params={"after": after})

    def shutdown(self, mode: str = "all") -> None:
        """`all` stops every process of the workspace, `server` only its own. Returns before they end."""
        self._json("POST", "/api/shutdown", {"mode": mode})

    # ------------------------------------------------------------ catalogue

    def cards(self, task: str | None = None) -> list[Card]:
        return self._nouns(Card, "GET", "/api/cards", params=_given(task=task))

    def card(self, name: str) -> Card:
        """`name` or `name:version`. Raises `NotFound`."""
        return self._noun(Card, "GET", f"/api/cards/{_part(name)}")

    def add_card(self, text: str, path: str = "card") -> Card:
        """`text` is the card's YAML; `path` is what its mistakes call it."""
        return self._noun(Card, "POST", "/api/cards", {"text": text, "path": path})

    def use_source(self, name: str, folder: Path) -> Card:
        """Puts a folder of this machine in front of the card's sources."""
        body = {"folder": str(folder.absolute())}
        return self._noun(Card, "POST", f"/api/cards/{_part(name)}/source", body, timeout=SUBMIT_SECONDS)

    # ------------------------------------------------------------ data

    def datasets(self, name: str | None = None) -> list[Dataset]:
        """Oldest first."""
        return self._nouns(Dataset, "GET", "/api/datasets", params=_given(name=name))

    def dataset(self, name: str) -> Dataset:
        """`name` (the one that was stored last) or `name:version`. Raises `NotFound`."""
        return self._noun(Dataset, "GET", f"/api/datasets/{_part(name)}")

    def register_dataset(
        self, path: Path, *, name: str | None = None, license: str | None = None, bad_rows: int = 0
    ) -> Dataset:
        """Checks and stores a file of this machine. Raises `DataError` with its bad rows."""
        body = {"path": str(path.absolute()), **_given(name=name, license=license), "bad_rows": bad_rows}
        return self._noun(Dataset, "POST", "/api/datasets", body, timeout=SUBMIT_SECONDS)

    # ------------------------------------------------------------ jobs

    def resolve(self, submission: Submission) -> Resolution:
        """The final set of parameters, with recipe and data checked and nothing run."""
        return self._view(
            Resolution, "POST", "/api/recipes/resolve", asdict(submission), timeout=SUBMIT_SECONDS
        )

    def submit(self, submission: Submission) -> JobView:
        return self._view(JobView, "POST", "/api/jobs", asdict(submission), timeout=SUBMIT_SECONDS)

    def jobs(self, experiment: str | None = None, limit: int | None = None) -> list[JobSummary]:
        """Newest first."""
        params = _given(experiment=experiment, limit=limit)
        return self._views(JobSummary, "GET", "/api/jobs", params=params)

    def job(self, name: str) -> JobView:
        return self._view(JobView, "GET", f"/api/jobs/{_part(name)}")

    def cancel(self, name: str) -> JobView:
        return self._view(JobView, "POST", f"/api/jobs/{_part(name)}/cancel")

    def prioritise(self, name: str, priority: str) -> JobView:
        return self._view(JobView, "POST", f"/api/jobs/{_part(name)}/priority", {"priority": priority})

    def computes(self) -> list[ComputeView]:
        return self._views(ComputeView, "GET", "/api/computes")

    def compute(self, name: str) -> ComputeView:
        return self._view(ComputeView, "GET", f"/api/computes/{_part(name)}")

    def create_compute(self, name: str, size: str, max_instances: int = 1) -> ComputeView:
        """A cluster called after an Azure size, mapped onto the server's machine."""
        body = {"name": name, "size": size, "max_instances": max_instances}
        return self._view(ComputeView, "POST", "/api/computes", body)

    def delete_compute(self, name: str) -> None:
        self._json("DELETE", f"/api/computes/{_part(name)}")

    def retry(self, name: str) -> JobView:
        return self._view(JobView, "POST", f"/api/jobs/{_part(name)}/retry")

    def events(self, name: str, after: int = 0) -> list[Event]:
        return self._nouns(Event, "GET", f"/api/jobs/{_part(name)}/events", params={"after": after})

    def progress(self, name: str, cursor: str | None = None) -> ProgressPage:
        """What happened since `cursor` (None: since the beginning), and the job as it is now."""
        params = _given(cursor=cursor)
        return self._view(ProgressPage, "GET", f"/api/jobs/{_part(name)}/progress", params=params)

    def metrics(self, name: str, step: str) -> list[MetricLine]:
        path = f"/api/jobs/{_part(name)}/metrics"
        return self._nouns(MetricLine, "GET", path, params={"step": step})

    def logs(self, name: str, step: str, attempt: int | None = None, offset: int = 0) -> LogPage:
        """The log from byte `offset` on; ask again with the answer's `offset`."""
        path = f"/api/jobs/{_part(name)}/logs/{_part(step)}"
        return self._view(LogPage, "GET", path, params=_given(attempt=attempt, offset=offset))

    def output_files(self, name: str, output: str) -> list[FileEntry]:
        return self._views(FileEntry, "GET", f"{_output_path(name, output)}/files")

    def output_bytes(self, name: str, output: str, path: str) -> bytes:
        """One file of an output, whole: for small ones."""
        return self._send("GET", f"{_output_path(name, output)}/files/{quote(path)}").content

    def download_output(self, name: str, output: str, to: Path, *, force: bool = False) -> Iterator[int]:
        """Writes the output's files under `to`, yielding the bytes written so far."""
        base = f"{_output_path(name, output)}/files"
        yield from self._download(base, self.output_files(name, output), to, force)

    # ------------------------------------------------------------ models

    def models(self, name: str | None = None) -> list[ModelRecord]:
        return self._nouns(ModelRecord, "GET", "/api/models", params=_given(name=name))

    def model(self, name: str, version: str = "latest") -> ModelRecord:
        return self._noun(ModelRecord, "GET", _model_path(name, version))

    def register(
        self,
        job: str,
        output: str,
        name: str,
        version: str | None = None,
        description: str = "",
        tags: Mapping[str, str] | None = None,
    ) -> ModelRecord:
        """Registers a job's output; without a version the next number is taken."""
        body = {
            "job": job,
            "output": output,
            "name": name,
            "version": version,
            "description": description,
            "tags": dict(tags or {}),
        }
        return self._noun(ModelRecord, "POST", "/api/models", body)

    def delete_model(self, name: str, version: str) -> None:
        self._json("DELETE", _model_path(name, version))

    def model_files(self, name: str, version: str) -> list[FileEntry]:
        return self._views(FileEntry, "GET", f"{_model_path(name, version)}/files")

    def download_model(self, name: str, version: str, to: Path, *, force: bool = False) -> Iterator[int]:
        base = f"{_model_path(name, version)}/files"
        yield from self._download(base, self.model_files(name, version), to, force)

    # ------------------------------------------------------------ endpoints

    def endpoints(self) -> list[EndpointView]:
        return self._views(EndpointView, "GET", "/api/endpoints")

    def endpoint(self, name: str) -> EndpointView:
        return self._view(EndpointView, "GET", f"/api/endpoints/{_part(name)}")

    def create_endpoint(
        self, name: str, description: str = "", tags: Mapping[str, str] | None = None
    ) -> EndpointView:
        body = {"name": name, "description": description, "tags": dict(tags or {})}
        return self._view(EndpointView, "POST", "/api/endpoints", body)

    def delete_endpoint(self, name: str) -> None:
        """Returns once it is recorded; the endpoint answers `NotFound` when nothing of it is left."""
        self._json("DELETE", f"/api/endpoints/{_part(name)}")

    def set_traffic(self, name: str, traffic: Mapping[str, int]) -> EndpointView:
        """Shares in per cent by deployment."""
        path = f"/api/endpoints/{_part(name)}/traffic"
        return self._view(EndpointView, "POST", path, dict(traffic))

    def set_mirror(self, name: str, mirror: Mapping[str, int]) -> EndpointView:
        """To which deployment so many per cent of the requests are sent as well; empty or 0 ends it."""
        path = f"/api/endpoints/{_part(name)}/mirror"
        return self._view(EndpointView, "POST", path, dict(mirror))

    def keys(self, name: str) -> KeysView:
        return self._view(KeysView, "GET", f"/api/endpoints/{_part(name)}/keys")

    def regenerate_key(self, name: str, slot: str) -> KeysView:
        path = f"/api/endpoints/{_part(name)}/keys/regenerate"
        return self._view(KeysView, "POST", path, {"slot": slot})

    def deployments(self, endpoint: str) -> list[DeploymentView]:
        return self._views(DeploymentView, "GET", f"/api/endpoints/{_part(endpoint)}/deployments")

    def deployment(self, endpoint: str, name: str) -> DeploymentView:
        return self._view(DeploymentView, "GET", _deployment_path(endpoint, name))

    def create_deployment(
        self,
        endpoint: str,
        name: str,
        model: str,
        replicas: int = 1,
        request_timeout_seconds: float = 90.0,
        instance_type: str | None = None,
    ) -> DeploymentView:
        """`model` is `name:version` of a registered model, or `base:NAME` once a job has imported it."""
        body = {
            "name": name,
            "model": model,
            "replicas": replicas,
            "request_timeout_seconds": request_timeout_seconds,
            **_given(instance_type=instance_type),
        }
        path = f"/api/endpoints/{_part(endpoint)}/deployments"
        return self._view(DeploymentView, "POST", path, body)

    def delete_deployment(self, endpoint: str, name: str) -> None:
        self._json("DELETE", _deployment_path(endpoint, name))

    def deployment_logs(self, endpoint: str, name: str, lines: int = 100) -> str:
        return str(
            self._json("GET", f"{_deployment_path(endpoint, name)}/logs", params={"lines": lines})["text"]
        )

    # ------------------------------------------------------------ the wire

    def _view(self, kind: type[V], method: str, path: str, body: object = None, **options: Any) -> V:
        return cast(V, self._json(method, path, body, **options))

    def _views(self, kind: type[V], method: str, path: str, **options: Any) -> list[V]:
        return cast(list[V], self._json(method, path, **options))

    def _noun(self, kind: type[N], method: str, path: str, body: object = None, **options: Any) -> N:
        return _read(kind, self._json(method, path, body, **options))

    def _nouns(self, kind: type[N], method: str, path: str, **options: Any) -> list[N]:
        return [_read(kind, item) for item in self._json(method, path, **options)]

    def _json(self, method: str, path: str, body: object = None, **options: Any) -> Any:
        response = self._send(method, path, body, **options)
        return response.json() if response.content else None

    def _send(self, method: str, path: str, body: object = None, **options: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, json=body, **options)
        except httpx.TimeoutException as error:
            raise _too_slow(self.url, path) from error
        except httpx.TransportError as error:
            raise _unreachable(self.url, error) from error
        if response.is_error:
            raise _refusal(error_of(response.status_code, response.content))
        return response

    def _download(self, base: str, files: Sequence[FileEntry], to: Path, force: bool) -> Iterator[int]:
        targets = [(entry["path"], _inside(to, entry["path"])) for entry in files]
        taken = [str(target) for _, target in targets if target.exists()]
        if taken and not force:
            raise AlreadyExists(
                f"{taken[0]} exists already, and so do {len(taken) - 1} more."
                if taken[1:]
                else f"{taken[0]} exists.",
                next_move="Choose another folder with --to, or overwrite with --force.",
            )
        written = 0
        for path, target in targets:
            try:
                for count in self._fetch(f"{base}/{quote(path)}", target):
                    written += count
                    yield written
            except OSError as error:
                raise UsageError(
                    f"{target} cannot be written: {error.strerror}.",
                    next_move="Choose another folder with --to.",
                ) from error

    def _fetch(self, url: str, target: Path) -> Iterator[int]:
        """Streams one file to its place; the place never holds half a file."""
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".part")
        try:
            with self._http.stream("GET", url) as response, partial.open("wb") as handle:
                if response.is_error:
                    raise error_of(response.status_code, response.read())
                for chunk in response.iter_bytes():
                    handle.write(chunk)
                    yield len(chunk)
            partial.replace(target)
        except httpx.TransportError as error:
            raise _unreachable(self.url, error) from error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def _read(kind: type[N], value: object) -> N:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise VersionMismatch(
            f"The server's {kind.__name__} is not the one that this client knows: {error.errors()[0]['msg']} "
            f"at {'.'.join(str(part) for part in error.errors()[0]['loc'])}.",
            next_move="Restart it in this version (jobs go on): tuneloop down --server-only && tuneloop up",
        ) from error


def _part(name: str) -> str:
    """A name as one segment of a path. Raises `UsageError` for one that would be another address."""
    if name.strip() in ("", ".", ".."):
        raise UsageError(f"{name!r} is not a name.", next_move="Give the name of what you mean.")
    return quote(name, safe=":")


def _output_path(job: str, output: str) -> str:
    return f"/api/jobs/{_part(job)}/outputs/{_part(output)}"


def _model_path(name: str, version: str) -> str:
    return f"/api/models/{_part(name)}/{_part(version)}"


def _deployment_path(endpoint: str, name: str) -> str:
    return f"/api/endpoints/{_part(endpoint)}/deployments/{_part(name)}"


def _given(**params: str | int | None) -> dict[str, str | int]:
    return {name: value for name, value in params.items() if value is not None}


def _inside(folder: Path, relative: str) -> Path:
    """`folder/relative`; refuses a path that would leave the folder."""
    pure = PurePosixPath(relative)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise UsageError(f"The server offered a file at {relative!r}, outside of the folder to write to.")
    return folder.joinpath(*pure.parts)


def _refusal(error: TuneloopError) -> TuneloopError:
    """For a person a wrong token means one thing: the file was changed while the server ran."""
    if type(error) is NotAllowed:
        error.next_move = (
            "The file 'token' of the home is not the one that its server started with. Put it back, or end "
            "the server (its pid stands in server.json of the home), then: tuneloop up"
        )
    return error


def _unreachable(url: str, error: httpx.TransportError) -> ServerUnreachable:
    return ServerUnreachable(
        f"The background server does not answer at {url} ({error or type(error).__name__}).",
        next_move="Start it with: tuneloop up",
    )


def _too_slow(url: str, path: str) -> Unavailable:
    return Unavailable(
        f"The background server at {url} took too long over {path}.",
        next_move="Look at it with: tuneloop status, or at logs/server.log in the home.",
    )
