"""Our models: registering an output of a job, with lineage. Registering is an act of the workspace: it is
complete once the record is written; the tracker carries it to MLflow's registry."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from tuneloop import __version__
from tuneloop.core.errors import AlreadyExists, InvalidState, NotFound, Unsupported, UsageError
from tuneloop.core.fit import count_parameters, replica_memory_bytes
from tuneloop.core.names import check_name, check_version
from tuneloop.core.ports import Clock, Files, Store
from tuneloop.core.states import MODEL_MOVES, ModelState, check_move
from tuneloop.core.types import (
    Artifact,
    ArtifactKind,
    Dataset,
    DeploymentRecord,
    Event,
    JobRecord,
    Lineage,
    ModelRecord,
    StepRecord,
)

_MODELS = ("mlflow_model", "model_folder")
"""What a replica can load."""


class Models:
    def __init__(self, store: Store, files: Files, clock: Clock) -> None:
        self._store = store
        self._files = files
        self._clock = clock

    def list(self, name: str | None = None) -> Sequence[ModelRecord]:
        """Newest first."""
        return self._store.list(ModelRecord, parent=name, newest_first=True)

    def get(self, name: str, version: str = "latest") -> ModelRecord:
        """`latest` is the one registered last. Raises `NotFound`."""
        if version != "latest":
            return self._store.get(ModelRecord, f"{name}:{version}")
        found = [model for model in self.list(name) if model.state is not ModelState.DELETING]
        if not found:
            raise NotFound(
                f"There is no model '{name}'.",
                next_move="Register one with: tuneloop models register JOB:trained_model --name NAME",
            )
        return found[0]

    def register(
        self,
        job_name: str,
        output: str,
        digest: str,
        *,
        name: str,
        version: str | None = None,
        description: str = "",
        tags: Mapping[str, str] | None = None,
    ) -> ModelRecord:
        """Record `digest`, made by `job_name` as `output`, as a version of `name`. Without `version` the next
        whole number is taken. Raises `AlreadyExists`, and `UsageError` when the output is not a model."""
        check_name(name, "model name")
        job = self._store.get(JobRecord, job_name)
        artifact = self._require_model(digest, output)
        with self._store.transaction():
            record = ModelRecord(
                created_at=self._clock.now(),
                name=name,
                model_version=self._new_version(name, version),
                description=description,
                tags=dict(tags or {}),
                artifact=digest,
                template_digest=self.template_digest(digest),
                lineage=self._lineage(job, output, artifact),
                metrics=self._metrics(job_name),
            )
            return self._insert(record)

    def register_files(
        self,
        path: Path,
        *,
        name: str,
        version: str | None = None,
        description: str = "",
        tags: Mapping[str, str] | None = None,
    ) -> ModelRecord:
        """Copy in a file or folder from elsewhere and record it as a version of `name`. Whether it can be
        served says `why_not_served`; it is kept and given out as it is. Raises `AlreadyExists` unless that
        version holds the same files: then that is what comes back."""
        check_name(name, "model name")
        digest, size_bytes = self._ingest(path)
        with self._store.transaction():
            if self._store.find(Artifact, digest) is None:
                layout = layout_of(self._files.artifact_path(digest))
                now = self._clock.now()
                self._store.insert(
                    Artifact(created_at=now, digest=digest, type=layout, size_bytes=size_bytes)
                )
            return self.register_artifact(
                digest, name=name, version=version, description=description, tags=tags
            )

    def register_artifact(
        self,
        digest: str,
        *,
        name: str,
        version: str | None = None,
        description: str = "",
        tags: Mapping[str, str] | None = None,
    ) -> ModelRecord:
        """The same of files that are here already and whose origin nobody knows."""
        check_name(name, "model name")
        self._store.get(Artifact, digest)
        with self._store.transaction():
            chosen = self._new_version(name, version)
            before = self._store.find(ModelRecord, f"{name}:{chosen}")
            if before is not None and before.artifact == digest and before.state is not ModelState.DELETING:
                return before
            return self._insert(
                ModelRecord(
                    created_at=self._clock.now(),
                    name=name,
                    model_version=chosen,
                    description=description,
                    tags=dict(tags or {}),
                    artifact=digest,
                    template_digest=self.template_digest(digest),
                    lineage=Lineage(code_version=__version__),
                )
            )

    def describe(self, name: str, version: str, *, description: str, tags: Mapping[str, str]) -> ModelRecord:
        """Other words for the same files; the tracker carries them to MLflow, where a tag that is left out
        stays."""
        with self._store.transaction():
            record = self.get(name, version)
            if record.state is ModelState.DELETING:
                raise InvalidState(f"Model {record.key} is being deleted.")
            changed = record.model_copy(update={"description": description, "tags": dict(tags)})
            if changed == record:
                return record
            # Without its number it is carried again.
            return self._store.update(changed.model_copy(update={"mlflow_version": None}))

    def delete(self, name: str, version: str) -> ModelRecord:
        """Give up a version; its bytes stay. Raises `InvalidState` while a deployment serves it."""
        with self._store.transaction():
            record = self.get(name, version)
            users = [
                deployment.key
                for deployment in self._store.list(DeploymentRecord)
                if deployment.model == record.key
            ]
            if users:
                raise InvalidState(
                    f"Model {record.key} is served by {', '.join(users)}.",
                    next_move=f"First: tuneloop endpoints delete {users[0].split('/')[0]}",
                )
            check_move(MODEL_MOVES, f"Model {record.key}", record.state, ModelState.DELETING)
            if record.state is ModelState.DELETING:
                return record
            moved = self._store.update(record.model_copy(update={"state": ModelState.DELETING}))
            self._note(moved, "deleted")
            return moved

    def template_digest(self, digest: str) -> str | None:
        """What `tuneloop.json` inside a model artifact says of its chat template."""
        path = self._files.artifact_path(digest) / "tuneloop.json"
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        found = facts.get("template_digest")
        return str(found) if found else None

    def why_not_served(self, digest: str) -> str | None:
        """What hinders a replica from loading this artifact; None for a model in one of the two layouts."""
        artifact = self._store.find(Artifact, digest)
        if artifact is None or artifact.type in _MODELS:
            return None
        folder = self._files.artifact_path(digest)
        if (folder / "MLmodel").is_file():
            wanted = ("model/config.json", "components/tokenizer/tokenizer.json")
            missing = [file for file in wanted if not (folder / file).is_file()]
            return f"it is an MLflow model without {' and '.join(missing)}, so it is no chat model"
        missing = [file for file in ("config.json", "tokenizer.json") if not (folder / file).is_file()]
        missing += [] if any(folder.glob("*.safetensors")) else ["weights in safetensors"]
        return f"it is no MLflow model, and for a Hugging Face model it lacks {', '.join(missing)}"

    def replica_memory_bytes(self, digest: str) -> int:
        """What a process that serves this artifact is expected to take. Raises `Unsupported` for files that
        cannot be served."""
        why = self.why_not_served(digest)
        if why is not None:
            raise Unsupported(
                f"This model cannot be served: {why}. Its files are kept and can be downloaded.",
                next_move="Serve a model that a job has exported, or upload a chat model in the layout of "
                "MLflow or of Hugging Face.",
            )
        return replica_memory_bytes(count_parameters(self._files.artifact_path(digest)))

    def base_artifact(self, name: str) -> Artifact:
        """The imported base model `name` (or `name:version`), as some job brought it in, the newest."""
        wanted = name.lower()
        for artifact in self._store.list(Artifact, newest_first=True):
            if artifact.type != "model_folder" or artifact.name is None:
                continue
            if wanted in {artifact.name.lower(), artifact.name.split(":")[0].lower()}:
                return artifact
        raise NotFound(
            f"The base model '{name}' has not been imported yet.",
            next_move="Run a job with it first: its import is kept.",
        )

    def _ingest(self, path: Path) -> tuple[str, int]:
        """A model is a folder; a file alone becomes one that holds it under its name."""
        if path.is_dir():
            return self._files.ingest(path)
        folder = self._files.folder(f"artifacts/.staging-{secrets.token_hex(8)}")
        try:
            shutil.copyfile(path, folder / path.name)
            return self._files.ingest(folder)
        finally:
            self._files.remove(folder)

    def _new_version(self, name: str, version: str | None) -> str:
        chosen = check_version(version) if version is not None else self._next_version(name)
        if chosen.lower() == "latest":
            raise UsageError("'latest' names the newest version and cannot be one; choose another.")
        return chosen

    def _insert(self, record: ModelRecord) -> ModelRecord:
        if self._store.find(ModelRecord, record.key) is not None:
            raise AlreadyExists(
                f"There is a model {record.key} already.",
                next_move="Give another --version, or none to take the next number.",
            )
        self._store.insert(record)
        self._note(record, "registered")
        return record

    def _require_model(self, digest: str, output: str) -> Artifact:
        artifact = self._store.get(Artifact, digest)
        if artifact.type != "mlflow_model":
            raise UsageError(
                f"Output '{output}' is a {artifact.type}, not a model that can be registered.",
                next_move="Register the job's output 'trained_model'.",
            )
        return artifact

    def _next_version(self, name: str) -> str:
        numbers = [int(found.model_version) for found in self.list(name) if found.model_version.isdigit()]
        return str(max(numbers, default=0) + 1)

    def _lineage(self, job: JobRecord, output: str, artifact: Artifact) -> Lineage:
        return Lineage(
            job=job.key,
            output=output,
            attempt=artifact.producer,
            base_model=job.job.base_model,
            datasets={role: self._with_digest(key) for role, key in job.job.datasets.items()},
            recipe_digest=job.job.recipe_digest,
            code_version=__version__,
        )

    def _with_digest(self, key: str) -> str:
        dataset = self._store.find(Dataset, key)
        return key if dataset is None else f"{key} ({dataset.artifact})"

    def _metrics(self, job_name: str) -> dict[str, float]:
        found: dict[str, float] = {}
        for step in self._store.list(StepRecord, parent=job_name):
            found.update({f"{step.step}.{name}": value for name, value in step.metrics.items()})
        return found

    def _note(self, record: ModelRecord, what: str) -> None:
        self._store.append(Event(at=self._clock.now(), subject=f"model/{record.key}", what=what))


def layout_of(folder: Path) -> ArtifactKind:
    """What a folder from outside is: a chat model as an MLflow model or as Hugging Face lays it out, or just
    files."""
    if (folder / "MLmodel").is_file():
        is_whole = (folder / "model" / "config.json").is_file()
        is_whole &= (folder / "components" / "tokenizer" / "tokenizer.json").is_file()
        return "mlflow_model" if is_whole else "folder"
    is_whole = (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file()
    return "model_folder" if is_whole and any(folder.glob("*.safetensors")) else "folder"
