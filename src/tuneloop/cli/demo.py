"""`tuneloop demo`: the whole loop for a newcomer, through the same API as every other command.

Each act may be repeated: what an earlier run has made and is still good is taken over, so a second run ends
in seconds, and a run that was interrupted anywhere is taken up by the next.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from tuneloop.cli import (
    demo_text,
    deployments,
    endpoints,
    live,
    output,
    processes,
    run,
    session,
    streaming,
)
from tuneloop.core.errors import NotFound, TuneloopError
from tuneloop.core.states import JOB_ENDED, DeploymentState, EndpointState, JobState

if TYPE_CHECKING:
    from tuneloop.cli.session import Session
    from tuneloop.client import EndpointClient, Submission
    from tuneloop.client.views import DeploymentView, JobView
    from tuneloop.core.types import ModelRecord

RECIPE = "demo"
MODEL = "tuneloop-guide"
ENDPOINT = "demo"
TUNED, BASE = "tuned", "base"
LIVE_QUESTIONS = 3
REPLY_TOKENS = 40
WARM_UP_SECONDS = 30.0
"""The router reads new routes within moments; this bounds the wait for it."""


@dataclass
class Demo:
    """What was found out so far, and how long each act took."""

    connection: Session
    tell: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def act(self, title: str) -> Iterator[None]:
        self.tell(f"\n{len(self.seconds) + 1}. {title}")
        began = time.monotonic()
        yield
        self.seconds[title] = time.monotonic() - began


@click.command("demo")
@output.json_option
def demo_(as_json: bool) -> int:
    """See the whole loop: tune a small chat model, evaluate it, deploy it and talk to it.

    Fine-tunes SmolLM2-135M-Instruct on 200 conversations about Tuneloop that ship with it, compares it with
    the base model, registers it as tuneloop-guide, deploys both behind the endpoint `demo`, asks them the
    same questions, and says how to go on. Minutes the first time, under a minute the next: finished steps
    are reused. Ctrl-C at any time; run it again to take it up.

    With --json the summary is printed as JSON on stdout and the progress goes to stderr.

    \b
    Example:
      tuneloop demo
    """
    job_name = ""
    tell = output.note if as_json else output.say
    try:
        demo = _begin(tell)
        submission = run.submission_of(RECIPE, {})
        job = unfinished(demo.connection, submission) or demo.connection.client.submit(submission)
        job_name = job["name"]
        with demo.act("tune, export and evaluate"):
            job = _watch(demo, job, as_json)
        if job["state"] != JobState.COMPLETED:
            return streaming.finish(demo.connection, job, as_json=as_json)
        job_name = ""
        return _go_on(demo, job, as_json)
    except KeyboardInterrupt:
        _tell_interrupted(job_name)
        return streaming.DETACHED


def _begin(tell: Callable[[str], None]) -> Demo:
    """The first act: a server to talk to."""
    began = time.monotonic()
    tell("1. start the server")
    demo = Demo(session.connect(), tell)
    tell(f"  {demo.connection.client.url}, workspace {demo.connection.settings.home}")
    demo.seconds["start the server"] = time.monotonic() - began
    return demo


def _go_on(demo: Demo, job: JobView, as_json: bool) -> int:
    """The acts after a completed job: show, register, deploy, ask, sum up."""
    client = demo.connection.client
    evaluation = read_evaluation(demo.connection, job)
    note = quality_note(demo.connection, job)
    if not as_json:
        demo_text.tell_evaluation(evaluation, note)
    with demo.act("register the model"):
        model, is_new = ensure_model(demo.connection, job)
        demo.tell(f"  {MODEL}:{model.model_version} {'registered' if is_new else 'is registered already'}")
    with demo.act("deploy it beside the base model"):
        ensure_serving(demo.connection, model, str(job["base_model"]), demo.tell)
    with demo.act("ask both, live"):
        replies = ask_both(demo.connection, evaluation)
        if not as_json:
            demo_text.tell_replies(replies, note)
    summary = {
        "seconds": demo.seconds,
        "steps": {
            step["name"]: {
                "state": step["state"],
                "seconds": output.between(step["started_at"], step["finished_at"])
                if step["started_at"]
                else 0.0,
                "peak_memory_bytes": step["peak_memory_bytes"],
            }
            for step in job["steps"]
        },
        "processes": _processes(demo.connection),
        "job": job["name"],
        "evaluation": evaluation,
        "quality_note": note,
        "model": {
            "name": MODEL,
            "version": model.model_version,
            "path": job["outputs"]["trained_model"]["path"],
        },
        "endpoint": client.endpoint(ENDPOINT),
        "replies": replies,
        "next": demo_text.next_moves(client.endpoint(ENDPOINT), model.model_version),
    }
    if as_json:
        output.print_json(summary)
    else:
        demo_text.tell_summary(summary)
    return 0


def _processes(connection: Session) -> list[dict[str, Any]]:
    """Server, tracker, router and the demo's replicas, with the most memory that each has held."""
    found = processes.measure(connection.settings.home, connection, connection.client.status())
    others = [one for one in found if not one["name"].startswith("replica ")]
    return others + [one for one in found if one["name"].startswith(f"replica {ENDPOINT}/")]


def unfinished(connection: Session, submission: Submission) -> JobView | None:
    """An equal job that an interrupted demo left running: following it is better than a second one."""
    wanted = connection.client.resolve(submission)
    for summary in connection.client.jobs(limit=20):
        if summary["state"] in JOB_ENDED or summary["display_name"] != wanted["display_name"]:
            continue
        job = connection.client.job(summary["name"])
        if job["parameters"] == wanted["parameters"] and job["state"] != JobState.CANCELING:
            return job
    return None


def _watch(demo: Demo, job: JobView, as_json: bool) -> JobView:
    demo.tell(f"  job {job['name']}: {job['display_name']}")
    for warning in job["warnings"]:
        demo.tell(f"  warning: {warning}")
    stream = sys.stderr if as_json else sys.stdout
    return live.follow(demo.connection, job["name"], stream=stream, told=job["warnings"])


def read_evaluation(connection: Session, job: JobView) -> dict[str, Any]:
    content = connection.client.output_bytes(job["name"], "evaluation_result", "evaluation.json")
    return dict(json.loads(content))


def quality_note(connection: Session, job: JobView) -> str | None:
    """What must be said wherever the base model's quality is shown (`dequantised from 4 bits`)."""
    card = connection.client.card(str(job["base_model"]))
    for source in card.sources:
        return source.note if source.type == "package" else None
    return None


def ensure_model(connection: Session, job: JobView) -> tuple[ModelRecord, bool]:
    """The registered version with these bytes, and whether it was registered just now."""
    known = connection.client.models(MODEL)
    digest = job["outputs"]["trained_model"]["digest"]
    for model in known:
        if model.artifact == digest:
            return model, False
    numbers = [int(model.model_version) for model in known if model.model_version.isdigit()]
    description = "SmolLM2-135M-Instruct tuned on conversations about Tuneloop, by `tuneloop demo`."
    version = str(max(numbers, default=0) + 1)
    return connection.client.register(job["name"], "trained_model", MODEL, version, description), True


def ensure_serving(
    connection: Session, model: ModelRecord, base_model: str, tell: Callable[[str], None]
) -> None:
    """The endpoint with the tuned model at all of the traffic and the base model at none, both ready."""
    ensure_endpoint(connection)
    wanted = {TUNED: f"{MODEL}:{model.model_version}", BASE: f"base:{base_model.partition(':')[0]}"}
    for name, served in wanted.items():
        ensure_deployment(connection, name, served)
    for name in wanted:
        began = time.monotonic()
        deployments.wait_ready(connection, ENDPOINT, name)
        took = output.duration(time.monotonic() - began)
        tell(f"  {ENDPOINT}/{name} is ready ({wanted[name]}, after {took})")
    shares = {TUNED: 100, BASE: 0}
    if connection.client.endpoint(ENDPOINT)["traffic"] != shares:
        connection.client.set_traffic(ENDPOINT, shares)
    _wait_until_it_answers(connection)


def ensure_endpoint(connection: Session) -> None:
    try:
        endpoint = connection.client.endpoint(ENDPOINT)
    except NotFound:
        endpoint = None
    if endpoint is not None and endpoint["state"] == EndpointState.DELETING:
        endpoints.wait_gone(connection, ENDPOINT)
        endpoint = None
    if endpoint is None:
        connection.client.create_endpoint(ENDPOINT, "The model of `tuneloop demo`, and its base.")


def ensure_deployment(connection: Session, name: str, model: str) -> None:
    """A deployment of `model`: one that is there already unless it failed or serves another."""
    found = _find_deployment(connection, name)
    if found is not None and not _serves(found, model):
        shares = connection.client.endpoint(ENDPOINT)["traffic"]
        if shares.get(name):
            connection.client.set_traffic(ENDPOINT, shares | {name: 0})
        if found["state"] == DeploymentState.DELETING:
            deployments.wait_gone(connection, ENDPOINT, name)
        else:
            deployments.delete_and_wait(connection, ENDPOINT, name)
        found = None
    if found is None:
        connection.client.create_deployment(ENDPOINT, name, model)


def _find_deployment(connection: Session, name: str) -> DeploymentView | None:
    try:
        return connection.client.deployment(ENDPOINT, name)
    except NotFound:
        return None


def _serves(deployment: DeploymentView, model: str) -> bool:
    is_same = deployment["model"].lower() in (model.lower(), f"{model.lower()}:latest") or (
        model.startswith("base:") and deployment["model"].lower().startswith(f"{model.lower()}:")
    )
    return is_same and deployment["state"] in (DeploymentState.READY, DeploymentState.CREATING)


def _wait_until_it_answers(connection: Session) -> None:
    """One token from each deployment, through the router."""
    give_up = time.monotonic() + WARM_UP_SECONDS
    waiting = [BASE, TUNED]
    while waiting:
        try:
            caller = session.endpoint_client(connection, ENDPOINT, waiting[-1])
            caller.complete([{"role": "user", "content": "Hi"}], max_tokens=1)
            waiting.pop()
        except TuneloopError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.3)


def live_questions(evaluation: dict[str, Any]) -> list[str]:
    """Two questions about Tuneloop and an everyday one; sampled prompts when there are no questions."""
    asked = evaluation.get("questions") or []
    everyday = [one["question"] for one in asked if one["kind"] == "everyday"]
    about = [one["question"] for one in asked if one["kind"] != "everyday" and one["tuned"]["right"]]
    about += [one["question"] for one in asked if one["kind"] != "everyday" and one["question"] not in about]
    chosen = about[: LIVE_QUESTIONS - 1] + everyday[:1]
    return chosen or [str(sample["prompt"]) for sample in evaluation.get("samples", [])[:LIVE_QUESTIONS]]


def ask_both(connection: Session, evaluation: dict[str, Any]) -> list[dict[str, str]]:
    """The same questions to both deployments, side by side, at temperature 0."""
    callers = {name: session.endpoint_client(connection, ENDPOINT, name) for name in (BASE, TUNED)}
    replies = []
    with ThreadPoolExecutor(len(callers)) as pool:
        for question in live_questions(evaluation):
            asked = {name: pool.submit(_reply, caller, question) for name, caller in callers.items()}
            replies.append({"question": question} | {name: reply.result() for name, reply in asked.items()})
    return replies


def _reply(caller: EndpointClient, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    completion = caller.complete(messages, max_tokens=REPLY_TOKENS, temperature=0)
    return str(completion["choices"][0]["message"]["content"])


def _tell_interrupted(job: str) -> None:
    output.note("\nStopped here. Nothing is lost: what was finished is kept, and what was started goes on.")
    output.note(f"  take it up:     {session.program()} demo")
    if job:
        output.note(f"  watch the job:  {session.program()} jobs stream {job}")
    output.note(f"  stop it all:    {session.program()} down")
