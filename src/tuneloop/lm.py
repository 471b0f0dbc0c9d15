"""Models and tokenizers on disk and in memory: load, adapt with LoRA, merge. Imports torch, knows no step.

Used by the steps, the training loop and the engines. Two layouts are known: a plain Hugging Face folder, and
an MLflow model folder, which holds one (weights under `model/`, tokenizer under `components/tokenizer/`).
What can be read of them without torch is in `tokens`, and named here too.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from tuneloop.core.errors import ModelUnavailable, OutOfMemory, Unsupported
from tuneloop.tokens import MODEL_NOTE, load_template, may_run_code, read_note, resolve_folders

__all__ = [
    "MODEL_NOTE",
    "add_lora",
    "device",
    "load_adapter",
    "load_model",
    "load_template",
    "load_tokenizer",
    "may_run_code",
    "memory_errors",
    "merge",
    "peak_device_memory_bytes",
    "quiet",
    "read_note",
    "refuse_incomplete",
    "refuse_without_four_bits",
    "resolve_folders",
    "threads",
    "unusable_tensors",
]

_TOO_LARGE = (
    "Use a smaller model, or end what else uses that memory. Without the GPU: CUDA_VISIBLE_DEVICES=''."
)
_MISSING_WEIGHTS = "The folder is incomplete or belongs to another model; import the model again."


def threads() -> int:
    """Set torch's threads to OMP_NUM_THREADS, or to the physical cores that this process may use."""
    written = os.environ.get("OMP_NUM_THREADS", "")
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = int(written) if written.isdigit() and int(written) > 0 else _physical(allowed)
    torch.set_num_threads(count)
    return count


def _physical(allowed: int) -> int:
    """Two threads of one core share its arithmetic units: more of them than cores is slower."""
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def quiet() -> None:
    """No progress bars and no hints from transformers: a step's log is read by people."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


# ---------------------------------------------------------------- devices


def device() -> torch.device:
    """Where models run: the first GPU that CUDA_VISIBLE_DEVICES leaves, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def memory_errors(where: torch.device, next_move: str) -> Iterator[None]:
    """`OutOfMemory` for what torch raises when the GPU's or the machine's memory does not suffice."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _GPU_IS_FULL):
            raise OutOfMemory(_full_gpu(where), next_move=next_move) from error
        # Torch has no class of its own for it.
        if "DefaultCPUAllocator: can't allocate memory" in str(error):
            raise OutOfMemory(
                f"The machine has no memory left: {psutil.virtual_memory().available / 1e9:.1f} of "
                f"{psutil.virtual_memory().total / 1e9:.1f} GB are free, and more was asked for at once.",
                next_move=next_move,
            ) from error
        raise


_GPU_IS_FULL = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What comes from below torch's own allocator; no class tells it."""


def _full_gpu(where: torch.device) -> str:
    try:
        free, total = torch.cuda.mem_get_info(where)
    except RuntimeError:  # so full that nothing can be asked of it
        return "The GPU has no memory left, not even for a process to begin."
    own = torch.cuda.memory_reserved(where)
    return (
        f"{torch.cuda.get_device_name(where)} has no memory left: of {total / 1e9:.1f} GB this process holds "
        f"{own / 1e9:.1f}, others {max(0, total - free - own) / 1e9:.1f}."
    )


def peak_device_memory_bytes(where: torch.device) -> int | None:
    """The most that this process has held of a GPU's memory; None for the CPU."""
    return int(torch.cuda.max_memory_reserved(where)) if where.type == "cuda" else None


# ---------------------------------------------------------------- loading


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The model's fast tokenizer (either layout). Raises `ModelUnavailable` when it has only a slow one."""
    folder = resolve_folders(path)[1]
    tokenizer: Any = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=may_run_code(path)
    )
    if not getattr(tokenizer, "is_fast", False):
        raise ModelUnavailable(
            f"The tokenizer in {folder} has no fast form; Tuneloop needs a tokenizer.json that can be used."
        )
    return tokenizer


def load_model(
    path: Path,
    dtype: torch.dtype = torch.float32,
    *,
    device: str | torch.device = "cpu",
    quantization: Literal["none", "4bit"] = "none",
    mismatched: list[str] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """The causal language model in `path` (either layout), in evaluation mode, with SDPA attention.

    "4bit": its linear layers but the head are kept in 4 bits, to be trained on by LoRA (QLoRA,
    arXiv:2305.14314); products run in `dtype`. Only safetensors are read. Raises `OutOfMemory`;
    `ModelUnavailable` when weights are missing or of another shape, which transformers would fill with random
    numbers; `Unsupported` when 4 bits do not work here. Where a list `mismatched` is given, weights of
    another shape do start at random, and the list gets their names.
    """
    folder = resolve_folders(path)[0]
    options.setdefault("attn_implementation", "sdpa")
    if quantization == "4bit":
        options.update(_four_bits(dtype, torch.device(device)))
    try:
        with memory_errors(torch.device(device), _TOO_LARGE):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=may_run_code(path),
                output_loading_info=True,
                ignore_mismatched_sizes=mismatched is not None,
                **options,
            )
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelUnavailable(
            f"The weights in {folder} cannot be loaded: {reason}", next_move=_MISSING_WEIGHTS
        ) from error
    model, report = loaded
    if mismatched is not None:
        mismatched += sorted(str(each[0]) for each in report.pop("mismatched_keys", None) or ())
    refuse_incomplete(report, folder)
    with memory_errors(torch.device(device), _TOO_LARGE):
        return _trainable_in_four_bits(model) if quantization == "4bit" else model.to(device).eval()


def _trainable_in_four_bits(model: PreTrainedModel) -> PreTrainedModel:
    """Where a CPU has AVX512-BF16, bitsandbytes repacks weights at the first evaluation for a kernel that has
    no gradient (0.50); training would go on without one. Told that the CPU has none, it does not."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def _four_bits(dtype: torch.dtype, where: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is told: NF4, with the constants of its blocks quantised too."""
    from transformers import BitsAndBytesConfig

    refuse_without_four_bits(where)
    chosen = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": chosen, "device_map": {"": str(where)}}


def refuse_without_four_bits(where: torch.device) -> None:
    """Raise `Unsupported` unless bitsandbytes is installed and multiplies by a 4-bit matrix on `where`."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Unsupported(
            "quantization is '4bit', and bitsandbytes is not installed.",
            next_move="pip install 'tuneloop[quantization]', or write quantization: none.",
        )
    try:
        error = _four_bit_error(where)
    except (ImportError, RuntimeError, NotImplementedError, AttributeError, OSError) as failure:
        raise _no_four_bits(where, str(failure).splitlines()[0]) from failure
    if not error < 1e-2:
        raise _no_four_bits(where, f"a product or its gradient is off by {error:.2g}")


def _four_bit_error(where: torch.device) -> float:
    """How far a small product and its gradient are from those by the weights that the 4 bits stand for."""
    import bitsandbytes

    weight = torch.linspace(-1, 1, 64 * 64, device=where).reshape(64, 64)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    states = torch.linspace(0, 1, 2 * 64, device=where).reshape(2, 64).requires_grad_()
    outputs = bitsandbytes.matmul_4bit(states, packed.t(), quant_state=state)
    (gradient,) = torch.autograd.grad(outputs.sum(), states)
    restored = bitsandbytes.functional.dequantize_4bit(packed, state)
    errors = (outputs - states @ restored.t(), gradient - restored.sum(0))
    return max(float(each.detach().abs().max()) for each in errors)


def _no_four_bits(where: torch.device, reason: str) -> Unsupported:
    return Unsupported(
        f"quantization is '4bit', and bitsandbytes does not work on this machine's {where.type}: {reason}.",
        next_move="Write quantization: none; install a bitsandbytes that is made for this machine otherwise.",
    )


def refuse_incomplete(report: dict[str, Any], folder: Path) -> None:
    """Raise `ModelUnavailable` when transformers' loading report names weights that were not found."""
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        names = [str(name) for name in report.get(kind) or ()]
        if names:
            raise ModelUnavailable(
                f"The weights in {folder} are incomplete: {kind.replace('_', ' ')}: {', '.join(names[:5])}"
                f"{' ...' if len(names) > 5 else ''}.",
                next_move=_MISSING_WEIGHTS,
            )


# ---------------------------------------------------------------- LoRA


def add_lora(
    model: PreTrainedModel,
    r: int,
    alpha: int,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    *,
    seed: int | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
) -> Any:
    """A PeftModel whose only trainable weights are LoRA's (arXiv:2106.09685): on `targets`, or on all linear
    layers but the head. `seed` fixes the start of the A matrices without touching the global generator.
    `use_rslora`: scaled by alpha / sqrt(r), not alpha / r (arXiv:2312.03732). `use_dora`: each output's
    magnitude is trained apart from its direction (arXiv:2402.09353)."""
    from peft import LoraConfig

    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets) if targets else "all-linear",
        bias="none",
        task_type="CAUSAL_LM",
        use_rslora=use_rslora,
        use_dora=use_dora,
    )
    if seed is None:
        return _adapted(model, config)
    # The model is on the CPU still: only that generator is used, and `torch.manual_seed` would seed GPUs too.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return _adapted(model, config)


def _adapted(model: PreTrainedModel, config: Any) -> Any:
    from peft import get_peft_model

    with warnings.catch_warnings():
        # PEFT 0.21 asks for an attribute that transformers 5.23 renamed.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        return get_peft_model(model, config)


def load_adapter(model: PreTrainedModel, folder: Path, *, is_trainable: bool = False) -> Any:
    """A PeftModel of `model` and the adapter in `folder` (PEFT layout). Raises `ModelUnavailable` when the
    adapter does not fit."""
    from peft import PeftModel, get_peft_model_state_dict

    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            raise ModelUnavailable(f"{folder} holds no {file}, so it is not a LoRA adapter.")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            # Said, because PEFT would go through the GPU wherever there is one.
            adapted = PeftModel.from_pretrained(
                model, str(folder), is_trainable=is_trainable, torch_device=str(model.device)
            )
    except (RuntimeError, ValueError) as error:
        raise _misfit(folder, str(error).splitlines()[0]) from error
    # PEFT drops, in silence, what it finds no place for.
    written = set(_tensor_names(folder / "adapter_model.safetensors"))
    placed = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if written != placed:
        raise _misfit(folder, f"it has no place for {sorted(written ^ placed)[0]}")
    return adapted


def _tensor_names(file: Path) -> list[str]:
    with safe_open(str(file), framework="pt") as opened:
        return list(opened.keys())


def _misfit(folder: Path, reason: str) -> ModelUnavailable:
    return ModelUnavailable(
        f"The adapter in {folder} does not fit the model: {reason}.",
        next_move="Use the base model that it was trained on.",
    )


def merge(peft_model: Any) -> PreTrainedModel:
    """The base model with the adapter added into its weights, in fp32; the adapter is gone.

    In 16 bits the sum would round most of a small change away. Raises `Unsupported` for a base in 4 bits:
    its rounding errors would stay in the weights.
    """
    if getattr(peft_model.get_base_model(), "is_quantized", False):
        raise Unsupported(
            "an adapter is not merged into weights of 4 bits.",
            next_move="Load the base model in full precision, and the adapter onto it.",
        )
    merged = peft_model.float().merge_and_unload()
    # transformers writes the precision that the configuration names.
    merged.config.dtype = torch.float32
    # PEFT leaves its attribute behind, and save_pretrained would then write an adapter.
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    if hasattr(merged, "_hf_peft_config_loaded"):
        merged._hf_peft_config_loaded = False
    return merged


def unusable_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """`name: reason` for every tensor without elements or with a value that is not a finite number."""
    found = []
    for name, tensor in tensors:
        if tensor.numel() == 0:
            found.append(f"{name}: no elements")
        elif tensor.is_floating_point() and not _is_finite(tensor):
            found.append(f"{name}: holds a value that is not a finite number")
    return found


def _is_finite(tensor: torch.Tensor) -> bool:
    """NaN and infinity show in the extremes, found twenty times faster than by `isfinite().all()`."""
    least, most = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(least)) and bool(torch.isfinite(most))
