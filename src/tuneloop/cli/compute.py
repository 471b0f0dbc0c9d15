"""`tuneloop compute`: the places to run on, who holds them and who waits; and the table of Azure's sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from tuneloop.cli import output, session

if TYPE_CHECKING:
    from tuneloop.client.views import ComputeView


@click.group("compute")
def compute_() -> None:
    """Places to run on: list, show, create, delete, sizes.

    `local` is this machine. A cluster is a name with an Azure size, for recipes that are written for
    Azure: it is mapped onto this machine. Its steps run here and claim this machine's slots and memory, in
    one line with all others; nothing is rented, and no GPU appears that is not there. What the size is
    good for: `tuneloop plan --compute NAME` plans for it.

    A step claims a slot and the memory that it is expected to take; a replica claims memory. What does not
    fit waits in line. The settings slots and memory_gb say how much may be claimed on this machine.

    \b
    Examples:
      tuneloop compute list
      tuneloop compute show local
      tuneloop compute sizes
      tuneloop compute create gpu-cluster-big --size STANDARD_NC24ADS_A100_V4
    """


@compute_.command("list")
@output.json_option
def list_(as_json: bool) -> None:
    """List the computes with what is claimed of them.

    \b
    Example:
      tuneloop compute list
    """
    found = session.connect().client.computes()
    if as_json:
        output.print_json(found)
        return
    rows = [
        (
            one["name"],
            one.get("size") or "this machine",
            one["cores"],
            f"{one['slots_used']} of {one['slots']}",
            f"{output.size(one['memory_claimed_bytes'])} of {output.size(one['memory_bytes'])}",
            len(one["queue"]),
        )
        for one in found
    ]
    output.table(("NAME", "SIZE", "CORES", "SLOTS IN USE", "MEMORY CLAIMED", "WAITING"), rows)


@compute_.command("show")
@click.argument("name", default="local")
@output.json_option
def show_(name: str, as_json: bool) -> None:
    """Show who holds a compute, and who waits for it: position, reason and estimate.

    The estimate is made of how long such steps took before; a dash where none ran yet.

    \b
    Example:
      tuneloop compute show local
    """
    found = session.connect().client.compute(name)
    if as_json:
        output.print_json(found)
        return
    output.pairs(_facts(found))
    output.say()
    output.table(
        ("HELD BY", "MEMORY"),
        [(one["what"], output.size(one["memory_bytes"])) for one in found["holders"]],
        empty="Nothing runs.",
    )
    output.say()
    output.table(
        ("#", "WAITING", "PRIORITY", "STARTS IN", "REASON"),
        [
            (
                one["position"],
                f"{one['job']}/{one['step']}",
                one["priority"],
                _soon(one["expected_seconds"]),
                one["reason"] or "",
            )
            for one in found["queue"]
        ],
        empty="Nothing waits.",
    )


def _facts(found: ComputeView) -> dict[str, object]:
    devices = found.get("devices", [])
    return {
        "compute": found["name"],
        "size": _told_size(found),
        "cores": found["cores"],
        "gpus": [f"{one['name']} {_memory(one['memory_bytes'])}" for one in devices] or "none",
        "slots": f"{found['slots_used']} of {found['slots']} in use",
        "memory": f"{output.size(found['memory_claimed_bytes'])} of "
        f"{output.size(found['memory_bytes'])} claimed",
        "limited by": found.get("limited_by", []),
    }


def _memory(count: int) -> str:
    return output.size(count) if count else "(memory not known)"


def _told_size(found: ComputeView) -> str | None:
    size = found.get("size")
    if size is None:
        return None
    return f"{size}, up to {found['max_instances']} node(s), mapped onto this machine: steps run here"


def _soon(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return output.duration(seconds) if seconds else "any moment"


@compute_.command("create")
@click.argument("name")
@click.option(
    "--size", required=True, metavar="SIZE", help="An Azure size, such as STANDARD_NC24ADS_A100_V4."
)
@click.option(
    "--max-instances", type=click.IntRange(min=1), default=1, help="Nodes that a plan may count on."
)
@output.json_option
def create_(name: str, size: str, max_instances: int, as_json: bool) -> None:
    """Name a cluster of an Azure size, mapped onto this machine.

    A recipe's `compute: NAME` then works as it is written. Its steps run on this machine; the size decides
    what `tuneloop plan --compute NAME` counts with.

    \b
    Example:
      tuneloop compute create gpu-cluster-big --size STANDARD_NC24ADS_A100_V4 --max-instances 2
    """
    made = session.connect().client.create_compute(name, size, max_instances)
    if as_json:
        output.print_json(made)
        return
    output.say(f"Created {made['name']}: {_told_size(made)}.")


@compute_.command("delete")
@click.argument("name")
@output.json_option
def delete_(name: str, as_json: bool) -> None:
    """Delete a cluster. One that a job uses is kept; so is this machine.

    \b
    Example:
      tuneloop compute delete gpu-cluster-big
    """
    session.connect().client.delete_compute(name)
    if as_json:
        output.print_json({"deleted": name})
        return
    output.note(f"Deleted {name}.")


@compute_.command("sizes")
@click.option("--gpus", is_flag=True, help="Only sizes with GPUs that can still be had.")
@output.json_option
def sizes_(gpus: bool, as_json: bool) -> None:
    """The table of Azure's sizes for fine-tuning: cores, memory, GPUs and the memory of each.

    \b
    Examples:
      tuneloop compute sizes
      tuneloop compute sizes --gpus --json
    """
    from tuneloop.core.sizes import SIZES

    listed = [size for size in SIZES if not gpus or (size.gpus and not size.is_retired)]
    if as_json:
        output.print_json([size.model_dump(mode="json") for size in listed])
        return
    output.table(
        ("SIZE", "CORES", "MEMORY", "GPUS", "MEMORY EACH", "DISK", "NOTE"),
        [
            (
                size.name,
                _known(size.cores),
                _gib(size.memory_gib),
                f"{_known(size.gpus)} {size.gpu}" if size.gpu else "none",
                _gib(size.gpu_memory_gib or None),
                _gib(size.disk_gib),
                size.note or "",
            )
            for size in listed
        ],
    )


def _known(count: int | None) -> str:
    return "-" if count is None else str(count)


def _gib(count: int | None) -> str:
    return "-" if count is None else f"{count:,} GiB"
