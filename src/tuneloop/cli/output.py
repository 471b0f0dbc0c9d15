"""Text for people, JSON for programs. Colours only on a terminal, and not with NO_COLOR."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

UNBOUNDED = 10_000
"""Width of a table that goes to a file or a pipe: nothing is cut."""

DAY_SECONDS = 86_400

STYLES = {
    "completed": "green",
    "succeeded": "green",
    "reused": "green",
    "ready": "green",
    "registered": "green",
    "running": "cyan",
    "ok": "green",
    "warn": "yellow",
    "creating": "yellow",
    "queued": "yellow",
    "canceling": "yellow",
    "canceled": "yellow",
    "skipped": "yellow",
    "failed": "bold red",
    "fail": "bold red",
}
"""Colour of a state, wherever it is shown."""

json_option = click.option("as_json", "--json", is_flag=True, help="Print the API's JSON instead of text.")


def print_json(value: Any) -> None:
    """`value` may hold core types."""
    click.echo(json.dumps(value, default=_plain, indent=2, ensure_ascii=False))


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else str(value)


def say(text: str = "") -> None:
    click.echo(text)


def note(text: str) -> None:
    """On stderr, beside what a program reads."""
    click.echo(text, err=True)


def warn(text: str) -> None:
    click.echo(f"warning: {text}", err=True)


def console(*, stderr: bool = False, width: int | None = None) -> Console:
    """Prints text as it is: no markup, no emoji, no guessing of colours."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    is_terminal = stream.isatty()
    return Console(
        file=stream,
        force_terminal=is_terminal,
        width=width or (None if is_terminal else UNBOUNDED),
        markup=False,
        emoji=False,
        highlight=False,
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str = "none") -> None:
    """Aligned columns without frames, which `grep` and `awk` can read."""
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False, header_style="bold")
    listed = [[cell(value) for value in row] for row in rows]
    if not listed:
        note(empty)
        return
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in listed:
        drawn.add_row(*row)
    draw(drawn, console())


def draw(table: Table, on: Console) -> None:
    """Prints a table; in a file or a pipe its lines end where their text ends."""
    if on.is_terminal:
        on.print(table)
        return
    with on.capture() as captured:
        on.print(table)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


def cell(value: object) -> Text:
    from rich.text import Text

    text = "" if value is None else str(value)
    return Text(text, style=STYLES.get(text, ""))


def pairs(values: Mapping[str, object]) -> None:
    """`name  value` lines; what is None or empty is left out."""
    shown = {name: value for name, value in values.items() if value not in (None, "", {}, [], ())}
    width = max((len(name) for name in shown), default=0)
    for name, value in shown.items():
        say(f"{name:<{width}}  {_spelled(value)}")


def _spelled(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={part}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(str(part) for part in value)
    return str(value)


def clean(text: str) -> str:
    """Without control characters: what a model or a log says must not steer the terminal."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")


def duration(seconds: float | None) -> str:
    """`4.2 s`, `1:05`, `2:03:10`, `12 days`."""
    if seconds is None:
        return ""
    if seconds >= 2 * DAY_SECONDS:
        return f"{seconds / DAY_SECONDS:,.0f} days" if seconds < 1000 * DAY_SECONDS else "years"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: float | None) -> str:
    """`812 B`, `4.2 MB`, `1.3 GB` (decimal)."""
    if count is None:
        return ""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def number(value: float) -> str:
    """Four figures that matter, without a trailing `.0`."""
    if abs(value) >= 1000 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.4g}"


def figure(name: str, value: float) -> str:
    """A metric by its name's unit: `loss 2.31`, `412 tokens/s`, `peak memory 1.5 GB`."""
    if name.endswith("_per_second"):
        return f"{number(round(value))} {name.removesuffix('_per_second').replace('_', ' ')}/s"
    if name.endswith("_bytes"):
        return f"{name.removesuffix('_bytes').replace('_', ' ')} {size(value)}"
    if name.endswith("_seconds"):
        return f"{name.removesuffix('_seconds').replace('_', ' ')} {duration(value)}"
    return f"{name.replace('_', ' ')} {number(value)}"


def moment(text: str | datetime | None) -> datetime | None:
    if text is None or isinstance(text, datetime):
        return text
    parsed = datetime.fromisoformat(text)
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)


def between(start: str | datetime | None, end: str | datetime | None) -> float | None:
    """Seconds from `start` to `end` (None: now)."""
    began = moment(start)
    if began is None:
        return None
    return max(0.0, ((moment(end) or datetime.now(UTC)) - began).total_seconds())


def when(text: str | datetime | None) -> str:
    """`2026-11-24 06:41`, in this machine's time."""
    parsed = moment(text)
    return parsed.astimezone().strftime("%Y-%m-%d %H:%M") if parsed else ""


def download(counts: Iterator[int], total: int, folder: Path) -> None:
    """Drains a download, with a bar on a terminal; says where the files are."""
    done = 0
    if sys.stderr.isatty():
        with click.progressbar(length=total, label="Downloading", file=sys.stderr) as bar:
            for written in counts:
                bar.update(written - done)
                done = written
    else:
        for done in counts:  # noqa: B007 - drained for its effect, the last count is shown
            pass
    note(f"{size(done)} in {folder}")
