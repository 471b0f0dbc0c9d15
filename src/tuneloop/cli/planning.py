"""What the planner is asked with: the recipe resolved, the lengths of its rows, the place, the measured
rate."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tuneloop
from tuneloop.cli import looks, output, recipe_file, session
from tuneloop.core.errors import InvalidState, NoRoom, TuneloopError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tuneloop.client.views import ComputeView
    from tuneloop.core.plan import Place, Plan, Rate, Recommendation, Rows, Setup
    from tuneloop.core.recipe import Resolved
    from tuneloop.core.types import Card

PROBE_TOKENS = 1024
"""A pack of more tokens is measured with so many: the rate changes little above."""


@dataclass
class Question:
    """A recipe and where it is to run."""

    card: Card
    resolved: Resolved
    rows: Rows
    place: Place

    def plan(self, *, probes: bool) -> Plan:
        """With the time, where the rate of this machine is known or `probes` lets it be measured."""
        from tuneloop.core import plan as planner

        finetune = self.resolved.finetune.model_dump()
        setup = planner.setup_at(finetune, self.place)
        rate = None
        if self.place.is_here and probes and self.rows.count is not None:
            rate = measured_rate(self.card, setup, self.rows, self.place)
        return planner.plan(self.card, finetune, self.rows, self.place, rate=rate)

    def recommend(self) -> list[Recommendation]:
        from tuneloop.core import plan as planner

        return planner.recommend(self.card, self.resolved.finetune.model_dump(), self.rows, self.place)


def ask(
    recipe: str,
    overrides: Mapping[str, str],
    *,
    compute: str | None = None,
    size: str | None = None,
    counts: bool = True,
) -> Question:
    """Raises what a submission of the recipe would raise: `RecipeError`, `NotFound`, `DataError`. Without
    `counts` rows are not tokenised: their lengths are guessed from characters."""
    from tuneloop.core import recipe as recipes

    if compute is not None and size is not None:
        raise UsageError("Give --compute or --size, not both.")
    path = recipe_file.path_of(recipe)
    shown = recipe if path == Path(recipe) else path.name
    written = recipes.parse(recipe_file.text_of(path), path=shown, overrides=overrides)
    written = recipes.attach(written, path.parent.absolute())
    client = session.connect().client
    card = client.card(written.model)
    resolved = recipes.resolve(written, card)
    place = _place(client.compute(compute or written.compute.finetune), size)
    return Question(card, resolved, rows_of(resolved, card, path.parent.absolute(), counts=counts), place)


def refuse_what_does_not_fit(recipe: str, overrides: Mapping[str, str]) -> None:
    """Raises `NoRoom` before a job is made of it. What is wrong with recipe or data is the submission's to
    say, and rows are tokenised only where it could depend on their length."""
    if not Path(recipe).is_file() and Path(recipe).exists():
        return  # a pipe can be read once
    try:
        asked = ask(recipe, overrides, counts=False)
        asked.rows = asked.rows.model_copy(update={"longest": most_tokens(asked)})
        if asked.rows.known_by == "worst case" or asked.plan(probes=False).is_fit:
            return
        found = ask(recipe, overrides).plan(probes=False)
    except NoRoom:
        raise
    except TuneloopError:
        return
    require_room(found, recipe)


def most_tokens(asked: Question) -> int:
    """Of the longest row if every character were a token, within the limit."""
    from tuneloop.core.plan.setup import TOKEN_CHARACTERS

    length = asked.resolved.preprocess.max_seq_length
    limit = min(asked.card.context_length, length) if length > 0 else asked.card.context_length
    return min(limit, round(asked.rows.longest * TOKEN_CHARACTERS))


def require_room(found: Plan, command: str) -> None:
    """Raises `NoRoom` for a plan that does not fit, with the smallest changes that would."""
    if found.is_fit:
        return
    ways = [
        f"{output.size(each.total_bytes)} with {each.what}" for each in found.changes if each.is_supported
    ]
    there = [f"{output.size(each.total_bytes)} on {each.what}" for each in found.sizes[:1]]
    would = "; or ".join([*ways[:3], *there])
    raise NoRoom(
        f"The plan does not fit: {'; '.join(found.reasons)}." + (f" What would: {would}." if would else ""),
        next_move=f"See all of it with: tuneloop plan {command}. To run all the same: --force",
        details=[each.model_dump(mode="json") for each in found.changes],
    )


# ---------------------------------------------------------------- the place


def _place(found: ComputeView, size: str | None) -> Place:
    from tuneloop.core import sizes
    from tuneloop.core.plan import place_of_size

    failed = sizes.why_not_provisioned(found["name"], found["provisioning_state"])
    if failed is not None:
        raise InvalidState(failed)
    named = size or found.get("size")
    if named is not None:
        nodes = found.get("max_instances", 1) if size is None else 1_000
        return place_of_size(sizes.get(named), nodes)
    return _here(found)


def _here(found: ComputeView) -> Place:
    """This machine: its first GPU where there is one, as training takes it."""
    from tuneloop.core.plan import Place

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")
    devices = [] if hidden else [one for one in found.get("devices", []) if one["memory_bytes"]]
    claimable = found["memory_bytes"]
    return Place(
        name=found["name"],
        device="cuda" if devices else "cpu",
        device_memory_bytes=devices[0]["memory_bytes"] if devices else claimable,
        host_memory_bytes=claimable,
        gpus=len(devices),
        gpu=devices[0]["name"] if devices else None,
        cores=found["cores"],
        disk_bytes=_free_disk(),
        has_fast_bf16=_has_fast_bf16(devices[0]["name"] if devices else None),
    )


def _free_disk() -> int | None:
    from tuneloop.core import settings as settings_module

    folder = settings_module.load().home
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


OLD_GPUS = ("K80", "P100", "P40", "V100", "T4", "GTX", "RTX 20", "Quadro RTX", "TITAN")
"""Before Ampere: no bf16 of their own (NVIDIA, compute capability below 8.0)."""


def _has_fast_bf16(gpu: str | None) -> bool:
    """As `training.plan.Machine` finds it, without torch: AMX or AVX512-BF16 of a processor."""
    if gpu is not None:
        return not any(old in gpu for old in OLD_GPUS)
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return False
    return "amx_tile" in flags or "avx512_bf16" in flags


# ---------------------------------------------------------------- the rows


def rows_of(resolved: Resolved, card: Card, folder: Path, *, counts: bool) -> Rows:
    """As exactly as can be had: tokens, else characters, else the longest that is let in."""
    from tuneloop.core.fit import rows_expected

    files = {
        role: path
        for role, path in _files(resolved, folder).items()
        if path.exists() and role in ("train", "validation")
    }
    length = resolved.preprocess.max_seq_length
    if "train" not in files:
        return rows_expected(None, length, card)
    if counts:
        try:
            return _counted(resolved, card, files)
        except TuneloopError as error:
            if error.exit_code == UsageError.exit_code:
                raise
            output.warn(f"rows are not counted in tokens, lengths are guessed: {error.message}")
    return _guessed(resolved, card, files)


def _files(resolved: Resolved, folder: Path) -> dict[str, Path]:
    samples = Path(tuneloop.__path__[0]) / "samples"
    return {
        role: samples / written.removeprefix("samples:")
        if written.startswith("samples:")
        else Path(folder, Path(written).expanduser())
        for role, written in resolved.recipe.data.files().items()
    }


def _guessed(resolved: Resolved, card: Card, files: Mapping[str, Path]) -> Rows:
    from tuneloop.core.data.check import check_files
    from tuneloop.core.data.reading import open_source
    from tuneloop.core.fit import rows_expected

    column = resolved.preprocess.messages_column
    sources = {role: open_source(path, column=column) for role, path in files.items()}
    report = check_files(sources, column=column)
    seen = {each.role: each.statistics for each in report.files}
    return rows_expected(seen["train"], resolved.preprocess.max_seq_length, card, seen.get("validation"))


def _counted(resolved: Resolved, card: Card, files: Mapping[str, Path]) -> Rows:
    preprocess = resolved.preprocess
    parameters = {
        "max_seq_length": preprocess.max_seq_length,
        "long_rows": preprocess.long_rows,
        "messages_column": preprocess.messages_column,
    }
    inputs = {**files, "tokenizer": looks.tokenizer(f"{card.name}:{card.version}")}
    outputs = {"report": "file", "findings": "file"}
    folder = looks.run("check", parameters, inputs, outputs, label="Counting tokens")
    said = looks.output_json(folder, "report")
    train = said["tokens"][str(files["train"])]
    aside = said["tokens"].get(str(files["validation"])) if "validation" in files else None
    tuned = resolved.finetune
    devices = tuned.number_of_gpu_to_use_finetuning * tuned.num_nodes_finetune
    effective = tuned.per_device_train_batch_size * tuned.gradient_accumulation_steps * devices
    return rows_counted(train, aside, said["max_seq_length"], effective)


def rows_counted(
    train: Mapping[str, Any], validation: Mapping[str, Any] | None, limit: int | None, effective_batch: int
) -> Rows:
    """From what the `check` look says of each file's lengths."""
    from tuneloop.core.plan import Rows

    most = max(1, train["lengths"]["max"])
    longest = min(most, limit) if limit else most
    aside = validation["lengths"]["max"] if validation else None
    return Rows(
        longest=longest,
        longest_step=_longest_step(train, longest, effective_batch),
        # The longest row's own share is not told: all of it might count.
        learned_share=min(1.0, 1.25 * train["learned_tokens"] / max(1, train["tokens"])),
        count=train["rows"],
        tokens=min(train["tokens"], train["rows"] * longest),
        validation_tokens=validation["tokens"] if validation else 0,
        longest_evaluated=None if aside is None else max(1, min(aside, longest)),
        known_by="tokens",
    )


def _longest_step(train: Mapping[str, Any], longest: int, effective_batch: int) -> int:
    """No step has more tokens than the longest rows together: the histogram tells how many are in which
    bin."""
    left, total = effective_batch, 0
    for each in reversed(train["lengths"]["histogram"]):
        taken = min(left, each["conversations"])
        total += taken * min(longest, each["up_to"])
        left -= taken
    return max(longest, total)


# ---------------------------------------------------------------- the rate


def measured_rate(card: Card, setup: Setup, rows: Rows, place: Place) -> Rate | None:
    """What this machine does with layers of that shape; None where it cannot be measured."""
    from tuneloop.core.plan import Rate, Rows, peak

    mean = (rows.tokens or 0) / max(1, rows.count or 1)
    tokens = _typical_pack(setup, rows, mean, place)
    few = card.architecture.model_copy(update={"layers": 3})
    small = Rows(longest=tokens, count=1, longest_evaluated=1)
    alone = setup.model_copy(update={"devices": 1, "nodes": 1, "sharding": "none"})
    needed = peak(few, alone, small, device=place.device).device.total_bytes
    if needed > place.device_memory_bytes:
        output.warn(f"the rate is not measured: three layers would take {output.size(needed)}.")
        return None
    parameters = {
        "architecture": card.architecture.model_dump(mode="json", exclude_defaults=True),
        "tokens": tokens,
        "rows": max(1, min(tokens // 2, round(tokens / max(1.0, mean)))),
        "apply_lora": setup.apply_lora,
        "lora_r": setup.lora_r,
        "is_bf16": setup.is_bf16,
        "optimizer": setup.optimizer,
        "learned_share": round(rows.learned_share, 2),
        "machine": _machine(place),
    }
    if setup.lora_targets is not None:
        parameters["lora_targets"] = list(setup.lora_targets)
    try:
        folder = looks.run("probe", parameters, {}, {"rate": "file"}, label="Measuring this machine")
    except TuneloopError as error:
        output.warn(f"the rate is not measured: {error.message}")
        return None
    said = looks.output_json(folder, "rate")
    # Processes of one processor share its cores.
    sharers = setup.processes_here if place.device == "cpu" else 1
    return Rate(
        tokens_per_second=said["tokens_per_second"] / sharers,
        how=f"{output.number(round(said['tokens_per_second'], 1))} tokens/s, measured with three layers here",
    )


def _typical_pack(setup: Setup, rows: Rows, mean: float, place: Place) -> int:
    """Tokens of an average pack, in steps: so that a few more rows ask no new question. `mean`: of a row."""
    from tuneloop.core.plan import pack_of

    drawn = mean * (setup.effective_batch / setup.devices if setup.is_packed else 1)
    tokens = max(32, min(PROBE_TOKENS, pack_of(setup, rows, place.device), round(max(mean, drawn))))
    return 1 << (tokens - 1).bit_length() if tokens < PROBE_TOKENS else PROBE_TOKENS


def _machine(place: Place) -> str:
    """What makes another machine, or another use of this one."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return f"{platform.node()}/{platform.machine()}/{place.cores}/{threads}/{place.gpu or ''}/{visible}"
