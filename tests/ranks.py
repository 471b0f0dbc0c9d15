"""Runs of several processes for tests. `run` starts one program, which imports torch once and forks the
ranks of each group from there: importing costs more than training.

That program is `python -m tests.ranks GROUPS.json FOLDER`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent
DEEPSPEED = ROOT / ".deepspeed"
"""Where `make test` puts it: never into the environment, where transformers and accelerate would import it
each time."""
GROUP_SECONDS = 30
"""How long a rank waits for another."""


def has_deepspeed() -> bool:
    return DEEPSPEED.is_dir() or importlib.util.find_spec("deepspeed") is not None


@dataclass(frozen=True)
class Scenario:
    name: str
    model: str
    """Its folder."""
    dataset: str
    checkpoints: str = ""
    """A folder; left out: one of its own, thrown away."""
    previous: tuple[str, ...] = ()
    """Checkpoint folders of earlier attempts."""
    strategy: str = "plain"
    parameters: dict[str, Any] = field(default_factory=dict)
    pack_tokens: int = 0
    is_checkpointed: bool = False
    is_bf16: bool = False
    dies_at: int | None = None
    """The last rank is gone after this step, without a word."""
    lora: dict[str, Any] | None = None
    """What differs in PEFT's configuration; left out: all weights are trained."""
    saves: str = ""
    """Where the trained weights go."""


@dataclass(frozen=True)
class Outcome:
    losses: dict[str, float] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    eval_losses: dict[str, float] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    error: str = ""
    code: str = ""
    draws: list[float] = field(default_factory=list)
    """A number out of each rank's generator at the end."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Group:
    """Processes that take the same scenarios one after the other."""

    ranks: int
    scenarios: list[Scenario]

    @property
    def may_die(self) -> bool:
        return any(each.dies_at is not None for each in self.scenarios)


@dataclass(frozen=True)
class Ran:
    outcomes: dict[str, Outcome]
    """By the scenario's name; those of a group after one that died are missing."""
    codes: list[list[int]]
    """Exit codes by group and rank."""


def run(groups: Sequence[Group], folder: Path, seconds: float = 1200) -> Ran:
    folder.mkdir(parents=True, exist_ok=True)
    given = folder / "groups.json"
    given.write_text(json.dumps([asdict(each) for each in groups]), encoding="utf-8")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "DS_ACCELERATOR": "cpu",
        # Nothing may be compiled.
        "CXX": "/nonexistent",
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), *([str(DEEPSPEED)] if DEEPSPEED.is_dir() else []), os.environ.get("PYTHONPATH", "")]
        ),
    }
    with open(folder / "log", "wb") as log:
        program = subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", str(given), str(folder)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            start_new_session=True,
        )
    try:
        program.wait(seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)  # and the ranks
        program.wait()
    assert program.returncode == 0, (folder / "log").read_text()[-6000:]
    found: dict[str, Outcome] = {}
    for place in range(len(groups)):
        read = json.loads((folder / f"told-{place}.json").read_text(encoding="utf-8"))
        found |= {name: Outcome(**each) for name, each in read.items()}
    return Ran(found, json.loads((folder / "codes.json").read_text(encoding="utf-8")))


# ---------------------------------------------------------------- the program


def _main(given: Path, folder: Path) -> int:
    """0 unless a rank ended as it should not have."""
    for name in ("torch", "peft", "tuneloop.training"):
        importlib.import_module(name)
    from tuneloop import lm

    with contextlib.suppress(ImportError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("deepspeed")

    lm.quiet()
    read = json.loads(given.read_text(encoding="utf-8"))
    groups = [Group(each["ranks"], [Scenario(**one) for one in each["scenarios"]]) for each in read]
    codes = [_fork(group, place, folder) for place, group in enumerate(groups)]
    (folder / "codes.json").write_text(json.dumps(codes), encoding="utf-8")
    return int(any(any(ended) for group, ended in zip(groups, codes, strict=True) if not group.may_die))


def _fork(group: Group, place: int, folder: Path) -> list[int]:
    """Exit codes by rank."""
    told = folder / f"told-{place}.json"
    told.write_text("{}", encoding="utf-8")
    children = []
    for rank in range(group.ranks):
        child = os.fork()
        if not child:
            _be_rank(group, rank, told, folder / f"store-{place}")
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _be_rank(group: Group, rank: int, told: Path, store: Path) -> None:
    code = 1
    try:
        _take(group, rank, told, store)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _take(group: Group, rank: int, told: Path, store: Path) -> None:
    from torch import distributed

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(group.ranks))
    if group.ranks > 1:
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=group.ranks,
            timeout=timedelta(seconds=GROUP_SECONDS),
        )
    outcomes: dict[str, Any] = {}
    for scenario in group.scenarios:
        own = told.parent / "checkpoints" / scenario.name
        outcomes[scenario.name] = asdict(_train(scenario, rank, group.ranks, own))
        if rank == 0:
            # After each: a later one may end the process.
            told.with_suffix(".new").write_text(json.dumps(outcomes), encoding="utf-8")
            os.replace(told.with_suffix(".new"), told)
    if group.ranks > 1:
        distributed.barrier()
        distributed.destroy_process_group()


def _train(scenario: Scenario, rank: int, world: int, own_folder: Path) -> Outcome:
    import torch
    from safetensors.torch import save_file

    from tests.conversations import Heard
    from tuneloop.core.errors import TuneloopError
    from tuneloop.core.recipe import FinetuneParameters
    from tuneloop.training import Machine, TrainingInputs, plan, train

    heard = Heard()
    parameters = FinetuneParameters.model_validate(
        {
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "evaluation_strategy": "disable",
            "number_of_gpu_to_use_finetuning": world,
            "cpu_processes": world,
            **_strategy(scenario.strategy),
            **scenario.parameters,
        }
    )
    started = time.monotonic()
    chosen = replace(plan(parameters, Machine("cpu", 0, has_fast_bf16=False)), is_bf16=scenario.is_bf16)
    inputs = TrainingInputs(
        Path(scenario.dataset),
        parameters,
        Path(scenario.checkpoints) if scenario.checkpoints else own_folder,
        tuple(Path(each) for each in scenario.previous),
        pack_tokens=scenario.pack_tokens,
        is_checkpointed=scenario.is_checkpointed,
    )
    try:
        with _death(scenario.dies_at if rank == world - 1 else None):
            result = train(_model(scenario), inputs, heard, chosen=chosen)
    except TuneloopError as error:
        return Outcome(error=str(error), code=error.code)
    if scenario.saves and rank == 0:
        save_file({name: weight.contiguous() for name, weight in result.weights.items()}, scenario.saves)
    return Outcome(
        losses=_named(heard.curve("loss")),
        norms=_named(heard.curve("grad_norm")),
        eval_losses=_named(heard.curve("eval_loss")),
        result={name: value for name, value in vars(result).items() if name != "weights"},
        warnings=heard.warnings,
        draws=_of_all_ranks(float(torch.rand(1)), world),
        seconds=time.monotonic() - started,
    )


def _strategy(name: str) -> dict[str, Any]:
    if name.startswith("zero"):
        return {"apply_deepspeed": True, "deepspeed_stage": name[-1]}
    return {"strategy": name if name in ("ddp", "fsdp") else "auto"}


def _model(scenario: Scenario) -> Any:
    import torch

    from tuneloop import lm

    if scenario.lora is None:
        return lm.load_model(Path(scenario.model)).requires_grad_(True)
    base = lm.load_model(Path(scenario.model), torch.bfloat16 if scenario.is_bf16 else torch.float32)
    # PEFT itself, for what `lm.add_lora` does not offer.
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **scenario.lora}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options))


@contextmanager
def _death(step: int | None) -> Iterator[None]:
    """This process ends when it has counted that step."""
    from tuneloop.training.tally import Tally

    counted = Tally.count_step

    def count_step(self: Tally, *values: Any) -> None:
        counted(self, *values)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(Tally, "count_step", count_step):
        yield


def _of_all_ranks(value: float, world: int) -> list[float]:
    import torch
    from torch import distributed

    if world == 1:
        return [value]
    found = [torch.zeros(1) for _ in range(world)]
    distributed.all_gather(found, torch.tensor([value]))
    return [float(each) for each in found]


def _named(curve: dict[int, float]) -> dict[str, float]:
    return {str(step): value for step, value in curve.items()}


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1]), Path(sys.argv[2])))
