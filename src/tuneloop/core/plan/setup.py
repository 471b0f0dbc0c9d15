"""What a plan is made of besides the model: how it is trained, on which rows, and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from tuneloop.core import deepspeed
from tuneloop.core.types import Noun

Sharding = Literal["none", "fsdp", "zero2", "zero3"]
"""How model states are cut between devices: not at all (one device, or DDP), FSDP2's full sharding, ZeRO
(arXiv:1910.02054)."""

Checkpointing = Literal["auto", "always", "never"]
"""Whether activations are computed again in the backward pass. `auto` plans as `never`; `choose` decides."""

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


PACK_TOKENS: Mapping[str, int] = {"cpu": 1024, "cuda": 8192}
"""Most tokens of a pack unless a recipe says otherwise or the longest row has more (`training.loop`)."""


class Setup(Noun):
    """How a model is trained. Everything that moves memory or time, and nothing else."""

    apply_lora: bool = False
    lora_r: int = 8
    lora_targets: tuple[str, ...] | None = None
    """None: every linear layer but the head."""
    has_dropout: bool = False
    """In front of the adapters."""
    is_dora: bool = False
    is_4bit: bool = False
    """The frozen matrices of layers in NF4 (QLoRA, arXiv:2305.14314)."""
    effective_batch: int = 1
    """Rows of an optimiser step, over all devices. Takes no memory."""
    is_packed: bool = True
    """Several rows may be computed at a time; False: one."""
    pack_tokens: int = 0
    """Most tokens that a device computes at a time; 0: `PACK_TOKENS`. A longer row is computed alone."""
    checkpointing: Checkpointing = "auto"
    is_bf16: bool = False
    """Matrix products, and frozen weights, in 16 bits; what is trained stays in 32 (but see `sharding`)."""
    optimizer: Literal["adamw_torch", "adafactor"] = "adamw_torch"
    sharding: Sharding = "none"
    may_shard: bool = False
    """`strategy: auto`: `choose` may turn DDP into FSDP where memory is short."""
    bucket_numbers: int | None = None
    """Of ZeRO's reduction; None: the square of the hidden size."""
    offload: Offload = "none"
    devices: int = 1
    """Of all nodes: one process each."""
    nodes: int = 1
    evaluates: bool = True
    epochs: int = 1
    max_steps: int = -1

    @classmethod
    def of(
        cls, finetune: Mapping[str, Any], *, has_fast_bf16: bool, devices: int = 1, nodes: int = 1
    ) -> Self:
        """From the parameters of a finetune step (`FinetuneParameters.model_dump()`).

        Without fast 16-bit arithmetic precision "16" runs as "32", as training does; one device shards
        nothing. Devices that are asked for and not there change how long a step takes, not what it learns.
        """
        asked = finetune["number_of_gpu_to_use_finetuning"] * finetune["num_nodes_finetune"]
        targets = finetune["lora_target_modules"]
        zero = deepspeed.settings_of(finetune) if devices > 1 else None
        bucket = None if zero is None else zero.zero.get("reduce_bucket_size")
        return cls(
            apply_lora=finetune["apply_lora"],
            lora_r=finetune["lora_r"],
            lora_targets=None if targets is None else tuple(targets),
            has_dropout=finetune["lora_dropout"] > 0,
            is_dora=finetune["apply_lora"] and finetune["lora_use_dora"],
            is_4bit=finetune["apply_lora"] and finetune["quantization"] == "4bit",
            effective_batch=finetune["per_device_train_batch_size"]
            * finetune["gradient_accumulation_steps"]
            * asked,
            is_packed=finetune["packing"],
            pack_tokens=finetune["pack_tokens"],
            checkpointing=finetune["activation_checkpointing"],
            is_bf16=str(finetune["precision"]) == "16" and has_fast_bf16,
            optimizer=finetune["optim"],
            sharding=_sharding(finetune, devices),
            may_shard=devices > 1 and not finetune["apply_deepspeed"] and finetune["strategy"] == "auto",
            bucket_numbers=bucket if isinstance(bucket, int) else None,
            devices=devices,
            nodes=nodes,
            evaluates=finetune["evaluation_strategy"] != "disable",
            epochs=finetune["num_train_epochs"],
            max_steps=finetune["max_steps"],
        )

    @property
    def is_checkpointed(self) -> bool:
        return self.checkpointing == "always"

    @property
    def can_shard(self) -> bool:
        """Adafactor needs whole rows and columns, and weights in 4 bits are not cut."""
        return self.devices > 1 and self.optimizer != "adafactor" and not self.is_4bit

    @property
    def processes_here(self) -> int:
        """Of one node."""
        return max(1, self.devices // self.nodes)


def _sharding(finetune: Mapping[str, Any], devices: int) -> Sharding:
    """As `training.plan.strategy_of`."""
    if devices == 1:
        return "none"
    if finetune["apply_deepspeed"]:
        return "zero3" if str(finetune["deepspeed_stage"]) == "3" else "zero2"
    return "fsdp" if finetune["strategy"] == "fsdp" else "none"


Knowledge = Literal["tokens", "characters", "worst case"]
"""Counted with the model's tokenizer; guessed from characters; or only the limit of a row is known."""


class Rows(Noun):
    """Lengths of the rows to train on, in tokens."""

    longest: int
    """Tokens of the longest row, after `max_seq_length` is obeyed."""
    longest_step: int | None = None
    """Tokens of the most that an optimiser step can draw; None: the longest row times the effective batch."""
    learned_share: float = 1.0
    """Of a pack's tokens, those that count for the loss."""
    count: int | None = None
    """Training rows; None where there is no data yet."""
    tokens: int | None = None
    """Of all training rows."""
    validation_tokens: int = 0
    longest_evaluated: int | None = None
    """Of the validation rows; None: as `longest`."""
    known_by: Knowledge = "worst case"

    @classmethod
    def counted(
        cls,
        lengths: Sequence[int],
        learned: int,
        *,
        effective_batch: int,
        validation_lengths: Sequence[int] = (),
    ) -> Self:
        """Of rows that are tokenised: `lengths` in tokens, `learned` tokens of all of them."""
        descending = sorted((int(each) for each in lengths), reverse=True)
        return cls(
            longest=descending[0],
            longest_step=sum(descending[:effective_batch]),
            # Of a pack: rows differ, so a quarter more than the mean.
            learned_share=min(1.0, 1.25 * learned / max(1, sum(descending))),
            count=len(descending),
            tokens=sum(descending),
            validation_tokens=sum(int(each) for each in validation_lengths),
            longest_evaluated=max((int(each) for each in validation_lengths), default=None),
            known_by="tokens",
        )

    def step(self, effective_batch: int) -> int:
        """Tokens of the most that an optimiser step can draw; there are no more rows in it than there are."""
        count = effective_batch if self.count is None else min(effective_batch, max(1, self.count))
        whole = self.longest * count
        return whole if self.longest_step is None else max(self.longest, min(whole, self.longest_step))

    def cut_to(self, length: int) -> Self:
        """As if `max_seq_length` were `length`."""
        if length >= self.longest:
            return self
        share = length / self.longest
        return self.model_copy(
            update={
                "longest": length,
                "longest_step": None,
                "longest_evaluated": None
                if self.longest_evaluated is None
                else min(length, self.longest_evaluated),
                # Long rows lose the most; a lower bound of the time, told as "about".
                "tokens": None
                if self.tokens is None or self.count is None
                else min(self.tokens, max(int(self.tokens * share), min(self.tokens, self.count * length))),
            }
        )


def pack_of(setup: Setup, rows: Rows, device: str) -> int:
    """Tokens of the longest pack that a device computes."""
    if not setup.is_packed:
        return rows.longest
    budget = setup.pack_tokens or PACK_TOKENS[device]
    step = rows.step(setup.effective_batch)
    # Shares differ by a row at most (`training.packing.shares`).
    share = step if setup.devices == 1 else min(step, -(-step // setup.devices) + rows.longest)
    return max(rows.longest, min(budget, share))


def has_several_packs(setup: Setup, rows: Rows, device: str) -> bool:
    """Whether a device computes several packs in an optimiser step."""
    return rows.step(setup.effective_batch) > setup.devices * pack_of(setup, rows, device)


def evaluated_pack_of(setup: Setup, rows: Rows, device: str) -> int:
    """The same of validation rows."""
    longest = rows.longest if rows.longest_evaluated is None else rows.longest_evaluated
    if not setup.is_packed:
        return longest
    return max(longest, min(setup.pack_tokens or PACK_TOKENS[device], max(longest, rows.validation_tokens)))


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
