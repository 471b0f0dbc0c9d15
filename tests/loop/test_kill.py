"""kill -9 of everything, at the worst moment: nothing is lost, and nothing happens twice."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.loop.world import SHORT, SLOW, LoopWorld, wait_for


def test_training_goes_on_without_its_server_and_the_next_server_finishes_the_job(world: LoopWorld) -> None:
    job = world.submit(SHORT, **SLOW)
    folder = world.wait_until_training(job)
    trainer = world.identity(folder)
    os.kill(world.server_pid(), signal.SIGKILL)
    progress = folder / "progress.jsonl"
    seen = progress.stat().st_size
    wait_for(lambda: progress.stat().st_size > seen, "training to go on")
    world.restart_server()
    assert world.identity(folder) == trainer
    ended = world.wait_until_ended(job)
    assert ended["state"] == "completed", ended["error"]
    assert world.step(job, "finetune")["attempts"] == 1


def test_a_killed_step_resumes_and_ends_with_the_losses_of_an_undisturbed_run(world: LoopWorld) -> None:
    dropout = {"finetune.lora_dropout": "0.1", **SLOW}
    undisturbed = world.submit(**dropout)
    assert world.wait_until_ended(undisturbed)["state"] == "completed"
    # Another limit of checkpoints changes no loss, and keeps the cache from answering.
    disturbed = world.submit(**dropout, **{"finetune.save_total_limit": "3"})
    folder = world.wait_until_training(disturbed, checkpoints=1)
    world.kill(folder)
    ended = world.wait_until_ended(disturbed)
    assert ended["state"] == "completed", ended["error"]
    assert world.step(disturbed, "finetune")["attempts"] == 2
    first_line = (folder.parent / "2" / "metrics.jsonl").read_text().splitlines()[0]
    expected, found = world.losses(undisturbed), world.losses(disturbed)
    assert found.keys() == expected.keys()
    assert json.loads(first_line)["step"] > 1, "the second attempt started over"
    assert max(abs(found[step] - expected[step]) for step in expected) < 1e-6
    loss = {name: world.step(name, "evaluate")["metrics"]["tuned_loss"] for name in (undisturbed, disturbed)}
    assert loss[undisturbed] == pytest.approx(loss[disturbed], abs=1e-6)


def test_a_killed_tracker_misses_nothing(world: LoopWorld) -> None:
    job = world.submit(SHORT, **SLOW)
    world.wait_until_training(job)
    for _ in range(2):
        folder = world.service_folder("tracker")
        wait_for(lambda folder=folder: (folder / "state.json").exists(), "the tracker to carry something")
        world.kill(folder)
        wait_for(lambda folder=folder: world.service_folder("tracker") != folder, "a new tracker")
    assert world.wait_until_ended(job)["state"] == "completed"
    lines = world.client.metrics(job, "finetune")
    expected = [(key, line.step) for line in lines for key in line.values]
    curves = wait_for(lambda: _curves(world.home, job, "finetune", len(expected)), "MLflow to catch up")
    assert sorted(curves) == sorted(expected)


def test_a_killed_replica_and_a_killed_router_are_replaced_and_the_next_requests_succeed(
    world: LoopWorld,
) -> None:
    job = world.submit(SHORT)
    assert world.wait_until_ended(job)["state"] == "completed"
    world.client.register(job, "trained_model", name="tiny")
    world.client.create_endpoint("chat")
    world.client.create_deployment("chat", "blue", "tiny:1")
    world.client.set_traffic("chat", {"blue": 100})
    wait_for(lambda: world.client.deployment("chat", "blue")["state"] == "ready", "the deployment")
    wait_for(lambda: world.client.endpoint("chat")["openai_base_url"], "the router")
    url = str(world.client.endpoint("chat")["openai_base_url"])
    key = world.client.keys("chat")["primary"]
    assert ask(url, key)

    (replica,) = world.client.deployment("chat", "blue")["replica_states"]
    world.kill(world.home / "replicas/chat/blue" / str(replica["number"]))
    assert ask(url, key)

    world.kill(world.service_folder("router"))
    wait_for(lambda: ask_or_none(url, key), "the router to come back on its port")
    assert world.client.endpoint("chat")["openai_base_url"] == url

    world.client.delete_endpoint("chat")
    wait_for(lambda: world.client.endpoints() == [], "the endpoint to go")
    wait_for(lambda: world.processes() == [f"tracker/{_starts(world)}"], "its processes to go")
    assert not (world.home / "replicas/chat").exists()
    assert ask_or_none(url, key) is None


def ask(url: str, key: str) -> str:
    from openai import OpenAI

    with OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60) as client:
        answer = client.chat.completions.create(
            model="chat", messages=[{"role": "user", "content": "Hi"}], max_tokens=4, temperature=0
        )
    assert answer.usage is not None
    return f"{answer.choices[0].message.content}/{answer.usage.completion_tokens}"


def ask_or_none(url: str, key: str) -> str | None:
    from openai import APIError

    try:
        return ask(url, key)
    except APIError:
        return None


def _starts(world: LoopWorld) -> int:
    return int(world.service_folder("tracker").name)


def _curves(home: Path, job: str, step: str, enough: int) -> list[tuple[str, int]] | None:
    """(metric, step) pairs that MLflow holds for the attempts of a step, once there are enough of them."""
    import sqlite3

    with sqlite3.connect(f"file:{home}/mlflow/mlflow.db?mode=ro", uri=True) as connection:
        found = connection.execute(
            "SELECT m.key, m.step FROM metrics m JOIN tags t ON t.run_uuid = m.run_uuid"
            " WHERE t.key = 'tuneloop.attempt' AND t.value LIKE ? AND m.key != 'peak_memory_bytes'",
            (f"{job}/{step}/%",),
        ).fetchall()
    connection.close()
    return found if len(found) >= enough else None
