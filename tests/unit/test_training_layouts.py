"""Several processes against one: the same losses, however the work is laid out; and again after a death.

All runs belong to one start of `tests.ranks`, whose outcomes the tests read.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

pytest.importorskip("torch")

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.conversations import write_dataset
from tests.models import tiny_model
from tests.ranks import Group, Outcome, Ran, Scenario, has_deepspeed, run
from tuneloop.core.errors import Internal, Unsupported
from tuneloop.core.recipe import FinetuneParameters
from tuneloop.training.layout.base import decoder_layers, refuse_what_cannot_be_cut
from tuneloop.training.layout.shards import Shards
from tuneloop.training.plan import Strategy

pytestmark = pytest.mark.timeout(1500)  # of a machine with other work; 40 s on a quiet one

SEVERAL = [each for each in get_args(Strategy) if each != "plain"]
HERE = [each for each in SEVERAL if has_deepspeed() or not each.startswith("zero")]
LORA = {"apply_lora": True}
DROPOUT = {"apply_lora": True, "lora_dropout": 0.3}
STEPS_OF_RESUME = {"num_train_epochs": 3, "checkpoint_steps": 2, "number_of_gpu_to_use_finetuning": 3}
EVERY_THIRD = {"evaluation_strategy": "steps", "eval_steps": 3}
DIES_AT = {"ddp": 5, "fsdp": 7, "zero2": 5, "zero3": 7}
"""Steps: one with a checkpoint of the step before, one with a checkpoint two before."""


def of_kind(kind: str) -> str:
    if kind not in HERE:
        pytest.skip("DeepSpeed is not installed: `make .deepspeed/.installed` puts it beside the environment")
    return kind


class Runs:
    """What is run, and where it writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._llama = str(tiny_model(folder / "llama"))
        self._tied = str(tiny_model(folder / "tied", "smollm2"))
        # 17 rows, 8 a step: the third step has one row, for two processes.
        self._dataset = str(write_dataset(folder / "dataset", train=17))

    def go(self) -> Ran:
        alone = [
            self.compared("full", "plain", 8, 1),
            self.compared("lora", "plain", 8, 1, lora=True),
            self.compared("one-by-one", "plain", 1, 8),
            self.resumed("reference", "plain"),
            self.stopping("plain", 8),
        ]
        together = [
            *(self.compared(f"full/{kind}", kind, 4, 1) for kind in HERE),
            *(self.compared(f"lora/{kind}", kind, 2, 2, lora=True) for kind in HERE),
            *(self.resumed(f"undisturbed/{kind}", kind, lora=True) for kind in HERE),
            *(self.stopping(kind, 4) for kind in HERE),
            *(self.with_adafactor(kind) for kind in HERE),
            replace(self.compared("checkpointed/fsdp", "fsdp", 4, 1), is_checkpointed=True),
        ]
        deaths = [self.resumed(f"death/{kind}", kind, lora=True, dies_at=DIES_AT[kind]) for kind in HERE]
        lives = [self.resumed(f"second/{kind}", kind, lora=True, after=f"death/{kind}") for kind in HERE]
        full = [self.resumed(f"cut/{kind}", kind, dies_at=5) for kind in ("plain", *HERE) if kind != "zero3"]
        other = {
            1: [("fsdp", "plain"), ("ddp", "plain"), ("zero2", "plain")],
            2: [("plain", "fsdp"), ("plain", "ddp"), ("fsdp", "ddp"), ("plain", "zero2")],
            3: [("fsdp", "fsdp"), ("zero2", "zero2")],
        }
        return run(
            [
                Group(1, alone),
                Group(2, together),
                *(Group(2, [each]) for each in deaths),
                Group(2, lives),
                *(Group(1 if each.strategy == "plain" else 2, [each]) for each in full),
                *(Group(ranks, self._moves(ranks, pairs)) for ranks, pairs in other.items()),
            ],
            self.folder / "ranks",
        )

    def compared(self, name: str, kind: str, batch: int, accumulation: int, lora: bool = False) -> Scenario:
        return Scenario(
            name,
            self._llama if lora else self._tied,
            self._dataset,
            strategy=kind,
            parameters={
                "per_device_train_batch_size": batch,
                "gradient_accumulation_steps": accumulation,
                "num_train_epochs": 2,
                "evaluation_strategy": "epoch",
                **(LORA if lora else {}),
            },
            lora={} if lora else None,
            # Unequal numbers of packs on two processes.
            pack_tokens=0 if kind == "plain" else 48,
            saves=str(self.weights(name)),
        )

    def resumed(
        self, name: str, kind: str, *, lora: bool = False, dies_at: int | None = None, after: str = ""
    ) -> Scenario:
        """The effective batch is of three processes, whatever number takes it."""
        return Scenario(
            name,
            self._llama if lora else self._tied,
            self._dataset,
            checkpoints=str(self.checkpoints(name)),
            previous=(str(self.checkpoints(after)),) if after else (),
            strategy=kind,
            parameters={
                **STEPS_OF_RESUME,
                **EVERY_THIRD,
                "per_device_train_batch_size": 2,
                **(DROPOUT if lora else {}),
            },
            lora={"lora_dropout": 0.3} if lora else None,
            pack_tokens=64,
            dies_at=dies_at,
            saves=str(self.weights(name)),
        )

    def stopping(self, kind: str, batch: int) -> Scenario:
        return replace(
            self.compared(f"stopping/{kind}", kind, batch, 1),
            parameters={
                "per_device_train_batch_size": batch,
                "num_train_epochs": 3,
                "learning_rate": 0.2,
                "apply_early_stopping": True,
                "evaluation_strategy": "steps",
                "eval_steps": 1,
            },
        )

    def with_adafactor(self, kind: str) -> Scenario:
        return replace(
            self.compared(f"adafactor/{kind}", kind, 4, 1), parameters={"optim": "adafactor", "max_steps": 1}
        )

    def _moves(self, ranks: int, pairs: list[tuple[str, str]]) -> list[Scenario]:
        return [
            self.resumed(moved(source, target, ranks), target, after=f"cut/{source}")
            for source, target in pairs
            if source in ("plain", *HERE)
        ]

    def checkpoints(self, name: str) -> Path:
        return self.folder / "checkpoints" / name

    def weights(self, name: str) -> Path:
        return self.folder / f"{name.replace('/', '-')}.safetensors"


def moved(source: str, target: str, ranks: int) -> str:
    return f"moved/{source}-to-{ranks}-{target}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def ran(runs: Runs) -> Ran:
    return runs.go()


def largest(one: dict[str, float], other: dict[str, float]) -> float:
    assert one
    assert set(one) == set(other)
    return max(abs(value - other[step]) for step, value in one.items())


def relative(one: dict[str, float], other: dict[str, float]) -> float:
    return largest({s: v / other[s] for s, v in one.items()}, dict.fromkeys(other, 1.0))


def check_equal(outcome: Outcome, reference: Outcome, *, losses: float = 1e-5) -> None:
    assert not outcome.error
    assert largest(outcome.losses, reference.losses) <= losses
    assert relative(outcome.norms, reference.norms) <= 1e-5
    assert largest(outcome.eval_losses, reference.eval_losses) <= losses


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("kind", SEVERAL)
def test_two_processes_learn_what_one_learns(ran: Ran, kind: str, mode: str) -> None:
    outcome = ran.outcomes[f"{mode}/{of_kind(kind)}"]
    assert outcome.result["strategy"] == kind
    assert outcome.result["processes"] == 2
    assert len(outcome.losses) == 6
    check_equal(outcome, ran.outcomes[mode])


def test_one_row_at_a_time_learns_the_same(ran: Ran) -> None:
    check_equal(ran.outcomes["one-by-one"], ran.outcomes["full"])


def test_a_sharded_model_may_forget_its_activations(ran: Ran) -> None:
    check_equal(ran.outcomes["checkpointed/fsdp"], ran.outcomes["full"])


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("kind", SEVERAL)
def test_the_trained_weights_come_out_whole(ran: Ran, runs: Runs, kind: str, mode: str) -> None:
    assert ran.outcomes[mode].losses
    found = load_file(runs.weights(f"{mode}/{of_kind(kind)}"))
    expected = load_file(runs.weights(mode))
    assert {name: each.shape for name, each in found.items()} == {n: e.shape for n, e in expected.items()}
    assert all(each.numel() and each.dtype == torch.float32 for each in found.values())
    # Six steps of Adam at 1e-3 make much of a gradient's last bits.
    assert max(float((each - expected[name]).abs().max()) for name, each in found.items()) < 1e-4


@pytest.mark.parametrize("kind", SEVERAL)
def test_processes_draw_different_dropout(ran: Ran, kind: str) -> None:
    first, second = ran.outcomes[f"undisturbed/{of_kind(kind)}"].draws
    assert first != second


@pytest.mark.parametrize("kind", SEVERAL)
def test_early_stopping_is_decided_alike(ran: Ran, kind: str) -> None:
    outcome, alone = ran.outcomes[f"stopping/{of_kind(kind)}"], ran.outcomes["stopping/plain"]
    assert outcome.result["is_stopped_early"]
    assert outcome.result["steps"] == alone.result["steps"] < 9
    assert outcome.result["kept_step"] == alone.result["kept_step"]


@pytest.mark.parametrize("kind", SEVERAL)
def test_a_run_after_a_kill_equals_an_undisturbed_one(ran: Ran, runs: Runs, kind: str) -> None:
    whole, second = ran.outcomes[f"undisturbed/{of_kind(kind)}"], ran.outcomes[f"second/{kind}"]
    step = second.result["resumed_from_step"]
    assert DIES_AT[kind] - 2 <= step <= DIES_AT[kind]
    assert len(second.losses) == 9 - step
    check_equal(second, after(step, whole), losses=1e-6)
    assert second.result["kept_step"] == whole.result["kept_step"]
    assert second.draws == whole.draws
    one, other = (load_file(runs.weights(f"{each}/{kind}")) for each in ("undisturbed", "second"))
    assert max(float((one[name] - other[name]).abs().max()) for name in one) <= 1e-6


def after(step: int, outcome: Outcome) -> Outcome:
    def later(curve: dict[str, float]) -> dict[str, float]:
        return {key: value for key, value in curve.items() if int(key) > step}

    return replace(
        outcome,
        losses=later(outcome.losses),
        norms=later(outcome.norms),
        eval_losses=later(outcome.eval_losses),
    )


def test_a_rank_does_not_outlive_one_that_was_killed(ran: Ran) -> None:
    killed = [codes for codes in ran.codes if -9 in codes and len(codes) > 1]
    assert len(killed) == 2 * len(HERE) - ("zero3" in HERE)
    # The first ends by itself, with an error, long before it would give up waiting.
    assert all(codes == [1, -9] for codes in killed)


@pytest.mark.parametrize(
    ("source", "target", "ranks"),
    [
        ("fsdp", "plain", 1),
        ("ddp", "plain", 1),
        ("plain", "fsdp", 2),
        ("plain", "ddp", 2),
        ("fsdp", "ddp", 2),
        ("fsdp", "fsdp", 3),
    ],
)
def test_a_checkpoint_may_be_continued_by_another_number_of_processes(
    ran: Ran, source: str, target: str, ranks: int
) -> None:
    outcome = ran.outcomes[moved(source, target, ranks)]
    assert outcome.result["resumed_from_step"] == 4
    check_equal(outcome, after(4, ran.outcomes["reference"]))
    assert outcome.result["kept_step"] == ran.outcomes["reference"].result["kept_step"]


@pytest.mark.parametrize(
    ("source", "target", "ranks", "words"),
    [
        ("zero2", "plain", 1, "made by 2 processes with zero2, and 1 process with plain cannot continue"),
        ("plain", "zero2", 2, "made by 1 process with plain, and 2 processes with zero2 cannot continue"),
        ("zero2", "zero2", 3, "made by 2 processes with zero2, and 3 processes with zero2 cannot continue"),
    ],
)
def test_what_zero_wrote_is_continued_by_equals_only(
    ran: Ran, source: str, target: str, ranks: int, words: str
) -> None:
    of_kind("zero2")
    outcome = ran.outcomes[moved(source, target, ranks)]
    assert outcome.code == "unsupported"
    assert words in outcome.error
    assert "new job" in outcome.error


@pytest.mark.parametrize("kind", SEVERAL)
def test_adafactor_needs_whole_matrices(ran: Ran, kind: str) -> None:
    outcome = ran.outcomes[f"adafactor/{of_kind(kind)}"]
    assert outcome.code == ("" if kind == "ddp" else "unsupported")
    assert kind == "ddp" or "strategy: ddp" in outcome.error


@pytest.mark.parametrize("kind", ["fsdp", "zero2", "zero3"])
def test_each_process_writes_its_share_and_no_pickle(ran: Ran, runs: Runs, kind: str) -> None:
    assert ran.outcomes[f"second/{of_kind(kind)}"].losses
    folder = runs.checkpoints(f"second/{kind}") / "checkpoint-9"
    assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".json"}
    sizes = {
        stem: [_elements(folder / f"{stem}-0000{rank}-of-00002.safetensors") for rank in (1, 2)]
        for stem in ("weights", "optimizer")
    }
    for one, other in sizes.values():
        assert abs(one - other) <= 0.05 * one
    whole = sum(each.numel() for each in load_file(runs.weights(f"second/{kind}")).values())
    assert whole <= sum(sizes["weights"]) <= 1.05 * whole


def _elements(file: Path) -> int:
    with safe_open(str(file), framework="pt") as opened:
        return sum(opened.get_tensor(name).numel() for name in opened.keys())  # noqa: SIM118


# ---------------------------------------------------------------- parts


def test_rows_are_read_across_the_files_that_hold_them(tmp_path: Path) -> None:
    weight = torch.arange(14.0).reshape(7, 2)
    files = []
    # Chunks as torch makes them for five processes: the last has none.
    for place, chunk in enumerate([*weight.chunk(5), weight[:0]]):
        files.append(tmp_path / f"{place}.safetensors")
        save_file({"weight": chunk.contiguous(), "step": torch.tensor(3.0)}, files[-1])
    with Shards(files) as shards:
        assert shards.shape("weight") == [7, 2]
        assert shards.shape("step") == []
        assert torch.equal(shards["weight"], weight)
        assert float(shards["step"]) == 3
        assert torch.equal(shards.rows("weight", 1, 6), weight[1:6])
        assert shards.rows("weight", 7, 7).shape == (0, 2)


def test_weights_that_were_not_sharded_are_not_trained() -> None:
    from tuneloop.training.layout import fsdp

    with pytest.raises(Internal, match="2 weights are not sharded, weight for one"):
        fsdp._check_sharded(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("kind", ["fsdp", "zero3"])
def test_4_bit_weights_are_not_cut(kind: Any) -> None:
    chosen = FinetuneParameters(apply_lora=True, quantization="4bit")
    with pytest.raises(Unsupported, match=f"4bit' and training is laid out by {kind}.*strategy: ddp"):
        refuse_what_cannot_be_cut(chosen, kind)


def test_4_bit_weights_stay_whole_in_stage_2() -> None:
    refuse_what_cannot_be_cut(FinetuneParameters(apply_lora=True, quantization="4bit"), "zero2")


def test_layers_are_what_a_model_says_or_its_longest_list() -> None:
    plain: Any = torch.nn.Module()
    plain.short = torch.nn.ModuleList([torch.nn.Linear(1, 1)])
    plain.long = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(3))
    assert decoder_layers(plain) == list(plain.long)
    plain._no_split_modules = ["Bilinear"]
    plain.other = torch.nn.Bilinear(1, 1, 1)
    assert decoder_layers(plain) == [plain.other]


def test_deepspeed_that_is_missing_comes_with_its_install_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys

    from tuneloop.training.layout import zero

    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(Unsupported, match=r"pip install 'tuneloop\[deepspeed\]'"):
        zero.import_deepspeed(torch.device("cpu"))
