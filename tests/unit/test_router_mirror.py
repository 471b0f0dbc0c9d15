"""Mirrored requests and limits of requests at once, in a real router before played replicas."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web

from tests.serving import AUTH, HTTP, Answer, PlayedReplica, RouterProcess, until
from tuneloop.core.types import RouteTable
from tuneloop.serving import mirror as mirrors


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
        each.release.set()
        each.kill()


def noted(router: RouterProcess, key: str, count: int = 1) -> list[dict[str, Any]]:
    path = router.mirrors / key / mirrors.LOG
    until(lambda: path.exists() and len(path.read_text().splitlines()) >= count, f"{count} lines of {key}")
    return [json.loads(line) for line in path.read_text().splitlines()]


def says(text: str, status: int = 200) -> Answer:
    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.json_response({"output": text}, status=status)

    return answer


# ---------------------------------------------------------------- mirrors


def test_so_many_per_cent_of_the_requests_reach_the_mirror_and_no_reply_of_it_the_caller(router, replica):
    blue, green = replica("blue", says("from blue")), replica("green", says("from green"))
    both = {"blue": [blue.route], "green": [green.route]}
    url = router.endpoint("mirror-share", both, {"blue": 100}, mirror={"green": 20})
    with httpx.Client(headers=AUTH) as client:
        replies = [client.post(f"{url}/score", json={"n": n}) for n in range(50)]
    assert Counter(reply.json()["output"] for reply in replies) == {"from blue": 50}
    assert {reply.headers["azureml-model-deployment"] for reply in replies} == {"blue"}
    until(lambda: len(green.requests) == 10, "ten copies")
    copied = {request["body"] for request in green.requests}
    assert copied < {request["body"] for request in blue.requests}
    lines = noted(router, "mirror-share/green", 10)
    assert all(line["is_same"] is False and line["same_characters"] == len('"from ') for line in lines)
    assert not any("from blue" in json.dumps(line) for line in lines)


def test_a_mirror_that_says_the_same_is_noted_as_the_same(router, replica):
    async def chat(_request: web.Request) -> web.StreamResponse:
        message = {"role": "assistant", "content": "Hello."}
        return web.json_response({"id": str(time.monotonic_ns()), "choices": [{"message": message}]})

    both = {"blue": [replica("blue", chat).route], "green": [replica("green", chat).route]}
    url = router.endpoint("mirror-same", both, {"blue": 100}, mirror={"green": 100})
    reply = HTTP.post(f"{url}/v1/chat/completions", json={"model": "mirror-same"}, headers=AUTH)
    (line,) = noted(router, "mirror-same/green")
    assert line["is_same"] is True
    assert (line["beside"], line["status"], line["mirror_status"]) == ("blue", 200, 200)
    assert (line["characters"], line["mirror_characters"], line["same_characters"]) == (6, 6, 6)
    assert line["request"] == reply.headers["x-request-id"]


def test_a_stream_is_compared_by_its_text(router, replica):
    def streams(*pieces: str) -> Answer:
        async def answer(request: web.Request) -> web.StreamResponse:
            out = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await out.prepare(request)
            for piece in pieces:
                chunk = {"choices": [{"delta": {"content": piece}}]}
                await out.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
            await out.write(b"data: [DONE]\n\n")
            return out

        return answer

    both = {
        "blue": [replica("blue", streams("It is ", "red.")).route],
        "green": [replica("green", streams("It ", "is ", "red.")).route],
    }
    url = router.endpoint("mirror-stream", both, {"blue": 100}, mirror={"green": 100})
    reply = HTTP.post(f"{url}/v1/chat/completions", json={"stream": True}, headers=AUTH)
    assert reply.text.count("data:") == 3
    (line,) = noted(router, "mirror-stream/green")
    assert (line["is_same"], line["characters"]) == (True, 10)


def test_a_slow_mirror_does_not_slow_the_caller_and_a_dead_one_is_left_out(router, replica):
    slow = replica("slow")

    async def answer(_request: web.Request) -> web.StreamResponse:
        await slow.released()
        return web.json_response({"output": "late"})

    slow.answer = answer
    both = {"blue": [replica("blue", says("now")).route], "green": [slow.route]}
    url = router.endpoint("mirror-slow", both, {"blue": 100}, mirror={"green": 100})
    with httpx.Client(headers=AUTH) as client:
        began = time.monotonic()
        replies = [client.post(f"{url}/score", json={}).status_code for _ in range(mirrors.MOST_COPIES + 4)]
        assert time.monotonic() - began < 3
    assert set(replies) == {200}
    assert len(slow.requests) == mirrors.MOST_COPIES
    assert noted(router, "mirror-slow/green")[0]["left_out"] == 4
    slow.release.set()
    assert len(noted(router, "mirror-slow/green", 1 + mirrors.MOST_COPIES)) == 1 + mirrors.MOST_COPIES

    url = router.endpoint(
        "mirror-none", {"blue": both["blue"], "green": []}, {"blue": 100}, mirror={"green": 100}
    )
    assert HTTP.post(f"{url}/score", json={}, headers=AUTH).status_code == 200
    assert noted(router, "mirror-none/green")[0]["left_out"] == 1


def test_a_mirror_that_fails_is_noted_and_its_error_kept_from_the_caller(router, replica):
    both = {"blue": [replica("blue", says("fine")).route], "green": [replica("green", says("no", 500)).route]}
    url = router.endpoint("mirror-fails", both, {"blue": 100}, mirror={"green": 100})
    assert HTTP.post(f"{url}/score", json={}, headers=AUTH).json() == {"output": "fine"}
    (line,) = noted(router, "mirror-fails/green")
    assert (line["status"], line["mirror_status"], line["is_same"]) == (200, 500, False)


def test_who_asks_for_a_deployment_by_name_is_not_mirrored(router, replica):
    blue, green = replica("blue", says("a")), replica("green", says("b"))
    both = {"blue": [blue.route], "green": [green.route]}
    url = router.endpoint("mirror-pin", both, {"blue": 100}, mirror={"green": 100})
    HTTP.post(f"{url}/score", json={}, headers={**AUTH, "azureml-model-deployment": "blue"})
    HTTP.post(f"{url}/v1/chat/completions", json={"model": "blue"}, headers=AUTH)
    HTTP.post(f"{url}/score", json={}, headers=AUTH)
    noted(router, "mirror-pin/green")
    assert (len(blue.requests), len(green.requests)) == (3, 1)


def test_a_log_begins_anew_when_it_is_large(tmp_path, monkeypatch):
    monkeypatch.setattr(mirrors, "LOG_BYTES", 30)
    for number in range(4):
        mirrors._append(tmp_path, {"a/b": [json.dumps({"number": number, "pad": "x" * 20})]})
    kept = sorted(path.name for path in (tmp_path / "a" / "b").iterdir())
    assert kept == ["last-mirror.jsonl", "mirror.jsonl"]
    assert json.loads((tmp_path / "a" / "b" / "mirror.jsonl").read_text())["number"] == 3


def test_what_was_mirrored_to_a_deployment_that_is_gone_is_not_written(tmp_path):
    async def write() -> None:
        kept = mirrors.Mirrors(tmp_path, lambda copy: asyncio.sleep(0))
        kept._note("chat/green", {"left_out": 1})
        await kept.write(RouteTable())

    asyncio.run(write())
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- limits


def test_requests_over_the_limit_wait_in_line_and_are_all_answered(router, replica):
    seen, most = [0], [0]

    async def counted(_request: web.Request) -> web.StreamResponse:
        seen[0] += 1
        most[0] = max(most[0], seen[0])
        await asyncio.sleep(0.05)
        seen[0] -= 1
        return web.json_response({"output": ""})

    url = router.endpoint("limit-line", {"blue": [replica("blue", counted).route]}, most=2, wait=5.0)
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: HTTP.post(f"{url}/score", json={}, headers=AUTH), range(8)))
    assert {reply.status_code for reply in replies} == {200}
    assert most[0] == 2


def test_a_request_that_waits_too_long_gets_429_with_retry_after(router, replica):
    busy = replica("busy")

    async def answer(_request: web.Request) -> web.StreamResponse:
        await busy.released()
        return web.json_response({"output": ""})

    busy.answer = answer
    url = router.endpoint("limit-full", {"blue": [busy.route]}, most=1, wait=0.2)
    first = threading.Thread(target=HTTP.post, args=(f"{url}/score",), kwargs={"json": {}, "headers": AUTH})
    first.start()
    until(lambda: len(busy.requests) == 1, "the first is answered")
    began = time.monotonic()
    score = HTTP.post(f"{url}/score", json={}, headers=AUTH)
    assert 0.1 < time.monotonic() - began < 2
    assert (score.status_code, score.json()["error"]["code"]) == (429, "too_many_requests")
    assert "max_concurrent_requests" in score.json()["error"]["message"]
    assert score.headers["retry-after"] == "1"
    chat = HTTP.post(f"{url}/v1/chat/completions", json={}, headers=AUTH)
    assert (chat.status_code, chat.json()["error"]["type"]) == (429, "rate_limit_error")
    busy.release.set()
    first.join(10)
    assert HTTP.post(f"{url}/score", json={}, headers=AUTH).status_code == 200


def test_a_caller_that_leaves_the_line_leaves_its_place(router, replica):
    busy = replica("busy")

    async def answer(_request: web.Request) -> web.StreamResponse:
        await busy.released()
        return web.json_response({"output": ""})

    busy.answer = answer
    url = router.endpoint("limit-leaves", {"blue": [busy.route]}, most=1, wait=5.0)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(HTTP.post, f"{url}/score", json={}, headers=AUTH)
        until(lambda: len(busy.requests) == 1, "the first is answered")
        with pytest.raises(httpx.ReadTimeout):
            HTTP.post(f"{url}/score", json={}, headers=AUTH, timeout=0.2)
        last = pool.submit(HTTP.post, f"{url}/score", json={}, headers=AUTH)
        time.sleep(0.1)
        busy.release.set()
        assert (first.result().status_code, last.result().status_code) == (200, 200)
    assert len(busy.requests) == 2
