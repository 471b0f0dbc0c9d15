"""Computes: places with capacity, who holds it, and who waits for it. In this version there is one machine,
`local`; a cluster is a name with an Azure size that is mapped onto it. So there is one account of slots and
memory, and one line, whatever name a recipe writes.

A step claims one slot and the memory that it is expected to take; a replica claims memory. What is claimed
never exceeds what the compute gives, but for one rule: a step that is alone may start whatever it is expected
to take, since the estimate may be wrong and nobody else can be harmed.

Memory that a wanted replica still lacks is kept free for it: steps end by themselves, endpoints do not, so a
deployment that was accepted gets its place as soon as running steps leave it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from tuneloop.core import sizes
from tuneloop.core.errors import AlreadyExists, InvalidState, NoRoom, UsageError
from tuneloop.core.names import check_name
from tuneloop.core.ports import Clock, Store
from tuneloop.core.states import (
    REPLICA_ENDED,
    STEP_GOOD,
    AttemptState,
    DeploymentState,
    JobState,
    ReplicaState,
    StepState,
)
from tuneloop.core.types import (
    PRIORITIES,
    AttemptRecord,
    Compute,
    DeploymentRecord,
    Gpu,
    Job,
    JobRecord,
    ReplicaRecord,
    Step,
    StepRecord,
)

ACTIVE = (AttemptState.CLAIMED, AttemptState.RUNNING)
WAITING = (JobState.QUEUED, JobState.RUNNING)
NOT_ENDED = (*WAITING, JobState.CANCELING)
LOCAL = "local"
"""This machine: where everything runs, replicas too."""
MOST_INSTANCES = 1000


@dataclass(frozen=True)
class Waiting:
    """A step whose inputs are there and that waits for its compute."""

    job: str
    step: str
    compute: str
    priority: str
    position: int
    """1 is next."""
    reason: str | None
    expected_seconds: float | None = None
    """Until it is expected to start; None where nothing is known of what is ahead."""


class Computes:
    """What there is to run on, what runs there now, and what waits."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def declare_local(
        self,
        *,
        slots: int,
        cores: int,
        memory_bytes: int,
        devices: Sequence[Gpu] = (),
        limited_by: Sequence[str] = (),
    ) -> Compute:
        """Record this machine, or what has changed about it since the last start. `memory_bytes` is what may
        be claimed."""
        facts: dict[str, object] = {
            "slots": slots,
            "cores": cores,
            "memory_bytes": memory_bytes,
            "gpus": len(devices),
            "devices": tuple(devices),
            "limited_by": tuple(limited_by),
        }
        found = self._store.find(Compute, LOCAL)
        if found is None:
            made = Compute(created_at=self._clock.now(), name=LOCAL, cores=cores, memory_bytes=memory_bytes)
            return self._store.insert(made.model_copy(update=facts))
        changed = found.model_copy(update=facts)
        return found if changed == found else self._store.update(changed)

    def create(self, name: str, *, size: str, max_instances: int = 1) -> Compute:
        """A named cluster of an Azure size, mapped onto this machine.

        Raises `InvalidName`, `NotFound` for a size that is not in the table, `UsageError` for one that the
        document denies or for nodes below 1, `AlreadyExists`.
        """
        check_name(name, "compute")
        found = sizes.get(size)
        denied = sizes.why_not_allowed(found.name, None)
        if denied is not None:
            raise UsageError(denied)
        _check_instances(max_instances)
        with self._store.transaction():
            existing = self._find(name)
            if existing is not None:
                raise AlreadyExists(
                    f"There is a compute '{existing.name}' already: {existing.size or 'this machine'}.",
                    next_move=f"Use it, or delete it first: tuneloop compute delete {existing.name}",
                )
            made = Compute(
                created_at=self._clock.now(),
                name=name,
                type="cluster",
                cores=0,
                memory_bytes=0,
                size=found.name,
                max_instances=max_instances,
            )
            return self._mapped(self._store.insert(made))

    def resize(self, name: str, *, max_instances: int) -> Compute:
        """Change the nodes that a plan may count on. Raises `NotFound`, `UsageError`, and `InvalidState` for
        this machine."""
        _check_instances(max_instances)
        with self._store.transaction():
            found = self._record(name)
            if found.type == "local":
                raise InvalidState(f"'{found.name}' is this machine: it is one node.")
            if found.max_instances != max_instances:
                found = self._store.update(found.model_copy(update={"max_instances": max_instances}))
            return self._mapped(found)

    def delete(self, name: str) -> None:
        """Raises `NotFound`, and `InvalidState` for this machine or a cluster that a job still names."""
        with self._store.transaction():
            found = self._record(name)
            if found.type == "local":
                raise InvalidState(f"'{found.name}' is this machine: it cannot be deleted.")
            users = [
                record.key
                for record in self._store.list(JobRecord, states=NOT_ENDED)
                if any(_is_same(step.compute, name) for step in record.job.steps)
            ]
            if users:
                raise InvalidState(
                    f"Compute '{found.name}' is used by {len(users)} job(s) that have not ended: "
                    f"{', '.join(users[:3])}{' ...' if len(users) > 3 else ''}.",
                    next_move=f"Wait for them, or cancel them first: tuneloop jobs cancel {users[0]}",
                )
            self._store.delete(found)

    def get(self, name: str) -> Compute:
        """With this machine's capacity, whatever size a cluster is called after. Names match whatever their
        case. Raises `NotFound`."""
        return self._mapped(self._record(name))

    def find(self, name: str) -> Compute | None:
        """Like `get`, but for what may be absent."""
        found = self._find(name)
        return None if found is None else self._mapped(found)

    def _find(self, name: str) -> Compute | None:
        found = self._store.find(Compute, name)
        if found is not None:
            return found
        return next((one for one in self._store.list(Compute) if _is_same(one.name, name)), None)

    def _record(self, name: str) -> Compute:
        found = self._find(name)
        # The store has the words for what is not there.
        return self._store.get(Compute, name) if found is None else found

    def list(self) -> Sequence[Compute]:
        return [self._mapped(record) for record in self._store.list(Compute)]

    def _mapped(self, record: Compute) -> Compute:
        machine = record if record.type == "local" else self._store.find(Compute, LOCAL)
        if machine is None or machine is record:
            return record
        shared = machine.model_dump(include={"slots", "cores", "memory_bytes", "gpus"})
        return record.model_copy(
            update={**shared, "devices": machine.devices, "limited_by": machine.limited_by}
        )

    def active(self) -> Sequence[AttemptRecord]:
        """The attempts that hold a slot, oldest first: of this machine, whatever its name was."""
        return self._store.list(AttemptRecord, states=ACTIVE)

    # ------------------------------------------------------------ claims

    def has_free_slot(self, name: str) -> bool:
        return len(self.active()) < self.get(name).slots

    def why_full(self, name: str, memory_bytes: int = 0) -> str | None:
        """None when a step that is expected to take so much may start; otherwise why not, in a sentence."""
        compute, holders = self.get(name), self.active()
        if len(holders) >= compute.slots:
            return _no_slot(compute, holders)
        serving = self._kept_for_serving()
        held = serving + sum(holder.memory_bytes for holder in holders)
        is_alone = not holders and serving == 0
        if is_alone or held + memory_bytes <= compute.memory_bytes:
            return None
        return _no_memory(compute, memory_bytes, held, [holder.parent for holder in holders], serving)

    def may_ever_fit(self, name: str, memory_bytes: int) -> bool:
        """Whether a step would start once every other step has ended; endpoints stay."""
        serving = self._kept_for_serving()
        return serving == 0 or serving + memory_bytes <= self.get(name).memory_bytes

    def why_no_replica(self, memory_bytes: int) -> str | None:
        """None when a replica that is expected to take so much may start; otherwise why not."""
        compute = self._store.find(Compute, LOCAL)
        if compute is None:
            return None
        holders, replicas = self.active(), self._replicas()
        serving = sum(replica.memory_bytes for replica in replicas)
        held = serving + sum(holder.memory_bytes for holder in holders)
        is_alone = not holders and not replicas
        if is_alone or held + memory_bytes <= compute.memory_bytes:
            return None
        return _no_memory(compute, memory_bytes, held, [holder.parent for holder in holders], serving)

    def require_room(self, replicas: int, memory_bytes: int, what: str) -> None:
        """Raises `NoRoom` when the endpoints together would want more than this machine gives."""
        compute = self._store.find(Compute, LOCAL)
        wanted, kept = replicas * memory_bytes, self._kept_for_serving()
        if compute is None or kept + wanted <= compute.memory_bytes:
            return
        plural = "a replica" if replicas == 1 else f"{replicas} replicas"
        raise NoRoom(
            f"{plural} of {what} would take about {_gb(wanted)}; of the {_gb(compute.memory_bytes)} that "
            f"Tuneloop may claim on this machine, endpoints hold {_gb(kept)}.",
            next_move="Ask for fewer replicas, take a deployment down (tuneloop deployments delete), or let "
            "Tuneloop claim more with the setting memory_gb.",
        )

    def holdings(self) -> dict[str, object]:
        """Of this machine: `slots_used`, `memory_claimed_bytes` (with what is kept for wanted replicas),
        and the `holders`, each with `what` and `memory_bytes`."""
        attempts = self.active()
        holders: list[AttemptRecord | ReplicaRecord] = [*attempts, *self._replicas()]
        return {
            "slots_used": len(attempts),
            "memory_claimed_bytes": sum(one.memory_bytes for one in attempts) + self._kept_for_serving(),
            "holders": [
                {"what": f"{one.kind} {one.key}", "memory_bytes": one.memory_bytes} for one in holders
            ],
        }

    def _replicas(self) -> Sequence[ReplicaRecord]:
        alive = [state for state in ReplicaState if state not in REPLICA_ENDED]
        return self._store.list(ReplicaRecord, states=alive)

    def _kept_for_serving(self) -> int:
        """Bytes that replicas hold, and that wanted ones still lack."""
        held: dict[str, int] = {}
        for replica in self._replicas():
            held[replica.parent] = held.get(replica.parent, 0) + replica.memory_bytes
        for deployment in self._store.list(
            DeploymentRecord, states=[DeploymentState.CREATING, DeploymentState.READY]
        ):
            wanted = deployment.replicas * deployment.memory_bytes
            held[deployment.key] = max(held.get(deployment.key, 0), wanted)
        return sum(held.values())

    # ------------------------------------------------------------ the queue

    def queue(self, name: str | None = None) -> Sequence[Waiting]:
        """What waits, in the order in which it starts, with an estimate from what is known of earlier steps.
        Of a cluster only its own, with their places in the one line; of this machine all."""
        machine = self._store.find(Compute, LOCAL)
        found = [] if machine is None else list(self._queue(machine))
        is_all = name is None or _is_same(name, LOCAL)
        return [one for one in found if is_all or _is_same(one.compute, str(name))]

    def places(self, record: JobRecord) -> dict[str, Waiting]:
        """Where the steps of one job stand that wait for their compute, by step."""
        steps = {step.step: step for step in self._store.list(StepRecord, parent=record.key)}
        waits = any(is_waiting(record.job, step, steps) for step in record.job.steps)
        if record.state not in WAITING or not waits:
            return {}
        return {waiting.step: waiting for waiting in self.queue() if waiting.job == record.key}

    def _queue(self, compute: Compute) -> Iterable[Waiting]:
        now, typical, since = self._clock.now(), _Durations(self._store), 0.0
        held = [
            (_or_unknown(typical.remaining(holder, now)), holder.memory_bytes) for holder in self.active()
        ]
        for position, (record, step, reason) in enumerate(self._in_line(), start=1):
            starts = _UNKNOWN
            if self.may_ever_fit(compute.name, step.memory_bytes):
                serving = self._kept_for_serving()
                starts = since = _earliest(compute, serving, held, since, step.memory_bytes)
                held.append((starts + _or_unknown(typical.of(record.job, step.name)), step.memory_bytes))
            yield Waiting(
                job=record.key,
                step=step.name,
                compute=step.compute,
                priority=record.priority,
                position=position,
                reason=reason,
                expected_seconds=None if starts == _UNKNOWN else starts,
            )

    def _in_line(self) -> Iterable[tuple[JobRecord, Step, str | None]]:
        for record in in_order(self._store.list(JobRecord, states=WAITING)):
            steps = {step.step: step for step in self._store.list(StepRecord, parent=record.key)}
            for step in record.job.steps:
                if is_waiting(record.job, step, steps):
                    yield record, step, steps[step.name].reason


_UNKNOWN = float("inf")


class _Durations:
    """How long steps take: the median of the last few that ran, of the same base model where any did."""

    def __init__(self, store: Store, look_back: int = 200) -> None:
        self._store = store
        jobs = {record.key: record.job.base_model for record in store.list(JobRecord)}
        self._seconds: dict[tuple[str | None, str], list[float]] = {}
        ended = store.list(StepRecord, states=[StepState.SUCCEEDED], newest_first=True, limit=look_back)
        for step in ended:
            if step.started_at is not None and step.finished_at is not None:
                seconds = max(0.0, (step.finished_at - step.started_at).total_seconds())
                for model in (jobs.get(step.job), None):
                    self._seconds.setdefault((model, step.step), []).append(seconds)

    def of(self, job: Job, step: str) -> float | None:
        known = self._seconds.get((job.base_model, step)) or self._seconds.get((None, step)) or []
        return sorted(known[:5])[len(known[:5]) // 2] if known else None

    def remaining(self, attempt: AttemptRecord, now: datetime) -> float | None:
        record = self._store.find(JobRecord, attempt.job)
        typical = None if record is None else self.of(record.job, attempt.step)
        if typical is None:
            return None
        return max(0.0, typical - (now - attempt.created_at).total_seconds())


def _earliest(
    compute: Compute, serving: int, held: Sequence[tuple[float, int]], since: float, memory_bytes: int
) -> float:
    """Seconds from now, `since` at the earliest, until a step of that size finds a slot and memory, when what
    is `held` (end, bytes) ends as expected."""
    at = since
    while True:
        alive = [(end, size) for end, size in held if end > at]
        taken = serving + sum(size for _, size in alive)
        is_alone = not alive and serving == 0
        has_room = is_alone or taken + memory_bytes <= compute.memory_bytes
        if len(alive) < compute.slots and has_room:
            return at
        if not alive:
            return _UNKNOWN
        at = min(end for end, _ in alive)


def _or_unknown(seconds: float | None) -> float:
    return _UNKNOWN if seconds is None else seconds


def in_order(records: Iterable[JobRecord]) -> list[JobRecord]:
    """Higher priority first; among equals, who came first."""
    return sorted(records, key=lambda record: PRIORITIES.index(record.priority))


def is_waiting(job: Job, step: Step, steps: dict[str, StepRecord]) -> bool:
    """Whether `step` could start but for its compute. (What the cache holds is reused within a round.)"""
    has_failed = any(other.state is StepState.FAILED for other in steps.values())
    return (
        steps[step.name].state is StepState.PENDING
        and all(steps[name].state in STEP_GOOD for name in step.needs)
        and (job.settings.continue_on_step_failure or not has_failed)
    )


def _is_same(name: str, other: str) -> bool:
    return name.lower() == other.lower()


def _check_instances(max_instances: int) -> None:
    if not 1 <= max_instances <= MOST_INSTANCES:
        raise UsageError(f"max_instances is {max_instances}; expected 1 to {MOST_INSTANCES}.")


def _no_slot(compute: Compute, holders: Sequence[AttemptRecord]) -> str:
    plural = "slot is" if compute.slots == 1 else f"{compute.slots} slots are"
    return f"waits for compute '{compute.name}': its {plural} used by {_some(holders)}"


def _no_memory(compute: Compute, wanted: int, held: int, holders: Sequence[str], serving: int) -> str:
    users = list(holders[:3]) + ([f"endpoints ({_gb(serving)})"] if serving else [])
    return (
        f"waits for memory of compute '{compute.name}': expected to take {_gb(wanted)}, and "
        f"{_gb(held)} of {_gb(compute.memory_bytes)} are claimed by {', '.join(users)}"
    )


def _some(holders: Sequence[AttemptRecord]) -> str:
    return ", ".join(holder.parent for holder in holders[:3])


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
