"""Jobs forward: observe attempts, reuse what the cache holds, claim slots, start attempts, finish jobs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from tuneloop.core.errors import NotFound, Stale
from tuneloop.core.ports import Clock, Executor, Files, Store
from tuneloop.core.recipe import step_key
from tuneloop.core.states import (
    ATTEMPT_ENDED,
    ATTEMPT_MOVES,
    JOB_MOVES,
    STEP_ENDED,
    STEP_GOOD,
    STEP_MOVES,
    AttemptState,
    JobState,
    StepState,
    check_move,
)
from tuneloop.core.types import (
    Artifact,
    AttemptRecord,
    CacheEntry,
    Compute,
    ErrorInfo,
    Event,
    JobRecord,
    ResultFile,
    Step,
    StepFile,
    StepFileInput,
    StepRecord,
)
from tuneloop.workspace.compute import ACTIVE, LOCAL, Computes, in_order
from tuneloop.workspace.reconcile.graph import blocked_by, input_digests, is_ending
from tuneloop.workspace.reconcile.limits import Limits
from tuneloop.workspace.reconcile.lost import is_lost, vanished
from tuneloop.workspace.reconcile.stopping import Stopper

log = logging.getLogger(__name__)

MODULE = "tuneloop.steps"
OPEN = (JobState.QUEUED, JobState.RUNNING, JobState.CANCELING)


class Pipelines:
    def __init__(
        self,
        store: Store,
        executor: Executor,
        files: Files,
        clock: Clock,
        computes: Computes,
        home_id: str,
        limits: Limits,
    ) -> None:
        self._store = store
        self._executor = executor
        self._files = files
        self._clock = clock
        self._computes = computes
        self._home_id = home_id
        self._limits = limits
        self._held_for: str | None = None
        """The step that is next and waits for memory, in this round."""
        self._stopper = Stopper(executor, clock, limits.stop_grace_seconds)

    def tick(self) -> None:
        """Higher priority first, then who came first: so slots and memory go to them."""
        self._held_for = None
        # All that ended is seen before anything starts: or what a job gives back in the middle of a round
        # would go to whoever stands behind it in the order.
        for part in (self._observe_job, self._advance_job):
            self._each(part)

    def _each(self, part: Callable[[JobRecord], None]) -> None:
        for record in in_order(self._store.list(JobRecord, states=OPEN)):
            try:
                part(record)
            except (Stale, NotFound) as lost:
                log.info("job %s: somebody else moved first: %s", record.key, lost)
            except Exception as defect:
                log.exception("job %s: this round failed; the next one tries again", record.key)
                self._confess(record, defect)

    def _confess(self, record: JobRecord, defect: Exception) -> None:
        """Why the job does not move, where people look: at its first step that has not ended."""
        steps = {step.step: step for step in self._store.list(StepRecord, parent=record.key)}
        waiting = [steps[step.name] for step in record.job.steps if steps[step.name].state not in STEP_ENDED]
        if waiting:
            with contextlib.suppress(Stale, NotFound):
                self._because(waiting[0], f"stuck, and tried again: {type(defect).__name__}: {defect}")

    def is_busy(self) -> bool:
        return bool(self._store.list(JobRecord, states=OPEN, limit=1))

    def stop_all(self, *, kill: bool = False) -> bool:
        """Push every attempt's process towards its end; True when none is left."""
        done = True
        for attempt in self._store.list(AttemptRecord, states=ACTIVE):
            owner, folder = self._owner(attempt), self._files.folder(attempt.folder)
            if kill:
                self._executor.stop(owner, folder, kill=True)
            # A claim that was not fulfilled stays a claim: the next server fulfils it.
            elif self._executor.status(owner, folder) in {"running", "starting"}:
                done &= self._stopper.is_stopped(owner, folder)
        return done

    # ------------------------------------------------------------ one job

    def _observe_job(self, record: JobRecord) -> None:
        steps = {step.step: step for step in self._store.list(StepRecord, parent=record.key)}
        for name in [step.name for step in record.job.steps]:
            if steps[name].state is StepState.RUNNING:
                steps[name] = self._observe(record, steps[name], is_ending=is_ending(record, steps))

    def _advance_job(self, record: JobRecord) -> None:
        steps = {step.step: step for step in self._store.list(StepRecord, parent=record.key)}
        if record.state is JobState.CANCELING:
            self._cancel(record, steps)
            return
        for step in record.job.steps:
            if steps[step.name].state is StepState.PENDING:
                steps[step.name] = self._advance(record, step, steps)
                record = self._store.get(JobRecord, record.key)
        self._finish(record, steps)

    def _finish(self, record: JobRecord, steps: dict[str, StepRecord]) -> None:
        if record.state not in {JobState.QUEUED, JobState.RUNNING}:
            return
        failed = [step for step in steps.values() if step.state is StepState.FAILED]
        if failed and not record.job.settings.continue_on_step_failure:
            self._end_running(record, steps)
        if not all(step.state in STEP_ENDED for step in steps.values()):
            return
        if failed:
            error = failed[0].error
            self._move_job(record, JobState.FAILED, error=_of_step(failed[0].step, error))
        else:
            self._move_job(record, JobState.COMPLETED)

    def _end_running(self, record: JobRecord, steps: dict[str, StepRecord]) -> None:
        for name, step in steps.items():
            if step.state is StepState.RUNNING:
                steps[name] = self._stop_step(step, "another step failed")

    def _cancel(self, record: JobRecord, steps: dict[str, StepRecord]) -> None:
        for name, step in steps.items():
            if step.state is StepState.PENDING:
                steps[name] = self._end_step(step, StepState.CANCELED, "the job was cancelled")
            elif step.state is StepState.RUNNING:
                steps[name] = self._stop_step(step, "the job was cancelled")
        if all(step.state in STEP_ENDED for step in steps.values()):
            self._move_job(record, JobState.CANCELED)

    def _stop_step(self, step: StepRecord, reason: str) -> StepRecord:
        """One push towards the end of its attempt; the step ends with it, in one write."""
        attempt = self._latest(step)
        if attempt is None or attempt.state in ATTEMPT_ENDED:
            return self._end_step(step, StepState.CANCELED, reason)
        if not self._stopper.is_stopped(self._owner(attempt), self._files.folder(attempt.folder)):
            return step
        with self._store.transaction():
            self._move_attempt(attempt, AttemptState.CANCELED, finished_at=self._clock.now())
            return self._end_step(step, StepState.CANCELED, reason)

    # ------------------------------------------------------------ a step that waits

    def _advance(self, record: JobRecord, step: Step, steps: dict[str, StepRecord]) -> StepRecord:
        waiting = steps[step.name]
        blocked = blocked_by(record.job, step, steps)
        if blocked is not None:
            return self._end_step(waiting, StepState.SKIPPED, blocked)
        if not all(steps[name].state in STEP_GOOD for name in step.needs):
            return self._because(waiting, f"waits for {', '.join(sorted(step.needs))}")
        inputs = input_digests(step, steps)
        key = step_key(step, inputs)
        if step.deterministic and not record.job.settings.force_rerun:
            entry = self._store.find(CacheEntry, key)
            if entry is not None and all(map(self._files.has_artifact, entry.outputs.values())):
                return self._reuse(record, waiting, entry)
        full = self._why_not_yet(record, step)
        if full is not None:
            return self._because(waiting, full)
        return self._claim(record, step, waiting, key)

    def _why_not_yet(self, record: JobRecord, step: Step) -> str | None:
        """A step that waits for memory is not overtaken by smaller ones behind it, or it might wait for ever;
        unless endpoints hold what it needs, and no step's end will help."""
        if self._held_for is not None:
            return f"waits for its turn on compute '{step.compute}': {self._held_for} is ahead"
        full = self._computes.why_full(step.compute, step.memory_bytes)
        if full is None or not self._computes.has_free_slot(step.compute):
            return full
        if self._computes.may_ever_fit(step.compute, step.memory_bytes):
            self._held_for = f"{record.key}/{step.name}"
            return full
        return f"{full}; endpoints will not end by themselves: tuneloop deployments delete"

    def _reuse(self, record: JobRecord, waiting: StepRecord, entry: CacheEntry) -> StepRecord:
        now = self._clock.now()
        with self._store.transaction():
            self._start_job(record)
            return self._move_step(
                waiting,
                StepState.REUSED,
                cache_key=entry.cache_key,
                reused_from=entry.attempt,
                outputs=entry.outputs,
                metrics=entry.metrics,
                warnings=entry.warnings,
                reason=f"same kind, parameters and inputs as {entry.attempt}",
                started_at=now,
                finished_at=now,
            )

    def _claim(self, record: JobRecord, step: Step, waiting: StepRecord, key: str) -> StepRecord:
        """Write the claim; the same tick or a later one starts the process (`_observe`)."""
        with self._store.transaction():
            # Asked again inside: of two reconcilers that both saw a free slot, one waits.
            full = self._computes.why_full(step.compute, step.memory_bytes)
            if full is not None:
                return self._because(waiting, full)
            self._start_job(record)
            claimed = self._move_step(
                waiting,
                StepState.RUNNING,
                cache_key=key,
                reason=None,
                started_at=self._clock.now(),
                attempts=waiting.attempts + 1,
            )
            self._new_attempt(claimed, step.compute, step.memory_bytes)
        return self._observe(record, claimed, is_ending=False)

    def _new_attempt(self, step: StepRecord, compute: str, memory_bytes: int) -> AttemptRecord:
        number = step.attempts
        attempt = AttemptRecord(
            created_at=self._clock.now(),
            job=step.job,
            step=step.step,
            number=number,
            compute=compute,
            memory_bytes=memory_bytes,
            folder=f"jobs/{step.job}/{step.step}/{number}",
        )
        self._note(step.job, "attempt", step=step.step, number=number)
        return self._store.insert(attempt)

    # ------------------------------------------------------------ a step that runs

    def _observe(self, record: JobRecord, step: StepRecord, *, is_ending: bool) -> StepRecord:
        """What became of the step's attempt. Nothing is started afresh for a job that is ending."""
        attempt = self._latest(step)
        if attempt is None or attempt.state in ATTEMPT_ENDED:
            return step
        owner, folder = self._owner(attempt), self._files.folder(attempt.folder)
        status = self._executor.status(owner, folder)
        # Read after the look at the process: what has ended by then has left its result by then.
        result = self._files.read_result(folder)
        if result is not None and not is_lost(result):
            return self._finish_attempt(record, step, attempt, result)
        if status == "absent" and not is_ending:
            return self._start(record, step, attempt, folder)
        if status == "running" and attempt.state is AttemptState.CLAIMED:
            self._move_attempt(attempt, AttemptState.RUNNING, process=self._executor.identity(folder))
        elif status == "ended" and not is_ending:
            return self._lose(record, step, attempt, folder, result)
        return step

    def _start(self, record: JobRecord, step: StepRecord, attempt: AttemptRecord, folder: Path) -> StepRecord:
        step_file = self._step_file(record, attempt)
        self._files.write_json(folder / "step.json", step_file.model_dump_json(indent=1, exclude_none=True))
        try:
            self._executor.ensure(self._owner(attempt), folder, MODULE, record.job.environment)
        except ValueError as impossible:
            # What can never be a process (a NUL in a variable, say) gives its slot back.
            return self._refuse(step, attempt, impossible)
        return step

    def _refuse(self, step: StepRecord, attempt: AttemptRecord, why: Exception) -> StepRecord:
        error = ErrorInfo(
            code="step_failed",
            message=f"The process of {attempt.key} cannot be started: {why}.",
            next="Mend the environment that the job was submitted with, and run it again.",
        )
        now = self._clock.now()
        with self._store.transaction():
            self._move_attempt(attempt, AttemptState.FAILED, error=error, finished_at=now)
            return self._move_step(step, StepState.FAILED, error=error, reason=error.message, finished_at=now)

    def _step_file(self, record: JobRecord, attempt: AttemptRecord) -> StepFile:
        step = record.job.step(attempt.step)
        steps = {found.step: found for found in self._store.list(StepRecord, parent=record.key)}
        digests = input_digests(step, steps)
        here = self._store.find(Compute, LOCAL)
        previous = [
            str(self._files.folder(earlier.folder))
            for earlier in reversed(self._attempts(attempt.parent))
            if earlier.number < attempt.number
        ]
        return StepFile(
            attempt=attempt.key,
            attempt_id=self._owner(attempt),
            kind=step.kind,
            parameters=step.parameters,
            inputs={
                name: StepFileInput(
                    path=str(self._files.artifact_path(digest)),
                    digest=digest,
                    name=getattr(step.inputs[name], "name", None),
                )
                for name, digest in digests.items()
            },
            outputs=step.outputs,
            previous_attempts=tuple(previous),
            cache_folder=str(self._files.folder("cache")),
            memory_bytes=here.memory_bytes if here is not None else None,
        )

    def _finish_attempt(
        self, record: JobRecord, step: StepRecord, attempt: AttemptRecord, result: ResultFile
    ) -> StepRecord:
        if result.status == "failed":
            return self._fail(step, attempt, result)
        folder = self._files.folder(attempt.folder)
        for name, output in result.outputs.items():
            self._files.adopt(folder / "outputs" / name, output.digest)
        outputs = {name: output.digest for name, output in result.outputs.items()}
        with self._store.transaction():
            for name in result.outputs:
                self._record_artifact(record, attempt, name, result)
            self._move_attempt(
                attempt,
                AttemptState.SUCCEEDED,
                finished_at=result.finished_at,
                peak_memory_bytes=result.peak_memory_bytes,
                process=attempt.process or self._executor.identity(folder),
            )
            done = self._move_step(
                step,
                StepState.SUCCEEDED,
                outputs=outputs,
                metrics=result.metrics,
                warnings=result.warnings,
                finished_at=result.finished_at,
            )
            if result.is_repeatable:
                self._remember(done, attempt)
        return done

    def _record_artifact(
        self, record: JobRecord, attempt: AttemptRecord, name: str, result: ResultFile
    ) -> None:
        output = result.outputs[name]
        if self._store.find(Artifact, output.digest) is not None:
            return
        is_base = output.type == "model_folder" and record.job.step(attempt.step).kind == "model_import"
        self._store.insert(
            Artifact(
                created_at=self._clock.now(),
                digest=output.digest,
                type=output.type,
                size_bytes=output.size_bytes,
                producer=attempt.key,
                name=record.job.base_model if is_base else name,
            )
        )

    def _remember(self, step: StepRecord, attempt: AttemptRecord) -> None:
        """The newest attempt with this key is what the next job reuses."""
        assert step.cache_key is not None
        entry = CacheEntry(
            created_at=self._clock.now(),
            cache_key=step.cache_key,
            attempt=attempt.key,
            outputs=step.outputs,
            metrics=step.metrics,
            warnings=step.warnings,
        )
        known = self._store.find(CacheEntry, entry.key)
        if known is None:
            self._store.insert(entry)
        else:
            self._store.update(entry.model_copy(update={"version": known.version}))

    def _fail(self, step: StepRecord, attempt: AttemptRecord, result: ResultFile) -> StepRecord:
        with self._store.transaction():
            self._move_attempt(
                attempt,
                AttemptState.FAILED,
                error=result.error,
                finished_at=result.finished_at,
                peak_memory_bytes=result.peak_memory_bytes,
            )
            return self._move_step(
                step,
                StepState.FAILED,
                error=result.error,
                warnings=result.warnings,
                reason=result.error.message if result.error else None,
                finished_at=result.finished_at,
            )

    def _lose(
        self,
        record: JobRecord,
        step: StepRecord,
        attempt: AttemptRecord,
        folder: Path,
        result: ResultFile | None,
    ) -> StepRecord:
        """The process is gone and left no result, or the word that one of its own is gone: try again, unless
        that was tried often enough. An interruption that was asked for (`tuneloop down`) does not count."""
        owner = self._owner(attempt)
        self._executor.stop(owner, folder, kill=True)
        error = result.error if result else vanished(attempt, self._executor.last_lines(folder))
        with self._store.transaction():
            self._move_attempt(attempt, AttemptState.LOST, error=error, finished_at=self._clock.now())
            lost = [
                earlier
                for earlier in self._attempts(step.key)
                if earlier.number > step.counted_from and earlier.state is AttemptState.LOST and earlier.error
            ]
            if len(lost) >= self._limits.max_attempts:
                return self._move_step(
                    step,
                    StepState.FAILED,
                    error=error,
                    reason=error.message if error else None,
                    finished_at=self._clock.now(),
                )
            again = self._store.update(step.model_copy(update={"attempts": step.attempts + 1}))
            self._new_attempt(again, attempt.compute, attempt.memory_bytes)
        return self._observe(record, again, is_ending=False)

    # ------------------------------------------------------------ writing

    def _latest(self, step: StepRecord) -> AttemptRecord | None:
        return self._store.find(AttemptRecord, f"{step.key}/{step.attempts}") if step.attempts else None

    def _attempts(self, step_key: str) -> list[AttemptRecord]:
        found = self._store.list(AttemptRecord, parent=step_key)
        return sorted(found, key=lambda attempt: attempt.number)

    def _owner(self, attempt: AttemptRecord) -> str:
        return f"{self._home_id}/{attempt.key}"

    def _because(self, step: StepRecord, reason: str) -> StepRecord:
        if step.reason == reason:
            return step
        return self._store.update(step.model_copy(update={"reason": reason}))

    def _start_job(self, record: JobRecord) -> None:
        current = self._store.get(JobRecord, record.key)
        if current.state is JobState.QUEUED:
            self._move_job(current, JobState.RUNNING, started_at=current.started_at or self._clock.now())
        elif current.state is not JobState.RUNNING:
            raise Stale(f"Job {record.key} became {current.state} meanwhile.")

    def _end_step(self, step: StepRecord, state: StepState, reason: str) -> StepRecord:
        return self._move_step(step, state, reason=reason, finished_at=self._clock.now())

    def _move_step(self, step: StepRecord, state: StepState, **changes: object) -> StepRecord:
        check_move(STEP_MOVES, f"Step {step.key}", step.state, state)
        with self._store.transaction():
            self._note(step.job, "step", step=step.step, state=str(state))
            return self._store.update(step.model_copy(update={"state": state, **changes}))

    def _move_attempt(self, attempt: AttemptRecord, state: AttemptState, **changes: object) -> None:
        check_move(ATTEMPT_MOVES, f"Attempt {attempt.key}", attempt.state, state)
        self._store.update(attempt.model_copy(update={"state": state, **changes}))

    def _move_job(self, record: JobRecord, state: JobState, **changes: object) -> None:
        check_move(JOB_MOVES, f"Job {record.key}", record.state, state)
        ended = {"finished_at": self._clock.now()} if state in _ENDED else {}
        with self._store.transaction():
            self._store.update(record.model_copy(update={"state": state, **ended, **changes}))
            self._note(record.key, "state", state=str(state))

    def _note(self, job: str, what: str, **data: str | int) -> None:
        self._store.append(Event(at=self._clock.now(), subject=f"job/{job}", what=what, data=dict(data)))


_ENDED = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELED})


def _of_step(step: str, error: ErrorInfo | None) -> ErrorInfo | None:
    return error and error.model_copy(update={"message": f"step {step}: {error.message}"})
