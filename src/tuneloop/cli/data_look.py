"""`tuneloop data check | stats | show`: what is in files of conversations, before anything is started."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from tuneloop.cli import completion, looks, output
from tuneloop.core.errors import AlreadyExists, DataError, UsageError

SHOWN_OF_A_RULE = 5
"""Findings that are printed; the file of findings has all."""
SHOWN = 20
"""Changes that are printed."""
BAR = 40
"""Characters of the longest bar of a histogram."""
POLICIES = ("error", "drop", "keep_last_turns", "split_turns", "cut")

_files = click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path))
_model = click.option(
    "--model",
    metavar="NAME",
    shell_complete=completion.cards,
    help="A base model of the catalogue, or a folder with its tokenizer: for the rules that need one.",
)
_column = click.option(
    "--messages-column",
    default="messages",
    show_default=True,
    metavar="NAME",
    help="Where in a row the conversation is.",
)
_length = click.option(
    "--max-seq-length",
    default=-1,
    show_default=True,
    metavar="TOKENS",
    help="Longest row that is trained on; -1: what the model reads.",
)
_policy = click.option(
    "--long-rows",
    default="error",
    show_default=True,
    type=click.Choice(POLICIES),
    help="What is done to longer rows.",
)


@click.command("check")
@_files
@_model
@_column
@_length
@_policy
@click.option(
    "--bad-rows",
    default=0,
    show_default=True,
    metavar="N",
    type=click.IntRange(min=0),
    help="So many bad rows are no failure.",
)
@click.option(
    "--fix",
    "fix",
    is_flag=True,
    help="Write a repaired copy beside each file, FILE.fixed.jsonl, and its changes.",
)
@click.option(
    "--findings",
    "target",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write every finding as JSON Lines.",
)
@output.json_option
def check_(
    files: Sequence[Path],
    model: str | None,
    messages_column: str,
    max_seq_length: int,
    long_rows: str,
    bad_rows: int,
    fix: bool,
    target: Path | None,
    as_json: bool,
) -> None:
    """Hold every row of FILE... to the rules: whatever would stop a job, or teach the model nonsense.

    JSON Lines, JSON, CSV, TSV and Parquet are read, the text ones also gzipped. Each finding says file, line,
    row, field, rule, value and what to do. With --model also the rules of its chat template and its tokens,
    and how long the rows are. Each FILE counts as a split of its own: what stands in two of them leaks.

    Exits with 0 when no more rows are bad than --bad-rows, else with 2. Warnings change nothing about that.

    \b
    Examples:
      tuneloop data check train.jsonl
      tuneloop data check train.jsonl test.jsonl --model Phi-3-mini-4k-instruct --max-seq-length 2048
      tuneloop data check train.csv --messages-column conversation --fix
    """
    said, folder = _look(files, model, messages_column, max_seq_length, long_rows, bad_rows=bad_rows, fix=fix)
    if target is not None:
        target.write_bytes((folder / "outputs" / "findings").read_bytes())
    if as_json:
        output.print_json(said)
    else:
        _tell(said, model, target)
        for each in said["fixed"]:
            _tell_fixed(each)
    report = said["report"]
    if not report["is_good"]:
        raise click.exceptions.Exit(DataError.exit_code)


@click.command("stats")
@_files
@_model
@_column
@_length
@output.json_option
def stats_(
    files: Sequence[Path], model: str | None, messages_column: str, max_seq_length: int, as_json: bool
) -> None:
    """Count what is in FILE...: rows, turns, tokens, and what --max-seq-length would cut.

    Bad rows are left out of the counts (`tuneloop data check` tells them).

    \b
    Examples:
      tuneloop data stats train.jsonl --model SmolLM2-135M-Instruct --max-seq-length 512
    """
    # A policy, so that a long row is no bad one: what each would take away is told anyway.
    said, _ = _look(files, model, messages_column, max_seq_length, "cut", bad_rows=2**31 - 1)
    if as_json:
        output.print_json(said)
        return
    _tell_statistics(said, model)


@click.command("show")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--row", default=1, show_default=True, metavar="N", type=click.IntRange(min=1), help="Which row, from 1."
)
@_model
@_column
@output.json_option
def show_(file: Path, row: int, model: str | None, messages_column: str, as_json: bool) -> None:
    """Print a row of FILE; with --model as the model will see it, with what is learned marked.

    On a terminal what counts for the loss is green, elsewhere it stands between [[ and ]].

    \b
    Example:
      tuneloop data show train.jsonl --row 17 --model Phi-3-mini-4k-instruct
    """
    inputs = {"data": file, **_tokenizer(model)}
    parameters = {"row": row, "messages_column": messages_column}
    folder = looks.run("check", parameters, inputs, {"report": "file"}, label=f"Reading {file.name}")
    said = looks.output_json(folder, "report")
    if as_json:
        output.print_json(said)
        return
    output.say(
        f"{file} row {said['row']}" + (f", line {said['line']}" if said["line"] != said["row"] else "")
    )
    if said["spans"]:
        share = said["learned_tokens"] / max(1, said["tokens"])
        output.say(f"{said['tokens']:,} tokens, {said['learned_tokens']:,} learned ({share:.0%})")
        output.say()
        _print_spans(said["spans"])
    elif said["messages"] is not None:
        output.say()
        _print_messages(said["messages"])
    for finding in said["findings"]:
        where = finding["field"] or "row"
        output.say(f"{where}: found {finding['value']} (rule {finding['rule']}). {finding['fix']}")


# ---------------------------------------------------------------- the look


def _look(
    files: Sequence[Path],
    model: str | None,
    column: str,
    max_seq_length: int,
    long_rows: str,
    *,
    bad_rows: int = 0,
    fix: bool = False,
) -> tuple[dict[str, Any], Path]:
    if len({os.path.realpath(file) for file in files}) < len(files):
        raise UsageError("A file is named twice.", next_move="Name each once.")
    if max_seq_length > 0 and model is None:
        raise UsageError("--max-seq-length counts tokens of a model.", next_move="Add --model NAME.")
    inputs = {f"file{number:03}": file for number, file in enumerate(files)}
    parameters = {
        "messages_column": column,
        "max_seq_length": max_seq_length,
        "long_rows": long_rows,
        "bad_rows": bad_rows,
        "fix": {name: str(_fixed(file)) for name, file in inputs.items()} if fix else {},
    }
    outputs = {"report": "file", "findings": "file"}
    label = "Checking " + (files[0].name if len(files) == 1 else f"{len(files)} files")
    # A repaired copy is wanted even where the question was asked before.
    folder = looks.run(
        "check", parameters, {**inputs, **_tokenizer(model)}, outputs, label=label, cached=not fix
    )
    return looks.output_json(folder, "report"), folder


def _tokenizer(model: str | None) -> dict[str, Path]:
    return {} if model is None else {"tokenizer": looks.tokenizer(model)}


def _fixed(file: Path) -> Path:
    """Where the repaired copy goes. Raises `AlreadyExists` before anything is read."""
    name = file.name.removesuffix(".gz")
    target = file.absolute().with_name(f"{name.rpartition('.')[0] or name}.fixed.jsonl")
    if target.exists():
        raise AlreadyExists(f"{target} is there already.", next_move="Move it away, then try again.")
    return target


# ---------------------------------------------------------------- text for people


def _tell(said: Mapping[str, Any], model: str | None, target: Path | None) -> None:
    report = said["report"]
    output.table(
        ("FILE", "FORMAT", "ROWS", "BAD", "MESSAGES", "CHARACTERS"),
        [
            (
                each["file"],
                each["format"],
                f"{each['rows']:,}",
                f"{each['bad_rows']:,}",
                f"{each['statistics']['messages']:,}",
                f"{each['statistics']['characters']:,}",
            )
            for each in report["files"]
        ],
    )
    if report["by_rule"]:
        output.say()
        output.table(
            ("RULE", "SEVERITY", "FINDINGS", "WHAT IT ASKS FOR"),
            [
                (each["rule"], each["severity"], f"{each['findings']:,}", each["what"])
                for each in report["by_rule"]
            ],
        )
        _tell_findings(report, target)
    _tell_tokens(said, model)
    output.say()
    output.say(_verdict(report, model))


def _tell_fixed(said: Mapping[str, Any]) -> None:
    output.say()
    output.say(
        f"{said['written']}: {said['rows_written']:,} of {said['rows']:,} rows written, "
        f"{said['rows_changed']:,} of them changed; dropped: {said['rows_dropped']:,} bad rows, "
        f"{said['duplicates_dropped']:,} duplicates."
    )
    for change in said["changes"][:SHOWN]:
        output.say(f"  {_line_of(change)}{change['what']}")
    if said["changes_count"] > SHOWN:
        output.say(f"  and {said['changes_count'] - SHOWN:,} more (--json lists a thousand)")


def _line_of(change: Mapping[str, Any]) -> str:
    return f"line {change['line']}: " if change["line"] else ""


def _tell_findings(report: Mapping[str, Any], target: Path | None) -> None:
    from tuneloop.core.data.report import RowFinding

    of_rule: dict[str, list[RowFinding]] = {each["rule"]: [] for each in report["by_rule"]}
    for found in report["findings"]:
        of_rule[found["rule"]].append(RowFinding.model_validate(found))
    # A few of every rule say more than many of one; errors come first, as in the table.
    shown = [each for found in of_rule.values() for each in found[:SHOWN_OF_A_RULE]]
    output.say()
    for each in shown:
        output.say(each.sentence() if each.severity == "error" else f"warning: {each.sentence()}")
    left = report["findings_count"] - len(shown)
    if left:
        where = f"in {target}" if target else "with --findings FILE"
        output.say(f"and {left:,} more: {where}")


def _verdict(report: Mapping[str, Any], model: str | None) -> str:
    bad, rows = report["bad_rows"], report["rows"]
    without = "" if model else " Rules of a chat template were not looked at: name a --model."
    if bad == 0:
        return f"{'The row is' if rows == 1 else f'All {rows:,} rows are'} good.{without}"
    allowed = f", {report['budget']:,} allowed" if report["budget"] else ""
    repair = (
        "" if report["is_good"] else " With --fix a copy is written without them, repaired where it can be."
    )
    are = "is" if bad == 1 else "are"
    return f"{bad:,} of {output.count(rows, 'row')} {are} bad{allowed}.{repair}{without}"


def _tell_statistics(said: Mapping[str, Any], model: str | None) -> None:
    for number, each in enumerate(said["report"]["files"]):
        if number:
            output.say()
        about = each["statistics"]
        output.pairs(
            {
                "file": each["file"],
                "rows": f"{about['rows']:,}"
                + (f" ({each['bad_rows']:,} bad, left out)" if each["bad_rows"] else ""),
                "messages": f"{about['messages']:,} ("
                + ", ".join(f"{count:,} {role}" for role, count in about["messages_by_role"].items() if count)
                + f"), at most {about['most_messages']:,} in a row",
                "characters": f"{about['characters']:,}, "
                f"{_share(about['learned_characters'], about['characters'])} in answers, "
                f"at most {about['most_characters']:,} in a row",
                "columns": ", ".join(f"{name} ({kind})" for name, kind in about["columns"].items()),
            }
        )
    _tell_tokens({**said, "long_rows": None}, model)


def _tell_tokens(said: Mapping[str, Any], model: str | None) -> None:
    for file, about in (said["tokens"] or {}).items():
        if not about["rows"]:
            continue
        lengths = about["lengths"]
        output.say()
        output.say(f"Tokens of {file} with {model}")
        output.pairs(
            {
                "tokens": f"{about['tokens']:,}, {_share(about['learned_tokens'], about['tokens'])} learned",
                "turns": f"{about['turns']:,}",
                "a row": f"median {lengths['median']:,}, p90 {lengths['p90']:,}, p99 {lengths['p99']:,}, "
                f"max {lengths['max']:,}",
            }
        )
        _print_histogram(lengths["histogram"])
        _tell_cut(about, said["max_seq_length"], said["long_rows"])


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "0%"


def _print_histogram(bins: Sequence[Mapping[str, int]]) -> None:
    most = max(each["conversations"] for each in bins)
    character = "█" if output.can_show(sys.stdout, "█") else "#"
    least = 0
    for each in bins:
        label = f"{least + 1:,} to {each['up_to']:,}"
        bar = character * max(1, round(BAR * each["conversations"] / most))
        output.say(f"{label:>18}  {bar} {each['conversations']:,}")
        least = each["up_to"]


def _tell_cut(about: Mapping[str, Any], limit: int, policy: str | None) -> None:
    if not about["long_rows"]:
        output.say(f"No row is longer than max_seq_length, {limit:,} tokens.")
        return
    rows = output.count(about["long_rows"], "row")
    output.say(
        f"{rows} {'is' if about['long_rows'] == 1 else 'are'} longer than max_seq_length, {limit:,} tokens."
    )
    output.table(
        ("LONG_ROWS", "LOSES ROWS", "TURNS", "ASSISTANT TOKENS"),
        [
            (
                f"{name}{' (chosen)' if name == policy else ''}",
                f"{loss['rows']:,}",
                f"{loss['turns']:,}",
                f"{loss['assistant_tokens']:,} ({_share(loss['assistant_tokens'], about['learned_tokens'])})",
            )
            for name, loss in about["would_lose"].items()
        ],
    )


def _print_spans(spans: Sequence[tuple[str, bool]]) -> None:
    from rich.text import Text

    on = output.console()
    text = Text()
    for written, is_learned in spans:
        if on.color_system is not None:
            text.append(output.clean(written), style="green" if is_learned else "dim")
        else:
            text.append(f"[[{output.clean(written)}]]" if is_learned else output.clean(written))
    on.print(text, soft_wrap=True)


def _print_messages(messages: Any) -> None:
    for message in messages if isinstance(messages, list) else [messages]:
        if isinstance(message, Mapping):
            output.say(f"{message.get('role')}: {message.get('content')}")
        else:
            output.say(str(message))
