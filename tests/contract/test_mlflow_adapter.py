"""The tracking server's contract, held by the fake, by MLflow on SQLite and by an MLflow server alike."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

import pytest

from tests.fakes_tracking import FakeTrackingServer, Killed
from tests.mlflow_server import MlflowServerProcess
from tuneloop.core.digest import of_path
from tuneloop.core.errors import InvalidState, NotFound, Unavailable
from tuneloop.core.ports import DatasetUse, Measurement, TrackingServer

START = datetime(2026, 1, 1, tzinfo=UTC)
END = START + timedelta(seconds=90)
DIGEST = "sha256:" + "ab" * 32


@dataclass(frozen=True)
class Seen:
    """A run as a person would find it."""

    name: str
    status: str
    ended_at: datetime | None
    tags: dict[str, str]
    parameters: dict[str, str]
    datasets: dict[str, tuple[str, str]]
    """Name to (shown digest, roles)."""


class Subject(Protocol):
    """A server, and eyes that look into it past the port."""

    server: TrackingServer

    def run(self, run_id: str) -> Seen: ...

    def curve(self, run_id: str, name: str) -> list[tuple[int, float]]: ...

    def picture(self, run_id: str, path: str) -> bytes: ...

    def delete_run(self, run_id: str) -> None: ...

    def model_names(self) -> set[str]: ...

    def run_of_model(self, name: str, number: int) -> str | None: ...


class FakeSubject:
    def __init__(self) -> None:
        self.fake = FakeTrackingServer()
        self.server: TrackingServer = self.fake

    def run(self, run_id: str) -> Seen:
        run = self.fake.runs[run_id]
        datasets = {
            name: (used.digest.removeprefix("sha256:")[:32], ", ".join(used.roles))
            for name, used in run.datasets.items()
        }
        return Seen(run.name, run.status, run.ended_at, run.tags, run.parameters, datasets)

    def curve(self, run_id: str, name: str) -> list[tuple[int, float]]:
        return self.fake.runs[run_id].curve(name)

    def picture(self, run_id: str, path: str) -> bytes:
        return self.fake.runs[run_id].pictures[path]

    def delete_run(self, run_id: str) -> None:
        self.fake.runs[run_id].is_deleted = True

    def model_names(self) -> set[str]:
        return set(self.fake.models)

    def run_of_model(self, name: str, number: int) -> str | None:
        return next(one.run_id for one in self.fake.models[name] if one.entry.number == number)


class MlflowSubject:
    def __init__(self, folder: Path, uri: str = "") -> None:
        from tuneloop.adapters.mlflow import open_server

        # After the adapter: it chooses how patient MLflow's client is.
        from mlflow import MlflowClient  # isort: skip

        self.uri = uri or f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}"
        self.server: TrackingServer = open_server(self.uri, folder / "mlflow" / "artifacts")
        self.server.model_entries()
        self.client = MlflowClient(self.uri, self.uri)

    def run(self, run_id: str) -> Seen:
        run = self.client.get_run(run_id)
        end = run.info.end_time
        datasets = {
            used.dataset.name: (used.dataset.digest, {tag.key: tag.value for tag in used.tags})
            for used in run.inputs.dataset_inputs
        }
        return Seen(
            name=run.info.run_name,
            status=run.info.status.lower(),
            ended_at=None if end is None else datetime.fromtimestamp(end / 1000, UTC),
            tags=run.data.tags,
            parameters=run.data.params,
            datasets={
                name: (digest, tags["mlflow.data.context"]) for name, (digest, tags) in datasets.items()
            },
        )

    def curve(self, run_id: str, name: str) -> list[tuple[int, float]]:
        return sorted((point.step, point.value) for point in self.client.get_metric_history(run_id, name))

    def picture(self, run_id: str, path: str) -> bytes:
        return Path(self.client.download_artifacts(run_id, path)).read_bytes()

    def delete_run(self, run_id: str) -> None:
        self.client.delete_run(run_id)

    def model_names(self) -> set[str]:
        return {model.name for model in self.client.search_registered_models()}

    def run_of_model(self, name: str, number: int) -> str | None:
        return self.client.get_model_version(name, str(number)).run_id or None


@pytest.fixture(scope="module")
def mlflow_subject(tmp_path_factory: pytest.TempPathFactory) -> MlflowSubject:
    """One for all tests of this file: a new database takes seconds. The tests use names of their own."""
    return MlflowSubject(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def elsewhere_subject(
    elsewhere: MlflowServerProcess, tmp_path_factory: pytest.TempPathFactory
) -> MlflowSubject:
    return MlflowSubject(tmp_path_factory.mktemp("home"), elsewhere.uri)


@pytest.fixture(params=["fake", "mlflow", "elsewhere"])
def subject(request: pytest.FixtureRequest) -> Subject:
    return FakeSubject() if request.param == "fake" else request.getfixturevalue(f"{request.param}_subject")


@pytest.fixture
def here(request: pytest.FixtureRequest) -> str:
    """A name that no other test uses."""
    return request.node.originalname


def new_run(subject: Subject, here: str, name: str = "run", **tags: str) -> str:
    known = {"tuneloop.job": f"{here}-{name}", **tags}
    return subject.server.ensure_run(here, "tuneloop.job", name, known, START)


def artifact(folder: Path) -> Path:
    path = folder / "artifact"
    path.mkdir()
    (path / "MLmodel").write_text("flavors: {}\n")
    return path


def register(
    subject: Subject, name: str, version: str, source: Path, digest: str = DIGEST, **more: str
) -> int:
    tags = {"tuneloop.version": version, "tuneloop.digest": digest, **more}
    return subject.server.ensure_model_version(
        name, version, digest, source=source, run_id=None, tags=tags, description="A model."
    )


# ---------------------------------------------------------------- runs


def test_ensuring_a_run_twice_is_one_run(subject: Subject, here: str) -> None:
    first = new_run(subject, here)
    assert new_run(subject, here) == first
    assert new_run(subject, here, "another") != first


def test_a_new_run_has_its_name_and_tags_and_is_running(subject: Subject, here: str) -> None:
    seen = subject.run(new_run(subject, here, note="it's here"))
    assert (seen.name, seen.status, seen.ended_at) == ("run", "running", None)
    assert seen.tags["note"] == "it's here"


def test_the_same_name_in_another_experiment_is_another_run(subject: Subject, here: str) -> None:
    tags = {"tuneloop.job": here}
    first = subject.server.ensure_run(f"{here} 1/x", "tuneloop.job", "run", tags, START)
    assert subject.server.ensure_run(f"{here} 2", "tuneloop.job", "run", tags, START) != first


def test_points_sent_twice_are_there_once(subject: Subject, here: str) -> None:
    run_id = new_run(subject, here)
    points = [Measurement("loss", 4.0 - step, 1000 + step, step) for step in range(3)]
    subject.server.log(run_id, measurements=points[:2])
    subject.server.log(run_id, measurements=points)
    assert subject.curve(run_id, "loss") == [(0, 4.0), (1, 3.0), (2, 2.0)]


def test_a_picture_is_an_artifact_of_its_run_and_the_last_one_stands(
    subject: Subject, here: str, tmp_path: Path
) -> None:
    run_id, picture = new_run(subject, here), tmp_path / "loss.png"
    for drawn in (b"first", b"second"):
        picture.write_bytes(drawn)
        subject.server.log_picture(run_id, picture)
        subject.server.log_picture(run_id, picture, "finetune")
    assert subject.picture(run_id, "loss.png") == b"second"
    assert subject.picture(run_id, "finetune/loss.png") == b"second"


def test_a_picture_of_a_run_that_is_not_there_is_an_error(
    subject: Subject, here: str, tmp_path: Path
) -> None:
    (tmp_path / "loss.png").write_bytes(b"drawn")
    with pytest.raises(NotFound):
        subject.server.log_picture("0" * 32, tmp_path / "loss.png")


def test_a_point_that_is_not_a_number_is_kept_and_stays_one(subject: Subject, here: str) -> None:
    run_id = new_run(subject, here)
    nan = Measurement("loss", math.nan, 1000, 1)
    subject.server.log(run_id, measurements=[nan])
    subject.server.log(run_id, measurements=[nan, Measurement("loss", 1.0, 1001, 2)])
    (_, first), second = subject.curve(run_id, "loss")
    assert math.isnan(first)
    assert second == (2, 1.0)


def test_more_points_and_parameters_than_fit_one_call_arrive(subject: Subject, here: str) -> None:
    run_id = new_run(subject, here)
    subject.server.log(
        run_id,
        measurements=[Measurement("loss", float(step), step, step) for step in range(2500)],
        parameters={f"p{number}": "x" * 6000 for number in range(250)},
        tags={f"t{number}": "y" * 8000 for number in range(120)},
    )
    seen = subject.run(run_id)
    assert len(subject.curve(run_id, "loss")) == 2500
    assert len(seen.parameters) == 250
    assert seen.tags["t119"] == "y" * 8000


def test_parameters_and_tags_may_be_said_again(subject: Subject, here: str) -> None:
    run_id = new_run(subject, here)
    for _ in range(2):
        subject.server.log(run_id, parameters={"finetune.learning_rate": "2e-05"}, tags={"a": "b"})
    assert subject.run(run_id).parameters == {"finetune.learning_rate": "2e-05"}


def test_datasets_show_name_digest_and_roles_and_may_be_said_again(subject: Subject, here: str) -> None:
    run_id = new_run(subject, here)
    train = DatasetUse("chat:1", DIGEST, ("train", "validation"), "/data/train.jsonl", 200)
    test = DatasetUse("chat-test:1", "sha256:" + "cd" * 32, ("test",), "/data/test.jsonl")
    for _ in range(2):
        subject.server.log_datasets(run_id, [train, test])
    assert subject.run(run_id).datasets == {
        "chat:1": ("ab" * 16, "train, validation"),
        "chat-test:1": ("cd" * 16, "test"),
    }


@pytest.mark.parametrize("status", ["finished", "failed", "killed"])
def test_a_run_ends_with_status_and_time(subject: Subject, here: str, status: str) -> None:
    run_id = new_run(subject, here, status)
    subject.server.set_status(run_id, status, END)  # type: ignore[arg-type]
    assert (subject.run(run_id).status, subject.run(run_id).ended_at) == (status, END)


def test_an_ended_run_may_run_again(subject: Subject, here: str) -> None:
    run_id = new_run(subject, here)
    subject.server.set_status(run_id, "failed", END)
    subject.server.set_status(run_id, "running")
    assert subject.run(run_id).status == "running"


def test_an_unknown_run_is_not_found(subject: Subject) -> None:
    with pytest.raises(NotFound):
        subject.server.log("f" * 32, tags={"a": "b"})


def test_a_deleted_run_takes_nothing_and_is_not_found_by_its_tag(subject: Subject, here: str) -> None:
    run_id = new_run(subject, here)
    subject.delete_run(run_id)
    with pytest.raises(InvalidState):
        subject.server.log(run_id, tags={"a": "b"})
    with pytest.raises(InvalidState):
        subject.server.set_status(run_id, "finished", END)
    assert new_run(subject, here) != run_id


def test_an_error_of_one_call_is_not_taken_for_silence(subject: Subject, here: str) -> None:
    run_id = new_run(subject, here)
    subject.server.log(run_id, parameters={"a": "1"})
    with pytest.raises(Exception) as caught:
        subject.server.log(run_id, parameters={"a": "2"})
    assert not isinstance(caught.value, (Unavailable, NotFound, InvalidState))


# ---------------------------------------------------------------- models


def test_ensuring_a_model_version_twice_is_one_version(subject: Subject, here: str, tmp_path: Path) -> None:
    source = artifact(tmp_path)
    assert register(subject, here, "2026.1-rc", source) == 1
    assert register(subject, here, "2026.1-rc", source) == 1
    assert register(subject, here, "final", source) == 2


def test_the_same_version_with_another_digest_is_another_one(
    subject: Subject, here: str, tmp_path: Path
) -> None:
    source = artifact(tmp_path)
    first = register(subject, here, "1", source)
    assert register(subject, here, "1", source, digest="sha256:" + "00" * 32) != first


def test_model_entries_tell_everything_back(subject: Subject, here: str, tmp_path: Path) -> None:
    number = register(subject, here, "v1", artifact(tmp_path), team="blue")
    (entry,) = [entry for entry in subject.server.model_entries() if entry.name == here]
    assert (entry.version, entry.digest, entry.number, entry.description) == (
        "v1",
        DIGEST,
        number,
        "A model.",
    )
    assert entry.tags["team"] == "blue"


def test_a_model_version_that_is_there_gets_other_words(subject: Subject, here: str, tmp_path: Path) -> None:
    source = artifact(tmp_path)
    number = register(subject, here, "v1", source, team="blue", theirs="yes")
    tags = {"tuneloop.version": "v1", "tuneloop.digest": DIGEST, "team": "red", "new": "1"}
    again = subject.server.ensure_model_version(
        here, "v1", DIGEST, source=source, run_id=None, tags=tags, description="Another."
    )
    (entry,) = [entry for entry in subject.server.model_entries() if entry.name == here]
    assert (again, entry.number, entry.description) == (number, number, "Another.")
    assert dict(entry.tags) == {**tags, "theirs": "yes"}


def test_a_model_version_leads_to_its_run(subject: Subject, here: str, tmp_path: Path) -> None:
    run_id = new_run(subject, here)
    tags = {"tuneloop.version": "1", "tuneloop.digest": DIGEST}
    number = subject.server.ensure_model_version(
        here, "1", DIGEST, source=artifact(tmp_path), run_id=run_id, tags=tags, description=""
    )
    assert subject.run_of_model(here, number) == run_id


def test_deleting_the_last_version_deletes_the_name(subject: Subject, here: str, tmp_path: Path) -> None:
    source = artifact(tmp_path)
    register(subject, here, "1", source)
    register(subject, here, "2", source)
    subject.server.delete_model_version(here, "1", DIGEST, run_id=None)
    assert [entry.version for entry in subject.server.model_entries() if entry.name == here] == ["2"]
    subject.server.delete_model_version(here, "2", DIGEST, run_id=None)
    assert here not in subject.model_names()


def test_deleting_what_is_gone_is_no_error(subject: Subject, here: str, tmp_path: Path) -> None:
    subject.server.delete_model_version(here, "1", DIGEST, run_id=None)
    register(subject, here, "1", artifact(tmp_path))
    for _ in range(2):
        subject.server.delete_model_version(here, "1", DIGEST, run_id=None)
    assert here not in subject.model_names()


# ---------------------------------------------------------------- MLflow alone


@pytest.fixture
def quiet_mlflow(mlflow_subject: MlflowSubject) -> Iterator[MlflowSubject]:
    """MLflow as a person uses it: the tracking URI is all that is set."""
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(mlflow_subject.uri)
    yield mlflow_subject
    mlflow.set_tracking_uri(before)


@pytest.mark.filterwarnings("ignore")
def test_a_registered_model_loads_by_name_and_its_artifact_stays_as_it_was(
    quiet_mlflow: MlflowSubject, here: str, tmp_path: Path
) -> None:
    import mlflow

    class Shout(mlflow.pyfunc.PythonModel):
        def predict(self, context: object, model_input: list[str], params: object = None) -> list[str]:
            return [text.upper() for text in model_input]

    source = tmp_path / "artifact"
    mlflow.pyfunc.save_model(source, python_model=Shout(), pip_requirements=[])
    digest, _ = of_path(source)
    number = register(quiet_mlflow, here, "spring", source, digest)
    loaded = mlflow.pyfunc.load_model(f"models:/{here}/{number}")
    assert loaded.predict(["hello"]) == ["HELLO"]
    assert mlflow.models.get_model_info(f"models:/{here}/{number}").flavors
    # MLflow puts a file of its own where it loads from; it must not land in the artifact.
    assert of_path(source)[0] == digest


def test_no_bytes_are_copied_for_a_registered_model(
    mlflow_subject: MlflowSubject, here: str, tmp_path: Path
) -> None:
    source = artifact(tmp_path)
    number = register(mlflow_subject, here, "1", source)
    shown = Path(mlflow_subject.client.get_model_version(here, str(number)).source)
    assert (shown / "MLmodel").samefile(source / "MLmodel")
    mlflow_subject.server.delete_model_version(here, "1", DIGEST, run_id=None)
    assert not shown.exists()
    assert (source / "MLmodel").exists()


def test_what_mlflow_keeps_as_files_lies_in_the_artifact_folder(
    mlflow_subject: MlflowSubject, here: str
) -> None:
    run = mlflow_subject.client.get_run(new_run(mlflow_subject, here))
    assert "/mlflow/artifacts/runs/" in run.info.artifact_uri


def test_a_reader_does_not_stop_the_writer(mlflow_subject: MlflowSubject, here: str) -> None:
    import sqlite3

    run_id = new_run(mlflow_subject, here)
    reader = sqlite3.connect(mlflow_subject.uri.removeprefix("sqlite:///"), isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM runs").fetchone()
    began = time.monotonic()
    mlflow_subject.server.log(run_id, tags={"a": "b"})
    assert time.monotonic() - began < 5  # a reader in the way would hold it for 20 seconds
    reader.close()


def test_a_tracker_killed_while_mlflow_makes_its_database_leaves_no_half_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.store.db.utils
    import sqlalchemy as sa

    from tuneloop.adapters.mlflow import open_server

    def die_half_way(engine: sa.Engine) -> None:
        with engine.begin() as connection:
            connection.execute(sa.text("CREATE TABLE _alembic_tmp_trace_tags (id INTEGER)"))
        raise Killed

    path = tmp_path / "mlflow" / "mlflow.db"
    with monkeypatch.context() as patch:
        patch.setattr(mlflow.store.db.utils, "_initialize_tables", die_half_way)
        with pytest.raises(Killed):
            open_server(f"sqlite:///{path}", tmp_path).model_entries()
    assert not path.exists()
    assert open_server(f"sqlite:///{path}", tmp_path).model_entries() == []
    assert [found.name for found in path.parent.glob(".*.new-*")] == []


def test_a_database_that_cannot_be_opened_is_unavailable_at_once(tmp_path: Path) -> None:
    from tuneloop.adapters.mlflow import open_server

    (tmp_path / "mlflow.db").mkdir()
    server = open_server(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path)
    began = time.monotonic()
    with pytest.raises(Unavailable, match=r"mlflow\.db"):
        server.model_entries()
    assert time.monotonic() - began < 5


def test_a_server_that_nobody_runs_is_unavailable_at_once(
    tmp_path: Path, unused_tcp_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuneloop.adapters.mlflow import open_server

    server = open_server(f"http://127.0.0.1:{unused_tcp_port}", tmp_path)
    began = time.monotonic()
    with pytest.raises(Unavailable):
        server.ensure_run("e", "tuneloop.job", "run", {"tuneloop.job": "j"}, START)
    assert time.monotonic() - began < 5


@pytest.fixture
def unused_tcp_port() -> Iterator[int]:
    """Bound and not listening: nobody else gets it, and nobody answers."""
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
