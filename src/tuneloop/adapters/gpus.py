"""The GPUs that this installation can use, told without importing torch: by `nvidia-smi` where the driver is
there, else by the kernel."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from tuneloop.core.types import Gpu

TIMEOUT_SECONDS = 10.0
DRIVER = Path("/proc/driver/nvidia/gpus")


def gpus(environment: Mapping[str, str] | None = None) -> tuple[Gpu, ...]:
    """Those that CUDA_VISIBLE_DEVICES leaves; empty without a driver, or with a torch that was built without
    CUDA."""
    chosen = (os.environ if environment is None else environment).get("CUDA_VISIBLE_DEVICES")
    if (chosen is not None and chosen.strip() in ("", "-1")) or not can_use_cuda():
        return ()
    command = shutil.which("nvidia-smi")
    told = _ask(command) if command else None
    found = parse(told) if told is not None else _of_the_kernel(DRIVER)
    return _visible(found, chosen)


def can_use_cuda() -> bool:
    """Builds without CUDA say so in their version (`2.13.0+cpu`)."""
    try:
        return not metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return False


def _ask(command: str) -> str | None:
    query = [command, "--query-gpu=uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout


def parse(text: str) -> list[tuple[str, Gpu]]:
    """Lines of `uuid, name, MiB`; what is no such line is left out."""
    found = []
    for line in text.splitlines():
        uuid, _, rest = line.partition(",")
        name, _, memory = rest.rpartition(",")
        if memory.strip().isdigit():
            found.append((uuid.strip(), Gpu(name=name.strip(), memory_bytes=int(memory) * 1024 * 1024)))
    return found


def _of_the_kernel(folder: Path) -> list[tuple[str, Gpu]]:
    """Names; the kernel does not tell the memory."""
    found = []
    for path in sorted(folder.glob("*/information")):
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        if "Model" in told:
            found.append((told.get("GPU UUID", ""), Gpu(name=told["Model"], memory_bytes=0)))
    return found


def _visible(found: Sequence[tuple[str, Gpu]], chosen: str | None) -> tuple[Gpu, ...]:
    """As CUDA reads the variable: numbers or beginnings of ids, up to the first that names none."""
    if chosen is None:
        return tuple(gpu for _, gpu in found)
    visible = []
    for word in (part.strip() for part in chosen.split(",")):
        if word.isdigit():
            match = [gpu for place, (_, gpu) in enumerate(found) if place == int(word)]
        else:
            match = [gpu for uuid, gpu in found if word and uuid.startswith(word)]
        if not match:
            break
        visible.append(match[0])
    return tuple(visible)
