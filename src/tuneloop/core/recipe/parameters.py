"""The parameters of every kind of step: names, types, defaults and limits of the chat-completion component.

Source: `chat_completion_finetune` 0.0.81, `chat_completion_datapreprocess` 0.0.80 and the inputs of
`chat_completion_pipeline` 0.0.82 (Azure/azureml-assets 4b41f8cc). What is not in the component is marked
"Tuneloop:". A default never changes without a new entry in `key.STEP_VERSIONS`: step keys leave defaults out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, JsonValue, field_serializer

from tuneloop.core.recipe.values import (
    Count,
    CountOrOff,
    CountOrZero,
    Flag,
    Fraction,
    FractionBelowOne,
    Integer,
    Length,
    NumberOrZero,
    Parameters,
    PositiveNumber,
    Precision,
    ZeroStage,
)
from tuneloop.core.types import Card, CardSource, Noun, StepKind


class ImportedCard(Noun):
    """What the model_import step needs to know of a card."""

    name: str
    version: str
    source: CardSource
    fallbacks: tuple[CardSource, ...] = ()
    """The card's other sources, in order."""
    remote_code: bool = False

    @classmethod
    def of(cls, card: Card) -> ImportedCard:
        source, *others = card.sources
        return cls(
            name=card.name,
            version=card.version,
            source=source,
            fallbacks=tuple(others),
            remote_code=card.remote_code,
        )

    @field_serializer("source")
    def _short(self, source: CardSource) -> dict[str, JsonValue]:
        """Without what is at its default, as parameters are kept; the type says how to read it."""
        return {"type": source.type, **source.model_dump(mode="json", exclude_defaults=True)}

    @field_serializer("fallbacks")
    def _all_short(self, fallbacks: tuple[CardSource, ...]) -> list[dict[str, JsonValue]]:
        return [self._short(source) for source in fallbacks]


class ModelImportParameters(Parameters):
    """`card` is filled in by Tuneloop; a recipe writes the rest."""

    card: ImportedCard | None = Field(default=None, description="The base model and where its weights lie.")
    trust_remote_code: Flag = Field(
        default=False,
        description="Run code out of the model's repository; true only for a card that says `remote_code`.",
    )


class PreprocessParameters(Parameters):
    """Messages become tokens, and a mark on each token that counts for the loss."""

    batch_size: Count = Field(default=1000, description="Rows tokenised at a time; not the training batch.")
    pad_to_max_length: Flag = Field(default=False, description="Pad every row to max_seq_length.")
    max_seq_length: Length = Field(
        default=-1, description="Longest row in tokens; see `long_rows`. -1: the model's maximum."
    )
    long_rows: Literal["error", "drop", "keep_last_turns", "split_turns", "cut"] = Field(
        default="error",
        description=(
            "Tuneloop: what becomes of longer rows. error: the step fails and lists them. drop: left out. "
            "keep_last_turns: as many of the last turns as fit, after the system message. split_turns: "
            "consecutive conversations of as many turns as fit, each after the system message. cut: "
            "the first max_seq_length tokens, as the component does."
        ),
    )
    messages_column: Annotated[str, Field(min_length=1)] = Field(
        default="messages", description="Tuneloop: the column that holds the conversation."
    )
    bad_rows: CountOrZero = Field(
        default=0, description="Tuneloop: so many rows that cannot be learned from are dropped, and told."
    )
    split: Literal["shuffled", "contiguous"] = Field(
        default="shuffled",
        description=(
            "Tuneloop: how splits without a file are carved from train. shuffled: by a seed, rows with the "
            "same opening line together. contiguous: the last rows in file order, as the component does."
        ),
    )
    split_seed: Annotated[Integer, Field(ge=0, lt=2**32)] = Field(
        default=42, description="Tuneloop: seed of the shuffled split."
    )


class FinetuneParameters(Parameters):
    """Rows 6, 7 and 23 to 63 of the pipeline component's inputs, the bounds of models' tags, and ours."""

    number_of_gpu_to_use_finetuning: Count = Field(default=1, description="Processes per node, one GPU each.")
    num_nodes_finetune: Count = Field(default=1, description="Nodes of the training step.")
    fewer_devices: Literal["accumulate", "refuse"] = Field(
        default="accumulate",
        description=(
            "Tuneloop: where fewer devices exist than are asked for. accumulate: the effective batch is kept "
            "by accumulating gradients over more micro-batches. refuse: the step fails."
        ),
    )
    cpu_processes: Count = Field(
        default=1,
        description="Tuneloop: on a machine without GPUs, the most processes that training uses there.",
    )
    strategy: Literal["auto", "ddp", "fsdp"] = Field(
        default="auto",
        description=(
            "Tuneloop: how several processes share the work. ddp: each holds the whole model. fsdp: each "
            "holds a part (FSDP2). auto: ddp where it fits into memory, else fsdp. apply_deepspeed decides "
            "for ZeRO."
        ),
    )

    apply_lora: Flag = Field(default=False, description="Train a LoRA adapter; false trains all weights.")
    merge_lora_weights: Flag = Field(
        default=True, description="Merge the adapter into the base before saving."
    )
    lora_alpha: Count = Field(default=128, description="LoRA's alpha; the adapter is scaled by alpha / r.")
    lora_r: Count = Field(default=8, description="LoRA's rank.")
    lora_dropout: FractionBelowOne = Field(default=0.0, description="Dropout before LoRA's A matrix.")
    lora_target_modules: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(
        default=None,
        description="Tuneloop: layers that get an adapter. Left out: every linear layer but the head.",
    )
    lora_use_rslora: Flag = Field(
        default=False,
        description="Tuneloop: rsLoRA; the adapter is scaled by alpha / sqrt(r) in place of alpha / r.",
    )
    lora_use_dora: Flag = Field(
        default=False,
        description="Tuneloop: DoRA; a weight's magnitude is trained beside the adapter. Slower.",
    )
    quantization: Literal["none", "4bit"] = Field(
        default="none",
        description=(
            "Tuneloop: 4bit keeps the frozen base in NF4 under the adapter (QLoRA). Needs apply_lora and the "
            "extra `quantization`."
        ),
    )
    neftune_noise_alpha: NumberOrZero = Field(
        default=0.0,
        description=(
            "Tuneloop: NEFTune; noise of this size on the embeddings while training, never while evaluating. "
            "0: none. The paper uses 5 to 15."
        ),
    )
    loss_tokens: Literal["assistant", "all"] = Field(
        default="assistant",
        description=(
            "Tuneloop: tokens that count for the loss, in training and in evaluation. assistant: what the "
            "assistant says. all: every token but the first of a conversation."
        ),
    )

    num_train_epochs: Count = Field(default=1, description="Rounds over the training set.")
    max_steps: CountOrOff = Field(
        default=-1, description="Optimiser steps; above 0 it decides, not the epochs."
    )
    per_device_train_batch_size: Count = Field(default=1, description="Rows per device and micro-batch.")
    per_device_eval_batch_size: Count = Field(default=1, description="Rows per device when evaluating.")
    auto_find_batch_size: Flag = Field(
        default=False, description="Halve what is computed at a time when memory runs out."
    )
    gradient_accumulation_steps: Count = Field(default=1, description="Micro-batches per optimiser step.")
    packing: Flag = Field(
        default=True,
        description=(
            "Tuneloop: conversations are computed end to end, without padding and without seeing each other. "
            "false: one at a time. The losses are the same."
        ),
    )
    pack_tokens: CountOrZero = Field(
        default=0,
        description=(
            "Tuneloop: most tokens that are computed at a time; what does not fit into memory at once is "
            "accumulated. 0: chosen for the machine. A longer conversation is computed alone."
        ),
    )
    activation_checkpointing: Literal["auto", "always", "never"] = Field(
        default="auto",
        description=(
            "Tuneloop: forget activations and compute them again in the backward pass: less memory, more "
            "time. auto: only where the plan does not fit into memory otherwise."
        ),
    )
    eval_accumulation_steps: CountOrOff = Field(
        default=-1,
        description="Evaluation steps kept on the device before moving to memory; -1 or 0: not set.",
    )

    optim: Literal["adamw_torch", "adafactor"] = Field(default="adamw_torch", description="Optimiser.")
    learning_rate: PositiveNumber = Field(default=2e-05, description="Peak learning rate.")
    learning_rate_min: PositiveNumber | None = Field(
        default=None, description="Below it a learning rate is warned of. Comes with a model's defaults."
    )
    learning_rate_max: PositiveNumber | None = Field(
        default=None, description="Above it a learning rate is warned of. Comes with a model's defaults."
    )
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = Field(default="linear", description="How the learning rate moves after warm-up.")
    warmup_steps: CountOrZero = Field(default=0, description="Steps over which the learning rate rises.")
    weight_decay: NumberOrZero = Field(default=0.0, description="Decay; not on biases and norms.")
    adam_beta1: FractionBelowOne = Field(default=0.9, description="AdamW's beta1.")
    adam_beta2: FractionBelowOne = Field(default=0.999, description="AdamW's beta2.")
    adam_epsilon: PositiveNumber = Field(default=1e-08, description="AdamW's epsilon.")
    max_grad_norm: NumberOrZero = Field(
        default=1.0, description="Gradients are clipped to this norm; 0: not."
    )

    precision: Precision = Field(
        default="32", description='"16": bf16 where the device is good at it; "32": fp32.'
    )
    seed: Annotated[Integer, Field(ge=0, lt=2**32)] = Field(
        default=42, description="Seed of everything random."
    )
    enable_full_determinism: Flag = Field(default=False, description="Deterministic kernels only.")
    dataloader_num_workers: CountOrZero = Field(default=0, description="Threads that prepare batches ahead.")
    ignore_mismatched_sizes: Flag = Field(
        default=False,
        description="Weights whose shapes do not fit start at random, and are named; not with apply_lora.",
    )

    evaluation_strategy: Literal["epoch", "steps", "disable"] = Field(
        default="epoch", description="When to evaluate."
    )
    evaluation_steps_interval: Fraction = Field(
        default=0.0, description="Share of an epoch between evaluations; above 0 it decides, not eval_steps."
    )
    eval_steps: Count = Field(default=500, description="Optimiser steps between evaluations.")
    logging_strategy: Literal["epoch", "steps"] = Field(default="steps", description="When to log.")
    logging_steps: Count = Field(default=10, description="Optimiser steps between logged values.")
    metric_for_best_model: Literal["loss", "f1", "exact"] = Field(
        default="loss", description="What makes a checkpoint the best one."
    )
    resume_from_checkpoint: Flag = Field(
        default=False, description="Start from the last checkpoint of the step."
    )
    save_total_limit: CountOrOff = Field(default=-1, description="Checkpoints kept; -1 or 0: all.")
    checkpoint_seconds: CountOrZero = Field(
        default=30,
        description=(
            "Tuneloop: seconds between checkpoints inside an epoch; what an interrupted run loses at most. "
            "Larger models wait longer, so that checkpoints cost little. 0: after every step."
        ),
    )
    checkpoint_steps: CountOrZero = Field(
        default=0,
        description="Tuneloop: optimiser steps between checkpoints; above 0 it decides, not the clock.",
    )
    stop_on_divergence: Flag = Field(
        default=True,
        description=(
            "Tuneloop: stop when the loss has blown up, before the rest of the time is spent. What is not a "
            "number always stops training."
        ),
    )
    apply_early_stopping: Flag = Field(default=False, description="Stop when evaluations get no better.")
    early_stopping_patience: Count = Field(default=1, description="Evaluations that may be no better.")
    early_stopping_threshold: NumberOrZero = Field(
        default=0.0, description="Improvement that counts as better."
    )

    apply_deepspeed: Flag = Field(default=False, description="Use DeepSpeed (ZeRO).")
    deepspeed: str | dict[str, JsonValue] | None = Field(
        default=None,
        description=(
            "A DeepSpeed configuration of your own: a JSON file, relative to the recipe's folder, or the "
            "object itself. The file is read when the job is submitted; steps get the object."
        ),
    )
    deepspeed_stage: ZeroStage = Field(default="2", description="ZeRO stage when `deepspeed` is left out.")
    apply_ort: Flag = Field(default=False, description="ONNX Runtime training.")


class ExportParameters(Parameters):
    """Tuneloop: the trained weights become an MLflow model."""

    logits_tolerance: PositiveNumber = Field(
        default=1e-3, description="Largest difference between merged and adapter logits that is let through."
    )


class EvaluateParameters(Parameters):
    """Tuneloop: base and exported model on the same rows. Replies are greedy, so that they repeat."""

    samples: CountOrZero = Field(default=5, description="Test conversations answered by both models.")
    max_new_tokens: Count = Field(default=48, description="Longest reply in tokens.")
    max_rows: Count | None = Field(default=None, description="Rows scored at most; left out: all.")


PARAMETERS: Mapping[StepKind, type[Parameters]] = {
    "model_import": ModelImportParameters,
    "preprocess": PreprocessParameters,
    "finetune": FinetuneParameters,
    "export": ExportParameters,
    "evaluate": EvaluateParameters,
}
