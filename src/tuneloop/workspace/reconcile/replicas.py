"""Endpoints forward: as many replicas as a deployment wants, a route table for the router, and nothing left
behind of what was deleted."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from tuneloop.core.errors import NotFound, Stale
from tuneloop.core.ports import Clock, Executor, Files, Store
from tuneloop.core.states import (
    DEPLOYMENT_MOVES,
    REPLICA_ENDED,
    REPLICA_MOVES,
    DeploymentState,
    EndpointState,
    ReplicaState,
    check_move,
)
from tuneloop.core.types import (
    DeploymentRecord,
    EndpointRecord,
    ErrorInfo,
    Event,
    ReplicaFile,
    ReplicaRecord,
    RouteDeployment,
    RouteEndpoint,
    RouteReplica,
    RouteTable,
)
from tuneloop.workspace.compute import Computes
from tuneloop.workspace.reconcile.limits import Limits, backoff_seconds
from tuneloop.workspace.reconcile.reports import read_error, read_ready
from tuneloop.workspace.reconcile.stopping import Stopper

log = logging.getLogger(__name__)

MODULE = "tuneloop.serving.replica"
ROUTES = "services/router"
MIRRORS = "services/router/mirrors"
VANISHED, TOO_SLOW = "replica_vanished", "replica_too_slow"
"""Of a replica that may do better at the next try; any other error is a refusal to serve."""
OPEN = tuple(state for state in ReplicaState if state not in REPLICA_ENDED)
WANTED = (ReplicaState.CLAIMED, ReplicaState.STARTING, ReplicaState.READY)


class Serving:
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
        self._stopper = Stopper(executor, clock, limits.stop_grace_seconds)
        self._routes: str | None = None
        self._crashed: dict[str, float] = {}
        self._loading: dict[str, float] = {}
        """Replicas that have not answered yet, and since when this server has waited for them."""

    def tick(self) -> None:
        for deployment in self._store.list(DeploymentRecord):
            try:
                self._deployment(deployment)
            except (Stale, NotFound) as lost:
                log.info("deployment %s: somebody else moved first: %s", deployment.key, lost)
            except Exception:
                log.exception("deployment %s: this round failed", deployment.key)
        for endpoint in self._store.list(EndpointRecord, states=[EndpointState.DELETING]):
            if not self._store.list(DeploymentRecord, parent=endpoint.key):
                self._store.delete(endpoint)
                self._files.remove(self._files.folder(f"replicas/{endpoint.name}"))
                self._files.remove(self._files.folder(f"{MIRRORS}/{endpoint.name}"))
                self._note(endpoint.name, "deleted")
        self._write_routes()

    def is_busy(self) -> bool:
        moving = [DeploymentState.CREATING, DeploymentState.DELETING]
        return bool(
            self._store.list(DeploymentRecord, states=moving, limit=1)
            or self._store.list(EndpointRecord, states=[EndpointState.DELETING], limit=1)
        )

    def stop_all(self, *, kill: bool = False) -> bool:
        """Push every replica's process towards its end; True when none is left. Deployments stay wanted."""
        done = True
        for replica in self._store.list(ReplicaRecord, states=OPEN):
            if kill:
                self._executor.stop(self._owner(replica), self._folder(replica), kill=True)
            elif self._stopper.is_stopped(self._owner(replica), self._folder(replica)):
                self._end(replica)
            else:
                done = False
        return done

    # ------------------------------------------------------------ one deployment

    def _deployment(self, deployment: DeploymentRecord) -> None:
        replicas = self._store.list(ReplicaRecord, parent=deployment.key)
        if deployment.state is DeploymentState.DELETING:
            self._delete(deployment, replicas)
            return
        running = [self._observe(replica) for replica in replicas if replica.state not in REPLICA_ENDED]
        deployment = self._count_crashes(deployment, running)
        alive = [replica for replica in running if replica.state in WANTED]
        if deployment.state is DeploymentState.FAILED:
            self._stop_surplus(alive, 0)
            return
        self._stop_surplus(alive, deployment.replicas)
        deployment = self._move(deployment, self._state_of(deployment, alive))
        if len(alive) < deployment.replicas and self._may_start(deployment):
            self._claim(deployment, replicas)

    def _state_of(self, deployment: DeploymentRecord, alive: list[ReplicaRecord]) -> DeploymentState:
        ready = [replica for replica in alive if replica.state is ReplicaState.READY]
        return DeploymentState.READY if len(ready) >= deployment.replicas else DeploymentState.CREATING

    def _count_crashes(self, deployment: DeploymentRecord, seen: list[ReplicaRecord]) -> DeploymentRecord:
        """A replica that answered clears the count; one that refused to serve ends the deployment at once."""
        if any(replica.state is ReplicaState.READY for replica in seen) and deployment.crashes:
            deployment = self._store.update(deployment.model_copy(update={"crashes": 0, "error": None}))
        for replica in seen:
            if replica.state is ReplicaState.FAILED:
                deployment = self._after_crash(deployment, replica)
        return deployment

    def _after_crash(self, deployment: DeploymentRecord, replica: ReplicaRecord) -> DeploymentRecord:
        self._crashed[deployment.key] = self._clock.monotonic()
        crashes = deployment.crashes + (replica.address is None)
        has_refused = replica.error is not None and replica.error.code not in (VANISHED, TOO_SLOW)
        changes: dict[str, object] = {"crashes": crashes, "error": replica.error}
        if has_refused or crashes >= self._limits.max_crashes:
            changes["state"] = DeploymentState.FAILED
            self._note(deployment.endpoint, "deployment failed", deployment=deployment.name)
        return self._store.update(deployment.model_copy(update=changes))

    def _may_start(self, deployment: DeploymentRecord) -> bool:
        crashed = self._crashed.get(deployment.key)
        if crashed is None:
            return True
        return self._clock.monotonic() - crashed >= backoff_seconds(deployment.crashes)

    def _claim(self, deployment: DeploymentRecord, replicas: Sequence[ReplicaRecord]) -> None:
        number = max((replica.number for replica in replicas), default=0) + 1
        # The deployment is written too, so that of two reconcilers only one adds a replica.
        with self._store.transaction():
            full = self._computes.why_no_replica(deployment.memory_bytes)
            if full is not None:
                self._because(deployment, full)
                return
            self._store.update(deployment.model_copy(update={"reason": None}))
            claimed = self._store.insert(
                ReplicaRecord(
                    created_at=self._clock.now(),
                    endpoint=deployment.endpoint,
                    deployment=deployment.name,
                    number=number,
                    folder=f"replicas/{deployment.endpoint}/{deployment.name}/{number}",
                    memory_bytes=deployment.memory_bytes,
                )
            )
        self._forget(replicas)
        self._observe(claimed)

    def _forget(self, replicas: Sequence[ReplicaRecord], keep: int = 3) -> None:
        """Of replicas that ended, the last few stay for their logs."""
        ended = [replica for replica in replicas if replica.state in REPLICA_ENDED]
        for replica in ended[:-keep]:
            self._remove(replica)

    def _delete(self, deployment: DeploymentRecord, replicas: Sequence[ReplicaRecord]) -> None:
        stopped = [self._stop(replica) for replica in replicas if replica.state not in REPLICA_ENDED]
        if not all(stopped):
            return
        for replica in self._store.list(ReplicaRecord, parent=deployment.key):
            self._remove(replica)
        self._store.delete(deployment)
        self._files.remove(self._files.folder(f"replicas/{deployment.key}"))
        self._files.remove(self._files.folder(f"{MIRRORS}/{deployment.key}"))
        self._note(deployment.endpoint, "deployment deleted", deployment=deployment.name)

    def _stop_surplus(self, alive: list[ReplicaRecord], wanted: int) -> None:
        for replica in sorted(alive, key=lambda one: one.number)[wanted:]:
            self._stop(replica)

    # ------------------------------------------------------------ one replica

    def _observe(self, replica: ReplicaRecord) -> ReplicaRecord:
        if replica.state is ReplicaState.STOPPING:
            self._stop(replica)
            return self._store.get(ReplicaRecord, replica.key)
        owner, folder = self._owner(replica), self._folder(replica)
        status = self._executor.status(owner, folder)
        if status == "absent":
            self._start(replica, folder)
            return replica
        if status == "ended":
            return self._lost(replica, folder)
        if replica.state is ReplicaState.READY:
            return replica
        moved = self._progress(replica, folder) if status == "running" else replica
        return moved if moved.state is ReplicaState.READY else self._within_patience(moved, folder)

    def _start(self, replica: ReplicaRecord, folder: Path) -> None:
        deployment = self._store.get(DeploymentRecord, replica.parent)
        model_path = self._files.artifact_path(deployment.artifact)
        # Written before by a server that died: it stands, unless the home was moved since.
        if not _names(folder / "replica.json", model_path):
            spec = ReplicaFile(
                replica=replica.key,
                owner=self._owner(replica),
                model_path=str(model_path),
                model=deployment.model,
                template_digest=deployment.template_digest,
                token=secrets.token_urlsafe(32),
                request_timeout_seconds=deployment.request_timeout_seconds,
            )
            self._files.write_json(folder / "replica.json", spec.model_dump_json(), private=True)
        environment = {**deployment.environment, "HF_HUB_OFFLINE": "1"}
        self._executor.ensure(self._owner(replica), folder, MODULE, environment)

    def _progress(self, replica: ReplicaRecord, folder: Path) -> ReplicaRecord:
        identity = self._executor.identity(folder)
        ready = read_ready(folder)
        if ready is not None:
            self._loading.pop(replica.key, None)
            self._note(replica.endpoint, "replica ready", replica=replica.key)
            return self._move_replica(replica, ReplicaState.READY, address=ready.address, process=identity)
        if replica.state is ReplicaState.CLAIMED:
            return self._move_replica(replica, ReplicaState.STARTING, process=identity)
        return replica

    def _within_patience(self, replica: ReplicaRecord, folder: Path) -> ReplicaRecord:
        """As it is, unless its liveness probe gives up on it."""
        probe = self._store.get(DeploymentRecord, replica.parent).liveness
        began = self._loading.setdefault(replica.key, self._clock.monotonic())
        if probe is None or self._clock.monotonic() - began < probe.patience_seconds:
            return replica
        self._executor.stop(self._owner(replica), folder, kill=True)
        error = ErrorInfo(
            code=TOO_SLOW,
            message=(
                f"Replica {replica.key} did not answer within {probe.patience_seconds:g} s, which is what "
                f"its liveness probe allows: initial_delay {probe.initial_delay_seconds:g} s and "
                f"{probe.failure_threshold} failures, one every {probe.period_seconds:g} s."
            ),
            next="Give the model longer: raise the probe's initial_delay.",
            details={"last_lines": "\n".join(self._executor.last_lines(folder))},
        )
        self._loading.pop(replica.key, None)
        self._note(replica.endpoint, "replica too slow", replica=replica.key)
        return self._move_replica(replica, ReplicaState.FAILED, error=error)

    def _lost(self, replica: ReplicaRecord, folder: Path) -> ReplicaRecord:
        self._executor.stop(self._owner(replica), folder, kill=True)
        self._loading.pop(replica.key, None)
        error = read_error(folder) or ErrorInfo(
            code=VANISHED,
            message=f"The process of replica {replica.key} ended by itself.",
            next=f"Look at: tuneloop deployments logs {replica.deployment} --endpoint {replica.endpoint}",
            details={"last_lines": "\n".join(self._executor.last_lines(folder))},
        )
        self._note(replica.endpoint, "replica lost", replica=replica.key)
        return self._move_replica(replica, ReplicaState.FAILED, error=error)

    def _stop(self, replica: ReplicaRecord) -> bool:
        """First out of the route table (by its state), then its process; True when it has gone."""
        if replica.state is not ReplicaState.STOPPING:
            replica = self._move_replica(replica, ReplicaState.STOPPING)
            self._write_routes()
        if not self._stopper.is_stopped(self._owner(replica), self._folder(replica)):
            return False
        self._end(replica)
        return True

    def _end(self, replica: ReplicaRecord) -> None:
        if replica.state is not ReplicaState.STOPPING:
            replica = self._move_replica(replica, ReplicaState.STOPPING)
        self._move_replica(replica, ReplicaState.STOPPED)

    def _remove(self, replica: ReplicaRecord) -> None:
        self._loading.pop(replica.key, None)
        self._store.delete(replica)
        self._files.remove(self._folder(replica))

    # ------------------------------------------------------------ routes

    def _write_routes(self) -> None:
        # Without what is at its default: a router that an older version left running knows no newer fields.
        text = self.route_table().model_dump_json(exclude_defaults=True)
        if text != self._routes:
            self._files.write_json(self._files.folder(ROUTES) / "routes.json", text)
            self._routes = text

    def route_table(self) -> RouteTable:
        ready: dict[str, list[RouteReplica]] = {}
        for replica in self._store.list(ReplicaRecord, states=[ReplicaState.READY]):
            if replica.address is not None:
                route = RouteReplica(
                    id=replica.key,
                    address=replica.address,
                    token_file=str(self._folder(replica) / "replica.json"),
                )
                ready.setdefault(replica.parent, []).append(route)
        deployments: dict[str, dict[str, RouteDeployment]] = {}
        for deployment in self._store.list(DeploymentRecord):
            if deployment.state is not DeploymentState.DELETING:
                deployments.setdefault(deployment.endpoint, {})[deployment.name] = RouteDeployment(
                    model=deployment.model,
                    request_timeout_seconds=deployment.request_timeout_seconds,
                    max_concurrent_requests=deployment.max_concurrent_requests,
                    max_queue_wait_seconds=deployment.max_queue_wait_seconds,
                    replicas=tuple(ready.get(deployment.key, ())),
                )
        return RouteTable(
            endpoints={
                endpoint.name: RouteEndpoint(
                    key_hashes=tuple(endpoint.key_hashes.values()),
                    traffic=endpoint.traffic,
                    mirror=endpoint.mirror,
                    deployments=deployments.get(endpoint.name, {}),
                )
                for endpoint in self._store.list(EndpointRecord, states=[EndpointState.READY])
            }
        )

    # ------------------------------------------------------------ writing

    def _owner(self, replica: ReplicaRecord) -> str:
        return f"{self._home_id}/{replica.key}"

    def _folder(self, replica: ReplicaRecord) -> Path:
        return self._files.folder(replica.folder)

    def _because(self, deployment: DeploymentRecord, reason: str) -> None:
        if deployment.reason != reason:
            self._store.update(deployment.model_copy(update={"reason": reason}))

    def _move(self, deployment: DeploymentRecord, state: DeploymentState) -> DeploymentRecord:
        if deployment.state is state:
            return deployment
        check_move(DEPLOYMENT_MOVES, f"Deployment {deployment.key}", deployment.state, state)
        self._note(deployment.endpoint, "deployment", deployment=deployment.name, state=str(state))
        return self._store.update(deployment.model_copy(update={"state": state}))

    def _move_replica(self, replica: ReplicaRecord, state: ReplicaState, **changes: object) -> ReplicaRecord:
        check_move(REPLICA_MOVES, f"Replica {replica.key}", replica.state, state)
        return self._store.update(replica.model_copy(update={"state": state, **changes}))

    def _note(self, endpoint: str, what: str, **data: str) -> None:
        self._store.append(
            Event(at=self._clock.now(), subject=f"endpoint/{endpoint}", what=what, data=dict(data))
        )


def _names(spec: Path, model_path: Path) -> bool:
    try:
        return ReplicaFile.model_validate_json(spec.read_text(encoding="utf-8")).model_path == str(model_path)
    except (OSError, ValidationError):
        return False
