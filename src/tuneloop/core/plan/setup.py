"""What a plan is made of besides the model: how it is trained, on which rows, and where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from tuneloop.core.types import Noun

Sharding = Literal["none", "zero1", "zero2", "zero3"]
"""How model states are cut between devices (ZeRO, arXiv:1910.02054). FSDP's full sharding plans as
`zero3`."""

Offload = Literal["none", "optimizer", "all"]
"""What of the states lies in the host's memory: nothing, the optimiser, or the optimiser and the weights."""

GEMM_TARGETS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "down_proj",
)


class Setup(Noun):
    """How a model is trained. Everything that moves memory or time, and nothing else."""

    apply_lora: bool = False
    lora_r: int = 8
    lora_targets: tuple[str, ...] | None = None
    """None: every linear layer but the head."""
    has_dropout: bool = False
    """In front of the adapters."""
    batch_size: int = 1
    """Rows of a micro-batch on one device."""
    eval_batch_size: int = 1
    accumulation: int = 1
    is_bf16: bool = False
    """Matrix products, and frozen weights, in 16 bits; what is trained stays in 32 (but see `sharding`)."""
    optimizer: Literal["adamw_torch", "adafactor"] = "adamw_torch"
    is_packed: bool = True
    """A micro-batch's rows lie end to end in one row; False: padded to the longest."""
    checkpointing: bool = False
    """Only the inputs of layers are kept; the rest is computed again."""
    sharding: Sharding = "none"
    offload: Offload = "none"
    devices: int = 1
    """Of all nodes."""
    nodes: int = 1
    evaluates: bool = True
    epochs: int = 1
    max_steps: int = -1

    @classmethod
    def of(
        cls, finetune: Mapping[str, Any], *, has_fast_bf16: bool, devices: int = 1, nodes: int = 1
    ) -> Self:
        """From the parameters of a finetune step (`FinetuneParameters.model_dump()`).

        Without fast 16-bit arithmetic precision "16" runs as "32", as training does; with one device ZeRO
        has nothing to shard. Devices that are asked for and not there are made up for by accumulation.
        """
        asked = finetune["number_of_gpu_to_use_finetuning"] * finetune["num_nodes_finetune"]
        is_sharded = bool(finetune["apply_deepspeed"]) and devices > 1
        targets = finetune.get("lora_target_modules")
        return cls(
            apply_lora=finetune["apply_lora"],
            lora_r=finetune["lora_r"],
            lora_targets=None if targets is None else tuple(targets),
            has_dropout=finetune["lora_dropout"] > 0,
            batch_size=finetune["per_device_train_batch_size"],
            eval_batch_size=finetune["per_device_eval_batch_size"],
            accumulation=finetune["gradient_accumulation_steps"] * max(1, -(-asked // devices)),
            is_bf16=str(finetune["precision"]) == "16" and has_fast_bf16,
            optimizer=finetune["optim"],
            sharding=("none", "zero1", "zero2", "zero3")[int(finetune["deepspeed_stage"])]
            if is_sharded
            else "none",
            devices=devices,
            nodes=nodes,
            evaluates=finetune["evaluation_strategy"] != "disable",
            epochs=finetune["num_train_epochs"],
            max_steps=finetune["max_steps"],
        )

    @property
    def effective_batch(self) -> int:
        return self.batch_size * self.accumulation * self.devices


Knowledge = Literal["tokens", "characters", "worst case"]
"""Counted with the model's tokenizer; guessed from characters; or only the limit of a row is known."""


class Rows(Noun):
    """Lengths of the rows to train on, in tokens."""

    longest: int
    """Tokens of the longest row, after `max_seq_length` is obeyed."""
    longest_batch: int | None = None
    """Tokens of the longest micro-batch that can be drawn; None: the longest row times the batch size."""
    learned_share: float = 1.0
    """Of the longest micro-batch's tokens, those that count for the loss."""
    count: int | None = None
    """Training rows; None where there is no data yet."""
    tokens: int | None = None
    """Of all training rows."""
    validation_tokens: int = 0
    longest_evaluated: int | None = None
    """Of the validation rows; None: as `longest`."""
    known_by: Knowledge = "worst case"

    def micro_batch(self, batch_size: int) -> int:
        """Tokens of the longest micro-batch; there are no more rows in it than there are."""
        whole = self.longest * (batch_size if self.count is None else min(batch_size, max(1, self.count)))
        return whole if self.longest_batch is None else min(whole, self.longest_batch)

    def cut_to(self, length: int) -> Self:
        """As if `max_seq_length` were `length`."""
        if length >= self.longest:
            return self
        share = length / self.longest
        return self.model_copy(
            update={
                "longest": length,
                "longest_batch": None,
                "longest_evaluated": None
                if self.longest_evaluated is None
                else min(length, self.longest_evaluated),
                # Long rows lose the most; a lower bound of the time, told as "about".
                "tokens": None
                if self.tokens is None or self.count is None
                else min(self.tokens, max(int(self.tokens * share), min(self.tokens, self.count * length))),
            }
        )


TOKEN_CHARACTERS = 3.2
"""Characters of a token, on the low side: English chat text has about 4 (fewer in code and other scripts)."""
TURN_TOKENS = 8
"""What a template adds to a message."""


def rows_by_characters(
    *,
    most_characters: int,
    most_messages: int,
    characters: int,
    learned_characters: int,
    messages: int,
    count: int,
    limit: int,
) -> Rows:
    """A guess of token lengths before anything is tokenised. `limit` is the longest row that is let in."""
    longest = int(most_characters / TOKEN_CHARACTERS) + TURN_TOKENS * (most_messages + 1)
    tokens = int(characters / TOKEN_CHARACTERS) + TURN_TOKENS * (messages + count)
    longest = max(1, min(limit, longest))
    return Rows(
        longest=longest,
        learned_share=min(1.0, max(0.05, learned_characters / max(1, characters) + 0.1)),
        count=count,
        tokens=min(tokens, count * limit),
        known_by="characters",
    )


class Place(Noun):
    """Where a plan is to hold: one device's memory and the host's."""

    name: str
    device: Literal["cpu", "cuda"] = "cpu"
    device_memory_bytes: int
    """Of one device; of the machine when the device is its processor."""
    host_memory_bytes: int
    gpus: int = 0
    """Of each node."""
    gpu: str | None = None
    nodes: int = 1
    cores: int = 1
    disk_bytes: int | None = None
    has_fast_bf16: bool = False
    is_here: bool = True
    """Whether it is this machine."""

    @property
    def devices(self) -> int:
        return max(1, self.gpus) * self.nodes
