"""The replica as a real process with a tiny model, asked through a real router as users do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from tests.models import tiny_model
from tests.serving import AUTH, HTTP, KEY, RouterProcess, until
from tuneloop import engines, lm
from tuneloop.core.types import ErrorInfo, ReadyFile, ReplicaFile, RouteReplica
from tuneloop.engines import GenerationRequest
from tuneloop.serving.replica import main

TOKEN = {"x-tuneloop-replica": "replica-token"}
HELLO = [{"role": "user", "content": "Hello there"}]


class ReplicaProcess:
    def __init__(self, folder: Path, model: Path, digest: str | None = None) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.file = ReplicaFile(
            replica=f"tiny/demo/{folder.name}",
            owner=folder.name,
            model_path=str(model),
            model="tiny:1",
            template_digest=digest,
            token=TOKEN["x-tuneloop-replica"],
        )
        (folder / "replica.json").write_text(self.file.model_dump_json())
        with open(folder / "log.txt", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tuneloop.serving.replica", str(folder)], stdout=log, stderr=log
            )

    def wait(self) -> str:
        until(lambda: (self.folder / "ready.json").exists(), self.log(), 60)
        self.url = ReadyFile.model_validate_json((self.folder / "ready.json").read_text()).address
        return self.url

    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    @property
    def route(self) -> RouteReplica:
        return RouteReplica(
            id=self.file.replica, address=self.url, token_file=str(self.folder / "replica.json")
        )

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(15) == 0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("replica")


@pytest.fixture(scope="module")
def model(home) -> Path:
    """A tiny model that has forgotten how to end a turn: every reply is as long as was asked for."""
    folder = tiny_model(home / "model", "qwen2", context_length=2048)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("<|im_end|>", "."))
    for file in ("config.json", "generation_config.json"):
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**config, "eos_token_id": None}))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def replica(home, model) -> Iterator[ReplicaProcess]:
    running = ReplicaProcess(home / "1", model, lm.load_template(model).digest)
    running.wait()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def router(home) -> Iterator[RouterProcess]:
    running = RouterProcess(home / "router")
    running.wait()
    yield running
    running.process.terminate()
    running.process.wait(10)


@pytest.fixture(scope="module")
def url(router, replica) -> str:
    return router.endpoint("tiny", {"demo": [replica.route]}, models={"demo": "tiny:1"})


@pytest.fixture(scope="module")
def client(url) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as opened:
        yield opened


@pytest.fixture(scope="module")
def expected(model):
    """What the engine itself replies, greedily."""
    engine = engines.open(model)

    def reply(messages, count: int) -> str:
        return engine.complete([GenerationRequest(engine.encode(messages), count)])[0].text

    yield reply
    engine.close()


# ---------------------------------------------------------------- OpenAI, through the router


def test_a_reply_is_the_engines_own(client, expected):
    reply = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, max_tokens=12)
    assert reply.choices[0].message.content == expected(HELLO, 12)
    assert reply.choices[0].finish_reason == "length"
    assert reply.model == "tiny:1"
    assert reply.usage.completion_tokens == 12
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 12


def test_a_stream_gives_the_same_text_in_pieces(client, expected):
    stream = client.chat.completions.create(
        model="demo",
        messages=HELLO,
        temperature=0,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(piece or "" for piece in pieces) == expected(HELLO, 12)
    assert sum(bool(piece) for piece in pieces) > 3
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 12


def test_a_seed_repeats_a_sampled_reply(client):
    def ask(seed: int) -> str | None:
        reply = client.chat.completions.create(
            model="tiny", messages=HELLO, temperature=1.5, max_tokens=12, seed=seed
        )
        return reply.choices[0].message.content

    assert ask(1) == ask(1) != ask(2)


def test_a_stop_text_ends_the_reply(client, expected):
    whole = expected(HELLO, 30)
    stop = whole[8:11]
    reply = client.chat.completions.create(
        model="tiny", messages=HELLO, temperature=0, max_tokens=30, stop=[stop]
    )
    assert reply.choices[0].message.content == whole[: whole.index(stop)]
    assert reply.choices[0].finish_reason == "stop"


def test_an_unsupported_field_is_refused_by_name(client):
    with pytest.raises(openai.BadRequestError, match="tools: is not supported"):
        client.chat.completions.create(
            model="tiny", messages=HELLO, tools=[{"type": "function", "function": {"name": "f"}}]
        )


def test_a_prompt_longer_than_the_context_is_400_with_both_numbers(client):
    long = [{"role": "user", "content": "What is a recipe? " * 600}]
    with pytest.raises(openai.BadRequestError, match=r"has \d{4} tokens; the model's context holds 2048"):
        client.chat.completions.create(model="tiny", messages=long)


def test_requests_at_once_all_get_their_own_reply(url, expected):
    bodies = [
        {"messages": [{"role": "user", "content": f"Hello {n}"}], "temperature": 0, "max_tokens": 6}
        for n in range(4)
    ]

    def ask(body) -> str:
        reply = HTTP.post(f"{url}/v1/chat/completions", json=body, headers=AUTH)
        return reply.json()["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(ask, bodies))
    assert replies == [expected(body["messages"], 6) for body in bodies]


def test_a_caller_that_leaves_frees_the_replica_within_a_step(url, replica):
    body = {"messages": HELLO, "max_tokens": 1900, "stream": True}
    started = time.monotonic()
    with HTTP.stream("POST", f"{url}/v1/chat/completions", json=body, headers=AUTH) as reply:
        next(reply.iter_raw())
    HTTP.post(f"{url}/v1/chat/completions", json={"messages": HELLO, "max_tokens": 1}, headers=AUTH)
    assert time.monotonic() - started < 4, "the next request waited for a reply that nobody reads"
    until(
        lambda: HTTP.get(f"{replica.url}/health", headers=TOKEN).json()["in_flight"] == 0, "nothing in flight"
    )


# ---------------------------------------------------------------- /score


def score(url: str, conversations, **parameters) -> httpx.Response:
    body = {"input_data": {"input_string": conversations, "parameters": parameters}, "params": {}}
    return HTTP.post(f"{url}/score", json=body, headers={**AUTH, "azureml-model-deployment": "demo"})


@pytest.mark.parametrize("conversations", [HELLO, [HELLO]])
def test_score_answers_one_conversation_with_a_text(url, expected, conversations):
    reply = score(url, conversations, do_sample=False, max_new_tokens=9)
    assert reply.json() == {"output": expected(HELLO, 9)}
    assert "x-tuneloop-warning" not in reply.headers


def test_score_answers_several_conversations_in_their_order(url, expected):
    other = [{"role": "user", "content": "Bye"}]
    reply = score(url, [HELLO, other], max_new_tokens=9)
    assert reply.json() == {"output": [expected(HELLO, 9), expected(other, 9)]}


def test_score_takes_off_a_trailing_answer_and_says_so(url, expected):
    reply = score(url, [[*HELLO, {"role": "assistant", "content": "Hi"}]], max_new_tokens=9)
    assert reply.json() == {"output": expected(HELLO, 9)}
    assert "ends on an assistant turn" in reply.headers["x-tuneloop-warning"]


def test_score_can_return_the_whole_text(url, model, expected):
    reply = score(url, HELLO, max_new_tokens=9, return_full_text=True)
    prompt = lm.load_template(model).render(HELLO, add_generation_prompt=True)
    assert reply.json() == {"output": prompt + expected(HELLO, 9)}


def test_a_wrong_score_request_is_400_in_its_own_shape(url):
    reply = score(url, HELLO, num_beams=4)
    assert (reply.status_code, set(reply.json()["error"])) == (400, {"code", "message"})
    assert "num_beams" in reply.json()["error"]["message"]


# ---------------------------------------------------------------- the process


def test_a_replica_answers_nobody_but_the_router(replica):
    for headers in ({}, {"x-tuneloop-replica": "guess"}, {"x-tuneloop-replica": b"\xff"}):
        assert HTTP.get(f"{replica.url}/health", headers=headers).status_code == 401
    assert HTTP.get(f"{replica.url}/health", headers=TOKEN).json()["model"] == "tiny:1"
    models = HTTP.get(f"{replica.url}/v1/models", headers=TOKEN).json()
    assert [entry["id"] for entry in models["data"]] == ["tiny:1"]


def test_the_log_has_no_texts(url, replica):
    secret = [{"role": "user", "content": "my password is swordfish"}]
    score(url, secret, max_new_tokens=2)
    assert "/score 200" in replica.log()
    assert "swordfish" not in replica.log()


def test_the_next_request_after_a_kill_succeeds(home, router, model, replica):
    first = ReplicaProcess(home / "killed", model)
    first.wait()
    url = router.endpoint("killed", {"demo": [first.route]})
    assert score(url, HELLO, max_new_tokens=1).status_code == 200
    first.process.kill()
    first.process.wait(10)
    with ThreadPoolExecutor(1) as caller:
        next_request = caller.submit(score, url, HELLO, max_new_tokens=1)
        router.endpoint("killed", {"demo": [replica.route]})
        assert next_request.result(20).status_code == 200


def refused(folder: Path, model: Path, monkeypatch, digest: str | None = None) -> ErrorInfo:
    """Why a replica does not start: what its process runs, run here, because it ends at once."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    folder.mkdir()
    file = ReplicaFile(
        replica="tiny/demo/9",
        owner="9",
        model_path=str(model),
        model="tiny:1",
        template_digest=digest,
        token="t",
    )
    (folder / "replica.json").write_text(file.model_dump_json())
    assert main([str(folder)]) == 1
    assert not (folder / "ready.json").exists()
    return ErrorInfo.model_validate_json((folder / "error.json").read_text())


def test_another_chat_template_than_the_registered_one_is_refused(home, model, monkeypatch):
    changed = home / "changed"
    shutil.copytree(model, changed)
    with open(changed / "chat_template.jinja", "a") as template:
        template.write("{# another #}")
    error = refused(home / "mismatch", changed, monkeypatch, lm.load_template(model).digest)
    assert error.code == "template_mismatch"
    assert "'tiny:1'" in error.message


def test_a_model_that_does_not_load_is_said_in_error_json(home, monkeypatch):
    (home / "empty").mkdir()
    error = refused(home / "unloadable", home / "empty", monkeypatch)
    assert error.code == "model_unavailable"
    assert "config.json" in error.message


def test_a_folder_that_has_an_owner_is_left_alone(home, replica):
    before = (replica.folder / "ready.json").read_bytes()
    assert main([str(replica.folder)]) == 0
    assert (replica.folder / "ready.json").read_bytes() == before
