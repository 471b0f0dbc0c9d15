"""`report.md` of the evaluate step: evaluation.json as a page for people. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def write_report(evaluation: Mapping[str, Any]) -> str:
    parts = ["# Base and tuned model on the same data\n", _head(evaluation), _measures(evaluation)]
    if evaluation["questions"]:
        parts.append(_questions(evaluation))
    if evaluation["samples"]:
        parts.append(_samples(evaluation["samples"]))
    return "\n".join(parts)


def _head(evaluation: Mapping[str, Any]) -> str:
    name = evaluation["base_model"] or "the base model"
    note = f" ({evaluation['note']})" if evaluation["note"] else ""
    rows = f"{evaluation['rows']} of {evaluation['rows_in_split']}"
    return f"Base model: {name}{note}. Test rows scored: {rows}. Replies are greedy.\n"


def _measures(evaluation: Mapping[str, Any]) -> str:
    base, tuned = evaluation["base"], evaluation["tuned"]
    rows = [
        ["loss (nats per learned token)", f"{base['loss']:.4f}", f"{tuned['loss']:.4f}"],
        ["perplexity", f"{base['perplexity']:.2f}", f"{tuned['perplexity']:.2f}"],
        ["tokens foretold", f"{base['token_accuracy']:.1%}", f"{tuned['token_accuracy']:.1%}"],
    ]
    for kind, counts in evaluation["kinds"].items():
        label = f"{kind} questions right" if kind else "questions right"
        rows.append([label, *(f"{counts[name]} of {counts['total']}" for name in ("base", "tuned"))])
    return _table(["", "base", "tuned"], rows)


def _questions(evaluation: Mapping[str, Any]) -> str:
    def shown(answer: Mapping[str, Any]) -> str:
        return f"{'✓' if answer['right'] else '✗'} {answer['reply']}"

    rows = [
        [
            question["kind"],
            question["question"],
            _wanted(question),
            shown(question["base"]),
            shown(question["tuned"]),
        ]
        for question in evaluation["questions"]
    ]
    table = _table(["kind", "question", "must say", "base", "tuned"], rows)
    return f"## Questions\n\nRight (✓) when the reply holds one alternative of every fact.\n\n{table}"


def _wanted(question: Mapping[str, Any]) -> str:
    return ", ".join(" or ".join(fact) for fact in question["facts"])


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    rows = [[sample[name] for name in ("prompt", "truth", "base", "tuned")] for sample in samples]
    return f"## Sample replies\n\n{_table(['prompt', 'truth', 'base', 'tuned'], rows)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(_cell(cell) for cell in line) + " |\n" for line in lines)


def _cell(text: str) -> str:
    """On one line, and unable to end its cell or to begin HTML."""
    escaped = text.strip().replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return "<br>".join(" ".join(line.split()) for line in escaped.splitlines())
