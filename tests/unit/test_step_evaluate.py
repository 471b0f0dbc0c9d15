"""The evaluate step on tiny models: numbers held to transformers, questions to their facts."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import tiny_model
from tuneloop.core.errors import DataError, Diverged
from tuneloop.core.types import StepFile, StepFileInput
from tuneloop.steps import evaluate, preprocess
from tuneloop.steps.context import StepContext
from tuneloop.steps.evaluation_report import write_report
from tuneloop.training.data import Conversations

ROWS = [
    [("user", f"Question {number}?"), ("assistant", f"Answer {number} is here.")]
    + ([("user", "And then?"), ("assistant", "Then | nothing\n<b>more</b>.")] if number % 2 else [])
    for number in range(6)
]
QUESTIONS = [
    {"id": "a", "kind": "own", "question": "What is a recipe?", "facts": [["one file"], ["model", "data"]]},
    {"id": "b", "kind": "everyday", "question": "Capital of France?", "facts": [["Paris"]]},
]


def step(
    folder: Path, kind: str, outputs: dict[str, str], inputs: dict[str, Path], **parameters
) -> StepContext:
    folder.mkdir()
    given = {
        name: StepFileInput(path=str(path), digest="sha256:0", name=path.name)
        for name, path in inputs.items()
    }
    file = StepFile(
        attempt="job/step/1", attempt_id="1", kind=kind, parameters=parameters, inputs=given, outputs=outputs
    )
    return StepContext(folder, file)


def write_rows(path: Path, rows=ROWS) -> Path:
    lines = [
        json.dumps({"messages": [{"role": role, "content": text} for role, text in row]}) for row in rows
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_questions(path: Path, questions=QUESTIONS) -> Path:
    path.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    return path


class Case:
    """Base and tuned model (in MLflow layout), a dataset, and the step run on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = tiny_model(folder / "base", "smollm2", seed=0)
        (self.base / "tuneloop.json").write_text(
            json.dumps({"format": 1, "base_model": "Tiny:1", "note": "dequantised from 4 bits"})
        )
        tiny_model(folder / "tuned" / "model", "smollm2", seed=1)
        shutil.copytree(folder / "tuned" / "model", folder / "tuned" / "components" / "tokenizer")
        (folder / "tuned" / "MLmodel").write_text("flavors: {}\n")
        self.tuned = folder / "tuned"
        self.test_file = write_rows(folder / "test.jsonl")
        files = dict.fromkeys(("train", "validation", "test"), self.test_file)
        context = step(
            folder / "prep", "preprocess", {"dataset": "dataset_folder"}, {"model": self.base, **files}
        )
        with contextlib.closing(context):
            preprocess.run(context)
        self.dataset = context.output("dataset")

    def run(self, name: str, inputs: dict[str, Path] | None = None, **parameters) -> StepContext:
        given = {"base": self.base, "model": self.tuned, "dataset": self.dataset, **(inputs or {})}
        context = step(
            self.folder / name, "evaluate", {"evaluation": "folder"}, given, max_new_tokens=8, **parameters
        )
        with contextlib.closing(context):
            evaluate.run(context)
        return context


def read(context: StepContext) -> dict:
    return json.loads((context.output("evaluation") / "evaluation.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def whole(case) -> StepContext:
    questions = write_questions(case.folder / "questions.jsonl")
    return case.run("whole", {"questions": questions, "test_file": case.test_file}, samples=3)


def test_losses_are_those_of_transformers_over_the_learned_tokens(case, whole):
    rows = Conversations(case.dataset / "test")
    for name, folder in (("base", case.base), ("tuned", case.tuned / "model")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        total, right, tokens = 0.0, 0, 0
        for row in rows:
            ids = torch.tensor(row.input_ids).long()
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0, :-1]
            learned = torch.tensor(row.learn)[1:]
            total += float(
                torch.nn.functional.cross_entropy(logits[learned], ids[1:][learned], reduction="sum")
            )
            right += int((logits[learned].argmax(-1) == ids[1:][learned]).sum())
            tokens += int(learned.sum())
        measured = read(whole)[name]
        assert measured["loss"] == pytest.approx(total / tokens, abs=1e-5)
        assert measured["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
        assert measured["token_accuracy"] == right / tokens


def test_the_summary_has_both_models_measures(whole):
    assert set(whole.summary) == {
        *(
            f"{name}_{measure}"
            for name in ("base", "tuned")
            for measure in ("loss", "perplexity", "token_accuracy")
        ),
        "evaluated_rows",
        "questions_right_base",
        "questions_right_tuned",
        "questions_total",
    }
    assert whole.summary["evaluated_rows"] == 6
    assert whole.summary["questions_total"] == 2


def test_samples_stand_beside_the_last_answer_of_their_conversation(whole):
    samples = read(whole)["samples"]
    assert [sample["row"] for sample in samples] == [1, 3, 6]
    assert samples[0]["prompt"] == "Question 0?"
    assert samples[0]["truth"] == "Answer 0 is here."
    assert samples[2]["prompt"] == "user: Question 5?\nassistant: Answer 5 is here.\nuser: And then?"
    assert samples[2]["base"] != samples[2]["tuned"]


def test_without_a_test_file_the_samples_come_out_of_the_tokens(case, whole):
    samples = read(case.run("from-tokens", samples=3))["samples"]
    expected = read(whole)["samples"]
    assert [sample["base"] for sample in samples] == [sample["base"] for sample in expected]
    assert [sample["truth"] for sample in samples] == [sample["truth"] for sample in expected]
    assert "Question 0?" in samples[0]["prompt"]


def test_the_same_evaluation_gives_the_same_bytes(case, whole):
    inputs = {"questions": case.folder / "questions.jsonl", "test_file": case.test_file}
    again = case.run("again", inputs, samples=3)
    for file in ("evaluation.json", "report.md"):
        assert (again.output("evaluation") / file).read_bytes() == (
            whole.output("evaluation") / file
        ).read_bytes()


def test_no_questions_and_no_samples_leave_the_measures(case):
    context = case.run("bare", samples=0, max_rows=2)
    evaluation = read(context)
    assert (evaluation["rows"], evaluation["rows_in_split"]) == (2, 6)
    assert evaluation["samples"] == evaluation["questions"] == []
    assert "questions_total" not in context.summary
    assert "2 of 6" in (context.output("evaluation") / "report.md").read_text()


def test_progress_names_model_and_stage(whole):
    lines = [json.loads(line) for line in (whole.folder / "progress.jsonl").read_text().splitlines()]
    stages = list(dict.fromkeys(line["stage"] for line in lines))
    assert stages == [
        "loading the base model",
        "base model: test loss",
        "base model: sample replies",
        "base model: questions",
        "loading the tuned model",
        "tuned model: test loss",
        "tuned model: sample replies",
        "tuned model: questions",
    ]


def test_the_report_says_how_the_base_came_and_keeps_its_tables_whole(whole):
    report = (whole.output("evaluation") / "report.md").read_text(encoding="utf-8")
    assert "Tiny:1 (dequantised from 4 bits)" in report
    assert "Then \\| nothing<br>&lt;b>more&lt;/b>." in report
    tables = [line for line in report.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in tables} == {4, 5, 6}


def test_a_report_shows_which_questions_are_right():
    evaluation = {
        "base_model": None,
        "note": None,
        "rows": 1,
        "rows_in_split": 1,
        "base": {"loss": 2.0, "perplexity": 7.389, "token_accuracy": 0.5},
        "tuned": {"loss": 1.0, "perplexity": 2.718, "token_accuracy": 0.75},
        "kinds": {"own": {"total": 1, "base": 0, "tuned": 1}},
        "questions": [
            {
                **QUESTIONS[0],
                "base": {"reply": "A meal.", "right": False},
                "tuned": {"reply": "One file.", "right": True},
            }
        ],
        "samples": [],
    }
    report = write_report(evaluation)
    assert "| own questions right | 0 of 1 | 1 of 1 |" in report
    assert "| one file, model or data | ✗ A meal. | ✓ One file. |" in report


# ---------------------------------------------------------------- questions


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("A recipe is ONE FILE with the Model.", True),
        ("one file of data", True),
        ("one file", False),
        ("the model and the data", False),
        ("", False),
    ],
)
def test_a_question_is_right_when_every_fact_is_said_in_one_of_its_wordings(reply, right):
    assert evaluate.Question(**QUESTIONS[0]).is_right(reply) is right


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("{", "found"),
        ("[]", "found"),
        ('{"question": "x", "facts": [["y"]]}', "id"),
        ('{"id": "a", "question": " ", "facts": [["y"]]}', "question"),
        ('{"id": "a", "question": "x", "facts": []}', "facts"),
        ('{"id": "a", "question": "x", "facts": ["y"]}', "facts"),
        ('{"id": "a", "question": "x", "facts": [[]]}', "facts"),
        ('{"id": "a", "question": "x", "facts": [["y"]], "fact": 1}', "fact"),
    ],
)
def test_a_malformed_question_is_refused_with_its_line(case, tmp_path, line, field):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(QUESTIONS[0]) + "\n\n" + line + "\n")
    name = f"bad-{tmp_path.name}"
    with pytest.raises(DataError, match=f"mine.jsonl line 3: {field}"):
        case.run(name, {"questions": path})


def test_a_loss_that_is_not_a_number_fails_the_step(case, monkeypatch):
    score = evaluate.TransformersEngine.score

    def broken(engine, ids, learn):
        return score(engine, ids, learn).__class__(float("nan"), 3, 0)

    monkeypatch.setattr(evaluate.TransformersEngine, "score", broken)
    with pytest.raises(Diverged, match="base model's loss"):
        case.run("diverged")


def test_a_sample_that_fills_the_context_is_left_out_and_said(case, monkeypatch):
    encode = evaluate.TransformersEngine.encode

    def long(engine, messages):
        ids = encode(engine, messages)
        return ids * 20 if messages[0]["content"] == "Question 0?" else ids

    monkeypatch.setattr(evaluate.TransformersEngine, "encode", long)
    context = case.run("long", {"test_file": case.test_file}, samples=3)
    assert [sample["row"] for sample in read(context)["samples"]] == [3, 6]
    assert "1 of 3 sample conversations" in context.warnings[0]
