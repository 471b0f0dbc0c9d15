"""A workspace of its own with a real server, and what a test needs to push it around."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.models import tiny_model
from tuneloop import daemon
from tuneloop.adapters.local import OWNER_VARIABLE
from tuneloop.client import Client, Submission
from tuneloop.core.settings import Settings
from tuneloop.core.types import ProcessIdentity

CARD = """
name: Tiny-Chat
version: "1"
description: A random model of some thousand parameters, for tests.
license: apache-2.0
publisher: Tuneloop
parameters: 1000
context_length: 256
architecture: {{family: llama, hidden_size: 8, intermediate_size: 16, layers: 1, attention_heads: 1,
  key_value_heads: 1, head_size: 8, vocabulary_size: 8, tied_embeddings: true}}
template_family: llama-3
sources:
  - type: folder
    path: {folder}
references: {{architecture: made up, parameters: made up}}
"""

RECIPE = """
experiment: tests
model: Tiny-Chat
data: {train: train.jsonl, validation: test.jsonl, test: test.jsonl}
finetune:
  apply_lora: true
  lora_r: 4
  learning_rate: 1e-2
  num_train_epochs: 2
  per_device_train_batch_size: 4
  evaluation_strategy: epoch
  logging_steps: 1
  save_total_limit: 2
evaluate: {samples: 1, max_new_tokens: 8}
"""

SLOW = {"finetune.num_train_epochs": "100"}
"""Some seconds of training on the tiny model: long enough to kill things in the middle."""

SHORT = RECIPE.replace("evaluate: {samples: 1, max_new_tokens: 8}", "evaluate: false")
"""Without the last step, for tests that need no evaluation."""


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 120.0) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for: {what}"
        time.sleep(0.05)


def row(question: str, answer: str) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"prompt": question, "messages": messages, "prompt_id": "x"})


def write_rows(folder: Path) -> None:
    colours = ["red", "green", "blue", "black", "white", "grey", "pink", "brown"]
    train = [row(f"What is colour {n}?", f"It is {colour}.") for n, colour in enumerate(colours)] * 2
    (folder / "train.jsonl").write_text("\n".join(train) + "\n", encoding="utf-8")
    (folder / "test.jsonl").write_text("\n".join(train[:4]) + "\n", encoding="utf-8")


class LoopWorld:
    def __init__(self, folder: Path, model: Path | None = None) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder)
        self.settings = Settings(home=folder / "home")
        self.home = self.settings.home
        self.model = model or tiny_model(folder / "model")
        self.client = self.connect()
        self.client.add_card(CARD.format(folder=self.model))

    # ---------------------------------------------------------------- the server

    def connect(self) -> Client:
        server = daemon.ensure(self.settings)
        return Client(server.url, server.token)

    def server_pid(self) -> int:
        found = daemon.find(self.settings)
        assert found is not None
        return found.pid

    def restart_server(self) -> None:
        self.client.close()
        self.client = self.connect()

    def take_down(self) -> None:
        if daemon.find(self.settings) is None:
            self.restart_server()
        self.client.shutdown("all")
        self.client.close()
        wait_for(lambda: not daemon.is_locked(self.home), "the server to end")
        for child in daemon.started:
            child.poll()

    def home_id(self) -> str:
        return str(json.loads((self.home / "home.json").read_text())["id"])

    def processes(self) -> list[str]:
        """Owners of the processes of this home that are alive, the server left out."""
        found = []
        for process in psutil.process_iter():
            try:
                owner = process.environ().get(OWNER_VARIABLE, "")
                if owner.startswith(self.home_id()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(owner.removeprefix(f"{self.home_id()}/"))
            except psutil.Error:
                continue
        return found

    # ---------------------------------------------------------------- jobs

    def submit(self, recipe: str = RECIPE, **overrides: Any) -> str:
        force = bool(overrides.pop("force_rerun", False))
        submission = Submission(
            text=recipe,
            path="recipe.yaml",
            folder=str(self.folder),
            overrides={key: str(value) for key, value in overrides.items()},
            force_rerun=force,
        )
        return str(self.client.submit(submission)["name"])

    def state(self, job: str) -> str:
        return str(self.client.job(job)["state"])

    def step(self, job: str, name: str) -> dict[str, Any]:
        return next(dict(step) for step in self.client.job(job)["steps"] if step["name"] == name)

    def wait_until_ended(self, job: str, seconds: float = 180.0) -> dict[str, Any]:
        ended = {"completed", "failed", "canceled"}
        wait_for(lambda: self.state(job) in ended, f"{job} to end", seconds)
        return dict(self.client.job(job))

    def wait_until_training(self, job: str, checkpoints: int = 1) -> Path:
        """Until finetune has written that many checkpoints; its attempt folder."""
        wait_for(lambda: self.step(job, "finetune")["attempts"], "finetune to start")
        folder = self.home / "jobs" / job / "finetune" / str(self.step(job, "finetune")["attempts"])
        wait_for(
            lambda: (
                self.state(job) in {"failed", "completed"}
                or len(list((folder / "checkpoints").glob("checkpoint-*"))) >= checkpoints
            ),
            "a checkpoint",
        )
        assert self.state(job) == "running", self.client.job(job)["error"]
        return folder

    def losses(self, job: str) -> dict[int, float]:
        lines = self.client.metrics(job, "finetune")
        return {line.step: line.values["loss"] for line in lines if "loss" in line.values}

    # ---------------------------------------------------------------- processes

    def identity(self, folder: Path) -> ProcessIdentity:
        wait_for(lambda: (folder / "process.json").exists(), f"a process in {folder.name}")
        return ProcessIdentity.model_validate_json((folder / "process.json").read_text())

    def kill(self, folder: Path) -> None:
        os.kill(self.identity(folder).pid, signal.SIGKILL)

    def service_folder(self, name: str) -> Path:
        wait_for(
            lambda: [one for one in self.client.status()["services"] if one["name"] == name], f"the {name}"
        )
        (service,) = [one for one in self.client.status()["services"] if one["name"] == name]
        return self.home / str(service["folder"])
