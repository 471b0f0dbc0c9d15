"""Checkpoints: whole or not there, verified when read, and without pickles.

    checkpoints/checkpoint-120/
      weights.safetensors     what is trained: the adapter, or all weights
      best.safetensors        the best weights so far, when those are other ones (a hard link where possible)
      optimizer.safetensors   the optimiser's tensors
      random.safetensors      torch's generators
      weights-00001-of-00002.safetensors ...   in place of each, where processes write their own shards
      state.json              step, sums, early stopping, the optimiser's numbers, other generators
      manifest.json           size and sha256 of each file, and what the checkpoint fits

A checkpoint is made in a hidden folder, flushed to disk and renamed. Reading takes the newest that is whole
and fits; one that is torn or foreign is passed over with its reason.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file

FORMAT = 2
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Found:
    """A checkpoint that was read and verified."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def files(self, stem: str) -> list[Path]:
        """`stem.safetensors`, or its shards in the order of their processes."""
        return shards(self.folder, stem)

    def tensors(self, stem: str) -> dict[str, torch.Tensor]:
        """Of a file that is not sharded."""
        return load_file(self.folder / f"{stem}.safetensors")

    def best_weights(self) -> list[Path]:
        """The files with the best weights so far; none when nothing has been evaluated yet."""
        best = self.files("best")
        return best or (self.files("weights") if self.state.get("best_step") == self.step else [])


def shards(folder: Path, stem: str) -> list[Path]:
    whole = folder / f"{stem}.safetensors"
    return [whole] if whole.exists() else sorted(folder.glob(f"{stem}-*-of-*.safetensors"))


class Writers(Protocol):
    """The processes that write one checkpoint together."""

    rank: int

    def gather(self, value: Any) -> list[Any]: ...

    def barrier(self) -> None: ...


def save(
    root: Path,
    *,
    state: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    best_weights: Sequence[Path],
    fits: str,
    is_milestone: bool,
    writers: Writers,
) -> Path:
    """Write `root/checkpoint-<step>`, in place of one that was found damaged; `tensors` by file name
    without its ending, each process its own. `root` is one folder for all of them. Returns the checkpoint's
    folder."""
    final = root / f"checkpoint-{state['step']}"
    work = root / f".{final.name}"
    is_first = writers.rank == 0
    try:
        if is_first:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
        writers.barrier()
        written = writers.gather(_write(work, tensors))
        if is_first:
            _complete(
                work,
                state,
                best_weights,
                fits,
                is_milestone,
                {k: v for each in written for k, v in each.items()},
            )
            shutil.rmtree(final, ignore_errors=True)
            os.rename(work, final)
            _flush(root)
        writers.barrier()
    except BaseException:
        # A full disk, say: earlier checkpoints stay as they are, and this one takes no room.
        shutil.rmtree(work, ignore_errors=True)
        raise
    return final


def _write(work: Path, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, Any]:
    """This process's files; their sizes and digests by name."""
    measured = {}
    for stem, named in tensors.items():
        path = work / f"{stem}.safetensors"
        save_file({key: tensor.detach().contiguous() for key, tensor in named.items()}, path)
        _flush(path)
        measured[path.name] = _measure(path)
    return measured


def _complete(
    work: Path,
    state: Mapping[str, Any],
    best_weights: Sequence[Path],
    fits: str,
    is_milestone: bool,
    measured: dict[str, Any],
) -> None:
    """What is written once."""
    for path in best_weights:
        target = work / path.name.replace("weights", "best", 1)
        _link(path, target)
        measured[target.name] = _measure(target)
    (work / "state.json").write_text(json.dumps(state), encoding="utf-8")
    measured["state.json"] = _measure(work / "state.json")
    manifest = {"format": FORMAT, "fits": fits, "is_milestone": is_milestone, "files": measured}
    (work / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in (work / "state.json", work / "manifest.json", work):
        _flush(path)


def find(roots: Iterable[Path], fits: str, skipped: Callable[[str], None]) -> Found | None:
    """The furthest whole checkpoint of `roots` that `fits`; `skipped` hears of each that was passed over."""
    for folder in _newest_first(folder for root in roots for folder in _folders(root)):
        try:
            return _read(folder, fits)
        except (OSError, ValueError, KeyError, TypeError) as error:
            skipped(f"checkpoint {folder.name} is passed over: {error}")
    return None


def reopen(folder: Path) -> Found:
    """One that another process has found and verified."""
    return Found(folder, json.loads((folder / "state.json").read_text(encoding="utf-8")))


def prune(root: Path, limit: int, *, is_finished: bool) -> None:
    """Delete checkpoints that are no longer wanted.

    Milestones (evaluations, ends of epochs) are kept up to `limit`, all when it is 0 or less. Others exist
    only to lose little when the process dies, and go when newer ones exist. While training goes on the
    newest two stay whatever `limit` says, so that a damaged one costs little.
    """
    folders = _newest_first(_folders(root))
    milestones = [folder for folder in folders if _manifest(folder).get("is_milestone")]
    kept = set(milestones if limit <= 0 else milestones[:limit])
    kept.update(folders[: 0 if is_finished and milestones else 2])
    for folder in folders:
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def dump_random(device: torch.device) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The generators' states: torch's as tensors, Python's and NumPy's as JSON."""
    tensors = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    python_version, python_words, python_gauss = random.getstate()
    name, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return tensors, {
        "python": [python_version, list(python_words), python_gauss],
        "numpy": [name, [int(word) for word in words], int(position), int(has_gauss), float(gauss)],
    }


def load_random(tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any], device: torch.device) -> None:
    """The reverse of `dump_random`."""
    torch.set_rng_state(tensors["cpu"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
    python_version, python_words, python_gauss = state["python"]
    random.setstate((python_version, tuple(python_words), python_gauss))
    name, words, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, np.array(words, dtype=np.uint32), position, has_gauss, gauss))


def _read(folder: Path, fits: str) -> Found:
    manifest = _manifest(folder)
    if not manifest:
        raise ValueError("its manifest cannot be read")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"its format is {manifest.get('format')!r}, this version reads {FORMAT}")
    if manifest["fits"] != fits:
        raise ValueError("it was made with other parameters, data or another engine")
    for name, expected in manifest["files"].items():
        size = (folder / name).stat().st_size
        if size != expected["size_bytes"]:
            raise ValueError(f"{name} has {size} bytes, expected {expected['size_bytes']}")
        if _measure(folder / name) != expected:
            raise ValueError(f"the contents of {name} have changed")
    return reopen(folder)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        read = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def _folders(root: Path) -> list[Path]:
    return (
        [folder for folder in root.glob("checkpoint-*") if _NAME.fullmatch(folder.name)]
        if root.is_dir()
        else []
    )


def _newest_first(folders: Iterable[Path]) -> list[Path]:
    return sorted(folders, key=lambda folder: int(folder.name.rpartition("-")[2]), reverse=True)


def _measure(path: Path) -> dict[str, Any]:
    with open(path, "rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return {"size_bytes": path.stat().st_size, "sha256": digest}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
