"""What `plan_fit.py` and `plan_accuracy.py` share: a configuration, and the peak that the real finetune step
reaches with it in a process of its own.

Models are random and have the families' real shapes; rows are random tokens. A model is made by another
process and kept under `--folder`, so that making it costs the measured process nothing.

One process: the kernel's largest resident set (VmHWM). Several: those of the step's process, torchrun and the
ranks added up, less the pages that are there once and were counted more than once: what resident sets exceed
proportional ones by (Rss - Pss of smaps_rollup, added up) in the fullest of looks taken ten times a second.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tuneloop.adapters.local import NO_CACHED_FRAGMENTS
from tuneloop.core.plan import Peak, Rows, Setup, architecture_of, choose, peak
from tuneloop.core.recipe import FinetuneParameters
from tuneloop.core.types import Architecture, ResultFile, StepFile

LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Case:
    """One configuration; `name` is made of what differs."""

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    length: int
    """Tokens of every row."""
    lora_r: int = 0
    """0: all weights are trained."""
    dora: bool = False
    rows: int = 1
    """Of an optimiser step."""
    pack: int = 0
    """`pack_tokens`; 0: one row at a time."""
    checkpointed: bool = False
    learned_share: float = 0.6
    """Of a row's tokens, at its end."""
    evaluated: int = 0
    """Validation rows; 0: no evaluation."""
    optimizer: str = "adamw_torch"
    dtype: str = "bfloat16"
    """Of the weights' file."""
    processes: int = 1
    strategy: str = "ddp"
    """Of several processes: ddp, fsdp, zero2, zero3."""
    steps: int = 3

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def shape(self) -> str:
        tied = "-tied" if self.tied else ""
        return (
            f"{self.family}-{self.hidden}x{self.intermediate}x{self.layers}-{self.heads}of{self.kv_heads}"
            f"-v{self.vocabulary}{tied}-{self.dtype}"
        )

    @property
    def name(self) -> str:
        adapter = "DoRA" if self.dora else "LoRA"
        how = f"{adapter} {self.lora_r}" if self.lora_r else "full"
        more = f" {self.processes} {self.strategy}" if self.processes > 1 else ""
        more += " checkpointed" if self.checkpointed else ""
        more += " +eval" if self.evaluated else ""
        more += " adafactor" if self.optimizer == "adafactor" else ""
        more += f" learned {self.learned_share}" if self.learned_share != 0.6 else ""
        millions = f"{self.architecture().parameters / 1e6:.0f}M"
        return f"{self.family} {millions} {how} {self.rows}x{self.length} pack {self.pack_tokens}{more}"

    @property
    def pack_tokens(self) -> int:
        return self.pack or self.length

    def config(self) -> dict[str, Any]:
        """Of transformers."""
        return {
            "model_type": self.family,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 4096,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }

    def architecture(self) -> Architecture:
        return architecture_of(self.config())

    def parameters(self) -> FinetuneParameters:
        return FinetuneParameters(
            apply_lora=self.lora_r > 0,
            lora_r=self.lora_r or 8,
            lora_alpha=16,
            lora_use_dora=self.dora,
            per_device_train_batch_size=self.rows // self.processes,
            number_of_gpu_to_use_finetuning=self.processes,
            cpu_processes=self.processes,
            **self._sharing(),
            pack_tokens=self.pack_tokens,
            activation_checkpointing="always" if self.checkpointed else "never",
            max_steps=self.steps,
            optim=self.optimizer,  # type: ignore[arg-type]
            evaluation_strategy="epoch" if self.evaluated else "disable",
            learning_rate=1e-5,
        )

    def _sharing(self) -> dict[str, Any]:
        if self.processes == 1:
            return {}
        if self.strategy.startswith("zero"):
            return {"apply_deepspeed": True, "deepspeed_stage": self.strategy[-1]}
        return {"strategy": self.strategy}


def learned_tokens(case: Case) -> int:
    """Of one row."""
    return max(1, int(case.length * case.learned_share))


def setup_of(case: Case) -> Setup:
    return Setup.of(case.parameters().model_dump(), has_fast_bf16=False, devices=case.processes)


def rows_of(case: Case) -> Rows:
    return Rows(
        longest=case.length,
        count=case.rows * case.steps,
        validation_tokens=case.evaluated * case.length,
        learned_share=learned_tokens(case) / case.length,
        known_by="tokens",
    )


def predict(case: Case) -> Peak:
    file_bytes = (2 if case.dtype == "bfloat16" else 4) * case.architecture().parameters
    chosen = choose(
        case.architecture(),
        setup_of(case),
        rows_of(case),
        device="cpu",
        available_bytes=None,
        file_bytes=file_bytes,
    )
    return peak(case.architecture(), chosen.setup, rows_of(case), device="cpu", file_bytes=file_bytes)


def measure(case: Case, folder: Path, deepspeed: Path | None = None) -> dict[str, Any]:
    """`peak_memory_bytes` of the finetune step, and its `seconds`. `deepspeed`: where that is, when it is not
    installed; only runs that use it find it, since transformers imports it wherever it is found."""
    model = folder / "models" / case.shape
    if not (model / "config.json").exists():
        _child("model", json.dumps(asdict(case)), str(model))
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    _child("data", json.dumps(asdict(case)), str(run / "dataset"))
    step = StepFile.model_validate(
        {
            "attempt": "bench/finetune/1",
            "attempt_id": "bench",
            "kind": "finetune",
            "parameters": case.parameters().model_dump(mode="json", exclude_defaults=True),
            "inputs": {
                "model": {"path": str(model), "digest": "sha256:model"},
                "dataset": {"path": str(run / "dataset"), "digest": "sha256:data"},
            },
            "outputs": {"trained": "adapter_folder" if case.lora_r else "model_folder"},
        }
    )
    (run / "step.json").write_text(step.model_dump_json(exclude_none=True), encoding="utf-8")
    began = time.monotonic()
    with open(run / "log.txt", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tuneloop.steps", str(run)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(case, deepspeed),
        )
        together = _watch(process) if case.processes > 1 else 0
        process.wait()
    result = ResultFile.model_validate_json((run / "result.json").read_text(encoding="utf-8"))
    if result.status != "succeeded":
        raise SystemExit(f"{case.name}: {result.error}")
    alone = result.peak_memory_bytes or 0
    return {"peak_memory_bytes": together or alone, "seconds": time.monotonic() - began}


def _environment(case: Case, deepspeed: Path | None) -> dict[str, str]:
    # As the server starts steps (`adapters.local`).
    found = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "OMP_WAIT_POLICY": "passive",
        "GLIBC_TUNABLES": NO_CACHED_FRAGMENTS,
    }
    if deepspeed is not None and case.strategy.startswith("zero"):
        found["PYTHONPATH"] = os.pathsep.join([str(deepspeed), *filter(None, [found.get("PYTHONPATH")])])
    return found


def _watch(process: subprocess.Popen[bytes]) -> int:
    """Until it has ended: the peak of it and of all that it starts."""
    import psutil

    most = fullest = counted_twice = 0
    whole = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            there = [whole.pid, *(each.pid for each in whole.children(recursive=True))]
        except psutil.NoSuchProcess:
            break
        seen = [memory for memory in map(_memory_of, there) if memory is not None]
        # Of those that are there at the same time: who asks torch for its devices is gone before the others.
        most = max(most, sum(memory[0] for memory in seen))
        proportional = sum(memory[2] for memory in seen)
        if proportional > fullest:
            fullest, counted_twice = proportional, sum(memory[1] for memory in seen) - proportional
        time.sleep(LOOK_SECONDS)
    return most - counted_twice


def _memory_of(pid: int) -> tuple[int, int, int] | None:
    """Largest resident set so far, resident and proportional set now."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
    except OSError:
        return None
    found = _kilobytes(status, "VmHWM"), _kilobytes(rollup, "Rss"), _kilobytes(rollup, "Pss")
    return found if found[0] else None


def _kilobytes(text: str, name: str) -> int:
    line = next((line for line in text.splitlines() if line.startswith(f"{name}:")), f"{name}: 0 kB")
    return 1024 * int(line.split()[1])


def _child(what: str, case: str, target: str) -> None:
    subprocess.run([sys.executable, __file__, what, case, target], check=True)


def make_model(case: Case, target: Path) -> None:
    """Random weights in Hugging Face layout."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**case.config())
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, case.dtype))
    model.save_pretrained(target)
    # The finetune step asks that there is one and copies it.
    (target / "tokenizer.json").write_text("{}", encoding="utf-8")


def make_data(case: Case, target: Path) -> None:
    """Rows of equal length, learned at their end, for all steps and one evaluation."""
    import numpy as np
    import pyarrow as pa

    target.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name, count in (("train", case.rows * case.steps), ("validation", max(1, case.evaluated))):
        ids = generator.integers(3, case.vocabulary, size=(count, case.length), dtype=np.int32)
        learn = np.zeros((count, case.length), dtype=bool)
        learn[:, case.length - learned_tokens(case) :] = True
        table = pa.table(
            {
                "input_ids": pa.array(list(ids), type=pa.list_(pa.int32())),
                "learn": pa.array(list(learn), type=pa.list_(pa.bool_())),
                "row": pa.array(range(1, count + 1), type=pa.int64()),
            }
        )
        with (
            pa.OSFile(str(target / f"{name}.arrow"), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as writer,
        ):
            writer.write_table(table)


if __name__ == "__main__":
    {"model": make_model, "data": make_data}[sys.argv[1]](Case(**json.loads(sys.argv[2])), Path(sys.argv[3]))
