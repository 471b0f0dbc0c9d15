"""The `TrackingServer` port on MLflow's own client. The tracker process opens it, and nothing beside it.

The client talks to the database itself (`sqlite:///...`) or to an MLflow server (`http://...`). It is opened
at the first call, because that takes a second or two and fails when nobody answers.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sqlite3
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from urllib.parse import quote

from tuneloop.core.errors import InvalidState, NotFound, TuneloopError, Unavailable
from tuneloop.core.ports import DatasetUse, Measurement, ModelEntry, RunStatus

# Before mlflow is imported: it starts a thread that reports usage otherwise. A person's own choice stands.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
# Their patience (120 s, 7 times) is for people who wait; the tracker comes again by itself.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

import mlflow.store.db.utils
import requests
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

_SILENCE = {"TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "UNAUTHENTICATED", "PERMISSION_DENIED"}
_STATUS = {"running": "RUNNING", "finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
_NOTHING: Mapping[str, str] = MappingProxyType({})
_DIGEST_LENGTH = 32
"""Of a dataset's digest as MLflow shows it (it takes 36 characters); the whole one is beside it."""


def open_server(tracking_uri: str, artifact_folder: Path) -> MlflowServer:
    """Raises nothing: whether anybody answers shows at the first call."""
    # What goes wrong is raised and reported by the tracker; the client would print a traceback as well.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Theirs is 10 with doubling pauses: two minutes of silence when a database does not answer.
    mlflow.store.db.utils.MAX_RETRY_COUNT = 1
    return MlflowServer(tracking_uri, artifact_folder)


EXPERIMENT_KIND = "mlflow.experimentKind"
"""Says that runs and curves, not traces of agents, are what this experiment is about."""


class MlflowServer:
    """See `ports.TrackingServer`. `artifact_folder` holds what MLflow itself keeps as files."""

    def __init__(self, tracking_uri: str, artifact_folder: Path) -> None:
        self._tracking_uri = tracking_uri
        self._artifact_folder = artifact_folder
        self._opened: MlflowClient | None = None
        self._experiments: dict[str, str] = {}

    # ------------------------------------------------------------ runs

    def ensure_run(
        self, experiment: str, identity: str, name: str, tags: Mapping[str, str], started_at: datetime
    ) -> str:
        with self._client() as client:
            number = self._experiment(client, experiment)
            query = f"tags.`{identity}` = {_quoted(tags[identity])}"
            found = client.search_runs([number], query, max_results=1, order_by=["attributes.start_time"])
            if found:
                return str(found[0].info.run_id)
            # Tags and run are written in one transaction: there is no run that could not be found again.
            made = client.create_run(number, _milliseconds(started_at), dict(tags), name)
            return str(made.info.run_id)

    def log(
        self,
        run_id: str,
        *,
        measurements: Sequence[Measurement] = (),
        parameters: Mapping[str, str] = _NOTHING,
        tags: Mapping[str, str] = _NOTHING,
    ) -> None:
        metrics = [Metric(point.name, point.value, point.at_ms, point.step) for point in measurements]
        with self._client() as client:
            client.log_batch(  # splits into calls of the size that MLflow takes
                run_id,
                metrics=metrics,
                params=[Param(name, value) for name, value in parameters.items()],
                tags=[RunTag(name, value) for name, value in tags.items()],
            )

    def log_datasets(self, run_id: str, datasets: Sequence[DatasetUse]) -> None:
        if datasets:
            with self._client() as client:
                client.log_inputs(run_id, [_dataset_input(dataset) for dataset in datasets])

    def set_status(self, run_id: str, status: RunStatus, ended_at: datetime | None = None) -> None:
        with self._client() as client:
            if status == "running":
                client.update_run(run_id, _STATUS[status])
            else:
                end = None if ended_at is None else _milliseconds(ended_at)
                client.set_terminated(run_id, _STATUS[status], end)

    def _experiment(self, client: MlflowClient, name: str) -> str:
        if name in self._experiments:
            return self._experiments[name]
        found = client.get_experiment_by_name(name)
        if found is None:
            # Said, because the default is a folder `mlruns` wherever the process was started.
            location = (self._artifact_folder / "runs" / quote(name, safe="")).absolute().as_uri()
            number = str(
                client.create_experiment(name, location, {EXPERIMENT_KIND: "custom_model_development"})
            )
        else:
            number = str(found.experiment_id)
            if found.lifecycle_stage == "deleted":
                client.restore_experiment(number)
        self._experiments[name] = number
        return number

    # ------------------------------------------------------------ models

    def ensure_model_version(
        self,
        name: str,
        version: str,
        digest: str,
        *,
        source: Path,
        run_id: str | None,
        tags: Mapping[str, str],
        description: str,
    ) -> int:
        with self._client() as client:
            found = self._find_version(client, name, version, digest)
            if found is not None:
                return int(found.version)
            _ensure_model_name(client, name)
            copy = self._linked_copy(name, version, digest)
            _link(source, copy)
            made = client.create_model_version(
                name, str(copy), run_id, dict(tags), description=description, await_creation_for=0
            )
            return int(made.version)

    def delete_model_version(self, name: str, version: str, digest: str) -> None:
        with self._client() as client:
            found = self._find_version(client, name, version, digest)
            if found is not None:
                client.delete_model_version(name, found.version)
            shutil.rmtree(self._linked_copy(name, version, digest), ignore_errors=True)
            if not client.search_model_versions(f"name = {_quoted(name)}", max_results=1):
                _delete_model_name(client, name)

    def model_entries(self) -> list[ModelEntry]:
        with self._client() as client:
            found: list[ModelEntry] = []
            token: str | None = None
            while True:
                page = client.search_model_versions(max_results=1000, page_token=token)
                found.extend(_entry(version) for version in page if "tuneloop.digest" in version.tags)
                token = page.token
                if not token:
                    return found

    def _find_version(
        self, client: MlflowClient, name: str, version: str, digest: str
    ) -> ModelVersion | None:
        query = f"name = {_quoted(name)} and tags.`tuneloop.version` = {_quoted(version)}"
        same = [
            one for one in client.search_model_versions(query) if one.tags.get("tuneloop.digest") == digest
        ]
        return min(same, key=lambda one: int(one.version), default=None)

    def _linked_copy(self, name: str, version: str, digest: str) -> Path:
        return (self._artifact_folder / "models" / name / f"{version}-{digest[-12:]}").absolute()

    # ------------------------------------------------------------ the client

    @contextmanager
    def _client(self) -> Iterator[MlflowClient]:
        """MLflow's client, and our errors for its own."""
        if self._opened is None:
            self._opened = self._open()
        try:
            yield self._opened
        except MlflowException as error:
            # What was remembered may be what is wrong: the database could have been replaced.
            self._experiments.clear()
            raise _translated(error) from error

    def _open(self) -> MlflowClient:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what its libraries deprecate is not ours to mend
                if self._tracking_uri.startswith("sqlite:///"):
                    _prepare_sqlite(Path(self._tracking_uri.removeprefix("sqlite:///")))
                return MlflowClient(self._tracking_uri, self._tracking_uri)
        except Exception as error:  # whatever it is, MLflow cannot be had now
            first_line = str(error).strip().split("\n", 1)[0]
            raise Unavailable(f"{self._tracking_uri} cannot be opened: {first_line}") from error


def _translated(error: MlflowException) -> TuneloopError | MlflowException:
    cause = error.__cause__ or error.__context__
    message = str(error.message).strip().split("\n", 1)[0]
    if isinstance(cause, requests.exceptions.RequestException) or error.error_code in _SILENCE:
        return Unavailable(message)
    if error.error_code == "RESOURCE_DOES_NOT_EXIST":
        return NotFound(message)
    # MLflow has no code of its own for what a person has deleted there.
    if "must be in the 'active' state" in message:
        return InvalidState(message)
    return error


def _prepare_sqlite(path: Path) -> None:
    """Readers (MLflow's UI) and our writes do not stop each other in WAL mode; it stays with the file."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists():
        _create_sqlite(path)
    with closing(sqlite3.connect(path, timeout=10)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")


def _create_sqlite(path: Path) -> None:
    """A new database appears whole or not at all.

    MLflow makes it by some seventy migrations outside of any transaction. Killed in between, it would refuse
    what it finds there ever after ("table _alembic_tmp_... already exists").
    """
    for left_behind in path.parent.glob(f".{path.name}.new-*"):
        left_behind.unlink(missing_ok=True)
    staging = path.with_name(f".{path.name}.new-{os.getpid()}")
    engine = mlflow.store.db.utils.create_sqlalchemy_engine(f"sqlite:///{staging}")
    try:
        mlflow.store.db.utils._initialize_tables(engine)
    finally:
        engine.dispose()
    with suppress(FileExistsError):  # somebody else was first: theirs stands
        os.link(staging, path)
    staging.unlink()


def _dataset_input(dataset: DatasetUse) -> DatasetInput:
    return DatasetInput(
        dataset=Dataset(
            name=dataset.name,
            digest=dataset.digest.removeprefix("sha256:")[:_DIGEST_LENGTH],
            source_type="local",
            source=json.dumps({"uri": dataset.source_path, "digest": dataset.digest}),
            profile=None if dataset.rows is None else json.dumps({"num_rows": dataset.rows}),
        ),
        tags=[InputTag("mlflow.data.context", ", ".join(dataset.roles))],
    )


def _entry(version: ModelVersion) -> ModelEntry:
    return ModelEntry(
        name=str(version.name),
        version=str(version.tags.get("tuneloop.version", version.version)),
        digest=str(version.tags["tuneloop.digest"]),
        number=int(version.version),
        description=str(version.description or ""),
        tags=dict(version.tags),
    )


def _ensure_model_name(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _delete_model_name(client: MlflowClient, name: str) -> None:
    try:
        client.delete_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def _link(source: Path, target: Path) -> None:
    """A folder of hard links to `source`'s files: no bytes are copied on one file system.

    MLflow writes a file of its own (`registered_model_meta`) into the folder that it loads a registered model
    from; an artifact must not change. Symbolic links would not do: it refuses paths that lead outside.
    """
    if target.exists():
        return
    staging = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(source, staging, copy_function=_link_or_copy)
    os.rename(staging, target)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def _quoted(text: str) -> str:
    """A string in MLflow's filter language, which knows no escape."""
    return f'"{text}"' if "'" in text else f"'{text}'"


def _milliseconds(at: datetime) -> int:
    return round(at.timestamp() * 1000)
