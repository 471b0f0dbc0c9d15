"""How a run is carried out on the machine at hand: device, precision, and the effective batch that was
asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tuneloop.core.errors import Unsupported
from tuneloop.core.recipe import FinetuneParameters
from tuneloop.core.support import cautions, refusals

PROCESSES = 1
"""This engine trains in one process, on one device."""


@dataclass(frozen=True)
class Machine:
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
    accumulation: int
    """Micro-batches per optimiser step, after making up for devices that are not used."""
    processes_asked: int
    warnings: tuple[str, ...]

    @property
    def base_dtype(self) -> torch.dtype:
        """For frozen weights; weights that are trained are loaded as fp32."""
        return torch.bfloat16 if self.is_bf16 else torch.float32


def plan(parameters: FinetuneParameters, machine: Machine) -> Plan:
    """Raises `Unsupported` with every refusal at once."""
    values = parameters.model_dump()
    refused = refusals(values)
    if refused:
        raise Unsupported(" ".join(refused), details=refused)
    asked = parameters.number_of_gpu_to_use_finetuning * parameters.num_nodes_finetune
    is_bf16 = parameters.precision == "16" and machine.has_fast_bf16
    warnings = cautions(values)
    if parameters.precision == "16" and not is_bf16:
        warnings.append(
            f"precision is 16: this machine's {machine.device} is slow at bf16, so training runs in 32 bits. "
            "Results are at least as precise."
        )
    if asked > PROCESSES:
        warnings.append(_fewer_devices(parameters, machine, asked))
    return Plan(
        device=torch.device(machine.device),
        is_bf16=is_bf16,
        accumulation=parameters.gradient_accumulation_steps * asked,
        processes_asked=asked,
        warnings=tuple(warnings),
    )


def _fewer_devices(parameters: FinetuneParameters, machine: Machine, asked: int) -> str:
    batch = parameters.per_device_train_batch_size
    accumulation = parameters.gradient_accumulation_steps
    return (
        f"{parameters.num_nodes_finetune} node(s) with {parameters.number_of_gpu_to_use_finetuning} "
        f"GPU(s) each were asked for; this machine has {machine.gpus} GPU(s), and training runs as one "
        f"process. The effective batch stays {batch} x {accumulation} x {asked} = "
        f"{batch * accumulation * asked} conversations: gradients accumulate over {accumulation * asked} "
        f"micro-batches in place of {accumulation}."
    )
