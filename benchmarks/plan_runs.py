"""What `plan_fit.py` and `plan_accuracy.py` share: a configuration, and the peak that the real finetune step
reaches with it in a process of its own.

Models are random and have the families' real shapes (`LlamaConfig`, `Phi3Config`, `Qwen2Config`,
`Qwen3Config`); rows are random tokens. A model is made by another process and kept under `--folder`, so that
making it costs the measured process nothing.
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

from tuneloop.core.plan import Peak, Rows, Setup, peak
from tuneloop.core.recipe import FinetuneParameters
from tuneloop.core.types import Architecture, ResultFile, StepFile


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
    batch: int = 1
    accumulation: int = 1
    learned_share: float = 0.6
    """Of a row's tokens, at its end."""
    evaluates: bool = False
    eval_batch: int = 1
    optimizer: str = "adamw_torch"
    dtype: str = "bfloat16"
    """Of the weights' file."""
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
        how = f"LoRA {self.lora_r}" if self.lora_r else "full"
        more = " +eval" if self.evaluates else ""
        more += f" x{self.accumulation}" if self.accumulation > 1 else ""
        more += " adafactor" if self.optimizer == "adafactor" else ""
        millions = f"{self.architecture().parameters / 1e6:.0f}M"
        return f"{self.family} {millions} {how} b{self.batch} L{self.length}{more}"

    def architecture(self) -> Architecture:
        return Architecture(
            family=self.family,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            layers=self.layers,
            attention_heads=self.heads,
            key_value_heads=self.kv_heads,
            head_size=self.head_size,
            vocabulary_size=self.vocabulary,
            tied_embeddings=self.tied,
            qkv_bias=self.family == "qwen2",
            qk_norm=self.family == "qwen3",
        )

    def parameters(self) -> FinetuneParameters:
        return FinetuneParameters(
            apply_lora=self.lora_r > 0,
            lora_r=self.lora_r or 8,
            lora_alpha=16,
            per_device_train_batch_size=self.batch,
            per_device_eval_batch_size=self.eval_batch,
            gradient_accumulation_steps=self.accumulation,
            max_steps=self.steps,
            optim=self.optimizer,  # type: ignore[arg-type]
            evaluation_strategy="epoch" if self.evaluates else "disable",
            learning_rate=1e-5,
        )


def learned_tokens(case: Case) -> int:
    """Of one row."""
    return max(1, int(case.length * case.learned_share))


def setup_of(case: Case) -> Setup:
    return Setup.of(case.parameters().model_dump(), has_fast_bf16=False)


def rows_of(case: Case) -> Rows:
    return Rows(longest=case.length, learned_share=learned_tokens(case) / case.length, known_by="tokens")


def predict(case: Case) -> Peak:
    size = 2 if case.dtype == "bfloat16" else 4
    parameters = case.architecture().parameters
    return peak(
        case.architecture(), setup_of(case), rows_of(case), device="cpu", file_bytes=size * parameters
    )


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """`peak_memory_bytes` of the finetune step, and its `seconds`."""
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
        subprocess.run(
            [sys.executable, "-P", "-m", "tuneloop.steps", str(run)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "passive"},
        )
    result = ResultFile.model_validate_json((run / "result.json").read_text(encoding="utf-8"))
    if result.status != "succeeded":
        raise SystemExit(f"{case.name}: {result.error}")
    return {"peak_memory_bytes": result.peak_memory_bytes, "seconds": time.monotonic() - began}


def _child(what: str, case: str, target: str) -> None:
    subprocess.run([sys.executable, __file__, what, case, target], check=True)


def make_model(case: Case, target: Path) -> None:
    """Random weights in Hugging Face layout."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    values: dict[str, Any] = {
        "hidden_size": case.hidden,
        "intermediate_size": case.intermediate,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.kv_heads,
        "vocab_size": case.vocabulary,
        "tie_word_embeddings": case.tied,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if case.family == "qwen3":
        values["head_dim"] = case.head_size
    config = AutoConfig.for_model(case.family, **values)
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
    rows = case.batch * case.accumulation * case.steps
    for name, count in (("train", rows), ("validation", case.eval_batch)):
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
