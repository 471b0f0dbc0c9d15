"""DeepSpeed's ZeRO (arXiv:1910.02054): every process holds a part of the optimiser's state and of the
gradients (stage 2), or of the weights as well (stage 3).

DeepSpeed is told of sums, not means, and of each step's last pack; its checkpoints are pickles, so parts are
written here. They are flat stretches of whole parameter groups, aligned for the number of processes: only
the same stage with equally many processes reads them.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from tuneloop.core import deepspeed as configuration
from tuneloop.core.errors import Internal, Unsupported
from tuneloop.core.recipe import FinetuneParameters
from tuneloop.training import optimizer
from tuneloop.training.checkpoint import Found
from tuneloop.training.data import Batch
from tuneloop.training.layout.base import Dump, refuse_what_cannot_be_cut, shard_suffix
from tuneloop.training.layout.plain import refuse_foreign
from tuneloop.training.layout.processes import Processes
from tuneloop.training.loss import Objective
from tuneloop.training.plan import Strategy

INSTALL = "pip install 'tuneloop[deepspeed]'"
_COMPILED = ("deepspeed_shm_comm",)
"""Operations that DeepSpeed would compile with the machine's C++ compiler when a group forms. This one serves
inference alone."""


class Zero(Processes):
    is_collective = True
    """Stage 2 in its backward pass only, where what is summed has to come in the same order everywhere."""

    def __init__(self, device: torch.device, strategy: Strategy, *, is_bf16: bool) -> None:
        super().__init__(device)
        self.strategy: Strategy = strategy
        self._stage = int(strategy[-1])
        self._is_bf16 = is_bf16
        # Before the model is measured and cut: nothing is lost when it is missing.
        self._deepspeed = import_deepspeed(device)

    def place(self, model: nn.Module) -> None:
        """To the device; with stage 3 weights move one by one, each to be cut at once."""
        if self._stage == 2:
            model.to(self.device)

    def wrap(self, model: nn.Module, objective: Objective, parameters: FinetuneParameters) -> None:
        refuse_what_cannot_be_cut(parameters, self.strategy)
        self._objective = objective
        self._trained = optimizer.trainable(model)
        self._shapes = {name: each.shape for name, each in self._trained.items()}
        config = self._config(model, parameters)
        if self._stage == 3:
            self._cut(model, config)
        self._engine: Any = self._deepspeed.initialize(
            model=model,
            optimizer=optimizer.of(parameters, self._trained),
            config=config,
            dist_init_required=False,
        )[0]
        self._zero: Any = self._engine.optimizer
        if self._stage == 3:
            self._check_cut()

    def loss(self, batch: Batch) -> torch.Tensor:
        return self._objective.summed_loss(batch.to(self.device), model=self._engine)

    def backward(self, loss: torch.Tensor, *, is_last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(is_last)
        # DeepSpeed takes the mean over the processes.
        self._engine.backward(loss * self.world)
        if not is_last:
            self._engine.step()  # counts the pack

    def clip(self, limit: float) -> float:
        self._zero.clip_grad = limit if math.isfinite(limit) else 0.0
        return float(self._norm())

    def step(self, rate: float) -> None:
        optimizer.set_learning_rate(self._zero.optimizer, rate)
        self._engine.step()

    def discard(self) -> None:
        self._zero.zero_grad()

    def dump(self) -> Dump:
        suffix = shard_suffix(self.rank, self.world)
        state = {
            f"{name}/{key}": value
            for name, part in self._parts()
            for key, value in self._zero.optimizer.state.get(part, {}).items()
        }
        return Dump({f"weights{suffix}": dict(self._parts()), f"optimizer{suffix}": state})

    def load(self, found: Found) -> None:
        refuse_foreign(found, self.strategy, self.world)
        self.load_weights(found.files("weights"))
        state: dict[str, dict[str, torch.Tensor]] = {name: {} for name, _ in self._parts()}
        for path, tensor in load_file(found.files("optimizer")[self.rank]).items():
            name, _, key = path.partition("/")
            state[name][key] = tensor if tensor.ndim == 0 else tensor.to(self.device)
        for name, part in self._parts():
            if state[name]:
                self._zero.optimizer.state[part] = state[name]

    @torch.no_grad()
    def load_weights(self, files: Sequence[Path]) -> None:
        saved = load_file(files[self.rank])
        parts = dict(self._parts())
        sizes = {name: each.numel() for name, each in parts.items()}
        found = {name: each.numel() for name, each in saved.items()}
        if sizes != found:
            raise Unsupported(
                f"{files[0].parent.name} was cut in another way: parts of {list(found.values())} numbers, "
                f"now {list(sizes.values())}. A key of finetune.deepspeed that decides it has changed, such "
                "as sub_group_size.",
                next_move="Train with the DeepSpeed configuration that it was made with, or submit the "
                "recipe as a new job.",
            )
        for name, part in parts.items():
            part.data.copy_(saved[name])
        self._refresh()

    def trained_weights(self) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        found = {}
        for name, weight in self._trained.items():
            whole = safe_get_full_fp32_param(weight)  # by all processes, one weight at a time
            if self.rank == 0:
                found[name] = whole.detach().view(self._shapes[name]).to("cpu", copy=True)
            del whole
        return found

    # ------------------------------------------------------------ DeepSpeed's inside

    def _config(self, model: Any, parameters: FinetuneParameters) -> dict[str, Any]:
        settings = configuration.settings_of(parameters.model_dump())
        assert settings is not None
        block: dict[str, Any] = dict(settings.block(int(model.config.get_text_config().hidden_size)))
        if self.device.type == "cpu":
            # There is no second stream to overlap with, only a second buffer to fill.
            block["overlap_comm"] = False
        return {
            "zero_optimization": block,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            # What a step is made of is said pack by pack.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": settings.gradient_clipping,
            "bf16": {"enabled": self._is_bf16},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            "steps_per_print": sys.maxsize,
        }

    def _cut(self, model: nn.Module, config: dict[str, Any]) -> None:
        """Weight by weight: `initialize` would move all of it to the device first."""
        if self._is_bf16:
            for weight in model.parameters():
                weight.data = weight.data.to(torch.bfloat16)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)
        self._deepspeed.zero.Init(
            module=model, config_dict_or_path=config, dtype=torch.bfloat16 if self._is_bf16 else torch.float32
        )

    def _check_cut(self) -> None:
        weights: list[Any] = list(self._trained.values())
        if all(each.ds_tensor.numel() >= each.ds_numel for each in weights):
            raise Internal("ZeRO-3 has cut no weight: this is a mistake of Tuneloop.")

    def _parts(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What this process holds of each group, in 32 bits, flat."""
        held = (
            self._zero.single_partition_of_fp32_groups
            if self._stage == 2
            else self._zero.fp32_partitioned_groups_flat
        )
        for place, part in enumerate(held):
            yield f"part{place}", part

    def _norm(self) -> Any:
        """Of the whole gradient; infinity where a part is not finite."""
        if self._stage == 2:
            return self._zero.scaled_global_norm()
        from deepspeed.runtime.utils import combine_grad_norm_groups

        return combine_grad_norm_groups(self._zero._get_norm_groups())

    def _refresh(self) -> None:
        """The weights that are computed with, after the 32-bit parts have changed."""
        if self._stage == 2:
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()
        for place in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(place)
        persistent = self._zero.persistent_parameters
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed over the group that has been formed, without anything to compile. Raises `Unsupported` when
    it is not installed."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        raise Unsupported(
            f"apply_deepspeed is true and DeepSpeed is not installed ({error}).",
            next_move=f"Install it: {INSTALL}. Or leave apply_deepspeed out and write strategy: fsdp.",
        ) from error
    deepspeed.utils.logger.setLevel("ERROR")
    # Torch's words to DeepSpeed, at each call.
    warnings.filterwarnings("ignore", r".torch\.distributed\.\w+. is deprecated", FutureWarning)
    for name in _COMPILED:
        deepspeed.ops.__compatible_ops__[name] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
    )
    return deepspeed
