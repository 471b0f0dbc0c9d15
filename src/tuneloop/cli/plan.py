"""`tuneloop plan`: what a recipe will take, before anything starts."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from tuneloop.cli import completion, output, planning, words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tuneloop.core.plan import Plan, Recommendation, Setup

BAR = 40
"""Characters of a bar as long as the limit."""
NAMES = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimiser",
    "lora": "LoRA adapter",
    "activations": "activations",
    "logits": "logits",
    "buffers": "buffers",
    "slack": "allocator slack",
    "process": "process",
}
VERDICT_STYLES = {"fits": "green", "tight": "yellow", "does not fit": "bold red"}


@click.command("plan")
@click.argument("recipe", shell_complete=completion.recipes)
@click.option("--compute", metavar="NAME", help="Plan for this compute; default: the recipe's for finetune.")
@click.option("--size", metavar="SIZE", help="Plan for an Azure size (`tuneloop compute sizes`).")
@click.option("changes", "--set", multiple=True, metavar="KEY=VALUE", help="Change one value of the recipe.")
@click.option("--recommend", is_flag=True, help="Print the three best settings or sizes for model and data.")
@click.option("--no-probe", is_flag=True, help="Do not measure this machine's rate: no time is told.")
@output.json_option
def plan_(
    recipe: str,
    compute: str | None,
    size: str | None,
    changes: Sequence[str],
    recommend: bool,
    no_probe: bool,
    as_json: bool,
) -> int:
    """What a recipe will take: memory by cause, disk, time, and whether it fits. Nothing is started.

    Lengths of rows are counted with the model's tokenizer, which is fetched without the weights; where that
    cannot be had they are guessed from characters, and it is said. The time comes from training a few random
    layers of the model's shape for about 20 seconds on this machine, once: the answer is kept.

    When it does not fit, the smallest changes that would are printed, each with what it would take.
    `tuneloop run` asks the same question first.

    \b
    Exit codes: 0 it fits, 4 it does not, 2 the recipe or the data is wrong.

    \b
    Examples:
      tuneloop plan my.yaml
      tuneloop plan my.yaml --size STANDARD_NC24ADS_A100_V4
      tuneloop plan my.yaml --set finetune.activation_checkpointing=always
      tuneloop plan my.yaml --recommend
    """
    asked = planning.ask(recipe, words.assignments(changes, "--set"), compute=compute, size=size)
    if recommend:
        listed = asked.recommend()
        if as_json:
            output.print_json(listed)
        else:
            tell_recommended(listed)
        return 0 if listed else 4
    found = asked.plan(probes=not no_probe)
    if as_json:
        output.print_json(found)
    else:
        tell(found)
    return 0 if found.is_fit else 4


# ---------------------------------------------------------------- text for people


def tell(plan: Plan) -> None:
    """The picture: a bar for each cause, the limit, disk and time, the verdict, and what would fit."""
    output.say(_headline(plan))
    output.say(f"  rows: {_rows(plan)}")
    output.say()
    _bars(plan)
    output.say()
    _totals(plan)
    output.say()
    _verdict(plan)


def _headline(plan: Plan) -> str:
    setup, place = plan.setup, plan.place
    adapter = "DoRA" if setup.is_dora else "LoRA"
    method = f"{adapter} of rank {setup.lora_r}" if setup.apply_lora else "all weights"
    where = f"{place.name}" + (f" ({place.gpus} {place.gpu})" if place.gpu else "")
    bits = "16" if setup.is_bf16 else "32"
    base = " over a 4-bit base" if setup.is_4bit else ""
    return (
        f"{plan.model} on {where}: {method}{base} ({_count(plan.trained_parameters)} of "
        f"{_count(plan.parameters)} parameters), {setup.effective_batch} rows a step, {bits} bits"
        f"{_processes(setup)}"
    )


def _processes(setup: Setup) -> str:
    if setup.devices == 1:
        return ""
    how = {"none": "DDP", "fsdp": "FSDP", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}[setup.sharding]
    return f", {setup.devices} processes ({how})"


def _rows(plan: Plan) -> str:
    rows = plan.rows
    known = {
        "tokens": "counted with the model's tokenizer",
        "characters": "guessed from characters",
        "worst case": "the limit of a row: the worst case",
    }[rows.known_by]
    many = "" if rows.count is None else f"{rows.count:,}, "
    again = ", activations computed again" if plan.setup.is_checkpointed else ""
    return f"{many}the longest {rows.longest:,} tokens ({known}); {_pack(plan):,} tokens at a time{again}"


def _pack(plan: Plan) -> int:
    from tuneloop.core.plan import pack_of

    return pack_of(plan.setup, plan.rows, plan.place.device)


def _count(number: int) -> str:
    if number >= 1_000_000_000:
        return f"{number / 1e9:.2f}B"
    return f"{number / 1e6:.1f}M" if number >= 1_000_000 else f"{number:,}"


def _bars(plan: Plan) -> None:
    """As long as their share of the limit, or of the total where that is more."""
    memory = plan.peak.device
    full = max(plan.limit_bytes, memory.total_bytes)
    block = "█" if output.can_show(sys.stdout, "█") else "#"
    together = " of all processes" if plan.setup.processes_here > 1 else ""
    device = "each GPU's memory" if plan.place.device == "cuda" else f"memory{together}"
    output.say(f"Peak of {device} (when {_moment(memory.moment)}):")
    for cause, size in memory.causes.items():
        if size:
            bar = block * max(1, round(BAR * size / full))
            output.say(f"  {NAMES[cause]:<16}{output.size(size):>10}  {bar}")
    limit = plan.limit_bytes
    output.say(
        f"  {'total':<16}{output.size(memory.total_bytes):>10}  "
        f"{memory.total_bytes / limit:.0%} of {output.size(limit)}"
    )


def _moment(moment: str) -> str:
    return {
        "loading": "the weights are loaded",
        "backward begins": "a backward pass begins",
        "layers are computed again": "a layer is computed again",
        "backward ends": "a backward pass ends",
        "optimizer steps": "the optimiser steps",
        "evaluating": "a validation pack runs",
    }[moment]


def _totals(plan: Plan) -> None:
    parts = ", ".join(f"{name} {output.size(size)}" for name, size in plan.disk.parts.items() if size)
    host = plan.peak.host_causes
    output.pairs(
        {
            "main memory": f"{output.size(plan.peak.host_bytes)} of "
            f"{output.size(plan.place.host_memory_bytes)} on each node "
            f"({', '.join(f'{name} {output.size(size)}' for name, size in host.items())})"
            if host
            else None,
            "disk": f"{output.size(plan.disk.total_bytes)} at most ({parts})",
            "time": _time(plan),
        }
    )


def _time(plan: Plan) -> str:
    time = plan.time
    steps = f"{time.steps:,} steps" if time.steps else "not known"
    if time.seconds is None or time.seconds_per_epoch is None:
        return f"{steps}; {time.how}"
    return (
        f"about {output.duration(time.seconds)} in all, {output.duration(time.seconds_per_epoch)} an epoch, "
        f"{steps} ({time.how})"
    )


def _verdict(plan: Plan) -> None:
    told = click.style(plan.verdict.upper(), **_style(plan.verdict))
    colours = output.has_colours(sys.stdout)
    reasons = "".join(f"; {reason}" for reason in plan.reasons).removeprefix("; ")
    click.echo(f"Verdict: {told}" + (f": {reasons}." if reasons else "."), color=colours)
    for warning in plan.warnings:
        output.warn(warning)
    for one in plan.unsupported:
        output.say(f"  note: {one}")
    if not plan.is_fit:
        tell_changes(plan)


def _style(verdict: str) -> dict[str, Any]:
    name = VERDICT_STYLES[verdict]
    return {"fg": name.split()[-1], "bold": "bold" in name}


def tell_changes(plan: Plan) -> None:
    """What would fit, each with its numbers."""
    if plan.changes:
        output.say("It would fit with one of:")
    for change in plan.changes:
        later = "" if change.is_supported else " (not in this version)"
        output.say(f"  {output.size(change.total_bytes):>9}  {change.what}{later}")
        if change.settings and change.is_supported:
            output.say(f"             {_as_options(change.settings)}")
    if not plan.changes:
        output.say("No change of the recipe alone would fit there.")
    if plan.sizes:
        output.say("As it is written it would fit on:")
    for size in plan.sizes:
        output.say(f"  {output.size(size.total_bytes):>9}  {size.what}")


def _as_options(settings: Any) -> str:
    spelled = {True: "true", False: "false"}
    return " ".join(
        f"--set {name}={spelled[value] if isinstance(value, bool) else value}"
        for name, value in settings.items()
    )


def tell_recommended(listed: Sequence[Recommendation]) -> None:
    if not listed:
        output.say("Nothing fits: neither here nor on one device of any size in the table.")
        return
    for number, each in enumerate(listed, start=1):
        share = each.total_bytes / each.limit_bytes
        output.say(f"{number}. {each.what}")
        taken = f"{output.size(each.total_bytes)} of {output.size(each.limit_bytes)}"
        output.say(f"   {taken} ({share:.0%}) on {each.place}")
        if each.settings:
            output.say(f"   {_as_options(each.settings)}")
