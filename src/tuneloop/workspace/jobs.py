"""Jobs: submitting, reading, cancelling and retrying them. Everything here is bookkeeping: it writes what is
wanted; `reconcile` makes it so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict

from tuneloop.core import recipe as recipes
from tuneloop.core import sizes
from tuneloop.core.errors import AlreadyExists, InvalidState, NotFound
from tuneloop.core.fit import rows_expected
from tuneloop.core.names import check_name, did_you_mean, new_job_name
from tuneloop.core.plan import Rows
from tuneloop.core.ports import Clock, Files, Store
from tuneloop.core.states import (
    JOB_ENDED,
    JOB_MOVES,
    STEP_GOOD,
    JobState,
    StepState,
    check_move,
)
from tuneloop.core.types import (
    Artifact,
    ArtifactInput,
    ArtifactKind,
    AttemptRecord,
    Card,
    Compute,
    Event,
    Job,
    JobOutput,
    JobRecord,
    Noun,
    Priority,
    Record,
    StepOutputInput,
    StepRecord,
)
from tuneloop.workspace.catalog import Catalog
from tuneloop.workspace.compute import LOCAL
from tuneloop.workspace.data import Brought, ChatFiles, Data

SAMPLES = Path(__file__).parent.parent / "samples"
"""Data that ships; `samples:guide/train_sft.jsonl` in a recipe is a file under here."""


@dataclass(frozen=True)
class Submission:
    """A recipe on its way in. `folder` is where its relative data paths start."""

    text: str
    path: str
    folder: Path
    overrides: Mapping[str, str] = field(default_factory=dict)
    experiment: str | None = None
    force_rerun: bool = False
    priority: Priority | None = None
    """None: what the recipe says, `medium` by default."""
    environment: Mapping[str, str] = field(default_factory=dict)
    name: str | None = None
    """What the job is called; None: a name is made up."""
    takes_model_defaults: bool = True
    """False: the card's defaults fill nothing; whoever submits has laid them over its own already."""
    shown: Mapping[str, str] = field(default_factory=dict)
    """Role (`train`, ...) to what its file is called in messages; left out: as the recipe writes it."""
    outputs: Mapping[str, JobOutput] = field(default_factory=dict)
    """Names for outputs of steps, beside the usual ones; they stand before a usual one of the same name."""
    tags: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    """What has to be said beside what the recipe gives cause for."""


class _InBrief(Noun):
    """A part of a stored record: the rest of it is passed over unread, which takes most of the time."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class StepInBrief(_InBrief):
    name: str
    outputs: dict[str, ArtifactKind] = {}


class JobInBrief(_InBrief):
    name: str
    display_name: str
    experiment: str
    steps: tuple[StepInBrief, ...] = ()
    outputs: dict[str, JobOutput] = {}
    tags: dict[str, str] = {}


class JobSummary(Record):
    """What a long list needs of a `JobRecord`; read only."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    kind: ClassVar[str] = JobRecord.kind
    job: JobInBrief
    state: JobState

    @property
    def key(self) -> str:
        return self.job.name


class Jobs:
    def __init__(self, store: Store, files: Files, clock: Clock, catalog: Catalog, data: Data) -> None:
        self._store = store
        self._files = files
        self._clock = clock
        self._catalog = catalog
        self._data = data

    def resolve(self, submission: Submission) -> tuple[recipes.Resolved, Card]:
        """The final set of parameters with their origins. Nothing is recorded. Raises `RecipeError`, and
        `NotFound` for a model or a compute that there is not."""
        if submission.experiment is not None:
            check_name(submission.experiment, "experiment")
        recipe = recipes.parse(submission.text, path=submission.path, overrides=submission.overrides)
        recipe = recipes.attach(recipe, submission.folder)
        card = self._catalog.get(recipe.model)
        for stage in recipes.STAGES:
            self._store.get(Compute, recipe.compute.of(stage))
        if submission.takes_model_defaults:
            return recipes.resolve(recipe, card), card
        return recipes.resolve(recipe, card.model_copy(update={"defaults": {}})), card

    def rehearse(self, submission: Submission) -> recipes.Resolved:
        """Everything that `submit` would refuse is refused, and nothing is recorded."""
        resolved, _ = self.resolve(submission)
        files = resolved.recipe.data.files()
        if "questions" in files:
            written = files["questions"]
            self._data.check_questions(data_path(written, submission.folder), written)
        warnings = self._data.check_chat(_chat_files(resolved, submission))
        return resolved.model_copy(update={"warnings": (*resolved.warnings, *warnings)})

    def submit(self, submission: Submission) -> JobRecord:
        """Check everything, bring the data in, and record the job; the reconciler does the rest.
        Raises `RecipeError`, `NotFound`, `DataError`, `Unsupported`, `InvalidName`, or `AlreadyExists` for a
        name that is taken; then nothing was recorded."""
        name = self._new_name(submission)
        resolved, card = self.resolve(submission)
        brought = self._bring_in(resolved, submission)
        told = (*submission.warnings, *resolved.warnings, *brought.warnings)
        resolved = resolved.model_copy(update={"warnings": told})
        here = self._store.find(Compute, LOCAL)
        job = recipes.compile_job(
            resolved,
            name=name,
            card=card,
            inputs=brought.inputs,
            dataset_names={role: dataset.key for role, dataset in brought.datasets.items()},
            experiment=submission.experiment,
            environment=dict(submission.environment),
            force_rerun=submission.force_rerun,
            priority=submission.priority,
            rows=self._rows(resolved, card, brought),
            gpus=0 if here is None or _hides_gpus(submission) else here.gpus,
            memory_bytes=None if here is None else here.memory_bytes,
        )
        job = job.model_copy(
            update={"outputs": {**job.outputs, **submission.outputs}, "tags": dict(submission.tags)}
        )
        return self.record(job if here is None else _warned(job, here.memory_bytes))

    def _new_name(self, submission: Submission) -> str:
        if submission.name is None:
            return new_job_name()
        check_name(submission.name, "job")
        if self._store.find(JobRecord, submission.name) is not None:
            # Said before the data are brought in; `record` is who decides.
            raise AlreadyExists(f"There is a job '{submission.name}' already.")
        return submission.name

    def _rows(self, resolved: recipes.Resolved, card: Card, brought: Brought) -> Rows:
        """How long the rows are expected to be, from their characters."""
        seen = {role: dataset.statistics for role, dataset in brought.datasets.items()}
        length = resolved.preprocess.max_seq_length
        return rows_expected(seen.get("train"), length, card, seen.get("validation"))

    def record(self, job: Job) -> JobRecord:
        """Record a graph of steps as it stands. Raises `NotFound` for an edge that leads nowhere or a
        compute that there is not."""
        _check_graph(job)
        now = self._clock.now()
        with self._store.transaction():
            # Inside: or a cluster might be deleted between the look and the record.
            for step in job.steps:
                _check_compute(self._store.get(Compute, step.compute))
            record = self._store.insert(JobRecord(created_at=now, job=job, priority=job.settings.priority))
            for step in job.steps:
                self._store.insert(StepRecord(created_at=now, job=job.name, step=step.name))
            self._note(job.name, "submitted", display_name=job.display_name)
        return record

    def get(self, name: str) -> JobRecord:
        return self._store.get(JobRecord, name)

    def list(self, experiment: str | None = None, limit: int | None = None) -> Sequence[JobRecord]:
        """Newest first."""
        return self._store.list(JobRecord, parent=experiment, newest_first=True, limit=limit)

    def summaries(self, limit: int | None = None) -> Sequence[JobSummary]:
        """Newest first, at a fraction of what `list` takes."""
        return self._store.list(JobSummary, newest_first=True, limit=limit)

    def steps(self, name: str) -> Sequence[StepRecord]:
        """In the order of the graph."""
        order = {step.name: position for position, step in enumerate(self.get(name).job.steps)}
        return sorted(self._store.list(StepRecord, parent=name), key=lambda record: order[record.step])

    def attempts(self, name: str, step: str) -> Sequence[AttemptRecord]:
        """Oldest first. Raises `NotFound` for a step that the job does not have."""
        job = self.get(name).job
        if step not in {known.name for known in job.steps}:
            known = [one.name for one in job.steps]
            raise NotFound(f"Job {name} has no step '{step}'.", next_move=did_you_mean(step, known))
        found = self._store.list(AttemptRecord, parent=f"{name}/{step}")
        return sorted(found, key=lambda attempt: attempt.number)

    def source_attempt(self, name: str, step: str) -> AttemptRecord | None:
        """The newest attempt of a step, or the one elsewhere whose outputs it reused."""
        own = self.attempts(name, step)
        if own:
            return own[-1]
        reused = self._store.get(StepRecord, f"{name}/{step}").reused_from
        return None if reused is None else self._store.find(AttemptRecord, reused)

    def cancel(self, name: str) -> JobRecord:
        """Ask for the end of a job. Asking twice is once; raises `InvalidState` when it has ended."""
        with self._store.transaction():
            record = self.get(name)
            if record.state is JobState.CANCELING:
                return record
            if record.state in JOB_ENDED:
                raise InvalidState(
                    f"Job {name} has ended already: it is {record.state}.",
                    next_move=f"Look at it with: tuneloop jobs show {name}",
                )
            return self._move(record, JobState.CANCELING)

    def describe(
        self, name: str, *, display_name: str | None = None, tags: Mapping[str, str] | None = None
    ) -> JobRecord:
        """Change what it is called for people, and its tags (all of them); None leaves it. In any state:
        nothing that runs depends on them."""
        with self._store.transaction():
            record = self.get(name)
            changes: dict[str, object] = {}
            if display_name is not None and display_name != record.job.display_name:
                changes["display_name"] = display_name
            if tags is not None and dict(tags) != record.job.tags:
                changes["tags"] = dict(tags)
            if not changes:
                return record
            job = record.job.model_copy(update=changes)
            return self._store.update(record.model_copy(update={"job": job}))

    def prioritise(self, name: str, priority: Priority) -> JobRecord:
        """Where it stands among what waits; what runs is not stopped. Raises `InvalidState` when it has
        ended."""
        with self._store.transaction():
            record = self.get(name)
            if record.state in JOB_ENDED:
                raise InvalidState(
                    f"Job {name} has ended already: it is {record.state}.",
                    next_move=f"Look at it with: tuneloop jobs show {name}",
                )
            self._note(name, "priority", priority=priority)
            return self._store.update(record.model_copy(update={"priority": priority}))

    def retry(self, name: str) -> JobRecord:
        """Run again what failed, was skipped or cancelled; what succeeded stays."""
        with self._store.transaction():
            record = self.get(name)
            if record.state not in {JobState.FAILED, JobState.CANCELED}:
                raise InvalidState(
                    f"Job {name} is {record.state}; only a failed or cancelled job can be retried.",
                    next_move="To run its recipe again from the start: tuneloop run RECIPE --force-rerun",
                )
            for step in self.steps(name):
                if step.state not in STEP_GOOD:
                    self._store.update(
                        step.model_copy(
                            update={
                                "state": StepState.PENDING,
                                "reason": None,
                                "error": None,
                                "started_at": None,
                                "finished_at": None,
                                "counted_from": step.attempts,
                            }
                        )
                    )
            return self._move(record, JobState.QUEUED, error=None, finished_at=None)

    def output(self, name: str, output: str) -> tuple[JobOutput, str]:
        """A job's output and its digest. Raises `NotFound`, or `InvalidState` when it is not made yet."""
        job = self.get(name).job
        mapped = job.outputs.get(output)
        if mapped is None:
            raise NotFound(
                f"Job {name} has no output '{output}'.", next_move=did_you_mean(output, job.outputs)
            )
        digest = self.output_digests(name).get(output)
        if digest is None:
            step = self._store.get(StepRecord, f"{name}/{mapped.step}")
            has_ended = self.get(name).state in JOB_ENDED
            raise InvalidState(
                f"Output '{output}' is made by step {mapped.step}, which is {step.state}.",
                next_move=f"Take the job up again: tuneloop jobs retry {name}"
                if has_ended
                else f"Wait for it: tuneloop jobs stream {name}",
            )
        return mapped, digest

    def output_digests(self, name: str) -> dict[str, str]:
        """Those outputs that exist by now."""
        made = {step.step: step.outputs for step in self._store.list(StepRecord, parent=name)}
        found = {}
        for output, mapped in self.get(name).job.outputs.items():
            digest = made.get(mapped.step, {}).get(mapped.output)
            if digest is not None:
                found[output] = digest
        return found

    def artifact(self, digest: str) -> Artifact:
        return self._store.get(Artifact, digest)

    def _bring_in(self, resolved: recipes.Resolved, submission: Submission) -> Brought:
        folder = submission.folder
        files = resolved.recipe.data.files()
        inputs: dict[str, ArtifactInput] = {}
        if "questions" in files:
            written = files["questions"]
            inputs["questions"] = self._data.bring_in_questions(data_path(written, folder), written)
        brought = self._data.bring_in_chat(_chat_files(resolved, submission))
        return replace(brought, inputs={**brought.inputs, **inputs})

    def _move(self, record: JobRecord, state: JobState, **changes: object) -> JobRecord:
        check_move(JOB_MOVES, f"Job {record.key}", record.state, state)
        moved = self._store.update(record.model_copy(update={"state": state, **changes}))
        self._note(record.key, "state", state=str(state))
        return moved

    def _note(self, name: str, what: str, **data: str) -> None:
        self._store.append(Event(at=self._clock.now(), subject=f"job/{name}", what=what, data=dict(data)))


def _chat_files(resolved: recipes.Resolved, submission: Submission) -> ChatFiles:
    written = {role: text for role, text in resolved.recipe.data.files().items() if role != "questions"}
    return ChatFiles(
        {role: data_path(text, submission.folder) for role, text in written.items()},
        {role: submission.shown.get(role, text) for role, text in written.items()},
        column=resolved.preprocess.messages_column,
        bad_rows=resolved.preprocess.bad_rows,
    )


def _check_compute(compute: Compute) -> None:
    failed = sizes.why_not_provisioned(compute.name, compute.provisioning_state)
    if failed is not None:
        raise InvalidState(failed)


def _hides_gpus(submission: Submission) -> bool:
    return submission.environment.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")


def _warned(job: Job, limit: int) -> Job:
    """A step that is expected to take more than the machine gives may still run when it is alone (the
    estimate may be wrong): `tuneloop run` has asked the planner first, other callers are told here."""
    told = [
        f"step {step.name} is expected to take {step.memory_bytes / 1e9:.1f} GB, more than the "
        f"{limit / 1e9:.1f} GB that Tuneloop may claim here: it runs alone, and memory may run out. "
        "What would fit: tuneloop plan RECIPE"
        for step in job.steps
        if step.memory_bytes > limit
    ]
    return job.model_copy(update={"warnings": (*job.warnings, *told)}) if told else job


def data_path(written: str, folder: Path) -> Path:
    """Where a recipe's data lie: `samples:` ships with Tuneloop, the rest starts at the recipe's folder."""
    if written.startswith("samples:"):
        path = (SAMPLES / written.removeprefix("samples:")).resolve()
        if not path.is_relative_to(SAMPLES.resolve()):
            raise NotFound(f"{written} leaves the samples that ship.")
        return path
    try:
        return Path(folder, Path(written).expanduser())
    except RuntimeError:
        raise NotFound(f"{written!r} names the home of a user that there is not.") from None


def _check_graph(job: Job) -> None:
    """Every edge leads to an output of an earlier step: so there are no cycles."""
    made: dict[str, Iterable[str]] = {}
    for step in job.steps:
        check_name(step.name, "step")
        if step.name in made:
            raise NotFound(f"Job {job.name} has two steps named '{step.name}'.")
        for name, given in step.inputs.items():
            if isinstance(given, StepOutputInput) and given.output not in made.get(given.step, ()):
                raise NotFound(
                    f"Step '{step.name}' takes input '{name}' from '{given.step}.{given.output}', "
                    "which no earlier step makes."
                )
        made[step.name] = step.outputs
    for name, mapped in job.outputs.items():
        if mapped.output not in made.get(mapped.step, ()):
            raise NotFound(
                f"Output '{name}' is mapped from '{mapped.step}.{mapped.output}', which is not made."
            )
