"""How an error is told: one message and the next move on stderr, or one JSON object."""

from __future__ import annotations

import errno
import json
import os
import re
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

import click

from tuneloop.cli import session
from tuneloop.core.errors import Internal, TuneloopError, Unavailable, UsageError
from tuneloop.core.plain import without_control

_COMMAND = re.compile(r"(?<![\w/.-])tuneloop(?= [a-z])")

MOST_DETAILS = 50
"""Lines of a long list of mistakes; the rest is counted."""


def show(error: TuneloopError, as_json: bool = False) -> None:
    """Print `error` on stderr; the traceback too when TUNELOOP_DEBUG is set."""
    if os.environ.get("TUNELOOP_DEBUG"):
        traceback.print_exception(error)
    if as_json:
        click.echo(json.dumps({"error": error.to_json()}), err=True)
        return
    for line in describe(error.message, error.next_move, error.details):
        click.echo(without_control(line), err=True)


def describe(message: str, next_move: str | None, details: Any) -> list[str]:
    """The lines that tell an error to a person; `details` that the message says already are left out."""
    lines = [f"error: {as_typed_here(message)}"]
    given = details if isinstance(details, list) else []
    told = [_mistake(detail) for detail in given if not _is_said(detail, message)]
    unsaid = [text for text in told if text]
    lines += [f"  {text}" for text in unsaid[:MOST_DETAILS]]
    if len(unsaid) > MOST_DETAILS:
        lines.append(f"  and {len(unsaid) - MOST_DETAILS} more")
    if next_move:
        lines.append(f"  next: {as_typed_here(next_move)}")
    return lines


def details_told(details: Iterable[Any]) -> list[str]:
    """A line for each mistake or finding of a list such as an error's `details`."""
    return [text for detail in details if (text := _mistake(detail))]


def _is_said(detail: Any, message: str) -> bool:
    """Whether the message holds a recipe's mistake with its line, or a row's finding as it is told here."""
    if not isinstance(detail, Mapping) or "message" not in detail:
        return isinstance(detail, Mapping) and "rule" in detail and _finding(detail) in message
    line = detail.get("line")
    return str(detail["message"]) in message and (not line or f"line {line}" in message)


def _mistake(detail: Any) -> str | None:
    """A mistake of a recipe (`line, field, message`) or a row (`file, line, field, rule, value, fix`)."""
    if not isinstance(detail, Mapping):
        return None
    if "rule" in detail:
        return _finding(detail)
    if "message" not in detail:
        return None
    place = f"line {detail['line']}: " if detail.get("line") else ""
    name = f"{detail['field']} " if detail.get("field") else ""
    return f"{place}{name}{detail['message']}"


def _finding(detail: Mapping[str, Any]) -> str:
    """`a.jsonl line 6: messages[0].role: found "usr" (rule role_known). Use one of system, user.`"""
    line = f"{detail.get('place', 'line')} {detail['line']}" if detail.get("line") is not None else None
    name = str(detail.get("id") or "")
    named = f"(id {name if len(name) <= 24 else f'{name[:12]}...'})" if name else None
    place = " ".join(str(part) for part in (detail.get("file"), line, named) if part)
    found = f"found {_short(detail['value'])} " if detail.get("value") is not None else ""
    told = f"{found}(rule {detail['rule']})."
    text = ": ".join(str(part) for part in (place, detail.get("field"), told) if part)
    return f"{text} {detail['fix']}" if detail.get("fix") else text


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    return text if len(text) <= 120 else f"{text[:117]}..."


def show_usage(error: click.ClickException, as_json: bool) -> int:
    """Click's own errors: what was typed is wrong. A group without a command gets its help page."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError) and not as_json:
        click.echo(error.format_message(), err=True)
        return error.exit_code
    if as_json:
        body = {"code": "usage", "message": error.format_message(), "next": None, "details": None}
        click.echo(json.dumps({"error": body}), err=True)
        return error.exit_code
    context = error.ctx if isinstance(error, click.UsageError) else None
    click.echo(f"error: {error.format_message()}", err=True)
    if context is not None:
        click.echo(f"  next: {as_typed_here(f'{context.command_path} --help')}", err=True)
    return error.exit_code


def as_typed_here(text: str) -> str:
    """`text` with its commands as they are typed from here: `.venv/bin/tuneloop run` for `tuneloop run`."""
    program = session.program()
    return text if program == "tuneloop" else _COMMAND.sub(lambda _: program, text)


def of_this_machine(error: Exception) -> TuneloopError | None:
    """What is no defect but this shell's folder or disk; None for anything else."""
    if isinstance(error, FileNotFoundError) and _is_folder_gone():
        return UsageError(
            "The folder that this shell is in was deleted.", next_move="Change to another: cd ~"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Unavailable(
            f"{error.filename or 'The output'} cannot be written: {error.strerror}.",
            next_move="Free some space, or write to another disk.",
        )
    return None


def _is_folder_gone() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def defect(error: Exception) -> Internal:
    """An exception that nobody expected."""
    return Internal(
        f"{type(error).__name__}: {error}",
        next_move="This is a defect of Tuneloop: set TUNELOOP_DEBUG=1 to see where, and report it.",
    )
