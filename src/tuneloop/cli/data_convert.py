"""`tuneloop data convert` and `tuneloop data split`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import click

from tuneloop.cli import failures, output, words
from tuneloop.core.chat import Finding
from tuneloop.core.data.convert import KINDS, Conversion, Kind, detect, json_line
from tuneloop.core.data.outputs import State, outputs
from tuneloop.core.data.reading import Row, read_rows
from tuneloop.core.data.rules import check_row, is_error
from tuneloop.core.data.split import SEED, SPLITS, Groups, contiguous, group_of
from tuneloop.core.errors import DataError

FIRST_ROWS = 100
"""What a layout is told by."""

MOST_FINDINGS = 100
"""Rows that cannot be converted are all counted, and the first ones listed."""

MOST_TOLD = 20
"""Of those that a budget allows, on stderr."""

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@dataclass
class _Bad:
    """Rows that could not be used."""

    file: str
    rows: int = 0
    details: list[dict[str, Any]] = field(default_factory=list)

    def add(self, row: Row, findings: Iterable[Finding]) -> None:
        self.rows += 1
        if self.rows <= MOST_FINDINGS:
            where = {"file": self.file, "line": row.line, "row": row.number}
            self.details.extend({**where, **finding._asdict()} for finding in findings)

    def refuse(self, message: str, next_move: str) -> NoReturn:
        raise DataError(message, next_move=next_move, details=self.details)

    def tell(self) -> None:
        for line in failures.details_told(self.details[:MOST_TOLD]):
            output.note(line)
        if self.rows > MOST_TOLD:
            output.note(f"and {self.rows - MOST_TOLD:,} rows more")


# ---------------------------------------------------------------- convert


@click.command("convert")
@click.argument("file", type=_FILE)
@click.option(
    "--from",
    "layout",
    type=click.Choice(["auto", *KINDS]),
    default="auto",
    show_default=True,
    help="Layout of FILE; auto tells it by the first rows, and says what it found.",
)
@click.option(
    "--to",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="OUT",
    help="JSON Lines file to write.",
)
@click.option(
    "--map",
    "mapped",
    multiple=True,
    metavar="NAME=MEANING",
    help="What a column, or a speaker, of FILE means. May be given several times.",
)
@click.option(
    "--bad-rows",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    show_default=True,
    help="So many rows that cannot be converted are left out, and told.",
)
@click.option(
    "--columns",
    type=click.Choice(["keep", "drop"]),
    default="keep",
    show_default=True,
    help="Columns that are not converted: keep them behind the messages, or drop them.",
)
@click.option("--join-parts", is_flag=True, help="Join the parts of a text, with nothing between them.")
@click.option("--force", is_flag=True, help="Replace a file that holds something else.")
@output.json_option
def convert_(
    file: Path,
    layout: str,
    to: Path,
    mapped: tuple[str, ...],
    bad_rows: int,
    columns: str,
    join_parts: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Bring FILE into the layout that Tuneloop learns from.

    FILE may be JSON Lines, JSON, CSV, TSV or Parquet, also gzipped. Each row is converted exactly, or
    reported with its line, the reason and what to do; then nothing is written, unless --bad-rows allows so
    many.

    \b
    Layouts, and what --map can say of each:
      sharegpt            conversations: [{from, value}]
                          conversations, from, value, system_prompt; a speaker is user, assistant or system
      alpaca              instruction, input, output, system, history; input joins instruction on a new line
      prompt-completion   prompt, completion, system: texts, or lists of messages
      openai              messages: [{role, content, weight}]; a weight of 0 is kept: read, not learned
      csv                 a column a turn: user, assistant, system, in the order of --map

    \b
    Examples:
      tuneloop data convert sharegpt.json --to talk.jsonl
      tuneloop data convert vicuna.json --from sharegpt --map bing=assistant --to talk.jsonl
      tuneloop data convert faq.csv --from csv --map Question=user --map Answer=assistant --to talk.jsonl
      tuneloop data convert qa.jsonl --from prompt-completion --map question=prompt --map answer=completion \\
          --to talk.jsonl --bad-rows 10
    """
    mapping = words.assignments(mapped, "--map")
    if to.exists() and to.samefile(file):
        raise click.UsageError(f"{to} is the file that is read. Name another with --to.")
    kind, why = _layout(file, layout, mapping)
    if not as_json:
        output.note(f"{file}: {kind} ({why})" if why else f"{file}: {kind}")
    conversion = Conversion(kind, mapping, keeps_columns=columns == "keep", joins_parts=join_parts)
    bad = _Bad(str(file))
    with outputs(to, force) as made:
        with open(made.begin(to), "wb") as handle:
            converted = _convert(read_rows(file, column=conversion.json_column), conversion, bad, handle)
        if bad.rows > bad_rows or not converted:
            _refuse_conversion(bad, converted, bad_rows)
        state = made.finish()[to]
    _tell_conversion(to, kind, why, converted, bad, conversion, state, as_json)


def _layout(file: Path, layout: str, mapping: Mapping[str, str]) -> tuple[Kind, str | None]:
    if layout != "auto":
        return layout, None  # type: ignore[return-value]
    first = [row.value for row in itertools.islice(read_rows(file, column=""), FIRST_ROWS) if row.value]
    return detect(first, mapping)


def _convert(rows: Iterable[Row], conversion: Conversion, bad: _Bad, handle: BinaryIO) -> int:
    converted = 0
    for row in rows:
        found = list(row.findings) if row.value is None else conversion(row.value)
        if isinstance(found, list):
            bad.add(row, found)
            continue
        handle.write(json_line(found))
        converted += 1
    return converted


def _refuse_conversion(bad: _Bad, converted: int, budget: int) -> NoReturn:
    rows = f"{bad.rows:,} of {bad.rows + converted:,} rows"
    if not converted:
        bad.refuse(f"{rows} of {bad.file} cannot be converted: nothing was written.", "Is --from right?")
    bad.refuse(
        f"{rows} of {bad.file} cannot be converted, and {budget} are allowed: nothing was written.",
        f"Mend them, or leave them out: --bad-rows {bad.rows}",
    )


def _tell_conversion(
    to: Path,
    kind: Kind,
    why: str | None,
    converted: int,
    bad: _Bad,
    conversion: Conversion,
    state: State,
    as_json: bool,
) -> None:
    if as_json:
        report = {
            "path": str(to.absolute()),
            "state": state,
            "layout": kind,
            "found_by": why,
            "rows": converted + bad.rows,
            "converted": converted,
            "bad_rows": bad.rows,
            "notes": dict(conversion.notes),
            "findings": bad.details,
        }
        output.print_json(report)
        return
    bad.tell()
    left_out = f", {bad.rows:,} left out" if bad.rows else ""
    output.say(f"{output.count(converted, 'conversation')} in {to}{left_out}.")
    for note, count in sorted(conversion.notes.items()):
        output.say(f"  {note}: {count:,}")


# ---------------------------------------------------------------- split


@click.command("split")
@click.argument("file", type=_FILE)
@click.option(
    "--by",
    type=click.Choice(["shuffled", "component"]),
    default="shuffled",
    show_default=True,
    help="Shuffled by opening line; or in file order, 80/10/10, as Azure's component does it.",
)
@click.option("--seed", type=int, default=SEED, show_default=True, help="Another one is another shuffle.")
@click.option("--validation", type=click.IntRange(0, 99), metavar="PCT", help="Per cent; default: 10.")
@click.option("--test", type=click.IntRange(0, 99), metavar="PCT", help="Per cent; default: 10.")
@click.option(
    "--to",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Folder for train.jsonl, validation.jsonl and test.jsonl.",
)
@click.option(
    "--messages-column", default="messages", show_default=True, metavar="C", help="Where conversations are."
)
@click.option("--force", is_flag=True, help="Replace files that hold something else.")
@output.json_option
def split_(
    file: Path,
    by: str,
    seed: int,
    validation: int | None,
    test: int | None,
    to: Path,
    messages_column: str,
    force: bool,
    as_json: bool,
) -> None:
    """Divide FILE into rows to train on and rows to hold out.

    By default every conversation goes where the hash of its opening line (the first thing the user says,
    without regard to case and spaces) and the seed put it. So no opening line is in two splits, the order of
    the rows does not matter, and rows that you add later leave the others where they are. Shares are met on
    average; no split is left empty.

    A share of 0 makes no such file. Columns beside the conversation are kept.

    \b
    Examples:
      tuneloop data split talk.jsonl --to my-data
      tuneloop data split talk.jsonl --validation 5 --test 0 --seed 7 --to my-data
      tuneloop data split talk.jsonl --by component --to my-data
    """
    if by == "component":
        if validation is not None or test is not None:
            raise click.UsageError("--by component always takes 80/10/10; leave --validation and --test out.")
        counts, states = _split_in_order(file, to, messages_column, force)
    else:
        held_out = {
            "validation": 10 if validation is None else validation,
            "test": 10 if test is None else test,
        }
        shares = {"train": 100 - sum(held_out.values()), **held_out}
        if shares["train"] < 1:
            raise click.UsageError(f"{sum(held_out.values())} % are held out: nothing is left to train on.")
        counts, states = _split_shuffled(file, to, messages_column, Groups(seed, shares), force)
    _tell_split(to, counts, states, as_json)


Counts = dict[str, int]


def _split_shuffled(
    file: Path, to: Path, column: str, groups: Groups, force: bool
) -> tuple[Counts, dict[str, State]]:
    """In two readings: which groups there are, then where each row goes."""
    bad = _Bad(str(file))
    before = _stamp(file)
    for row in read_rows(file, column=column):
        findings = _unsplittable(row, column)
        if findings:
            bad.add(row, findings)
        elif row.value is not None:
            groups.add(group_of(row.value[column]))
    _refuse_bad(bad)
    assignment = groups.assignment()
    placed = (
        (assignment(group_of(row.value[column])), row.value)
        for row in read_rows(file, column=column)
        if row.value is not None
    )
    names = [name for name in SPLITS if name in assignment.shares]
    return _write(placed, to, names, force, lambda: _refuse_changed(file, before))


def _split_in_order(file: Path, to: Path, column: str, force: bool) -> tuple[Counts, dict[str, State]]:
    bad = _Bad(str(file))
    before = _stamp(file)
    count = 0
    for row in read_rows(file, column=column):
        count += 1
        if row.value is None:
            bad.add(row, row.findings)
    _refuse_bad(bad)
    shares = contiguous({"train": count})
    ends = {name: share.stop for name, share in shares.items()}
    values = (row.value for row in read_rows(file, column=column) if row.value is not None)
    placed = (
        (next(name for name, end in ends.items() if number < end), value)
        for number, value in enumerate(values)
    )
    return _write(placed, to, list(shares), force, lambda: _refuse_changed(file, before))


def _unsplittable(row: Row, column: str) -> list[Finding]:
    if row.value is None:
        return list(row.findings)
    return [finding for finding in check_row(row.value, column) if is_error(finding)]


def _refuse_bad(bad: _Bad) -> None:
    if bad.rows:
        bad.refuse(
            f"{bad.rows:,} rows of {bad.file} cannot be used: nothing was written.",
            f"See all that is wrong: tuneloop data check {bad.file}",
        )


def _stamp(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _refuse_changed(file: Path, before: tuple[int, int]) -> None:
    if _stamp(file) != before:
        raise DataError(
            f"{file} was written to while it was read.",
            next_move="Wait until whatever writes it is done, then try again.",
        )


def _write(
    placed: Iterator[tuple[str, dict[str, Any]]],
    to: Path,
    names: list[str],
    force: bool,
    check: Any,
) -> tuple[Counts, dict[str, State]]:
    counts = dict.fromkeys(names, 0)
    places = {name: to / f"{name}.jsonl" for name in names}
    with outputs(to, force) as made:
        handles = {name: open(made.begin(place), "wb") for name, place in places.items()}  # noqa: SIM115 - closed below
        try:
            for name, value in placed:
                handles[name].write(json_line(value))
                counts[name] += 1
        finally:
            for handle in handles.values():
                handle.close()
        check()
        states = made.finish()
    return counts, {name: states[place] for name, place in places.items()}


def _tell_split(to: Path, counts: Counts, states: Mapping[str, State], as_json: bool) -> None:
    total = sum(counts.values())
    if as_json:
        splits = [
            {
                "split": name,
                "path": str((to / f"{name}.jsonl").absolute()),
                "rows": rows,
                "state": states[name],
            }
            for name, rows in counts.items()
        ]
        output.print_json({"rows": total, "splits": splits})
        return
    output.say(f"{total:,} rows in {to}{os.sep}")
    rows = (
        (f"{name}.jsonl", f"{count:,}", f"{100 * count / total:.1f} %", states[name])
        for name, count in counts.items()
    )
    output.table(("FILE", "ROWS", "SHARE", "STATE"), rows)
