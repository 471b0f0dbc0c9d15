"""Endpoints and deployments: what is wanted. Starting and stopping replicas is the reconciler's."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tuneloop.core import sizes
from tuneloop.core.errors import AlreadyExists, InvalidState, NotFound, UsageError
from tuneloop.core.keys import endpoint_key, key_hash
from tuneloop.core.names import check_endpoint_name, check_name, did_you_mean
from tuneloop.core.ports import Clock, Store
from tuneloop.core.states import DeploymentState, EndpointState, ModelState
from tuneloop.core.types import (
    DeploymentRecord,
    EndpointRecord,
    Event,
    Probe,
    ReplicaRecord,
    ServiceRecord,
)
from tuneloop.workspace.catalog import Catalog
from tuneloop.workspace.compute import Computes
from tuneloop.workspace.models import Models

SLOTS = ("primary", "secondary")
MAX_REPLICAS = 64
MAX_WAIT_SECONDS = 3600.0
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_OWN_VARIABLES = re.compile(r"TUNELOOP_.*|HF_HUB_OFFLINE|TRANSFORMERS_OFFLINE")
"""What a replica is told by us."""


@dataclass(frozen=True)
class Wishes:
    """How a deployment is to be served, beside its model and the number of its replicas. See
    `DeploymentRecord` for each."""

    description: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    instance_type: str | None = None
    max_concurrent_requests: int | None = None
    max_queue_wait_seconds: float = 0.5
    liveness: Probe | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Raises `UsageError`, and `NotFound` for an unknown instance type."""
        if self.instance_type is not None:
            sizes.get(self.instance_type)
        most = self.max_concurrent_requests
        if most is not None and most < 1:
            raise UsageError(f"max_concurrent_requests is {most}; expected 1 or more.")
        _check_seconds("max_queue_wait_seconds", self.max_queue_wait_seconds, least=0.0)
        if self.liveness is not None:
            _check_seconds("initial_delay_seconds", self.liveness.initial_delay_seconds, least=0.0)
            _check_seconds("period_seconds", self.liveness.period_seconds, least=1.0)
            if self.liveness.failure_threshold < 1:
                raise UsageError(
                    f"failure_threshold is {self.liveness.failure_threshold}; expected 1 or more."
                )
        for name, value in self.environment.items():
            if not _VARIABLE.fullmatch(name) or "\0" in value:
                raise UsageError(
                    f"{name!r} cannot be the name of an environment variable, or its value is none."
                )
            if _OWN_VARIABLES.fullmatch(name):
                raise UsageError(f"The environment variable {name} is set by Tuneloop; leave it out.")

    def as_fields(self) -> dict[str, object]:
        size = None if self.instance_type is None else sizes.get(self.instance_type).name
        return {
            "description": self.description,
            "tags": dict(self.tags),
            "instance_type": size,
            "max_concurrent_requests": self.max_concurrent_requests,
            "max_queue_wait_seconds": self.max_queue_wait_seconds,
            "liveness": self.liveness,
            "environment": dict(self.environment),
        }


NO_WISHES = Wishes()


class Endpoints:
    """`secret` is the workspace's: endpoint keys derive from it and are stored nowhere."""

    def __init__(
        self, store: Store, clock: Clock, models: Models, secret: bytes, catalog: Catalog | None = None
    ) -> None:
        self._store = store
        self._clock = clock
        self._models = models
        self._catalog = catalog or Catalog(store, clock)
        self._computes = Computes(store, clock)
        self._secret = secret

    def create(
        self, name: str, *, description: str = "", tags: Mapping[str, str] | None = None
    ) -> EndpointRecord:
        check_endpoint_name(name)
        record = EndpointRecord(
            created_at=self._clock.now(),
            name=name,
            id=secrets.token_hex(8),
            description=description,
            tags=dict(tags or {}),
        )
        with self._store.transaction():
            if self._store.find(EndpointRecord, name) is not None:
                raise AlreadyExists(
                    f"There is an endpoint '{name}' already.",
                    next_move=f"Show it with: tuneloop endpoints show {name}",
                )
            created = self._store.insert(self._with_hashes(record))
            self._note(name, "created")
        return created

    def get(self, name: str) -> EndpointRecord:
        return self._store.get(EndpointRecord, name)

    def list(self) -> Sequence[EndpointRecord]:
        return self._store.list(EndpointRecord)

    def delete(self, name: str) -> EndpointRecord:
        """Asks for its end, with all deployments; the record goes when the last process has gone."""
        with self._store.transaction():
            record = self.get(name)
            for deployment in self.deployments(name):
                self._move(deployment, DeploymentState.DELETING)
            if record.state is EndpointState.DELETING:
                return record
            self._note(name, "deleting")
            return self._store.update(
                record.model_copy(update={"state": EndpointState.DELETING, "traffic": {}, "mirror": {}})
            )

    def keys(self, name: str) -> dict[str, str]:
        record = self.get(name)
        return {slot: self._key(record, slot) for slot in SLOTS}

    def regenerate(self, name: str, slot: str) -> dict[str, str]:
        """A new key in `slot`; the other one goes on working."""
        if slot not in SLOTS:
            raise UsageError(f"There is no key '{slot}'; there is: {', '.join(SLOTS)}.")
        with self._store.transaction():
            record = self.get(name)
            generations = {**record.key_generations, slot: record.key_generations[slot] + 1}
            changed = self._with_hashes(record.model_copy(update={"key_generations": generations}))
            self._store.update(changed)
            self._note(name, "key regenerated", slot=slot)
        return self.keys(name)

    def describe(self, name: str, *, description: str, tags: Mapping[str, str]) -> EndpointRecord:
        with self._store.transaction():
            record = self._require_ready(name)
            changed = record.model_copy(update={"description": description, "tags": dict(tags)})
            return record if changed == record else self._store.update(changed)

    def set_traffic(
        self, name: str, traffic: Mapping[str, int], mirror: Mapping[str, int] | None = None
    ) -> EndpointRecord:
        """Weights in per cent; they add up to 100, or to 0 to take the endpoint out of service. With `mirror`
        None a mirror stays, unless its deployment receives traffic now."""
        with self._store.transaction():
            record = self._require_ready(name)
            known = [deployment.name for deployment in self.deployments(name)]
            _check_weights(name, "Traffic", traffic, known)
            total = sum(traffic.values())
            if total not in {0, 100}:
                raise UsageError(
                    f"Traffic adds up to {total}; expected 100 (or 0 to serve nothing).",
                    next_move=f"Share it out anew, such as: tuneloop endpoints traffic {name} "
                    + (f"{known[0]}=100" if len(known) == 1 else f"{known[0]}=90 {known[1]}=10"),
                )
            self._note(name, "traffic", **{key: str(value) for key, value in traffic.items()})
            if mirror is None:
                mirror = {key: value for key, value in record.mirror.items() if not traffic.get(key)}
            changed = record.model_copy(update={"traffic": dict(traffic), "mirror": {}})
            return self._store.update(self._mirrored(changed, mirror, known))

    def set_mirror(self, name: str, mirror: Mapping[str, int]) -> EndpointRecord:
        """Send a copy of so many per cent of the requests to a deployment without traffic; empty ends it."""
        with self._store.transaction():
            record = self._require_ready(name)
            known = [deployment.name for deployment in self.deployments(name)]
            changed = self._mirrored(record, mirror, known)
            self._note(name, "mirror", **{key: str(value) for key, value in changed.mirror.items()})
            return self._store.update(changed)

    def _mirrored(
        self, record: EndpointRecord, mirror: Mapping[str, int], known: Sequence[str]
    ) -> EndpointRecord:
        _check_weights(record.name, "Mirrored traffic", mirror, known)
        wanted = {key: value for key, value in mirror.items() if value}
        if len(wanted) > 1:
            raise UsageError(f"Traffic is mirrored to {', '.join(wanted)}; expected one deployment at most.")
        for deployment in wanted:
            if record.traffic.get(deployment):
                raise UsageError(
                    f"Deployment '{deployment}' receives {record.traffic[deployment]} % of the traffic and "
                    "cannot get a copy of it too.",
                    next_move="Mirror to a deployment without traffic, or send its traffic elsewhere first.",
                )
        return record.model_copy(update={"mirror": wanted})

    def deploy(
        self,
        endpoint: str,
        name: str,
        model: str,
        *,
        replicas: int = 1,
        request_timeout_seconds: float = 90.0,
        wishes: Wishes = NO_WISHES,
    ) -> DeploymentRecord:
        """`model` is `name:version`, `name` (the newest) or `base:NAME` (an imported base model)."""
        check_name(name, "deployment name")
        _check_serving(replicas, request_timeout_seconds, wishes)
        with self._store.transaction():
            self._require_ready(endpoint)
            if self._store.find(DeploymentRecord, f"{endpoint}/{name}") is not None:
                raise AlreadyExists(f"Endpoint {endpoint} has a deployment '{name}' already.")
            served, artifact, template_digest = self._model(model)
            memory_bytes = self._models.replica_memory_bytes(artifact)
            self._computes.require_room(replicas, memory_bytes, served)
            record = DeploymentRecord(
                created_at=self._clock.now(),
                endpoint=endpoint,
                name=name,
                model=served,
                artifact=artifact,
                template_digest=template_digest,
                replicas=replicas,
                memory_bytes=memory_bytes,
                request_timeout_seconds=request_timeout_seconds,
            )
            self._note(endpoint, "deployment created", deployment=name, model=served)
            return self._store.insert(record.model_copy(update=wishes.as_fields()))

    def change_deployment(
        self,
        endpoint: str,
        name: str,
        model: str,
        *,
        replicas: int,
        request_timeout_seconds: float,
        wishes: Wishes = NO_WISHES,
    ) -> DeploymentRecord:
        """Everything about it is said anew; replicas that run go on. One that failed is tried again, with
        whatever was changed. Raises `InvalidState` for what only other processes could have: another model or
        environment."""
        _check_serving(replicas, request_timeout_seconds, wishes)
        with self._store.transaction():
            self._require_ready(endpoint)
            old = self.deployment(endpoint, name)
            if old.state is DeploymentState.DELETING:
                raise InvalidState(f"Deployment {old.key} is being deleted.")
            served, artifact, template_digest = self._model(model)
            has_failed = old.state is DeploymentState.FAILED
            if not has_failed:
                _refuse_restart(old, artifact, wishes)
            memory_bytes = self._models.replica_memory_bytes(artifact)
            more = replicas - (0 if has_failed else old.replicas)
            if more > 0:
                self._computes.require_room(more, memory_bytes, served)
            fields: dict[str, object] = {
                **wishes.as_fields(),
                "model": served,
                "artifact": artifact,
                "template_digest": template_digest,
                "memory_bytes": memory_bytes,
                "replicas": replicas,
                "request_timeout_seconds": request_timeout_seconds,
            }
            if has_failed:
                fields |= {"state": DeploymentState.CREATING, "crashes": 0, "error": None, "reason": None}
            elif replicas > old.replicas:
                fields["state"] = DeploymentState.CREATING
            changed = old.model_copy(update=fields)
            if changed == old:
                return old
            self._note(endpoint, "deployment changed", deployment=name, model=served)
            return self._store.update(changed)

    def why_not_served_on(self, model: str, instance_type: str) -> str | None:
        """Why a model should not be served on a size of Azure's list: it is not in the allow list of its base
        model. None when it may, or where there is no list."""
        card = self._catalog.find(self._base_of(model))
        allowed = None if card is None else sizes.allow_list(card.tags, "inference")
        size = sizes.get(instance_type)
        if card is None or allowed is None or size.name.lower() in {name.lower() for name in allowed}:
            return None
        return (
            f"{size.name} is not in the inference_compute_allow_list of {card.name}: {', '.join(allowed)}. "
            "Choose one of these."
        )

    def _base_of(self, model: str) -> str:
        if model.startswith("base:"):
            return model.removeprefix("base:")
        name, _, version = model.partition(":")
        return self._models.get(name, version or "latest").lineage.base_model or ""

    def deployments(self, endpoint: str) -> Sequence[DeploymentRecord]:
        return self._store.list(DeploymentRecord, parent=endpoint)

    def deployment(self, endpoint: str, name: str) -> DeploymentRecord:
        self.get(endpoint)
        return self._store.get(DeploymentRecord, f"{endpoint}/{name}")

    def delete_deployment(self, endpoint: str, name: str) -> DeploymentRecord:
        """Raises `InvalidState` while it receives traffic: first send the traffic elsewhere."""
        with self._store.transaction():
            record = self.get(endpoint)
            deployment = self.deployment(endpoint, name)
            weight = record.traffic.get(name, 0)
            if weight and record.state is EndpointState.READY:
                others = [one.name for one in self.deployments(endpoint) if one.name != name]
                # What is not named in a new share gets nothing: `NAME=0` alone would take the rest out too.
                share = f"{others[0]}=100" if others else f"{name}=0"
                raise InvalidState(
                    f"Deployment {deployment.key} receives {weight} % of the traffic.",
                    next_move=f"First: tuneloop endpoints traffic {endpoint} {share}",
                )
            if record.mirror.get(name) and record.state is EndpointState.READY:
                raise InvalidState(
                    f"{record.mirror[name]} % of the traffic is mirrored to deployment {deployment.key}.",
                    next_move=f"First: tuneloop endpoints traffic {endpoint} --mirror {name}=0",
                )
            traffic = {key: value for key, value in record.traffic.items() if key != name}
            self._store.update(record.model_copy(update={"traffic": traffic}))
            self._note(endpoint, "deployment deleting", deployment=name)
            return self._move(deployment, DeploymentState.DELETING)

    def replicas(self, endpoint: str, deployment: str) -> Sequence[ReplicaRecord]:
        return self._store.list(ReplicaRecord, parent=f"{endpoint}/{deployment}")

    def router_url(self) -> str | None:
        """Where the router listens, once it does."""
        router = self._store.find(ServiceRecord, "router")
        return None if router is None or router.port is None else f"http://127.0.0.1:{router.port}"

    def _model(self, written: str) -> tuple[str, str, str | None]:
        if written.startswith("base:"):
            artifact = self._models.base_artifact(written.removeprefix("base:"))
            return written, artifact.digest, self._models.template_digest(artifact.digest)
        name, _, version = written.partition(":")
        record = self._models.get(name, version or "latest")
        if record.state is ModelState.DELETING:
            raise InvalidState(f"Model {record.key} is being deleted.")
        return record.key, record.artifact, record.template_digest

    def _require_ready(self, name: str) -> EndpointRecord:
        record = self.get(name)
        if record.state is not EndpointState.READY:
            raise InvalidState(f"Endpoint {name} is {record.state}.")
        return record

    def _move(self, deployment: DeploymentRecord, state: DeploymentState) -> DeploymentRecord:
        if deployment.state is state:
            return deployment
        return self._store.update(deployment.model_copy(update={"state": state}))

    def _key(self, record: EndpointRecord, slot: str) -> str:
        return endpoint_key(self._secret, record.id, slot, record.key_generations[slot])

    def _with_hashes(self, record: EndpointRecord) -> EndpointRecord:
        hashes = {slot: key_hash(self._key(record, slot)) for slot in SLOTS}
        return record.model_copy(update={"key_hashes": hashes})

    def _note(self, name: str, what: str, **data: str) -> None:
        self._store.append(
            Event(at=self._clock.now(), subject=f"endpoint/{name}", what=what, data=dict(data))
        )


def _check_serving(replicas: int, request_timeout_seconds: float, wishes: Wishes) -> None:
    if not 1 <= replicas <= MAX_REPLICAS:
        raise UsageError(f"replicas is {replicas}; expected 1 to {MAX_REPLICAS}.")
    if not 0 < request_timeout_seconds <= 3600:
        raise UsageError(f"request_timeout_seconds is {request_timeout_seconds}; expected up to 3600.")
    wishes.check()


def _check_seconds(name: str, value: float, *, least: float) -> None:
    if not (math.isfinite(value) and least <= value <= MAX_WAIT_SECONDS):
        raise UsageError(f"{name} is {value:g}; expected {least:g} to {MAX_WAIT_SECONDS:g}.")


def _check_weights(endpoint: str, what: str, weights: Mapping[str, int], known: Sequence[str]) -> None:
    for deployment, weight in weights.items():
        if deployment not in known:
            raise NotFound(
                f"Endpoint {endpoint} has no deployment '{deployment}'.",
                next_move=did_you_mean(deployment, known)
                or f"Make one: tuneloop deployments create NAME --endpoint {endpoint} --model N:V",
            )
        if not 0 <= weight <= 100:
            raise UsageError(
                f"{what} of '{deployment}' is {weight}; expected 0 to 100.",
                next_move=f"All of it: tuneloop endpoints traffic {endpoint} {deployment}=100",
            )


def _refuse_restart(old: DeploymentRecord, artifact: str, wishes: Wishes) -> None:
    """Raises `InvalidState` for a change that replicas which run cannot take."""
    wrong = []
    if artifact != old.artifact:
        wrong.append("its model")
    if dict(wishes.environment) != old.environment:
        wrong.append("its environment variables")
    if wrong:
        raise InvalidState(
            f"Deployment {old.key} serves {old.model}: {' and '.join(wrong)} cannot be changed while its "
            "replicas run.",
            next_move="Create another deployment beside it, send it the traffic, then delete this one.",
        )
