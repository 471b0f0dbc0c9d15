"""What the preprocess step says: what it does not do, what it did, and `stats.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tuneloop.core.chat import ChatTemplate
from tuneloop.core.data.split import Assignment
from tuneloop.core.recipe import PreprocessParameters
from tuneloop.steps.context import StepContext
from tuneloop.steps.preprocess.findings import Findings
from tuneloop.steps.preprocess.tally import Tally
from tuneloop.steps.preprocess.work import Splits
from tuneloop.tokens import Tokenize

if TYPE_CHECKING:
    from tuneloop.steps.preprocess import Outcome


def say_what_is_not_done(
    context: StepContext, parameters: PreprocessParameters, template: ChatTemplate
) -> None:
    if parameters.pad_to_max_length:
        context.warn("pad_to_max_length is true: rows are packed end to end in training, so none is padded.")
    if not template.end_of_turn:
        context.warn(f"{template.origin} writes nothing after an answer: the model will not learn to stop.")
    if template.writes_date:
        context.warn(
            f"{template.origin} writes the date of today into the text: other days give other tokens."
        )


def say_what_was_done(
    context: StepContext,
    parameters: PreprocessParameters,
    tokenize: Tokenize,
    places: Mapping[str, Splits],
    outcome: Outcome,
) -> None:
    _say_carving(context, parameters, places["train"], outcome)
    _say_findings(context, outcome.findings)
    for name, tally in outcome.tallies.items():
        _say_split(context, parameters, tokenize, name, tally)


def _say_carving(
    context: StepContext, parameters: PreprocessParameters, train: Splits, outcome: Outcome
) -> None:
    if isinstance(train, Assignment):
        carved = [f"{name} ({outcome.tallies[name].rows} rows)" for name in train.shares if name != "train"]
        context.warn(
            f"{' and '.join(carved)} had no file: those rows of the training file are used for it and not "
            f"trained on. They are drawn with preprocess.split_seed {train.seed}; rows with the same opening "
            "line stay together."
        )
        return
    for name, share in train:
        if name != "train":
            context.warn(
                f"{name} was not given: rows {share.start + 1} to {share.stop} of the training file are used "
                "for it and not trained on. They are taken in file order: a sorted file gives a biased split."
            )


def _say_findings(context: StepContext, findings: Findings) -> None:
    if findings.bad_rows:
        rules = ", ".join(f"{rule} {count}" for rule, count in sorted(findings.by_rule.items()))
        first = findings.listed[0]
        context.warn(
            f"{findings.bad_rows} bad rows were dropped, as preprocess.bad_rows allows ({rules}; first: "
            f"{first['file']} line {first['line']})."
        )
    for (file, rule), (count, first) in sorted(findings.noted.items()):
        context.warn(
            f"{file}: {count} finding{'' if count == 1 else 's'} of rule {rule}, first in line "
            f"{first['line']}: {first['field']}: {first['value']}. {first['fix']}"
        )


def _say_split(
    context: StepContext, parameters: PreprocessParameters, tokenize: Tokenize, name: str, tally: Tally
) -> None:
    if tally.long_rows:
        rows = tally.rows + tally.dropped_rows
        context.warn(
            f"{tally.long_rows} of {rows} {name} rows are longer than {tokenize.max_seq_length} tokens "
            f"(first: line {tally.first_long_line}). By preprocess.long_rows: {parameters.long_rows}, "
            f"{tally.dropped_rows} rows were dropped and {tally.truncated_rows} shortened: "
            f"{tally.lost_turns} turns and {tally.lost_learned_tokens} assistant tokens are not learned."
        )
    if tally.special_text_rows:
        context.warn(
            f"{tally.special_text_rows} {name} rows hold the text of a special token, which is tokenised as "
            "that token."
        )
    context.summary[f"{name}_rows"] = tally.rows
    context.summary[f"{name}_tokens"] = tally.tokens
    context.summary[f"{name}_learned_tokens"] = tally.learned_tokens
    context.summary[f"{name}_longest"] = max(tally.lengths, default=0)
    if tally.long_rows:
        context.summary[f"{name}_long_rows"] = tally.long_rows
        context.summary[f"{name}_lost_learned_tokens"] = tally.lost_learned_tokens


def describe(parameters: PreprocessParameters, tokenize: Tokenize, outcome: Outcome) -> dict[str, Any]:
    """The content of `stats.json`."""
    return {
        "format": 2,
        "splits": {name: tally.to_json() for name, tally in outcome.tallies.items()},
        "bad_rows": {
            "dropped": outcome.findings.bad_rows,
            "findings_by_rule": dict(sorted(outcome.findings.by_rule.items())),
            "first": outcome.findings.listed,
        },
        "template_digest": tokenize.template.digest,
        "max_seq_length": tokenize.max_seq_length,
        "long_rows": tokenize.long_rows,
        "messages_column": parameters.messages_column,
    }
