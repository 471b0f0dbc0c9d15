"""Jobs and attempts as MLflow runs: a run per job, a nested one per attempt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tuneloop.core.errors import InvalidState, NotFound
from tuneloop.core.ports import Files, RunStatus, Store, TrackingServer
from tuneloop.core.states import ATTEMPT_ENDED, JOB_ENDED, STEP_GOOD, AttemptState, JobState
from tuneloop.core.types import AttemptRecord, Dataset, JobRecord, StepFile, StepRecord
from tuneloop.workspace.tracking import facts
from tuneloop.workspace.tracking.pauses import PassOn, Pauses
from tuneloop.workspace.tracking.progress import Progress

BYTES_PER_TICK = 1 << 20
"""Of one attempt's metrics.jsonl, so that no attempt holds up the others."""

_JOB_STATUS: dict[JobState, RunStatus] = {
    JobState.COMPLETED: "finished",
    JobState.FAILED: "failed",
    JobState.CANCELED: "killed",
}
_ATTEMPT_STATUS: dict[AttemptState, RunStatus] = {
    AttemptState.SUCCEEDED: "finished",
    AttemptState.FAILED: "failed",
    AttemptState.LOST: "failed",
    AttemptState.CANCELED: "killed",
}


class _RunGone(PassOn):
    """MLflow knows nothing of a run that was made there: its database was replaced."""


class _RunDeleted(PassOn):
    """A person deleted the run in MLflow."""


@contextmanager
def _about_runs() -> Iterator[None]:
    """Tells the server's answers about a run from errors of the same name elsewhere."""
    try:
        yield
    except NotFound as gone:
        raise _RunGone(gone.message) from gone
    except InvalidState as deleted:
        raise _RunDeleted(deleted.message) from deleted


@dataclass(frozen=True)
class Work:
    """A job that MLflow does not show in full, as the store had it at one moment."""

    job: JobRecord
    steps: tuple[StepRecord, ...]
    attempts: tuple[AttemptRecord, ...]
    """Those not carried to their end."""


class Runs:
    """Carries one job at a time; calling again goes on where it stopped."""

    def __init__(
        self, store: Store, files: Files, server: TrackingServer, progress: Progress, pauses: Pauses
    ) -> None:
        self._store = store
        self._files = files
        self._server = server
        self._progress = progress
        self._pauses = pauses
        self._summarised: dict[str, int] = {}
        """Step to the version of its record whose summary was said; a fresh tracker says it again."""

    def work(self, job: JobRecord) -> Work:
        steps = tuple(self._store.list(StepRecord, parent=job.key))
        return Work(job=job, steps=steps, attempts=tuple(self._open_attempts(steps)))

    def lag_bytes(self, work: Work) -> int:
        """Bytes of the job's metrics that MLflow does not hold."""
        return sum(self._lag(attempt) for attempt in work.attempts)

    def carry(self, work: Work) -> None:
        """Raises `Unavailable`, and `NotFound` when the job has to be carried again from the start."""
        try:
            self._tell_job(work)
        except _RunGone as gone:
            self._start_over(work)
            raise NotFound(f"{gone} It is carried again from the start.") from None
        except _RunDeleted:
            # Somebody threw the run away on purpose: bringing it back would be a quarrel with them.
            self._settle(work.job)

    # ------------------------------------------------------------ jobs

    def _tell_job(self, work: Work) -> None:
        with _about_runs():
            run_id = self._begin_job(work.job)
            for step in work.steps:
                self._summarise(step, run_id)
        are_done = [self._try_attempt(work, attempt, run_id) for attempt in work.attempts]
        if work.job.state in JOB_ENDED:
            self._end_job(work.job, run_id)
            if all(are_done):
                self._settle(work.job)

    def _begin_job(self, record: JobRecord) -> str:
        """The job's run, with everything that is known from the start."""
        subject, job = subject_of(record), record.job
        tracked = self._progress.of(subject)
        tags = facts.job_tags(job)
        run_id = tracked.run_id
        if run_id is None:
            started_at = record.started_at or record.created_at
            run_id = self._server.ensure_run(
                job.experiment, "tuneloop.job", job.display_name, tags, started_at
            )
            self._progress.save(subject, run_id=run_id)
        if not tracked.is_started:
            datasets = {role: self._store.find(Dataset, key) for role, key in job.datasets.items()}
            self._server.log(run_id, parameters=facts.flat(job.parameters), tags=tags)
            self._server.log_datasets(run_id, facts.dataset_uses(datasets))
            self._progress.save(subject, is_started=True)
        if tracked.is_finished and record.state not in JOB_ENDED:
            self._server.set_status(run_id, "running")
            self._progress.save(subject, is_finished=False)
        return run_id

    def _summarise(self, step: StepRecord, run_id: str) -> None:
        """What a step came to, on the job's run: of steps that ran and of those that were reused."""
        if step.state not in STEP_GOOD or self._summarised.get(step.key) == step.version:
            return
        self._server.log(run_id, measurements=facts.summary(step), tags=facts.summary_tags(step))
        self._summarised[step.key] = step.version

    def _end_job(self, record: JobRecord, run_id: str) -> None:
        with _about_runs():
            if record.error is not None:
                self._server.log(run_id, tags={"tuneloop.error": facts.shorten(record.error.message)})
            self._server.set_status(run_id, _JOB_STATUS[record.state], record.finished_at)

    def _settle(self, job: JobRecord) -> None:
        self._progress.save(subject_of(job), is_finished=True, carried_version=job.version)
        self._progress.forget(f"attempt/{job.key}/")
        for step in job.job.steps:
            self._summarised.pop(f"{job.key}/{step.name}", None)

    def _start_over(self, work: Work) -> None:
        attempts = [f"attempt/{key}" for step in work.steps for key in _attempt_keys(step)]
        for subject in [subject_of(work.job), *attempts]:
            self._progress.save(
                subject, run_id=None, metrics_offset=0, is_started=False, is_finished=False, carried_version=0
            )
        for step in work.steps:
            self._summarised.pop(step.key, None)

    # ------------------------------------------------------------ attempts

    def _open_attempts(self, steps: tuple[StepRecord, ...]) -> Iterator[AttemptRecord]:
        for step in steps:
            for key in _attempt_keys(step):
                if not self._progress.of(f"attempt/{key}").is_finished:
                    attempt = self._store.find(AttemptRecord, key)
                    if attempt is not None:
                        yield attempt

    def _lag(self, attempt: AttemptRecord) -> int:
        tracked = self._progress.of(subject_of(attempt))
        size = facts.size_of(self._files.folder(attempt.folder) / "metrics.jsonl")
        return 0 if tracked.is_finished else max(0, size - tracked.metrics_offset)

    def _try_attempt(self, work: Work, attempt: AttemptRecord, parent_run: str) -> bool:
        """Whether the attempt is carried to its end."""
        subject = subject_of(attempt)
        try:
            self._pauses.guard(subject, partial(self._tell_attempt, work, attempt, parent_run))
        except _RunDeleted:
            self._progress.save(subject, is_finished=True)
        return self._progress.of(subject).is_finished

    def _tell_attempt(self, work: Work, attempt: AttemptRecord, parent_run: str) -> None:
        folder = self._files.folder(attempt.folder)
        has_ended = attempt.state in ATTEMPT_ENDED
        if not has_ended and not (folder / "step.json").exists():
            return
        with _about_runs():
            run_id = self._begin_attempt(work, attempt, folder, parent_run)
            is_read = self._carry_curves(attempt, folder, run_id)
            if has_ended and is_read:
                self._carry_pictures(attempt, folder, run_id, parent_run)
                self._end_attempt(attempt, run_id, parent_run)

    def _begin_attempt(self, work: Work, attempt: AttemptRecord, folder: Path, parent_run: str) -> str:
        subject, job = subject_of(attempt), work.job.job
        tracked = self._progress.of(subject)
        run_id = tracked.run_id
        if run_id is not None and tracked.is_started:
            return run_id
        step, given = job.step(attempt.step), _step_file(folder)
        tags = facts.attempt_tags(attempt, step.kind, given, parent_run)
        if run_id is None:
            name = f"{attempt.step} {attempt.number}"
            run_id = self._server.ensure_run(
                job.experiment, "tuneloop.attempt", name, tags, attempt.created_at
            )
            self._progress.save(subject, run_id=run_id)
        parameters = facts.flat(step.parameters if given is None else given.parameters)
        self._server.log(run_id, parameters=parameters, tags=tags)
        self._progress.save(subject, is_started=True)
        return run_id

    def _carry_curves(self, attempt: AttemptRecord, folder: Path, run_id: str) -> bool:
        """Whether every whole line of metrics.jsonl has been carried."""
        subject = subject_of(attempt)
        start = self._progress.of(subject).metrics_offset
        end = start
        for batch in facts.read_curves(folder / "metrics.jsonl", start, BYTES_PER_TICK):
            if batch.points:
                self._server.log(run_id, measurements=batch.points)
            # After, never before: points sent twice are one point, points skipped are lost.
            self._progress.save(subject, metrics_offset=batch.end)
            end = batch.end
        return end < start + BYTES_PER_TICK

    def _carry_pictures(self, attempt: AttemptRecord, folder: Path, run_id: str, parent_run: str) -> None:
        """To the attempt's run, and to the job's, where a person looks first."""
        for picture in facts.pictures_of(folder):
            self._server.log_picture(run_id, picture)
            self._server.log_picture(parent_run, picture, attempt.step)

    def _end_attempt(self, attempt: AttemptRecord, run_id: str, parent_run: str) -> None:
        tags = {"tuneloop.state": str(attempt.state)}
        if attempt.error is not None:
            tags["tuneloop.error"] = facts.shorten(attempt.error.message)
        self._server.log(run_id, tags=tags, measurements=facts.system_facts(attempt))
        self._server.set_status(run_id, _ATTEMPT_STATUS[attempt.state], attempt.finished_at)
        self._server.log(parent_run, measurements=facts.system_facts(attempt, f"{attempt.step}."))
        self._progress.save(subject_of(attempt), is_finished=True)


def subject_of(record: JobRecord | AttemptRecord) -> str:
    return f"{record.kind}/{record.key}"


def _attempt_keys(step: StepRecord) -> list[str]:
    return [f"{step.key}/{number}" for number in range(1, step.attempts + 1)]


def _step_file(folder: Path) -> StepFile | None:
    path = folder / "step.json"
    return StepFile.model_validate_json(path.read_bytes()) if path.exists() else None
