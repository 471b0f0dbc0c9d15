"""How a run is carried out on the machine at hand: device, precision, processes, and the effective batch
that was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from tuneloop.core.errors import Unsupported
from tuneloop.core.recipe import FinetuneParameters
from tuneloop.core.support import cautions, refusals

Strategy = Literal["plain", "ddp", "fsdp", "zero2", "zero3"]
"""How the work is shared: one process; gradients summed over processes (DDP); weights sharded as well, by
FSDP2 or by DeepSpeed's ZeRO (arXiv:1910.02054)."""


@dataclass(frozen=True)
class Machine:
    """Of one node."""

    device: str
    """`cpu` or `cuda`."""
    gpus: int
    has_fast_bf16: bool

    @staticmethod
    def detect() -> Machine:
        if torch.cuda.is_available():
            return Machine(
                "cuda", torch.cuda.device_count(), torch.cuda.is_bf16_supported(including_emulation=False)
            )
        return Machine("cpu", 0, _cpu_has_fast_bf16())


def _cpu_has_fast_bf16() -> bool:
    """Without AMX or AVX512-BF16, bf16 on a CPU was measured 9 times slower than fp32."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


@dataclass(frozen=True)
class Plan:
    device: torch.device
    is_bf16: bool
    """Matrix products in bf16 (autocast); what is trained stays fp32."""
    strategy: Strategy
    processes: int
    """Over all nodes."""
    processes_asked: int
    effective_batch: int
    """Conversations of an optimiser step: as asked, whatever the number of processes."""
    warnings: tuple[str, ...]

    @property
    def base_dtype(self) -> torch.dtype:
        """For frozen weights; weights that are trained are loaded as fp32."""
        return torch.bfloat16 if self.is_bf16 else torch.float32


def plan(parameters: FinetuneParameters, machine: Machine, nodes: int = 1) -> Plan:
    """`nodes`: how many machines like this one there are. Raises `Unsupported` with every refusal at once."""
    values = parameters.model_dump()
    asked = parameters.number_of_gpu_to_use_finetuning * parameters.num_nodes_finetune
    processes = processes_of(parameters, machine.gpus, nodes)
    refused = refusals(values)
    if processes < asked and parameters.fewer_devices == "refuse":
        refused.append(
            f"fewer_devices is 'refuse': {asked} processes were asked for, and {processes} can run here. Ask "
            "for fewer, or write 'accumulate' to keep the effective batch with what there is."
        )
    if refused:
        raise Unsupported(" ".join(refused), details=refused)
    is_bf16 = parameters.precision == "16" and machine.has_fast_bf16
    warnings = cautions(values, processes=processes)
    if parameters.precision == "16" and not is_bf16:
        warnings.append(
            f"precision is 16: this machine's {machine.device} is slow at bf16, so training runs in 32 bits. "
            "Results are at least as precise."
        )
    if processes < asked:
        warnings.append(_fewer_devices(parameters, machine, processes))
    return Plan(
        device=torch.device(machine.device),
        is_bf16=is_bf16,
        strategy=strategy_of(parameters, processes),
        processes=processes,
        processes_asked=asked,
        effective_batch=parameters.per_device_train_batch_size
        * parameters.gradient_accumulation_steps
        * asked,
        warnings=tuple(warnings),
    )


def processes_of(parameters: FinetuneParameters, gpus: int, nodes: int = 1) -> int:
    """Over `nodes` machines with `gpus` each: one for every GPU, and without any as many as
    `cpu_processes` allows; never more than were asked for."""
    each = min(parameters.number_of_gpu_to_use_finetuning, gpus or parameters.cpu_processes)
    return each * min(parameters.num_nodes_finetune, nodes)


def strategy_of(parameters: FinetuneParameters, processes: int) -> Strategy:
    if processes == 1:
        return "plain"
    if parameters.apply_deepspeed:
        return "zero2" if parameters.deepspeed_stage == "2" else "zero3"
    return "fsdp" if parameters.strategy == "fsdp" else "ddp"


def _fewer_devices(parameters: FinetuneParameters, machine: Machine, processes: int) -> str:
    batch = parameters.per_device_train_batch_size
    accumulation = parameters.gradient_accumulation_steps
    asked = parameters.number_of_gpu_to_use_finetuning * parameters.num_nodes_finetune
    how = "as one process" if processes == 1 else f"as {processes} processes"
    more = (
        f" Without GPUs, finetune.cpu_processes (now {parameters.cpu_processes}) says how many processes may "
        "run."
        if not machine.gpus
        else ""
    )
    return (
        f"{parameters.num_nodes_finetune} node(s) with {parameters.number_of_gpu_to_use_finetuning} "
        f"GPU(s) each were asked for; this machine has {machine.gpus} GPU(s), and training runs {how}. "
        f"The effective batch stays {batch} x {accumulation} x {asked} = {batch * accumulation * asked} "
        f"conversations: gradients accumulate.{more}"
    )
