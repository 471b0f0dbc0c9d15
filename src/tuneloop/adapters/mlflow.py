"""The `TrackingServer` port on MLflow's own client. The tracker process opens it, and nothing beside it.

The client talks to the database itself (`sqlite:///...`) or to an MLflow server (`http://...`). It is opened
at the first call, because that takes a second or two and fails when nobody answers.

Beside a database, a registered model points at a mirror of the artifact (hard links: no bytes). A server is
on another machine for all we know, so the bytes go into its artifact store, under the run of the model's job:
MLflow takes a source of its own store only from within the run that is named with it.
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
from urllib.parse import quote, urlsplit

from tuneloop.core.errors import NotFound, Unavailable
from tuneloop.core.ports import DatasetUse, Measurement, ModelEntry, RunStatus
from tuneloop.core.settings import without_password

# Before mlflow is imported: it starts a thread that reports usage otherwise. A person's own choice stands.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
# Their patience (120 s, 7 times) is for people who wait; the tracker comes again by itself. Set whatever the
# environment says: what a person wrote there was meant for programs that come once.
os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "10"
os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
# No bars for a terminal that is not there; and no addresses on it, which may hold a password.
os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"

import mlflow.store.db.utils
import requests
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from tuneloop.adapters.mlflow_errors import translated
from tuneloop.adapters.mlflow_upload import Uploads

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


MODELS = "models"
"""The experiment of models whose job has no run there."""
OWN_MODEL = "tuneloop.model"
"""Tag of a run that is there for a model's bytes alone."""
IDENTITIES = ("tuneloop.attempt", "tuneloop.job", OWN_MODEL)
"""Tags that no two of our runs share."""

EXPERIMENT_KIND = "mlflow.experimentKind"
"""Says that runs and curves, not traces of agents, are what this experiment is about."""


class MlflowServer:
    """See `ports.TrackingServer`. `artifact_folder` holds what MLflow itself keeps as files."""

    def __init__(self, tracking_uri: str, artifact_folder: Path) -> None:
        self._tracking_uri = tracking_uri
        self._artifact_folder = artifact_folder
        self._opened: MlflowClient | None = None
        self._experiments: dict[str, str] = {}
        self._is_elsewhere = tracking_uri.startswith(("http://", "https://"))
        self._uploads = Uploads(tracking_uri)
        is_in_the_home = tracking_uri == f"sqlite:///{artifact_folder.parent / 'mlflow.db'}"
        self.place = "" if is_in_the_home else without_password(tracking_uri)

    # ------------------------------------------------------------ runs

    def ensure_run(
        self, experiment: str, identity: str, name: str, tags: Mapping[str, str], started_at: datetime
    ) -> str:
        with self._client() as client:
            number = self._experiment(client, experiment)
            found = _runs_with(client, number, identity, tags[identity])
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

    def log_picture(self, run_id: str, picture: Path, folder: str = "") -> None:
        with self._client() as client:
            artifacts = client.get_run(run_id).info.artifact_uri
            # A folder of the server's own machine would be one of this machine for the client.
            if self._is_elsewhere and urlsplit(artifacts).scheme in ("", "file"):
                return
            client.log_artifact(run_id, str(picture), folder or None)

    def set_status(self, run_id: str, status: RunStatus, ended_at: datetime | None = None) -> None:
        with self._client() as client:
            if status == "running":
                client.update_run(run_id, _STATUS[status])
            else:
                end = None if ended_at is None else _milliseconds(ended_at)
                client.set_terminated(run_id, _STATUS[status], end)
                if self._is_elsewhere:
                    _delete_twins(client, run_id)

    def _experiment(self, client: MlflowClient, name: str) -> str:
        if name in self._experiments:
            return self._experiments[name]
        found = client.get_experiment_by_name(name)
        if found is None:
            kind = {EXPERIMENT_KIND: "custom_model_development"}
            number = str(client.create_experiment(name, self._artifact_location(name), kind))
        else:
            number = str(found.experiment_id)
            if found.lifecycle_stage == "deleted":
                client.restore_experiment(number)
        self._experiments[name] = number
        return number

    def _artifact_location(self, experiment: str) -> str | None:
        """Of a database: said, because the default is a folder `mlruns` wherever the process was started. A
        server knows its own."""
        if self._is_elsewhere:
            return None
        return (self._artifact_folder / "runs" / quote(experiment, safe="")).absolute().as_uri()

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
                _describe_again(client, found, tags, description)
                return int(found.version)
            if self._is_elsewhere:
                run_id, place = self._place_elsewhere(client, name, version, digest, run_id)
                self._uploads.ensure(source, place)
            else:
                place = str(self._linked_copy(name, version, digest))
                _link(source, Path(place))
            _ensure_model_name(client, name)
            made = client.create_model_version(
                name, place, run_id, dict(tags), description=description, await_creation_for=0
            )
            # As with runs (`_delete_twins`): what is asked for twice, after a silence, is there once.
            first = self._find_version(client, name, version, digest) or made
            if first.version != made.version:
                client.delete_model_version(name, made.version)
            return int(first.version)

    def delete_model_version(self, name: str, version: str, digest: str, *, run_id: str | None) -> None:
        with self._client() as client:
            found = self._find_version(client, name, version, digest)
            if self._is_elsewhere:
                # Before the version: once that is gone, nothing tells where the bytes are.
                self._remove_elsewhere(client, name, version, digest, found.run_id if found else run_id)
            else:
                shutil.rmtree(self._linked_copy(name, version, digest), ignore_errors=True)
            while found is not None:
                client.delete_model_version(name, found.version)
                found = self._find_version(client, name, version, digest)
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

    def _place_elsewhere(
        self, client: MlflowClient, name: str, version: str, digest: str, run_id: str | None
    ) -> tuple[str, str]:
        """(run, address) where the model's bytes belong; the run is made when there is no other."""
        run = None if run_id is None else _find_run(client, run_id)
        if run is None or run.info.lifecycle_stage == "deleted":
            identity = f"{name}:{version} {digest[-12:]}"
            number = self._experiment(client, MODELS)
            found = _runs_with(client, number, OWN_MODEL, identity)
            run = (
                found[0]
                if found
                else client.create_run(number, tags={OWN_MODEL: identity}, run_name=f"{name}:{version}")
            )
            client.set_terminated(run.info.run_id)
        return str(run.info.run_id), f"{run.info.artifact_uri}/{_path_of(name, version, digest)}"

    def _remove_elsewhere(
        self, client: MlflowClient, name: str, version: str, digest: str, run_id: str | None
    ) -> None:
        run = None if run_id is None else _find_run(client, run_id)
        if run is None:
            identity = f"{name}:{version} {digest[-12:]}"
            run = next(iter(_runs_with(client, self._experiment(client, MODELS), OWN_MODEL, identity)), None)
        if run is None:
            return
        self._uploads.remove(f"{run.info.artifact_uri}/{_path_of(name, version, digest)}")
        if OWN_MODEL in run.data.tags and run.info.lifecycle_stage == "active":
            client.delete_run(run.info.run_id)

    def _linked_copy(self, name: str, version: str, digest: str) -> Path:
        return (self._artifact_folder / _path_of(name, version, digest)).absolute()

    # ------------------------------------------------------------ the client

    def open(self) -> None:
        """Makes sure that there is a database. Raises `Unavailable`."""
        if self._opened is None:
            self._opened = self._open()

    @contextmanager
    def _client(self) -> Iterator[MlflowClient]:
        """MLflow's client, and our errors for its own."""
        self.open()
        assert self._opened is not None
        try:
            yield self._opened
        except (MlflowException, requests.exceptions.RequestException) as error:
            # What was remembered may be what is wrong: the database could have been replaced.
            self._experiments.clear()
            raise translated(error, self._tracking_uri) from error

    def _open(self) -> MlflowClient:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what its libraries deprecate is not ours to mend
                if self._tracking_uri.startswith("sqlite:///"):
                    _prepare_sqlite(Path(self._tracking_uri.removeprefix("sqlite:///")))
                return MlflowClient(self._tracking_uri, self._tracking_uri)
        except Exception as error:  # whatever it is, MLflow cannot be had now
            first_line = without_password(str(error).strip().split("\n", 1)[0])
            raise Unavailable(f"{self.place or self._tracking_uri} cannot be opened: {first_line}") from error


def _describe_again(
    client: MlflowClient, there: ModelVersion, tags: Mapping[str, str], description: str
) -> None:
    """What differs. No tag is taken away: a person may have put it there."""
    for name, value in tags.items():
        if there.tags.get(name) != value:
            client.set_model_version_tag(there.name, there.version, name, value)
    if (there.description or "") != description:
        client.update_model_version(there.name, there.version, description)


def _runs_with(client: MlflowClient, experiment: str, tag: str, value: str) -> list[Run]:
    """Those that are not deleted, the oldest first."""
    order = ["attributes.start_time", "attributes.run_id"]
    return list(client.search_runs([experiment], f"tags.`{tag}` = {_quoted(value)}", order_by=order))


def _delete_twins(client: MlflowClient, run_id: str) -> None:
    """A request that nobody waited for any more may have been carried out in the end: an empty run beside the
    one that was made when it was asked again."""
    run = client.get_run(run_id)
    for tag in IDENTITIES:
        if tag in run.data.tags:
            for other in _runs_with(client, run.info.experiment_id, tag, run.data.tags[tag]):
                if other.info.run_id != run_id and not other.data.params and not other.data.metrics:
                    client.delete_run(other.info.run_id)
            return


def _find_run(client: MlflowClient, run_id: str) -> Run | None:
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if isinstance(translated(error, ""), NotFound):
            return None
        raise


def _path_of(name: str, version: str, digest: str) -> str:
    """Where a model's files are, below a folder of MLflow's artifacts."""
    return f"models/{name}/{version}-{digest[-12:]}"


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
