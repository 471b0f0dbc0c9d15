"""What `tuneloop demo` tells: the evaluation, the replies side by side, the summary."""

from __future__ import annotations

import json
import os
import shlex
import sys
from typing import TYPE_CHECKING, Any

from tuneloop.cli import output, session

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tuneloop.client.views import EndpointView

WIDTH = 110
QUESTION = "What is a recipe in Tuneloop?"
FIGURES = (
    ("loss", "test loss", "lower is better"),
    ("perplexity", "perplexity", "lower is better"),
    ("token_accuracy", "token accuracy", "higher is better"),
)


def tell_evaluation(evaluation: Mapping[str, Any], note: str | None) -> None:
    """Loss, perplexity, accuracy of base and tuned model on the same rows, then the questions."""
    base, tuned = evaluation["base"], evaluation["tuned"]
    output.say()
    output.say(f"   On {evaluation['rows']} held-out conversations{_said(note)}:")
    rows = [
        (title, output.number(base[name]), output.number(tuned[name]), meaning)
        for name, title, meaning in FIGURES
        if name in base and name in tuned
    ]
    output.table(("", "BASE", "TUNED", ""), rows)
    if evaluation.get("questions"):
        output.say()
        output.say(f"   Questions in words that the training never showed{_said(note)}:")
        tell_questions(evaluation["questions"])


def tell_questions(questions: Sequence[Mapping[str, Any]]) -> None:
    rows = [
        (
            one["kind"],
            _verdict(one["base"]["right"]),
            _verdict(one["tuned"]["right"]),
            one["question"],
            _line(one["tuned"]["reply"]),
        )
        for one in questions
    ]
    _bounded_table(("KIND", "BASE", "TUNED", "QUESTION", "THE TUNED MODEL'S REPLY"), rows)
    for kind, score in scores(questions).items():
        output.say(
            f"   {kind}: base {score['base']} of {score['of']} right, tuned {score['tuned']} of {score['of']}"
        )


def scores(questions: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Right answers of both models by kind of question."""
    found: dict[str, dict[str, int]] = {}
    for one in questions:
        score = found.setdefault(one["kind"], {"base": 0, "tuned": 0, "of": 0})
        score["of"] += 1
        for name in ("base", "tuned"):
            score[name] += bool(one[name]["right"])
    return found


def tell_replies(replies: Sequence[Mapping[str, str]], note: str | None) -> None:
    base = f"BASE{f' ({note})' if note else ''}"
    rows = [(one["question"], _line(one["base"]), _line(one["tuned"])) for one in replies]
    _bounded_table(("QUESTION", base, "TUNED"), rows, lines=True)


def next_moves(endpoint: EndpointView, version: str) -> dict[str, str]:
    """Title to command line; each works as pasted."""
    key = f"$({session.pasteable('endpoints keys demo --primary')})"
    body = json.dumps({"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 48})
    curl = (
        f"curl -s {str(endpoint['openai_base_url']).rstrip('/')}/chat/completions "
        f'-H "Authorization: Bearer {key}" -H "Content-Type: application/json" -d {shlex.quote(body)}'
    )
    program = session.program()
    return {
        "call it": curl,
        "chat on": f"{program} chat demo",
        "chat with the base model": f"{program} chat demo --deployment base",
        "see its curves in MLflow": f"{program} mlflow",
        "see where it came from": f"{program} models show tuneloop-guide:{version}",
        "tune your own": f"{program} recipes show demo > my.yaml && {program} run my.yaml",
        "take the endpoint down": f"{program} endpoints delete demo",
        "take it all down": f"{program} down",
    }


def tell_summary(summary: Mapping[str, Any]) -> None:
    """What was done in how long, what changed, where things are, and how to go on."""
    output.say("\nSummary")
    _tell_times(summary)
    _tell_memory(summary)
    evaluation = summary["evaluation"]
    loss = f"{output.number(evaluation['base']['loss'])} -> {output.number(evaluation['tuned']['loss'])}"
    output.say(f"  test loss: {loss} (base -> tuned{_said(summary['quality_note'], ', base ')})")
    for kind, score in scores(evaluation.get("questions") or []).items():
        output.say(f"  {kind} questions right: {score['base']} -> {score['tuned']} of {score['of']}")
    model, endpoint = summary["model"], summary["endpoint"]
    output.say(f"  model: {model['name']}:{model['version']} in {model['path']}")
    output.say(f"  endpoint: {endpoint['openai_base_url']} (OpenAI), {endpoint['scoring_uri']} (Azure)")
    home = os.environ.get("TUNELOOP_HOME")
    output.say(f"\nGo on (in a shell with TUNELOOP_HOME={shlex.quote(home)})" if home else "\nGo on")
    for title, command in summary["next"].items():
        output.say(f"  {title}:\n    {command}")


def _tell_times(summary: Mapping[str, Any]) -> None:
    for title, seconds in summary["seconds"].items():
        output.say(f"  {title:<34} {output.duration(seconds):>8}")
        if title.startswith("tune"):
            for name, step in summary["steps"].items():
                peak = output.size(step["peak_memory_bytes"])
                output.say(f"    {name:<32} {_step_time(step):>8}{f'   peak memory {peak}' if peak else ''}")
    output.say(f"  {'in all':<34} {output.duration(sum(summary['seconds'].values())):>8}")


def _tell_memory(summary: Mapping[str, Any]) -> None:
    measured = [
        f"{one['name']} {output.size(one['peak_memory_bytes'])}"
        for one in summary["processes"]
        if one["peak_memory_bytes"] is not None
    ]
    output.say(f"  peak memory: {', '.join(measured) or 'not known'}")


def _step_time(step: Mapping[str, Any]) -> str:
    return "reused" if step["state"] == "reused" else output.duration(step["seconds"])


def _bounded_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, lines: bool = False) -> None:
    """A table that wraps long replies, on a terminal and in a file alike."""
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False, header_style="bold", leading=1 if lines else 0)
    for position, column in enumerate(columns):
        drawn.add_column(column, ratio=None if len(columns) > 3 and position < 3 else 1, overflow="fold")
    for row in rows:
        drawn.add_row(*[output.cell(value) for value in row])
    output.draw(drawn, output.console(width=None if sys.stdout.isatty() else WIDTH))


def _line(text: str) -> str:
    return " ".join(output.clean(text).split())


def _verdict(is_right: bool) -> str:
    return "right" if is_right else "wrong"


def _said(note: str | None, before: str = " (base model ") -> str:
    if note is None:
        return ""
    return f"{before}{note}" + (")" if before.endswith("(base model ") else "")
