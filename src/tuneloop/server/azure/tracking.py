"""MLflow of the workspace, over the listener, as `mlflow` and the plugin azureml-mlflow ask for it.

Behind it stands a helper process with MLflow's own handlers (`adapters.mlflow_api`), which the reconciler
keeps only while somebody asks. What is done here is who may ask, and names: Azure's run of a job has the
job's name as its id, MLflow gives ids of its own.
"""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlencode

from starlette.responses import Response

from tuneloop.core.errors import Stale, Unavailable
from tuneloop.core.settings import without_password
from tuneloop.core.states import ServiceState
from tuneloop.core.types import JobRecord, ServiceRecord, TrackingRecord
from tuneloop.server.azure.errors import Refusal
from tuneloop.server.azure.gateway import Gateway
from tuneloop.server.azure.routing import Request, Routes

routes = Routes()

START_SECONDS = 90.0
"""MLflow takes some seconds to be imported, more on a busy machine."""
ANSWER_SECONDS = 110.0
"""MLflow's clients wait 120."""
TOUCH_SECONDS = 60.0
"""How often the helper process is told that it is still needed."""
TOKEN_HEADER = "x-tuneloop-service"  # noqa: S105
IDS = frozenset({"run_id", "run_uuid", "source_run_id"})
LISTS_OF_IDS = frozenset({"run_ids"})
PARENT = "mlflow.parentRunId"
_FILTERED = re.compile(
    r"""(?P<what>tags\.[`"]?mlflow\.(?:parent|root)RunId[`"]?|(?:attributes?\.)?run_id)"""
    r"""(?P<is>\s*=\s*)(?P<quote>['"])(?P<name>[^'"]*)['"]""",
    re.IGNORECASE,
)


def tracking_uri(gateway: Gateway, workspace_id: str) -> str:
    """What `mlflow.set_tracking_uri` is given: the form that azureml-mlflow reads, or the MLflow server that
    this workspace writes to."""
    outside = _outside(gateway)
    return outside or f"azureml://{gateway.host}/mlflow/v1.0{workspace_id}"


def _outside(gateway: Gateway) -> str | None:
    uri = gateway.parts.settings.tracking_uri
    return without_password(uri) if uri.startswith(("http://", "https://")) else None


def _operation(method: str) -> Callable[[Gateway, Request], Response]:
    def operation(gateway: Gateway, request: Request) -> Response:
        return _forwarded(gateway, request)

    operation.__doc__ = f"MLflow's REST API: {method}"
    return operation


for _method in ("GET", "POST", "PATCH", "DELETE"):
    routes.add(
        _method, "/mlflow/{version}{ws}/api/{rest:path}", name=f"mlflow_{_method.lower()}", audience="ml"
    )(_operation(_method))


def _forwarded(gateway: Gateway, request: Request) -> Response:
    outside = _outside(gateway)
    if outside:
        told = f"This workspace writes to the MLflow server {outside}: use that as the tracking URI."
        raise Refusal(400, "INVALID_PARAMETER_VALUE", told, target="trackingUri")
    names = _Names(gateway)
    query = [(key, names.inward(key, value)) for key, value in parse_qsl(request.http.url.query)]
    body: Any = {key: request.body.raw(key) for key in request.body.names()}
    body = names.translated(body, names.inward)
    path = f"/api/{request['rest']}" + (f"?{urlencode(query)}" if query else "")
    method = request.http.method
    status, kind, raw = _asked(gateway, method, path, None if method == "GET" else json.dumps(body).encode())
    if kind.startswith("application/json"):
        raw = json.dumps(names.translated(json.loads(raw), names.outward)).encode()
    return Response(raw, status, media_type=kind)


# ---------------------------------------------------------------- names


class _Names:
    """The two ids of a job's run: `inward` is what MLflow has, `outward` the job's name."""

    def __init__(self, gateway: Gateway) -> None:
        self._store = gateway.parts.store
        self._jobs: dict[str, str] | None = None

    def inward(self, key: str, value: str) -> str:
        if key in IDS or key == PARENT:
            return self._run_of(value) or value
        if key == "filter":
            return _FILTERED.sub(self._in_filter, value)
        return value

    def outward(self, key: str, value: str) -> str:
        if key not in IDS and key != PARENT:
            return value
        if self._jobs is None:
            self._jobs = {
                one.run_id: one.subject.removeprefix("job/")
                for one in self._store.list(TrackingRecord)
                if one.run_id and one.subject.startswith("job/") and " @ " not in one.subject
            }
        return self._jobs.get(value, value)

    def _in_filter(self, found: re.Match[str]) -> str:
        run = self._run_of(found["name"])
        if run is None:
            return found[0]
        # We have no deeper nesting than a job and its attempts: the root of a run is its parent.
        what = re.sub("rootRunId", "parentRunId", found["what"], flags=re.IGNORECASE)
        return f"{what}{found['is']}{found['quote']}{run}{found['quote']}"

    def _run_of(self, job: str) -> str | None:
        if self._store.find(JobRecord, job) is None:
            return None
        found = self._store.find(TrackingRecord, f"job/{job}")
        return None if found is None else found.run_id

    def translated(self, value: Any, translate: Callable[[str, str], str]) -> Any:
        """The same JSON with the ids of runs as `translate` has them."""
        if isinstance(value, list):
            return [self.translated(one, translate) for one in value]
        if not isinstance(value, Mapping):
            return value
        found = {key: self._translated_at(key, one, translate) for key, one in value.items()}
        if found.get("key") == PARENT and isinstance(found.get("value"), str):
            found["value"] = translate(PARENT, found["value"])
        return found

    def _translated_at(self, key: str, value: Any, translate: Callable[[str, str], str]) -> Any:
        if isinstance(value, str):
            return translate(key, value)
        if key in LISTS_OF_IDS and isinstance(value, list):
            return [translate("run_id", one) if isinstance(one, str) else one for one in value]
        return self.translated(value, translate)


# ---------------------------------------------------------------- the helper process


def _asked(gateway: Gateway, method: str, path: str, body: bytes | None) -> tuple[int, str, bytes]:
    """(status, media type, body) of the helper's answer, which is started when there is none."""
    give_up = time.monotonic() + START_SECONDS
    while True:
        port, token = _address(gateway, give_up)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS)
        headers = {TOKEN_HEADER: token, "content-type": "application/json"}
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.headers.get("content-type", "application/json"), answer.read()
        except ConnectionRefusedError:
            # It has just ended; the reconciler will see that and start another.
            if time.monotonic() > give_up:
                raise _unavailable(None) from None
            time.sleep(0.2)
        except (OSError, http.client.HTTPException) as broken:
            raise _unavailable(f"{type(broken).__name__}: {broken}") from None
        finally:
            connection.close()


def _address(gateway: Gateway, give_up: float) -> tuple[int, str]:
    while True:
        record = _ask_for(gateway)
        if record.state is ServiceState.RUNNING and record.port is not None:
            folder = gateway.parts.files.folder(record.folder)
            spec = json.loads((folder / "mlflow.json").read_text(encoding="utf-8"))
            return record.port, str(spec["token"])
        if time.monotonic() > give_up:
            raise _unavailable(record.error.message if record.error else None)
        time.sleep(0.05)


def _ask_for(gateway: Gateway) -> ServiceRecord:
    """Say that the helper is needed, unless that was said a moment ago."""
    store, now = gateway.parts.store, gateway.now()
    try:
        with store.transaction():
            record = store.find(ServiceRecord, "mlflow")
            if record is None:
                record = store.insert(
                    ServiceRecord(created_at=now, name="mlflow", state=ServiceState.STOPPED, asked_at=now)
                )
            elif record.asked_at is None or (now - record.asked_at).total_seconds() > TOUCH_SECONDS:
                record = store.update(record.model_copy(update={"asked_at": now}))
            else:
                return record
    except Stale:
        return store.get(ServiceRecord, "mlflow")
    gateway.parts.wake()
    return record


def _unavailable(why: str | None) -> Unavailable:
    told = why or f"it did not start within {START_SECONDS:.0f} s"
    return Unavailable(
        f"The process that speaks MLflow's API cannot be asked: {told}.",
        next_move="Its log lies in services/mlflow of the home; try again.",
    )
