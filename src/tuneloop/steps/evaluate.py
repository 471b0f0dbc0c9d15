"""The evaluate step: base and exported model, one after the other, on the same rows and the same questions.

    evaluation/
      evaluation.json    format, note, base and tuned {loss, perplexity, token_accuracy}, rows, rows_in_split,
                         samples [{row, prompt, truth, base, tuned}], kinds {kind: {total, base, tuned}},
                         questions [{id, kind, question, facts, base: {reply, right}, tuned: {...}}]
      report.md          the same for people

Losses are means over the learned tokens of the test split, in nats. Replies are greedy, so that they repeat.
A question is right when its reply holds, in any case of letters, at least one alternative of every fact.
What is scored is what is served: the exported folder, through the engine that replicas use.
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tuneloop import lm
from tuneloop.core.chat import Message
from tuneloop.core.data.reading import read_rows
from tuneloop.core.data.rules import check_row, is_error
from tuneloop.core.errors import Diverged
from tuneloop.core.process import write_atomically
from tuneloop.core.questions import Question, read_questions
from tuneloop.core.recipe import EvaluateParameters
from tuneloop.engines import GenerationRequest
from tuneloop.engines import transformers as engine_transformers
from tuneloop.engines.transformers import TransformersEngine
from tuneloop.steps.context import StepContext
from tuneloop.steps.evaluation_report import write_report
from tuneloop.training.data import Conversations, split_path

ASKED_AT_ONCE = 16
"""Replies between two progress lines."""


def run(context: StepContext) -> None:
    parameters = EvaluateParameters.model_validate(context.parameters)
    questions = _read_questions(context)
    rows = Conversations(split_path(context.inputs["dataset"], "test"))
    examination = Examination(context, parameters, rows, questions)
    base = examination.sit("base", context.inputs["base"])
    tuned = examination.sit("tuned", context.inputs["model"])
    evaluation = examination.evaluation(base, tuned)
    _summarise(context, evaluation)
    target = context.output("evaluation")
    target.mkdir()
    text = json.dumps(evaluation, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(target / "evaluation.json", text + "\n")
    write_atomically(target / "report.md", write_report(evaluation))


class Sample(NamedTuple):
    """A test conversation without its last answer, and that answer."""

    row: int
    prompt: str
    truth: str
    ids: tuple[int, ...]


class Marks(NamedTuple):
    """What one model did: the means over the test split, and its replies."""

    loss: float
    perplexity: float
    token_accuracy: float
    samples: list[str]
    questions: list[str]


class Examination:
    """The same for every model that sits it: prompts are made once, by the base model's tokenizer."""

    def __init__(
        self,
        context: StepContext,
        parameters: EvaluateParameters,
        rows: Conversations,
        questions: list[Question],
    ) -> None:
        self.context = context
        self.parameters = parameters
        self.rows = rows
        self.questions = questions
        self.scored_rows = min(len(rows), parameters.max_rows or len(rows))
        self._samples: list[Sample] | None = None

    def sit(self, name: str, path: Path) -> Marks:
        """Loads the model, and lets go of it at the end: memory holds one at a time."""
        self.context.progress(f"loading the {name} model")
        engine = engine_transformers.load(path)
        try:
            if self._samples is None:
                self.rows.check(engine.model.config.get_text_config().vocab_size)
                self._samples = self._choose_samples(engine)
            loss, accuracy = self._score(name, engine)
            samples = self._ask(f"{name} model: sample replies", engine, [each.ids for each in self._samples])
            asked = [engine.encode([{"role": "user", "content": each.question}]) for each in self.questions]
            questions = self._ask(f"{name} model: questions", engine, asked)
        finally:
            engine.close()
            del engine
            gc.collect()
        return Marks(loss, math.exp(min(loss, 700.0)), accuracy, samples, questions)

    # ---------------------------------------------------------------- loss

    def _score(self, name: str, engine: TransformersEngine) -> tuple[float, float]:
        """(mean loss, share of tokens foretold) over the learned tokens, one row at a time: no padding."""
        loss_sum, tokens, right = 0.0, 0, 0
        started = said = time.monotonic()
        for index in range(self.scored_rows):
            row = self.rows[index]
            score = engine.score(row.input_ids.tolist(), row.learn.tolist())
            loss_sum, tokens, right = loss_sum + score.loss_sum, tokens + score.tokens, right + score.right
            now = time.monotonic()
            if now - said >= 0.25 or index + 1 == self.scored_rows:
                said = now
                left = (now - started) / (index + 1) * (self.scored_rows - index - 1)
                self.context.progress(
                    f"{name} model: test loss",
                    index + 1,
                    self.scored_rows,
                    "rows",
                    left,
                    loss=loss_sum / tokens,
                )
        if not math.isfinite(loss_sum):
            raise Diverged(
                f"The {name} model's loss on the test rows is not a number.",
                next_move="Train again with a smaller learning rate." if name == "tuned" else None,
            )
        return loss_sum / tokens, right / tokens

    # ---------------------------------------------------------------- replies

    def _ask(self, stage: str, engine: TransformersEngine, prompts: Sequence[tuple[int, ...]]) -> list[str]:
        replies: list[str] = []
        started = time.monotonic()
        for start in range(0, len(prompts), ASKED_AT_ONCE):
            left = (time.monotonic() - started) / start * (len(prompts) - start) if start else None
            self.context.progress(stage, start, len(prompts), "replies", left)
            requests = [
                GenerationRequest(ids, min(self.parameters.max_new_tokens, engine.context_length - len(ids)))
                for ids in prompts[start : start + ASKED_AT_ONCE]
            ]
            replies.extend(completion.text for completion in engine.complete(requests))
        if prompts:
            self.context.progress(stage, len(prompts), len(prompts), "replies")
        return replies

    def _choose_samples(self, engine: TransformersEngine) -> list[Sample]:
        """Evenly spaced over the test split. A conversation that fills the whole context is left out, and
        that is said."""
        count = min(self.parameters.samples, len(self.rows))
        chosen = [self.rows[int(index)].row for index in np.linspace(0, len(self.rows) - 1, count).round()]
        if "test_file" in self.context.inputs:
            samples = self._from_file(engine, set(chosen))
        else:
            samples = self._from_tokens(engine, set(chosen))
        fitting = [sample for sample in samples if len(sample.ids) < engine.context_length]
        if len(fitting) < len(samples):
            self.context.warn(
                f"{len(samples) - len(fitting)} of {len(samples)} sample conversations fill the model's "
                f"context of {engine.context_length} tokens, so no reply to them is shown."
            )
        return fitting

    def _from_file(self, engine: TransformersEngine, lines: set[int]) -> list[Sample]:
        samples = []
        column = _messages_column(self.context.inputs["dataset"])
        name = self.context.input_names["test_file"]
        for row in read_rows(self.context.inputs["test_file"], name, column=column):
            if row.line not in lines or row.value is None or any(map(is_error, check_row(row.value, column))):
                continue
            messages = row.value[column]
            last = max(n for n, message in enumerate(messages) if message["role"] == "assistant")
            if prompt := messages[:last]:
                truth = str(messages[last]["content"])
                samples.append(Sample(row.line, _as_text(prompt), truth, engine.encode(prompt)))
        return samples

    def _from_tokens(self, engine: TransformersEngine, lines: set[int]) -> list[Sample]:
        """Where the test split was carved out of the training file: the last learned span is the truth."""
        samples = []
        for index in range(len(self.rows)):
            row = self.rows[index]
            if row.row not in lines:
                continue
            learned = np.flatnonzero(row.learn)
            stop = int(learned[-1]) + 1
            breaks = np.flatnonzero(np.diff(learned) > 1)
            start = int(learned[breaks[-1] + 1]) if len(breaks) else int(learned[0])
            ids = tuple(int(token) for token in row.input_ids)
            if start:
                prompt, truth = engine.decode(ids[:start]), engine.decode(ids[start:stop])
                samples.append(Sample(row.row, prompt.strip(), truth, ids[:start]))
        return samples

    # ---------------------------------------------------------------- what comes of it

    def evaluation(self, base: Marks, tuned: Marks) -> dict[str, Any]:
        """The content of `evaluation.json`."""
        samples = [
            {"row": each.row, "prompt": each.prompt, "truth": each.truth, "base": first, "tuned": second}
            for each, first, second in zip(self._samples or [], base.samples, tuned.samples, strict=True)
        ]
        questions = [
            {
                "id": each.id,
                "kind": each.kind,
                "question": each.question,
                "facts": each.facts,
                "base": {"reply": first, "right": each.is_right(first)},
                "tuned": {"reply": second, "right": each.is_right(second)},
            }
            for each, first, second in zip(self.questions, base.questions, tuned.questions, strict=True)
        ]
        note = lm.read_note(self.context.inputs["base"])
        return {
            "format": 1,
            "base_model": note.get("base_model"),
            "note": note.get("note"),
            "base": _means(base),
            "tuned": _means(tuned),
            "rows": self.scored_rows,
            "rows_in_split": len(self.rows),
            "samples": samples,
            "kinds": _count_by_kind(questions),
            "questions": questions,
        }


def _messages_column(dataset: Path) -> str:
    """What the preprocess step read."""
    path = dataset / "stats.json"
    about = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return str(about.get("messages_column", "messages"))


def _means(marks: Marks) -> dict[str, float]:
    return {
        "loss": marks.loss,
        "perplexity": marks.perplexity,
        "token_accuracy": marks.token_accuracy,
    }


def _count_by_kind(questions: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    kinds: dict[str, dict[str, int]] = {}
    for question in questions:
        counts = kinds.setdefault(question["kind"], {"total": 0, "base": 0, "tuned": 0})
        counts["total"] += 1
        for name in ("base", "tuned"):
            counts[name] += question[name]["right"]
    return kinds


def _summarise(context: StepContext, evaluation: dict[str, Any]) -> None:
    for name in ("base", "tuned"):
        for measure, value in evaluation[name].items():
            context.summary[f"{name}_{measure}"] = value
    context.summary["evaluated_rows"] = evaluation["rows"]
    if evaluation["questions"]:
        for name in ("base", "tuned"):
            right = sum(question[name]["right"] for question in evaluation["questions"])
            context.summary[f"questions_right_{name}"] = right
        context.summary["questions_total"] = len(evaluation["questions"])


def _as_text(messages: Sequence[Message]) -> str:
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


# ---------------------------------------------------------------- questions


def _read_questions(context: StepContext) -> list[Question]:
    """Of the input `questions`, if there is one. Raises `DataError` with every mistake in it."""
    path = context.inputs.get("questions")
    if path is None:
        return []
    return read_questions(path.read_bytes().splitlines(), context.input_names["questions"])
