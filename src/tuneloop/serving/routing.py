"""Which deployment and which replica a request goes to. The rules alone: no sockets, no web framework.

A deployment is chosen by, in this order:
1. the header `azureml-model-deployment`, which pins one whatever its traffic;
2. OpenAI's `model` field, when it is the name of a deployment or the `name:version` of a deployed model;
3. the endpoint's traffic weights, when `model` is the endpoint's name or is left out.
Any other `model` is refused by name: a reply from a model that was not asked for is worse than none.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from tuneloop.core.keys import key_matches
from tuneloop.core.types import ReplicaFile, RouteDeployment, RouteEndpoint, RouteReplica, RouteTable
from tuneloop.serving.wire import DEPLOYMENT_HEADER, Refused

SUSPECT_SECONDS = 1.0
"""A replica that refused a connection is left alone for so long, unless the table brings others."""


class RouteFile:
    """The route table, read again when the file is another one. A torn or missing file changes nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.table = RouteTable()
        self.digest = ""
        """SHA-256 of the file as it was read: who wrote it can see that it is obeyed."""
        self._stamp: tuple[int, int, int] | None = None
        self._tokens: dict[str, str] = {}

    def refresh(self) -> bool:
        """True when the table changed."""
        try:
            seen = os.stat(self.path)
            stamp = (seen.st_ino, seen.st_mtime_ns, seen.st_size)
            if stamp == self._stamp:
                return False
            text = self.path.read_bytes()
            table = RouteTable.model_validate_json(text)
        except (OSError, ValidationError):
            # Somebody is writing it, or it is gone: the old routes are still the best that is known.
            return False
        self._stamp = stamp
        self.table = table
        self.digest = hashlib.sha256(text).hexdigest()
        known = {replica.id for _, _, replica in self._replicas()}
        self._tokens = {name: token for name, token in self._tokens.items() if name in known}
        return True

    def token(self, replica: RouteReplica) -> str | None:
        """What the replica wants to see in `x-tuneloop-replica`; None while its file cannot be read."""
        token = self._tokens.get(replica.id)
        if token is None:
            try:
                file = ReplicaFile.model_validate_json(Path(replica.token_file).read_bytes())
            except (OSError, ValidationError):
                return None
            token = self._tokens[replica.id] = file.token
        return token

    def forget(self, replica: RouteReplica) -> None:
        """Its token was refused: read it again next time."""
        self._tokens.pop(replica.id, None)

    def _replicas(self) -> Iterator[tuple[str, str, RouteReplica]]:
        for endpoint, route in self.table.endpoints.items():
            for name, deployment in route.deployments.items():
                for replica in deployment.replicas:
                    yield endpoint, name, replica


def find_endpoint(table: RouteTable, name: str) -> RouteEndpoint:
    endpoint = table.endpoints.get(name)
    if endpoint is None:
        raise Refused(
            404, "endpoint_not_found", f"There is no endpoint '{name}' here. See: tuneloop endpoints list"
        )
    return endpoint


def check_key(endpoint: RouteEndpoint, headers: Mapping[str, str]) -> None:
    """Raises 401 unless the caller holds one of the keys (`Authorization: Bearer` or `api-key`)."""
    key = _bearer(headers.get("authorization")) or headers.get("api-key")
    challenge = {"WWW-Authenticate": "Bearer"}
    if not key:
        message = (
            "No key was sent: add the header 'Authorization: Bearer KEY' (or 'api-key: KEY'). "
            "See: tuneloop endpoints keys NAME"
        )
        raise Refused(401, "missing_key", message, headers=challenge)
    if not key.isascii() or not key_matches(key, endpoint.key_hashes):
        message = "The key is not one of this endpoint's keys. See: tuneloop endpoints keys NAME"
        raise Refused(401, "invalid_key", message, headers=challenge)


def _bearer(value: str | None) -> str | None:
    scheme, _, key = (value or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None


def choose_deployment(
    name: str, endpoint: RouteEndpoint, pins: list[str], model: str | None, turns: Turns
) -> str:
    """The deployment for a request that carries these pin headers and this `model`. Raises 400 or 404."""
    if len(set(pins)) > 1:
        raise Refused(400, "ambiguous_deployment", f"The header {DEPLOYMENT_HEADER} was sent more than once.")
    pin = pins[0].strip() if pins else None
    if pin is not None and pin not in endpoint.deployments:
        message = f"Endpoint '{name}' has no deployment '{pin}'; {_choices(endpoint)}"
        raise Refused(404, "deployment_not_found", message)
    named = _named_by_model(name, endpoint, model)
    if pin is not None:
        if pin not in named:
            message = (
                f"The header {DEPLOYMENT_HEADER} says '{pin}', model '{model}' is served by {_list(named)}."
            )
            raise Refused(400, "ambiguous_deployment", message, param="model")
        return pin
    if len(named) == 1 and model not in (None, name):
        return named[0]
    return turns.next(name, _weights(name, endpoint, named))


def _named_by_model(name: str, endpoint: RouteEndpoint, model: str | None) -> list[str]:
    """Every deployment that `model` may mean."""
    everything = list(endpoint.deployments)
    if model is None or model == name:
        return everything
    if model in endpoint.deployments:
        return [model]
    named = [deployment for deployment, route in endpoint.deployments.items() if route.model == model]
    if not named:
        others = _list(model_names(endpoint))
        message = f"model '{model}' is not served by endpoint '{name}'; use '{name}', or: {others}."
        raise Refused(404, "model_not_found", message, param="model")
    return named


def model_names(endpoint: RouteEndpoint) -> list[str]:
    """What the `model` field may say besides the endpoint's name: deployments and their models."""
    names = dict.fromkeys(endpoint.deployments)
    names.update(dict.fromkeys(route.model for route in endpoint.deployments.values()))
    return list(names)


def _weights(name: str, endpoint: RouteEndpoint, named: list[str]) -> dict[str, int]:
    weights = {deployment: endpoint.traffic.get(deployment, 0) for deployment in named}
    if not endpoint.deployments:
        raise Refused(404, "no_deployment", f"Endpoint '{name}' has no deployment yet.")
    if not any(weights.values()):
        message = (
            f"No traffic goes to {_list(named)} of endpoint '{name}'. Set it "
            f"(tuneloop endpoints traffic {name} {named[0]}=100), or pin it with {DEPLOYMENT_HEADER}."
        )
        raise Refused(404, "no_traffic", message)
    return {deployment: weight for deployment, weight in weights.items() if weight > 0}


def _choices(endpoint: RouteEndpoint) -> str:
    return f"there is: {_list(list(endpoint.deployments))}." if endpoint.deployments else "it has none yet."


def _list(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


class Turns:
    """Smooth weighted round robin: of any 100 requests in a row, each deployment gets its weight.

    Every turn adds its weight to each credit; the largest credit wins and pays the sum of all weights
    (the method of nginx's upstream module).
    """

    def __init__(self) -> None:
        self._credits: dict[str, dict[str, float]] = {}

    def next(self, endpoint: str, weights: Mapping[str, int]) -> str:
        held = self._credits.get(endpoint, {})
        credits = {name: held.get(name, 0.0) + weight for name, weight in weights.items()}
        chosen = max(credits, key=lambda name: credits[name])
        credits[chosen] -= sum(weights.values())
        self._credits[endpoint] = credits
        return chosen


@dataclass
class Load:
    """What is in flight, and which replicas were seen dead. `now` is a monotonic time in seconds."""

    in_flight: dict[str, int] = field(default_factory=dict)
    """Requests per `endpoint/deployment`."""
    waiting: dict[str, int] = field(default_factory=dict)
    """Of those, the ones that wait for a replica."""
    per_replica: dict[str, int] = field(default_factory=dict)
    _suspects: dict[str, float] = field(default_factory=dict)

    def pick(self, deployment: RouteDeployment, now: float) -> RouteReplica | None:
        """The least busy replica that is not under suspicion and may have one more, or None."""
        most = deployment.max_concurrent_requests
        free = [
            replica
            for replica in self._usable(deployment, now)
            if most is None or self.per_replica.get(replica.id, 0) < most
        ]
        return min(free, key=lambda replica: self.per_replica.get(replica.id, 0), default=None)

    def is_full(self, deployment: RouteDeployment, now: float, *, is_behind: bool = False) -> bool:
        """Whether there are replicas, each with as many requests as it may have, or as those ahead in the
        line will fill."""
        if deployment.max_concurrent_requests is None or not self._usable(deployment, now):
            return False
        return is_behind or self.pick(deployment, now) is None

    def _usable(self, deployment: RouteDeployment, now: float) -> list[RouteReplica]:
        return [replica for replica in deployment.replicas if self._suspects.get(_who(replica), 0.0) <= now]

    def suspect(self, replica: RouteReplica, now: float) -> None:
        self._suspects = {who: until for who, until in self._suspects.items() if until > now}
        self._suspects[_who(replica)] = now + SUSPECT_SECONDS

    @staticmethod
    @contextmanager
    def counted(counts: dict[str, int], key: str) -> Iterator[None]:
        counts[key] = counts.get(key, 0) + 1
        try:
            yield
        finally:
            counts[key] -= 1
            if not counts[key]:
                del counts[key]


def _who(replica: RouteReplica) -> str:
    return f"{replica.id} {replica.address}"


class Line:
    """Requests that wait for a replica, per deployment, in the order in which they came."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[asyncio.Event]] = {}

    def is_empty(self, key: str) -> bool:
        return key not in self._waiting

    def is_first(self, key: str, place: asyncio.Event) -> bool:
        return self._waiting[key][0] is place

    def wake(self, key: str) -> None:
        """Something became free: the first has a look."""
        for place in list(self._waiting.get(key, ()))[:1]:
            place.set()

    def wake_all(self) -> None:
        """The routes changed: everybody has a look."""
        for places in self._waiting.values():
            for place in places:
                place.set()

    @contextmanager
    def joined(self, key: str) -> Iterator[asyncio.Event]:
        """A place in the line; who leaves, served or not, lets the next one have a look."""
        place = asyncio.Event()
        places = self._waiting.setdefault(key, deque())
        places.append(place)
        try:
            yield place
        finally:
            places.remove(place)
            if places:
                places[0].set()
            else:
                del self._waiting[key]
