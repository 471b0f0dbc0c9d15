"""Training speed beside TRL and LLaMA-Factory: useful tokens per CPU second and peak memory, in one run.

    .venv/bin/python benchmarks/train_speed.py --make-peers PEERS
    .venv/bin/python benchmarks/train_speed.py --peers PEERS [--work FOLDER] [--repeats 3] [--json out.json]
    .venv/bin/python benchmarks/train_speed.py --peers PEERS --quick
    .venv/bin/python benchmarks/train_speed.py --profile

SmolLM2-135M-Instruct in fp32, LoRA r 16 and alpha 32 on all linear layers, AdamW, the loss on what the
assistant says. Eight conversations of 135 to 1,024 tokens: 3,864 in all, 2,443 of them to learn. Every run is
a process of its own with one thread on one core (`taskset`); sides take turns within a repeat. All sides get
the same token ids and the same adapter; losses of every step must agree to 1e-3, or the run ends with an
error.

CPU seconds run from the end of the first optimiser step to the end of the last one. The first step, on
copies of the shortest conversation, warms up and is not counted. Useful tokens are those of the
conversations; padding is none. Peak memory is the process's VmHWM, the model's loading included. Linux only.

The share of the GEMM peak is what the arithmetic that no method can leave out would take at the fp32 rate of
`torch.mm`, measured on the same core before, between and after: 4 P FLOPs for a token (P: numbers of the
frozen linear layers; a product forward and one backward), 6 for each number of the adapter, 4 H V for a
learned token (the head), and 6 n d T for a token of a conversation of T (causal attention; n heads of size d,
each layer).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_speed_setup import LENGTHS, LORA, PEERS, TARGETS, ensure_task, make_peers, python_of

from tuneloop.adapters.local import NO_CACHED_FRAGMENTS

HERE = Path(__file__).parent
OVERHEAD = "Python, autograd, allocation, and the profiler itself"
LOSS_TOLERANCE = 1e-3
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
AS_A_STEP = {"GLIBC_TUNABLES": NO_CACHED_FRAGMENTS}
"""What Tuneloop starts its steps with, for Tuneloop's sides; in the environment of this program, for all."""


@dataclass(frozen=True)
class Side:
    name: str
    about: str
    peer: str | None
    batch: int
    is_checkpointed: bool = False

    def command(self, task: Path, peers: Path | None, out: Path) -> list[str]:
        script = f"train_speed_peer_{self.peer}.py" if self.peer else "train_speed_tuneloop.py"
        python = python_of(peers, self.peer) if self.peer and peers else Path(sys.executable)
        command = [str(python), str(HERE / script), "--task", str(task), "--batch", str(self.batch)]
        return [*command, *(["--checkpointing"] if self.is_checkpointed else []), "--out", str(out)]


SIDES = (
    Side("tuneloop-1", "Tuneloop, batch 1", None, 1),
    Side("trl-1", "TRL, batch 1 (its default: checkpointing)", "trl", 1, is_checkpointed=True),
    Side("tuneloop-4", "Tuneloop, batch 4", None, 4),
    Side("trl-4", "TRL, batch 4 (its default: checkpointing)", "trl", 4, is_checkpointed=True),
    Side("trl-best", "TRL, batch 1, no checkpointing (its best)", "trl", 1),
    Side(
        "llamafactory-1",
        "LLaMA-Factory, batch 1 (its default: checkpointing)",
        "llamafactory",
        1,
        is_checkpointed=True,
    ),
    Side("llamafactory-best", "LLaMA-Factory, batch 1, no checkpointing (its best)", "llamafactory", 1),
)
TARGETS_TO_REACH = (("tuneloop-1", "trl-1", 1.5), ("tuneloop-4", "trl-4", 3.5))
"""Ours, theirs, and how many times as fast ours is to be."""
MEMORY_TO_REACH = ("tuneloop-4", "trl-4", 0.5)


def main() -> None:
    given = _arguments()
    if given.make_peers:
        make_peers(given.make_peers, given.torch_index)
        return
    print("$", shlex.join([sys.executable, *sys.argv]), flush=True)
    work = given.work or Path(tempfile.mkdtemp(prefix="tuneloop-speed-"))
    task = ensure_task(work)
    if given.profile:
        profile(task, work, given.core, given.json)
        return
    compare(_chosen(given), task, work, given)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peers", type=Path, help="folder of the peers' environments")
    parser.add_argument("--make-peers", type=Path, metavar="PEERS", help="make them (3 GB), and nothing else")
    parser.add_argument("--torch-index", help="package index of torch's CPU wheels, for --make-peers")
    parser.add_argument("--work", type=Path, help="keeps model and rows; a temporary folder if left out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="the one that is used")
    parser.add_argument("--only", action="append", metavar="NAME", choices=[side.name for side in SIDES])
    parser.add_argument("--quick", action="store_true", help="once, against TRL at batch 1")
    parser.add_argument("--profile", action="store_true", help="where our own time goes")
    parser.add_argument("--json", type=Path, help="all figures")
    return parser.parse_args()


def _chosen(given: argparse.Namespace) -> list[Side]:
    names = ["tuneloop-1", "trl-1"] if given.quick else given.only or [side.name for side in SIDES]
    if given.quick:
        given.repeats = 1
    sides = [side for side in SIDES if side.name in names]
    missing = {side.peer for side in sides if side.peer} - {
        name for name in PEERS if given.peers and python_of(given.peers, name).exists()
    }
    if missing:
        raise SystemExit(
            f"no environment of {', '.join(sorted(map(str, missing)))}: --make-peers, then --peers"
        )
    return sides


# ---------------------------------------------------------------- running


def run(command: list[str], core: int, log: Path, own: dict[str, str]) -> None:
    """One side, alone on its core. Raises `SystemExit` with its last lines."""
    with open(log, "wb") as file:
        ended = subprocess.run(
            ["taskset", "-c", str(core), *command],
            env={**own, **os.environ, **ENVIRONMENT},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    if ended.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
        raise SystemExit("\n".join([f"{shlex.join(command)} failed:", *last]))


def gemm_peak(core: int) -> float:
    """fp32 GFLOP/s of one thread, the best shape."""
    ran = subprocess.run(
        ["taskset", "-c", str(core), sys.executable, str(HERE / "train_speed_clock.py")],
        env={**os.environ, **ENVIRONMENT},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return max(json.loads(ran.stdout).values())


def compare(sides: list[Side], task: Path, work: Path, given: argparse.Namespace) -> None:
    for side in sides:
        command = side.command(task, given.peers, Path("OUT.json"))
        variables = " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
        print(f"{side.name}: {variables} taskset -c {given.core} {shlex.join(command)}", flush=True)
    peaks = [gemm_peak(given.core)]
    found: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    for repeat in range(1, given.repeats + 1):
        for side in sides:
            out = work / f"{side.name}-{repeat}.json"
            out.unlink(missing_ok=True)
            own = {} if side.peer else AS_A_STEP
            run(side.command(task, given.peers, out), given.core, work / f"{side.name}-{repeat}.log", own)
            figures = json.loads(out.read_text(encoding="utf-8"))
            _check_versions(side, figures["versions"])
            found[side.name].append(figures)
            print(
                f"{repeat} {side.name}: {speed(figures):.1f} tokens/s, "
                f"{figures['peak_rss_bytes'] / 1e6:,.0f} MB, first loss {figures['losses'][0]:.4f}",
                flush=True,
            )
        peaks.append(gemm_peak(given.core))
        print(f"{repeat} GEMM: {peaks[-1]:.1f} GFLOP/s", flush=True)
    agreed = check_losses(sides, found)
    print("\n".join(["", *table(sides, found, peaks, task), "", *agreed, *verdicts(found)]))
    if given.json:
        written = {"command": sys.argv, "gemm_gflops": peaks, "sides": found, "flops": flops_per_token(task)}
        given.json.write_text(json.dumps(written, indent=1), encoding="utf-8")


def _check_versions(side: Side, versions: dict[str, str]) -> None:
    for name, pinned in PEERS.get(side.peer or "", {}).items():
        if name in versions and versions[name].split("+")[0] != pinned:
            raise SystemExit(
                f"{side.name} ran {name} {versions[name]}, not {pinned}: make its environment again"
            )


# ---------------------------------------------------------------- judging


def speed(figures: dict[str, Any]) -> float:
    return float(figures["tokens"] / figures["cpu_seconds"])


def check_losses(sides: list[Side], found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Whether all sides of a batch size did the same work: the loss of every step, and the gradient's norm.
    Raises `SystemExit` when losses differ."""
    lines = []
    for batch in sorted({side.batch for side in sides}):
        alike = [side for side in sides if side.batch == batch]
        first = found[alike[0].name][0]
        runs = [run for side in alike for run in found[side.name]]
        apart = max(
            abs(loss - other)
            for run in runs
            for loss, other in zip(run["losses"], first["losses"], strict=True)
        )
        norms = max(
            abs(norm / other - 1)
            for run in runs
            for norm, other in zip(run["norms"], first["norms"], strict=True)
        )
        lines.append(
            f"Batch {batch}: losses of all {len(first['losses'])} steps agree to {apart:.1e}, norms of the "
            f"gradient to {norms:.1e} (relative), over {len(runs)} runs of {len(alike)} sides."
        )
        if apart > LOSS_TOLERANCE:
            told = [f"{side.name}: {found[side.name][0]['losses']}" for side in alike]
            raise SystemExit("\n".join(["the sides do not do the same work; losses:", *told, lines[-1]]))
    return lines


def flops_per_token(task: Path) -> float:
    """Of a useful token, on average: see the top of this file."""
    written = json.loads(task.read_text(encoding="utf-8"))
    config = json.loads((Path(written["model"]) / "config.json").read_text(encoding="utf-8"))
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    sizes = [(hidden, queries), (queries, hidden), *[(hidden, keys)] * 2, *[(hidden, wide)] * 3]
    layers = config["num_hidden_layers"]
    frozen = layers * sum(a * b for a, b in sizes)
    adapter = layers * int(LORA["r"]) * sum(a + b for a, b in sizes)  # type: ignore[call-overload]
    tokens, targets = sum(LENGTHS), sum(TARGETS)
    head = 4 * hidden * config["vocab_size"] * targets / tokens
    attention = 6 * layers * queries * sum(length**2 for length in LENGTHS) / tokens
    return float(4 * frozen + 6 * adapter + head + attention)


def table(
    sides: list[Side], found: dict[str, list[dict[str, Any]]], peaks: list[float], task: Path
) -> list[str]:
    flops, peak = flops_per_token(task), max(peaks)
    lines = [
        f"GEMM peak: {peak:.1f} GFLOP/s (measured {len(peaks)} times, from {min(peaks):.1f}); a useful token "
        f"takes {flops / 1e6:.0f} MFLOP, so the peak is {peak * 1e9 / flops:.0f} tokens/s.",
        "",
        "| setting | tokens per CPU second | from to | peak RSS, MB | share of GEMM peak "
        "| Tuneloop, times as fast |",
        "|---|---|---|---|---|---|",
    ]
    for side in sides:
        speeds = [speed(figures) for figures in found[side.name]]
        memory = statistics.median(figures["peak_rss_bytes"] for figures in found[side.name])
        middle = statistics.median(speeds)
        ours = found.get(f"tuneloop-{side.batch}")
        times = f"{_ratio(ours, found[side.name])[0]:.2f}" if side.peer and ours else ""
        lines.append(
            f"| {side.about} | {middle:.1f} | {min(speeds):.1f} to {max(speeds):.1f} | {memory / 1e6:,.0f} | "
            f"{middle * flops / peak / 1e9:.0%} | {times} |"
        )
    return lines


def _ratio(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Median, least and most, of the repeats pair by pair."""
    ratios = [speed(a) / speed(b) for a, b in zip(ours, theirs, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def verdicts(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = []
    for ours, theirs, wanted in TARGETS_TO_REACH:
        if found.get(ours) and found.get(theirs):
            middle, least, most = _ratio(found[ours], found[theirs])
            word = "reached" if middle >= wanted else "NOT reached"
            lines.append(
                f"{ours} by {theirs}: {middle:.2f} times ({least:.2f} to {most:.2f}); {wanted} is {word}."
            )
    ours, theirs, wanted = MEMORY_TO_REACH
    if found.get(ours) and found.get(theirs):
        share = _memory(found[ours]) / _memory(found[theirs])
        word = "reached" if share <= wanted else "NOT reached"
        lines.append(f"{ours} takes {share:.2f} of the memory of {theirs}; {wanted} is {word}.")
    return lines


def _memory(runs: list[dict[str, Any]]) -> float:
    return float(statistics.median(figures["peak_rss_bytes"] for figures in runs))


# ---------------------------------------------------------------- where our time goes


def profile(task: Path, work: Path, core: int, json_file: Path | None) -> None:
    """Tuneloop at batch 1 and 4, once by the clock and once by the profiler."""
    peak, written = gemm_peak(core), {}
    for side in (side for side in SIDES if side.peer is None):
        out = work / f"{side.name}-profile.json"
        runs = []
        for more in ([], ["--profile"]):
            out.unlink(missing_ok=True)
            run([*side.command(task, None, out), *more], core, work / f"{side.name}-profile.log", AS_A_STEP)
            runs.append(json.loads(out.read_text(encoding="utf-8")))
        written[side.name] = runs
        print("\n".join(["", *profile_table(side, runs[0], runs[1], peak, task)]), flush=True)
    if json_file:
        json_file.write_text(json.dumps({"gemm_gflops": peak, "sides": written}, indent=1), encoding="utf-8")


def profile_table(
    side: Side, plain: dict[str, Any], profiled: dict[str, Any], peak: float, task: Path
) -> list[str]:
    total = profiled["cpu_seconds"]
    # The profiler reads the wall clock; on a core that is shared, that runs faster than the work.
    pace = profiled["cpu_seconds"] / profiled["wall_seconds"]
    groups = {name: seconds * pace for name, seconds in profiled["groups"].items() if name != "other"}
    groups[OVERHEAD] = total - sum(groups.values())
    ideal = flops_per_token(task) * plain["tokens"] / peak / 1e9
    lines = [
        f"{side.about}: {plain['cpu_seconds']:.1f} CPU seconds, {speed(plain):.1f} tokens/s "
        f"({total:.1f} s under the profiler); the products alone would take {ideal:.1f} s "
        f"at the GEMM peak of {peak:.1f} GFLOP/s.",
        "",
        "| where | CPU seconds | share |",
        "|---|---|---|",
    ]
    for name, seconds in sorted(groups.items(), key=lambda item: -item[1]):
        lines.append(f"| {name} | {seconds:.2f} | {seconds / total:.1%} |")
    lines += ["", "Largest operators:"]
    for name, seconds in list(profiled["operators"].items())[:16]:
        lines.append(f"  {seconds * pace:6.2f} s  {name}")
    return lines


if __name__ == "__main__":
    main()
