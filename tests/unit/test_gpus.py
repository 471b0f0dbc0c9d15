"""GPUs of this machine, told without torch."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tuneloop.adapters import gpus
from tuneloop.core.types import Gpu

MIB = 1024 * 1024
SMI = "GPU-aaa, NVIDIA A100-SXM4-80GB, 81920\nGPU-bbb, NVIDIA L4, 23034\n"
A100, L4 = (
    Gpu(name="NVIDIA A100-SXM4-80GB", memory_bytes=81920 * MIB),
    Gpu(name="NVIDIA L4", memory_bytes=23034 * MIB),
)


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for NVIDIA's tool."""
    path = tmp_path / "nvidia-smi"
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{SMI}END\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(gpus.metadata, "version", lambda name: "2.13.0+cu130")
    return path


def test_names_and_memory_come_from_nvidia_smi(smi: Path) -> None:
    assert gpus.gpus({}) == (A100, L4)


@pytest.mark.parametrize(
    ("chosen", "left"),
    [("1", (L4,)), ("1,0", (L4, A100)), ("GPU-b", (L4,)), ("0,7,1", (A100,)), ("", ()), ("-1", ())],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(smi: Path, chosen: str, left: tuple[Gpu, ...]) -> None:
    assert gpus.gpus({"CUDA_VISIBLE_DEVICES": chosen}) == left


def test_a_tool_that_fails_leaves_what_the_kernel_tells(
    smi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi.write_text("#!/bin/sh\nexit 9\n", encoding="utf-8")
    card = tmp_path / "gpus" / "0000:01:00.0"
    card.mkdir(parents=True)
    (card / "information").write_text("Model: \t\t NVIDIA T4\nGPU UUID: \t GPU-1\n", encoding="utf-8")
    monkeypatch.setattr(gpus, "DRIVER", tmp_path / "gpus")
    assert gpus.gpus({}) == (Gpu(name="NVIDIA T4", memory_bytes=0),)


def test_without_a_driver_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpus, "DRIVER", tmp_path / "nothing")
    assert gpus.gpus({}) == ()


def test_a_torch_without_cuda_can_use_none(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus.metadata, "version", lambda name: "2.13.0+cpu")
    assert gpus.gpus({}) == ()


def test_lines_that_are_no_gpu_are_left_out() -> None:
    assert gpus.parse("No devices were found\nGPU-1, X, [N/A]\n") == []
