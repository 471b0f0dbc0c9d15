"""What the SDK is shown of a cluster that was not made, which no command can bring about."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.fakes import FakeClock, FakeStore
from tuneloop.core.types import Compute
from tuneloop.server.azure import computes
from tuneloop.server.azure.bodies import Body
from tuneloop.server.azure.gateway import Gateway
from tuneloop.server.azure.routing import Answer, Request
from tuneloop.workspace.compute import Computes


def asked(handler: Any, store: FakeStore, name: str) -> Any:
    parts: Any = SimpleNamespace(computes=Computes(store, FakeClock()), store=store)
    unused: Any = None
    gateway = Gateway(parts, "https://127.0.0.1:1", Path("/"), b"", unused, "")
    params = {"subscription": "s", "group": "g", "workspace": "w", "compute": name}
    answer = handler(gateway, Request(unused, params, {}, Body({}), None))
    assert isinstance(answer, Answer)
    return answer.body


def test_a_failed_cluster_is_shown_as_failed_and_so_is_the_operation_that_made_it() -> None:
    store, clock = FakeStore(), FakeClock()
    Computes(store, clock).declare_local(slots=1, cores=2, memory_bytes=10**9)
    made = Computes(store, clock).create("broken", size="Standard_NC6s_v3")
    assert asked(computes.get_compute_status, store, "broken") == {"status": "Succeeded"}
    record = store.get(Compute, made.name)
    store.update(record.model_copy(update={"provisioning_state": "failed"}))
    shown = asked(computes.get_compute, store, "BROKEN")
    assert (shown["name"], shown["properties"]["provisioningState"]) == ("broken", "Failed")
    told = asked(computes.get_compute_status, store, "broken")
    assert told["status"] == "Failed"
    assert told["error"]["code"] == "ComputeFailed"
    assert "Provisioning failed: compute 'broken' is in the state failed." in told["error"]["message"]
