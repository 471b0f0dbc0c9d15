"""`tuneloop plan`, and `tuneloop run` asking it first."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.conftest import Ran
from tests.unit.cli.fake_api import FakeApi
from tuneloop.cli import looks, planning
from tuneloop.core.errors import ModelUnavailable, StepFailed

GB = 10**9
RECIPE = """model: SmolLM2-135M-Instruct
data:
  train: train.jsonl
finetune:
  apply_lora: true
  per_device_train_batch_size: 8
  activation_checkpointing: never
"""


class Looks:
    """Answers in place of step processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.fails: dict[str, Exception] = {}
        self.longest = 900

    def tokenizer(self, model: str) -> Path:
        if "tokenizer" in self.fails:
            raise self.fails["tokenizer"]
        return self.folder

    def run(
        self, kind: str, parameters: Mapping[str, Any], inputs: Mapping[str, Path], outputs: Any, **_: Any
    ) -> Path:
        self.asked.append((kind, dict(parameters)))
        if kind in self.fails:
            raise self.fails[kind]
        made = self.folder / kind / "outputs"
        made.mkdir(parents=True, exist_ok=True)
        lengths = {"max": self.longest, "histogram": [{"up_to": 1024, "conversations": 40}]}
        tokens = {"rows": 40, "tokens": 20_000, "learned_tokens": 8_000, "lengths": lengths}
        checked = {"tokens": {str(inputs.get("train")): tokens}, "max_seq_length": 8192}
        said = checked if kind == "check" else {"tokens_per_second": 100.0}
        name = {"check": "report", "probe": "rate"}[kind]
        (made / name).write_text(json.dumps(said), encoding="utf-8")
        return self.folder / kind


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, api: FakeApi) -> Looks:
    # The fake card's allow list names one old size; without it every size may be recommended.
    api.cards = [card.model_copy(update={"tags": {}}) for card in api.cards]
    fake = Looks(tmp_path / "looks")
    monkeypatch.setattr(looks, "tokenizer", fake.tokenizer)
    monkeypatch.setattr(looks, "run", fake.run)
    return fake


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    row = {
        "messages": [{"role": "user", "content": "a " * 200}, {"role": "assistant", "content": "b " * 200}]
    }
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 40, encoding="utf-8")
    path = tmp_path / "my.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def test_plan_draws_a_bar_for_each_cause_and_the_verdict(
    tuneloop_command: Callable[..., Ran], asked: Looks, recipe: Path, api: FakeApi
) -> None:
    api.computes["local"]["memory_bytes"] = 64 * GB
    ran = tuneloop_command("plan", str(recipe))
    assert ran.code == 0, ran.err
    assert "40, the longest 900 tokens (counted with the model's tokenizer)" in ran.out
    for cause in ("weights", "optimiser", "activations", "logits", "process", "total"):
        assert any(line.startswith(f"  {cause}") for line in ran.out.splitlines()), cause
    assert "Verdict: FITS." in ran.out
    assert "about 3:20 in all, 3:20 an epoch, 5 steps (100 tokens/s" in ran.out
    assert [kind for kind, _ in asked.asked] == ["check", "probe"]


def test_the_json_of_a_plan_adds_up(
    tuneloop_command: Callable[..., Ran], asked: Looks, recipe: Path, api: FakeApi
) -> None:
    api.computes["local"]["memory_bytes"] = 64 * GB
    said = json.loads(tuneloop_command("plan", str(recipe), "--json").out)
    memory = said["peak"]["device"]
    assert sum(memory["causes"].values()) == memory["total_bytes"]
    assert said["limit_bytes"] == 64 * GB
    assert said["time"]["seconds"] == pytest.approx(200)


def test_processes_of_one_processor_are_planned_together_and_share_its_rate(
    tuneloop_command: Callable[..., Ran], asked: Looks, recipe: Path, api: FakeApi
) -> None:
    api.computes["local"]["memory_bytes"] = 64 * GB
    two = ("finetune.number_of_gpu_to_use_finetuning=2", "finetune.cpu_processes=2")
    ran = tuneloop_command("plan", str(recipe), *(f"--set={each}" for each in two))
    assert ran.code == 0, ran.err
    assert "16 rows a step, 32 bits, 2 processes (DDP)" in ran.out
    assert "Peak of memory of all processes" in ran.out
    # As long as with one: there are no more cores.
    assert "about 3:20 in all, 3:20 an epoch, 3 steps (100 tokens/s" in ran.out


def test_what_is_chosen_to_fit_is_shown(
    tuneloop_command: Callable[..., Ran], asked: Looks, recipe: Path, api: FakeApi
) -> None:
    command = ("plan", str(recipe), "--no-probe", "--set=finetune.activation_checkpointing=auto")
    api.computes["local"]["memory_bytes"] = 64 * GB
    assert "; 1,024 tokens at a time\n" in tuneloop_command(*command).out
    api.computes["local"]["memory_bytes"] = 2 * GB
    ran = tuneloop_command(*command)
    assert ran.code == 0
    assert "; 900 tokens at a time, activations computed again\n" in ran.out


def test_what_does_not_fit_comes_with_what_would_and_exits_with_4(
    tuneloop_command: Callable[..., Ran], asked: Looks, recipe: Path, api: FakeApi
) -> None:
    api.computes["local"]["memory_bytes"] = 2_500_000_000
    ran = tuneloop_command("plan", str(recipe), "--no-probe")
    assert ran.code == 4
    assert "Verdict: DOES NOT FIT" in ran.out
    assert "--set finetune.activation_checkpointing=always" in ran.out
    assert "As it is written it would fit on:" in ran.out


def test_a_size_is_planned_for_without_measuring_this_machine(
    tuneloop_command: Callable[..., Ran], asked: Looks, recipe: Path
) -> None:
    ran = tuneloop_command("plan", str(recipe), "--size", "STANDARD_NC24ADS_A100_V4")
    assert ran.code == 0, ran.err
    assert "Standard_NC24ads_A100_v4 (1 A100)" in ran.out
    assert "the rate of this place is not measured" in ran.out
    assert "steps run on this machine, not on" in ran.out
    assert [kind for kind, _ in asked.asked] == ["check"]


def test_a_cluster_is_planned_by_its_size_and_a_recipe_may_name_it(
    tuneloop_command: Callable[..., Ran], asked: Looks, recipe: Path
) -> None:
    tuneloop_command("compute", "create", "big", "--size", "Standard_NC24ads_A100_v4")
    recipe.write_text(RECIPE + "compute: big\n", encoding="utf-8")
    said = json.loads(tuneloop_command("plan", str(recipe), "--json").out)
    assert said["place"]["name"] == "Standard_NC24ads_A100_v4"
    assert tuneloop_command("plan", str(recipe), "--compute", "nobody").code == 3


def test_a_compute_whose_making_failed_is_not_planned_for(
    tuneloop_command: Callable[..., Ran], asked: Looks, recipe: Path, api: FakeApi
) -> None:
    tuneloop_command("compute", "create", "big", "--size", "Standard_NC24ads_A100_v4")
    api.computes["big"]["provisioning_state"] = "failed"
    ran = tuneloop_command("plan", str(recipe), "--compute", "big")
    assert (ran.code, "Provisioning failed" in ran.err) == (4, True)


def test_compute_and_size_together_are_refused(
    tuneloop_command: Callable[..., Ran], asked: Looks, recipe: Path
) -> None:
    ran = tuneloop_command("plan", str(recipe), "--compute", "local", "--size", "NC6s_v3")
    assert (ran.code, "not both" in ran.err) == (2, True)


def test_without_a_tokenizer_lengths_are_guessed_and_it_is_said(
    tuneloop_command: Callable[..., Ran], asked: Looks, recipe: Path, api: FakeApi
) -> None:
    api.computes["local"]["memory_bytes"] = 64 * GB
    asked.fails["tokenizer"] = ModelUnavailable("no network")
    ran = tuneloop_command("plan", str(recipe), "--no-probe")
    assert ran.code == 0
    assert "guessed from characters" in ran.out
    assert "lengths are guessed: no network" in ran.err


def test_the_recipes_column_is_read_where_lengths_are_guessed(
    tuneloop_command: Callable[..., Ran], asked: Looks, recipe: Path, api: FakeApi
) -> None:
    api.computes["local"]["memory_bytes"] = 64 * GB
    asked.fails["tokenizer"] = ModelUnavailable("no network")
    data = recipe.parent / "train.jsonl"
    data.write_text(data.read_text(encoding="utf-8").replace('"messages"', '"talk"'), encoding="utf-8")
    ran = tuneloop_command(
        "plan", str(recipe), "--no-probe", "--json", "--set", "preprocess.messages_column=talk"
    )
    assert json.loads(ran.out)["rows"]["longest"] == 274


def test_a_rate_that_cannot_be_measured_leaves_the_rest_of_the_plan(
    tuneloop_command: Callable[..., Ran], asked: Looks, recipe: Path, api: FakeApi
) -> None:
    api.computes["local"]["memory_bytes"] = 64 * GB
    asked.fails["probe"] = StepFailed("killed")
    ran = tuneloop_command("plan", str(recipe))
    assert ran.code == 0
    assert "the rate is not measured: killed" in ran.err


def test_without_data_the_limit_of_a_row_is_planned_and_said_to_be_the_worst_case(
    tuneloop_command: Callable[..., Ran], asked: Looks, recipe: Path, api: FakeApi
) -> None:
    api.computes["local"]["memory_bytes"] = 640 * GB
    (recipe.parent / "train.jsonl").unlink()
    ran = tuneloop_command("plan", str(recipe), "--set", "preprocess.max_seq_length=512")
    assert "the longest 512 tokens (the limit of a row: the worst case)" in ran.out


def test_recommend_prints_three_ways(
    tuneloop_command: Callable[..., Ran], asked: Looks, recipe: Path, api: FakeApi
) -> None:
    api.computes["local"]["memory_bytes"] = 12 * GB
    ran = tuneloop_command("plan", str(recipe), "--recommend")
    assert ran.code == 0
    assert [line[:2] for line in ran.out.splitlines() if line[:1].isdigit()] == ["1.", "2.", "3."]


@pytest.mark.parametrize(("hidden", "device"), [(False, "cuda"), (True, "cpu")])
def test_here_the_first_gpu_is_planned_for_unless_it_is_hidden(
    tuneloop_command: Callable[..., Ran],
    asked: Looks,
    recipe: Path,
    api: FakeApi,
    monkeypatch: pytest.MonkeyPatch,
    hidden: bool,
    device: str,
) -> None:
    if hidden:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    api.computes["local"]["devices"] = [{"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 80 * GB}]
    place = json.loads(tuneloop_command("plan", str(recipe), "--no-probe", "--json").out)["place"]
    assert (place["device"], place["device_memory_bytes"]) == (device, (8 if hidden else 80) * GB)


# ---------------------------------------------------------------- run


def test_run_refuses_what_does_not_fit_with_the_smallest_changes_and_makes_no_job(
    tuneloop_command: Callable[..., Ran], asked: Looks, recipe: Path, api: FakeApi
) -> None:
    api.computes["local"]["memory_bytes"] = 2_500_000_000
    ran = tuneloop_command("run", str(recipe), "--detach")
    assert ran.code == 4
    assert "The plan does not fit" in ran.err
    assert "activation_checkpointing" in ran.err
    assert ("POST", "/api/jobs") not in [call[:2] for call in api.calls]


def test_run_with_force_runs_it_all_the_same(
    tuneloop_command: Callable[..., Ran], asked: Looks, recipe: Path, api: FakeApi
) -> None:
    api.computes["local"]["memory_bytes"] = 2_500_000_000
    assert tuneloop_command("run", str(recipe), "--detach", "--force").code == 0
    assert asked.asked == []
    assert ("POST", "/api/jobs") in [call[:2] for call in api.calls]


def test_run_tokenises_nothing_where_the_longest_possible_row_fits(
    tuneloop_command: Callable[..., Ran], asked: Looks, recipe: Path, api: FakeApi
) -> None:
    api.computes["local"]["memory_bytes"] = 64 * GB
    assert tuneloop_command("run", str(recipe), "--detach").code == 0
    assert asked.asked == []


def test_run_trusts_no_guess_from_characters(
    tuneloop_command: Callable[..., Ran], asked: Looks, recipe: Path, api: FakeApi
) -> None:
    """By its characters the row has some 270 tokens, which would fit; it has 900, as in a script that has a
    token for each character."""
    api.computes["local"]["memory_bytes"] = 2_500_000_000
    assert tuneloop_command("run", str(recipe), "--detach").code == 4
    assert [kind for kind, _ in asked.asked] == ["check"]


def test_run_counts_tokens_where_it_depends_on_them(
    tuneloop_command: Callable[..., Ran], asked: Looks, recipe: Path, api: FakeApi
) -> None:
    api.computes["local"]["memory_bytes"] = 2_500_000_000
    asked.longest = 60
    assert tuneloop_command("run", str(recipe), "--detach").code == 0
    assert [kind for kind, _ in asked.asked] == ["check"]


def test_what_is_wrong_with_a_recipe_is_told_by_the_submission(
    tuneloop_command: Callable[..., Ran], asked: Looks, recipe: Path, api: FakeApi
) -> None:
    recipe.write_text("model: [", encoding="utf-8")
    tuneloop_command("run", str(recipe), "--detach")
    assert ("POST", "/api/jobs") in [call[:2] for call in api.calls]


# ---------------------------------------------------------------- what is asked


def test_a_histogram_bounds_the_tokens_of_a_step() -> None:
    train = {
        "rows": 5,
        "tokens": 2000,
        "learned_tokens": 1000,
        "lengths": {
            "max": 900,
            "histogram": [{"up_to": 256, "conversations": 3}, {"up_to": 1024, "conversations": 2}],
        },
    }
    found = planning.rows_counted(train, None, 8192, 4)
    assert (found.longest, found.longest_step) == (900, 2 * 900 + 2 * 256)
    assert planning.rows_counted(train, None, 500, 4).longest_step == 2 * 500 + 2 * 256


@pytest.mark.parametrize(
    ("gpu", "fast"), [("NVIDIA H100 80GB HBM3", True), ("Tesla V100-SXM2-32GB", False), ("Tesla T4", False)]
)
def test_gpus_before_ampere_have_no_fast_16_bits(gpu: str, fast: bool) -> None:
    assert planning._has_fast_bf16(gpu) is fast
