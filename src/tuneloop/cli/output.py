"""Text for people, JSON for programs.

Colours only on a terminal: NO_COLOR (set to anything) and TERM=dumb turn them off, FORCE_COLOR turns them on
in a pipe as well. What is drawn over itself needs a terminal that can; elsewhere there are plain lines.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from tuneloop.core.plain import escaped, without_control

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

UNBOUNDED = 10_000
"""Width of a table that goes to a file or a pipe: nothing is cut."""

NARROW = 72
"""Columns of a terminal below which a table that does not fit becomes paragraphs."""

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
    click.echo(escaped(json.dumps(value, default=_plain, indent=2, ensure_ascii=False), keep="\n"))


def _plain(value: Any) -> Any:
    # Not model_dump: it hands NaN on, for which JSON has no word; as text it is null.
    return json.loads(value.model_dump_json()) if hasattr(value, "model_dump_json") else str(value)


def say(text: str = "") -> None:
    click.echo(clean(text))


def note(text: str) -> None:
    """On stderr, beside what a program reads."""
    click.echo(clean(text), err=True)


def warn(text: str) -> None:
    click.echo(clean(f"warning: {text}"), err=True)


def has_colours(stream: TextIO) -> bool:
    """NO_COLOR before FORCE_COLOR (see no-color.org and force-color.org); empty counts as not set."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR", "0") not in ("", "0"):
        return True
    return is_drawable(stream)


def is_drawable(stream: TextIO) -> bool:
    """Whether lines of `stream` can be drawn over."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def can_show(stream: TextIO, text: str) -> bool:
    """Whether the stream's encoding has these characters (in the C locale it may be ASCII)."""
    try:
        text.encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def console(*, stderr: bool = False, width: int | None = None) -> Console:
    """Prints text as it is: no markup, no emoji, no guessing of colours."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    colours = has_colours(stream)
    is_terminal = stream.isatty()
    # What was asked for by FORCE_COLOR is drawn whatever the terminal says of itself.
    system = "auto" if is_drawable(stream) else "standard"
    return Console(
        file=stream,
        force_terminal=is_terminal or colours,
        color_system=system if colours else None,  # type: ignore[arg-type]
        width=width or (None if is_terminal else UNBOUNDED),
        markup=False,
        emoji=False,
        highlight=False,
        legacy_windows=False,
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str = "none") -> None:
    """Aligned columns without frames, which `grep` and `awk` can read.

    On a terminal that is too narrow for them cells are folded, but for the first, which holds the name; on a
    very narrow one each row becomes a paragraph of `COLUMN  value` lines.
    """
    listed = [[cell(value) for value in row] for row in rows]
    if not listed:
        note(empty)
        return
    on = console()
    is_narrow = sys.stdout.isatty() and on.width < NARROW
    if is_narrow and _natural_width(columns, listed) > on.width:
        draw(_paragraphs(columns, listed), on)
        return
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        drawn.add_column(column, overflow="fold", no_wrap=column == columns[0])
    for row in listed:
        drawn.add_row(*row)
    draw(drawn, on)


def _natural_width(columns: Sequence[str], rows: Sequence[Sequence[Text]]) -> int:
    """Without folding, two spaces between columns."""
    widths = [max(len(name), *(row[place].cell_len for row in rows)) for place, name in enumerate(columns)]
    return sum(widths) + 2 * (len(columns) - 1)


def _paragraphs(columns: Sequence[str], rows: Sequence[Sequence[Text]]) -> Table:
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False, show_header=False)
    drawn.add_column(style="bold", no_wrap=True)
    drawn.add_column(overflow="fold")
    for number, row in enumerate(rows):
        if number:
            drawn.add_row("", "")
        for name, value in zip(columns, row, strict=True):
            if value.plain:
                drawn.add_row(name, value)
    return drawn


def draw(table: Table, on: Console) -> None:
    """Prints a table; its lines end where their text ends."""
    with on.capture() as captured:
        on.print(table)
    for line in captured.get().splitlines():
        click.echo(line.rstrip(), color=on.color_system is not None)


def cell(value: object) -> Text:
    from rich.text import Text

    text = "" if value is None else clean(str(value))
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
    return without_control(text)


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


def count(value: int, noun: str) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{value:,} {noun}" if value == 1 else f"{value:,} {noun}s"


def figures(values: Mapping[str, float]) -> Iterator[str]:
    """Each metric as `figure` tells it; a measured one together with what was planned of it."""
    for name, value in values.items():
        if name.startswith("planned_") and name.removeprefix("planned_") in values:
            continue
        planned = values.get(f"planned_{name}")
        if planned is None or not name.endswith("_bytes"):
            yield figure(name, value)
        else:
            yield f"{_of(value, planned)} planned"


def _of(value: float, whole: float) -> str:
    """`3.1 of 3.4 GB`; `812.0 MB of 1.2 GB`."""
    number_, unit = size(value).split(" ")
    return f"{number_ if size(whole).endswith(f' {unit}') else size(value)} of {size(whole)}"


def figure(name: str, value: float) -> str:
    """A metric by its name's unit: `loss 2.31`, `412 tokens/s`, `peak memory 1.5 GB`."""
    if name == "gemm_share":
        # The processor's speed at matrix products (GEMM).
        return f"{100 * value:.{0 if value >= 0.1 else 1}f} % of GEMM peak"
    if name == "bytes_per_second":
        return f"{size(value)}/s"
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
    if is_drawable(sys.stderr):
        with click.progressbar(length=total, label="Downloading", file=sys.stderr) as bar:
            for written in counts:
                bar.update(written - done)
                done = written
    else:
        for done in counts:  # noqa: B007 - drained for its effect, the last count is shown
            pass
    note(f"{size(done)} in {folder}")
