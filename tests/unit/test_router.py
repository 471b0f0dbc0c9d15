"""The router as a real process on loopback, before replicas played by a web application in a thread."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import openai
import pytest
from aiohttp import web

from tests.serving import AUTH, HTTP, KEY, Answer, PlayedReplica, RouterProcess, until
from tuneloop.core.process import write_atomically
from tuneloop.core.types import (
    DemandFile,
    ErrorInfo,
    RouteEndpoint,
    RouteReplica,
    RouteTable,
)
from tuneloop.serving.routing import RouteFile, Turns


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    running = RouterProcess(tmp_path_factory.mktemp("router"))
    running.wait()
    yield running
    running.process.terminate()
    running.process.wait(10)


@pytest.fixture
def replica(tmp_path: Path) -> Iterator[Callable[..., PlayedReplica]]:
    started: list[PlayedReplica] = []

    def start(name: str, answer: Answer | None = None) -> PlayedReplica:
        started.append(PlayedReplica(tmp_path, name, answer))
        return started[-1]

    yield start
    for each in started:
        each.kill()


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize("headers", [AUTH, {"authorization": f"bearer {KEY}"}, {"api-key": KEY}])
def test_a_right_key_is_let_in_by_either_header(router, replica, headers):
    url = router.endpoint("keys-right", {"demo": [replica("right").route]})
    assert HTTP.post(f"{url}/score", json={}, headers=headers).json() == {"replica": "right"}


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "missing_key"),
        ({"authorization": "Basic abc"}, "missing_key"),
        ({"authorization": "Bearer wrong"}, "invalid_key"),
        ({"api-key": "wrong"}, "invalid_key"),
        ({"api-key": b"\xff\xfe"}, "invalid_key"),
    ],
)
def test_a_missing_or_wrong_key_is_401_in_the_shape_of_each_api(router, replica, headers, code):
    url = router.endpoint("keys-wrong", {"demo": [replica("wrong").route]})
    score = HTTP.post(f"{url}/score", json={}, headers=headers)
    assert (score.status_code, set(score.json()["error"])) == (401, {"code", "message"})
    assert score.json()["error"]["code"] == code
    chat = HTTP.post(f"{url}/v1/chat/completions", json={}, headers=headers)
    assert (chat.status_code, chat.json()["error"]["type"]) == (401, "authentication_error")


def test_an_openai_client_with_a_wrong_key_gets_its_own_error(router, replica):
    url = router.endpoint("keys-openai", {"demo": [replica("openai").route]})
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_a_replica_sees_its_token_and_never_the_callers_key(router, replica):
    played = replica("token")
    url = router.endpoint("keys-hidden", {"demo": [played.route]})
    forged = {
        **AUTH,
        "x-tuneloop-replica": "forged",
        "cookie": "a=b",
        "te": "trailers",
        "x-request-id": "abc-1",
    }
    reply = HTTP.post(f"{url}/score", json={}, headers=forged)
    seen = played.requests[0]["headers"]
    assert seen.getall("x-tuneloop-replica") == [played.token]
    assert not {"authorization", "api-key", "cookie", "te"} & {name.lower() for name in seen}
    assert seen["x-request-id"] == reply.headers["x-request-id"] == "abc-1"


# ---------------------------------------------------------------- which deployment


def test_traffic_is_split_by_weight(router, replica):
    both = {"blue": [replica("blue").route], "green": [replica("green").route]}
    url = router.endpoint("traffic-split", both, {"blue": 90, "green": 10})
    with httpx.Client(headers=AUTH) as client:
        replies = [client.post(f"{url}/score", json={}) for _ in range(50)]
    assert Counter(reply.json()["replica"] for reply in replies) == {"blue": 45, "green": 5}
    assert {reply.headers["azureml-model-deployment"] for reply in replies} == {"blue", "green"}


def test_a_header_pins_a_deployment_without_traffic(router, replica):
    both = {"blue": [replica("blue").route], "green": [replica("green").route]}
    url = router.endpoint("traffic-pin", both, {"blue": 100})
    reply = HTTP.post(f"{url}/score", json={}, headers={**AUTH, "azureml-model-deployment": "green"})
    assert reply.json() == {"replica": "green"}
    assert reply.headers["azureml-model-deployment"] == "green"


def test_an_unknown_pin_is_404_and_names_the_deployments(router, replica):
    url = router.endpoint("traffic-unknown", {"blue": [replica("blue").route]})
    reply = HTTP.post(f"{url}/score", json={}, headers={**AUTH, "azureml-model-deployment": "red"})
    assert reply.status_code == 404
    assert (
        reply.json()["error"]["message"]
        == "Endpoint 'traffic-unknown' has no deployment 'red'; there is: 'blue'."
    )


def test_two_different_pins_are_refused(router, replica):
    both = {"blue": [replica("blue").route], "green": [replica("green").route]}
    url = router.endpoint("traffic-smuggled", both)
    pins = [("azureml-model-deployment", "blue"), ("azureml-model-deployment", "green")]
    reply = HTTP.post(f"{url}/score", json={}, headers=[*AUTH.items(), *pins])
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "ambiguous_deployment")


@pytest.mark.parametrize(
    ("model", "served_by"),
    [
        (None, "blue"),
        ("by-model", "blue"),
        ("green", "green"),
        ("tuned:3", "green"),
        ("base:SmolLM2", "blue"),
    ],
)
def test_the_model_field_may_name_endpoint_deployment_or_model(router, replica, model, served_by):
    both = {"blue": [replica("blue").route], "green": [replica("green").route]}
    url = router.endpoint(
        "by-model", both, {"blue": 100}, models={"blue": "base:SmolLM2", "green": "tuned:3"}
    )
    body = {} if model is None else {"model": model}
    assert HTTP.post(f"{url}/v1/chat/completions", json=body, headers=AUTH).json() == {"replica": served_by}


def test_a_model_that_is_not_served_is_404_with_the_choices(router, replica):
    url = router.endpoint("by-wrong-model", {"blue": [replica("blue").route]})
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
    with pytest.raises(openai.NotFoundError, match=r"'gpt-4o'.*'by-wrong-model'.*'blue'.*'blue-model:1'"):
        client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "Hi"}])


def test_a_pin_and_a_model_that_disagree_are_refused(router, replica):
    both = {"blue": [replica("blue").route], "green": [replica("green").route]}
    url = router.endpoint("by-both", both)
    headers = {**AUTH, "azureml-model-deployment": "blue"}
    reply = HTTP.post(f"{url}/v1/chat/completions", json={"model": "green"}, headers=headers)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "model")


def test_an_endpoint_without_traffic_says_what_to_do(router, replica):
    url = router.endpoint("traffic-none", {"blue": [replica("blue").route]}, traffic={"blue": 0})
    reply = HTTP.post(f"{url}/score", json={}, headers=AUTH)
    assert reply.status_code == 404
    assert "tuneloop endpoints traffic traffic-none blue=100" in reply.json()["error"]["message"]


def test_an_unknown_endpoint_and_path_are_404_in_json(router):
    assert HTTP.post(f"{router.url}/endpoints/nowhere/score", headers=AUTH).json()["error"]["code"] == (
        "endpoint_not_found"
    )
    assert HTTP.get(f"{router.url}/nowhere").json()["error"]["code"] == "path_not_found"
    assert HTTP.get(f"{router.url}/endpoints/nowhere/score").status_code == 405


def test_models_are_listed_to_an_openai_client(router, replica):
    url = router.endpoint("listing", {"blue": [replica("blue").route]}, models={"blue": "tuned:1"})
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY)
    assert [model.id for model in client.models.list()] == ["listing", "blue", "tuned:1"]


# ---------------------------------------------------------------- bodies


def test_a_body_over_the_limit_is_413(router, replica):
    url = router.endpoint("large", {"blue": [replica("blue").route]})
    reply = HTTP.post(f"{url}/score", content=b"x" * (32 * 1024 * 1024 + 1), headers=AUTH)
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "too_large")


def test_a_body_of_megabytes_arrives_whole(router, replica):
    played = replica("blue")
    url = router.endpoint("megabytes", {"blue": [played.route]})
    assert HTTP.post(f"{url}/score", content=b"x" * 5_000_000, headers=AUTH).status_code == 200
    assert played.requests[0]["body"] == b"x" * 5_000_000


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[]", b'{"temperature": NaN}', b"[" * 100_000])
def test_a_body_that_is_not_a_json_object_is_400(router, replica, body):
    url = router.endpoint("broken-json", {"blue": [replica("blue").route]})
    reply = HTTP.post(f"{url}/v1/chat/completions", content=body, headers=AUTH)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_json")


# ---------------------------------------------------------------- time, streams and callers that leave


def test_a_slow_reply_is_504_and_the_replica_is_let_go(router, replica):
    async def never(_request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(60)
        raise AssertionError

    played = replica("slow", never)
    url = router.endpoint("slow", {"blue": [played.route]}, timeout=0.3)
    reply = HTTP.post(f"{url}/score", json={}, headers=AUTH)
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
    assert played.left.wait(5)


def _streaming(played: PlayedReplica, then: str) -> Answer:
    """One event at once; the second when released; then the end, silence, or a cut connection."""

    async def answer(request: web.Request) -> web.StreamResponse:
        out = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await out.prepare(request)
        await out.write(b"data: one\n\n")
        await played.released()
        if then == "cut":
            request.transport.abort()  # type: ignore[union-attr]
        await out.write(b"data: two\n\n")
        return out

    return answer


def test_a_stream_arrives_chunk_by_chunk(router, replica):
    played = replica("stream")
    played.answer = _streaming(played, "end")
    url = router.endpoint("streaming", {"blue": [played.route]})
    with HTTP.stream("POST", f"{url}/v1/chat/completions", json={}, headers=AUTH) as reply:
        chunks = reply.iter_raw()
        assert next(chunks) == b"data: one\n\n"
        # Only now may the replica go on: a router that buffers would never get here.
        played.release.set()
        assert b"".join(chunks) == b"data: two\n\n"
    assert reply.headers["content-type"] == "text/event-stream"
    assert reply.headers["azureml-model-deployment"] == "blue"


def test_a_stream_that_is_cut_ends_in_an_error_event(router, replica):
    played = replica("cut")
    played.answer = _streaming(played, "cut")
    url = router.endpoint("cutting", {"blue": [played.route]})
    with HTTP.stream("POST", f"{url}/v1/chat/completions", json={}, headers=AUTH) as reply:
        chunks = reply.iter_raw()
        assert next(chunks) == b"data: one\n\n"
        played.release.set()
        last = b"".join(chunks).decode().strip()
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_lost"


def test_a_stream_past_the_timeout_ends_in_an_error_event(router, replica):
    played = replica("long")
    played.answer = _streaming(played, "end")
    url = router.endpoint("long-stream", {"blue": [played.route]}, timeout=0.4)
    with HTTP.stream("POST", f"{url}/v1/chat/completions", json={}, headers=AUTH) as reply:
        text = reply.read().decode()
    assert json.loads(text.split("data: ")[-1])["error"]["code"] == "timeout"
    assert played.left.wait(5)


def test_a_caller_that_leaves_frees_the_replica(router, replica):
    played = replica("leaving")
    played.answer = _streaming(played, "end")
    url = router.endpoint("leaving", {"blue": [played.route]})
    with HTTP.stream("POST", f"{url}/v1/chat/completions", json={}, headers=AUTH) as reply:
        next(reply.iter_raw())
    assert played.left.wait(5)


# ---------------------------------------------------------------- replicas that come and go


def test_a_killed_replica_is_not_noticed_when_another_stands_by(router, replica):
    first, second = replica("first"), replica("second")
    url = router.endpoint("standby", {"blue": [first.route, second.route]})
    with httpx.Client(headers=AUTH) as client:
        assert client.post(f"{url}/score", json={}).status_code == 200
        first.kill()
        assert {client.post(f"{url}/score", json={}).json()["replica"] for _ in range(4)} == {"second"}


def test_a_request_waits_for_the_replica_that_replaces_a_killed_one(router, replica):
    first = replica("first")
    url = router.endpoint("replaced", {"blue": [first.route]})
    assert HTTP.post(f"{url}/score", json={}, headers=AUTH).json() == {"replica": "first"}
    first.kill()
    replies: list[httpx.Response] = []
    caller = threading.Thread(target=lambda: replies.append(HTTP.post(f"{url}/score", json={}, headers=AUTH)))
    caller.start()
    until(lambda: "replaced/blue" in _demand(router).wake, "the router asks for a replica")
    router.endpoint("replaced", {"blue": [replica("second").route]})
    caller.join(10)
    assert replies[0].json() == {"replica": "second"}


def test_a_reply_that_breaks_before_its_end_is_asked_for_again(router, replica):
    async def breaks(request: web.Request) -> web.StreamResponse:
        request.transport.abort()  # type: ignore[union-attr]
        return web.Response()

    broken, good = replica("a-broken", breaks), replica("b-good")
    url = router.endpoint("again", {"blue": [broken.route, good.route]})
    assert HTTP.post(f"{url}/score", json={}, headers=AUTH).json() == {"replica": "b-good"}


def test_a_request_that_kills_every_replica_is_given_up(router, replica):
    async def breaks(request: web.Request) -> web.StreamResponse:
        request.transport.abort()  # type: ignore[union-attr]
        return web.Response()

    played = [replica(f"broken-{number}", breaks) for number in range(4)]
    url = router.endpoint("poison", {"blue": [each.route for each in played]})
    reply = HTTP.post(f"{url}/score", json={}, headers=AUTH)
    assert (reply.status_code, reply.json()["error"]["code"]) == (502, "replica_lost")
    assert sum(len(each.requests) for each in played) == 3


def test_another_process_on_a_dead_replicas_port_is_not_taken_for_it(router, replica):
    other, good = replica("a-other"), replica("b-good")
    stolen = RouteReplica(id="a-dead", address=other.address, token_file=str(good.token_file))
    url = router.endpoint("stolen-port", {"blue": [stolen, good.route]})
    reply = HTTP.post(f"{url}/score", json={}, headers=AUTH)
    assert (reply.status_code, reply.json()) == (200, {"replica": "b-good"})


def test_without_a_replica_it_is_503_with_retry_after(router):
    url = router.endpoint("asleep", {"blue": []}, timeout=0.3)
    reply = HTTP.post(f"{url}/score", json={}, headers=AUTH)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "no_replica")
    assert int(reply.headers["retry-after"]) > 0


def test_the_demand_file_counts_what_is_in_flight(router, replica):
    played = replica("busy")
    played.answer = _streaming(played, "end")
    url = router.endpoint("demand", {"blue": [played.route]})
    with HTTP.stream("POST", f"{url}/v1/chat/completions", json={}, headers=AUTH) as reply:
        until(lambda: _demand(router).in_flight.get("demand/blue") == 1, "one request in flight")
        played.release.set()
        reply.read()
    until(lambda: "demand/blue" not in _demand(router).in_flight, "nothing in flight")


def _demand(router: RouterProcess) -> DemandFile:
    return DemandFile.model_validate_json(router.demand.read_text())


# ---------------------------------------------------------------- the route table


def test_a_torn_route_table_leaves_the_old_routes(tmp_path):
    path = tmp_path / "routes.json"
    path.write_text(RouteTable(endpoints={"a": RouteEndpoint(key_hashes=())}).model_dump_json())
    routes = RouteFile(path)
    assert routes.refresh()
    assert "a" in routes.table.endpoints
    path.write_text('{"format": 1, "endpoi')
    assert not routes.refresh()
    assert "a" in routes.table.endpoints
    path.unlink()
    assert not routes.refresh()
    write_atomically(path, RouteTable().model_dump_json())
    assert routes.refresh()
    assert routes.table.endpoints == {}


def test_turns_follow_the_weights_in_any_hundred_requests():
    turns = Turns()
    weights = {"a": 50, "b": 30, "c": 20}
    chosen = [turns.next("e", weights) for _ in range(250)]
    for start in range(0, 150, 10):
        assert Counter(chosen[start : start + 100]) == weights


# ---------------------------------------------------------------- the process


def test_a_taken_port_is_said_in_error_json(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        running = RouterProcess(tmp_path, port=taken.getsockname()[1])
        assert running.process.wait(15) == 1
    error = ErrorInfo.model_validate_json((running.folder / "error.json").read_text())
    assert error.code == "port_taken"
    assert not (running.folder / "ready.json").exists()


def test_a_killed_router_is_replaced_on_the_same_port(tmp_path, replica):
    first = RouterProcess(tmp_path)
    port = int(first.wait().rsplit(":", 1)[1])
    url = first.endpoint("again", {"blue": [replica("blue").route]})
    with httpx.Client(headers=AUTH) as client:
        assert client.post(f"{url}/score", json={}).status_code == 200
        first.process.kill()
        first.process.wait(10)
        second = RouterProcess(tmp_path, port=port)
        second.wait()
    assert HTTP.post(f"{url}/score", json={}, headers=AUTH).status_code == 200
    second.process.terminate()
    assert second.process.wait(10) == 0


def test_sigterm_lets_a_request_end_and_exits_cleanly(tmp_path, replica):
    played = replica("draining")
    played.answer = _streaming(played, "end")
    running = RouterProcess(tmp_path)
    running.wait()
    url = running.endpoint("drain", {"blue": [played.route]})
    with HTTP.stream("POST", f"{url}/v1/chat/completions", json={}, headers=AUTH) as reply:
        chunks = reply.iter_raw()
        next(chunks)
        running.process.send_signal(signal.SIGTERM)
        with pytest.raises(httpx.ConnectError):
            _connect_until_refused(f"{running.url}/health")
        played.release.set()
        assert b"".join(chunks) == b"data: two\n\n"
    assert running.process.wait(10) == 0


def test_sigterm_cuts_what_does_not_end_with_an_error_event(tmp_path, replica):
    played = replica("stuck")
    played.answer = _streaming(played, "end")
    running = RouterProcess(tmp_path)
    running.wait()
    url = running.endpoint("stuck", {"blue": [played.route]}, timeout=60)
    with HTTP.stream("POST", f"{url}/v1/chat/completions", json={}, headers=AUTH) as reply:
        chunks = reply.iter_raw()
        next(chunks)
        running.process.send_signal(signal.SIGTERM)
        last = b"".join(chunks).decode()
    assert json.loads(last.strip().removeprefix("data: "))["error"]["code"] == "stopping"
    assert running.process.wait(10) == 0


def _connect_until_refused(url: str) -> None:
    """Each time over a connection of its own: one that is open already goes on being answered."""
    for _ in range(500):
        with httpx.Client(trust_env=False) as caller:
            caller.get(url)
        time.sleep(0.01)


def test_a_folder_that_has_an_owner_is_left_alone(tmp_path):
    running = RouterProcess(tmp_path)
    running.wait()
    before = (running.folder / "ready.json").read_text()
    again = subprocess.run(
        [sys.executable, "-m", "tuneloop.serving.router", str(running.folder)], timeout=30, check=False
    )
    assert again.returncode == 0
    assert (running.folder / "ready.json").read_text() == before
    running.process.terminate()
    running.process.wait(10)


def test_the_router_process_knows_no_torch():
    code = "import sys, tuneloop.serving.router as r; sys.exit(bool({'torch', 'mlflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 0


def test_the_demand_file_is_valid_from_the_start(router):
    assert _demand(router).at <= datetime.now(UTC)
