"""A job of several processes under its server, one of which is killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")

from tests.attempts import processes_of
from tests.loop.world import SHORT, LoopWorld, wait_for

pytestmark = pytest.mark.slow

TOGETHER = {
    "finetune.number_of_gpu_to_use_finetuning": 2,
    "finetune.cpu_processes": 2,
    "finetune.per_device_train_batch_size": 2,
    "finetune.num_train_epochs": 100,
    "finetune.checkpoint_steps": 5,
}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[LoopWorld]:
    one = LoopWorld(tmp_path / "world")
    yield one
    one.take_down()
    wait_for(lambda: one.processes() == [], "every process to be gone", seconds=10)


def test_a_job_that_loses_a_rank_tries_again_from_its_checkpoint_and_ends_as_if_nothing_had_been(
    world: LoopWorld,
) -> None:
    undisturbed = world.submit(SHORT, **TOGETHER)
    assert world.wait_until_ended(undisturbed)["state"] == "completed"
    # Another limit of checkpoints changes no loss, and keeps the cache from answering.
    job = world.submit(SHORT, **TOGETHER, **{"finetune.save_total_limit": 3})
    folder = world.wait_until_training(job, checkpoints=2)
    ranks = wait_for(lambda: {"0", "1"} <= set(processes_of(folder)) and processes_of(folder), "both ranks")
    ranks["1"].kill()
    ended = world.wait_until_ended(job)
    assert ended["state"] == "completed", ended["error"]
    assert world.step(job, "finetune")["attempts"] == 2
    lost = json.loads((folder / "result.json").read_text())
    assert lost["error"]["code"] == "rank_lost"
    first = json.loads((folder.parent / "2" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] > 1, "the second attempt started over"
    expected, found = world.losses(undisturbed), world.losses(job)
    assert found.keys() == expected.keys()
    assert max(abs(found[step] - expected[step]) for step in expected) < 1e-6
