"""The preprocess step: conversations in JSON Lines become tokens, each marked when it counts for the loss.

    dataset/
      train.arrow  validation.arrow  test.arrow     Arrow IPC files: input_ids list<int32>, learn list<bool>,
                                                    row int64 (the line in the source file)
      stats.json                                    counts per split, template digest, max_seq_length

Files are read as streams, `batch_size` rows at a time. Nothing is left out in silence: every bad row is
reported with file, line, field, rule and fix (the first hundred), and then the step fails. Splits that are
not given are carved from the training file as the chat-completion component does it. Equal inputs give equal
bytes.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from tuneloop import lm
from tuneloop.core.chat import ChatTemplate, Finding, check_messages, mask_tokens
from tuneloop.core.errors import DataError, Unsupported
from tuneloop.core.process import write_atomically
from tuneloop.core.recipe import PreprocessParameters
from tuneloop.steps.context import StepContext

SPLITS = ("train", "validation", "test")
MOST_FINDINGS = 100
SCHEMA = pa.schema(
    [("input_ids", pa.list_(pa.int32())), ("learn", pa.list_(pa.bool_())), ("row", pa.int64())]
)

_JSON_LINES = "Write one JSON object a line (JSON Lines, UTF-8)."
_BOM = b"\xef\xbb\xbf"


def run(context: StepContext) -> None:
    parameters = PreprocessParameters.model_validate(context.parameters)
    lm.quiet()
    model = context.inputs["model"]
    tokenize = Tokenize(model, parameters.max_seq_length)
    _say_what_is_not_done(context, parameters, tokenize.template)
    target = context.output("dataset")
    target.mkdir()
    context.progress("counting rows")
    shares = plan_splits(
        {name: count_rows(context.inputs[name]) for name in SPLITS if name in context.inputs}
    )
    statistics = _write_splits(context, parameters, tokenize, shares, target)
    _say_what_was_done(context, tokenize, shares, statistics)
    about = {
        "format": 1,
        "splits": {name: asdict(split) for name, split in statistics.items()},
        "template_digest": tokenize.template.digest,
        "max_seq_length": tokenize.max_seq_length,
    }
    write_atomically(target / "stats.json", json.dumps(about, indent=1) + "\n")


# ---------------------------------------------------------------- which rows go where


class Share(NamedTuple):
    """The rows `start` to `stop` (counted from 0) of the file of input `source` make a split."""

    source: str
    start: int
    stop: int


def plan_splits(rows: Mapping[str, int]) -> dict[str, Share]:
    """Input name to its number of rows, in; the share of every split, out. Only train: 80 / 10 / 10. One of
    the others missing: 80 / 20. Contiguous, without shuffling (chat_completion_datapreprocess 0.0.80).

    Raises `DataError` when there are too few rows to carve.
    """
    missing = [name for name in SPLITS if name not in rows]
    tenths = {0: 0, 1: 2, 2: 1}[len(missing)]
    carved = max(1, rows["train"] * tenths // 10) if missing else 0
    kept = rows["train"] - carved * len(missing)
    if kept < 1:
        carving = f", too few to carve {' and '.join(missing)} out of it" if missing else ""
        raise DataError(
            f"the training file has {rows['train']} rows{carving}.",
            next_move=f"Give it at least {len(missing) + 1}, or name files for the other splits.",
        )
    shares = {name: Share(name, 0, count) for name, count in rows.items()}
    shares["train"] = Share("train", 0, kept)
    for number, name in enumerate(missing):
        shares[name] = Share("train", kept + number * carved, kept + (number + 1) * carved)
    return {name: shares[name] for name in SPLITS}


def count_rows(path: Path) -> int:
    """Lines that are not blank. Raises `Unsupported` for a file that is not text."""
    with open(path, "rb") as handle:
        if handle.read(4) == b"PAR1":
            raise Unsupported(
                f"{path.name} is a Parquet file; the data of a chat recipe is read as JSON Lines.",
                next_move='Convert it: python -c "import pandas; '
                "pandas.read_parquet('F').to_json('F.jsonl', orient='records', lines=True)\"",
            )
        handle.seek(0)
        return sum(1 for line in handle if line.removeprefix(_BOM).strip())


# ---------------------------------------------------------------- reading rows


class Row(NamedTuple):
    line: int
    messages: list[dict[str, Any]]


def read_rows(
    path: Path, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, Row | list[Finding]]]:
    """(line, row or what is wrong with it) for rows `start` to `stop`; a blank line is no row."""
    with open(path, "rb") as handle:
        written = ((line, raw.removeprefix(_BOM) if line == 1 else raw) for line, raw in enumerate(handle, 1))
        rows = (each for each in written if each[1].strip())
        for line, raw in itertools.islice(rows, start, stop):
            yield line, _read_row(line, raw)


def _read_row(line: int, raw: bytes) -> Row | list[Finding]:
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        shown = f"byte {raw[error.start]:#04x} at position {error.start}"
        return [Finding("utf8", "", shown, "Save the file as UTF-8.")]
    except (ValueError, RecursionError) as error:
        return [Finding("json", "", _short(raw), f"{error}. {_JSON_LINES}")]
    return check_messages(row) or Row(line, row["messages"])


def _short(raw: bytes) -> str:
    text = raw.decode("utf-8").strip()
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass
class Complaints:
    """Findings over all files, until there are enough of them."""

    found: list[dict[str, Any]] = field(default_factory=list)

    def add(self, file: str, line: int, findings: list[Finding]) -> None:
        for each in findings:
            self.found.append({"file": file, "line": line, **each._asdict()})
        if len(self.found) >= MOST_FINDINGS:
            self.raise_any()

    def raise_any(self) -> None:
        """Raise one `DataError` with all findings; its message holds the first few."""
        if not self.found:
            return
        shown = [
            "{file} line {line}: {where}: found {value} (rule {rule}). {fix}".format(
                **each, where=each["field"] or "the row"
            )
            for each in self.found[:5]
        ]
        count = f"{len(self.found)} findings" if len(self.found) < MOST_FINDINGS else "100 findings or more"
        more = f"\n({count}; the first {len(shown)} are shown)" if len(self.found) > len(shown) else ""
        raise DataError("\n".join(shown) + more, details=self.found[:MOST_FINDINGS])


# ---------------------------------------------------------------- tokens


class Tokens(NamedTuple):
    input_ids: list[int]
    learn: list[bool]
    was_cut: bool


class Tokenize:
    """Messages to tokens, as the model's own `apply_chat_template(tokenize=True)` would have them."""

    def __init__(self, model: Path, max_seq_length: int = -1) -> None:
        tokenizer = lm.load_tokenizer(model)
        self.template: ChatTemplate = lm.load_template(model)
        self.max_seq_length = _longest(model, tokenizer, max_seq_length)
        self._rust = tokenizer.backend_tokenizer
        self._rust.no_truncation()
        self._rust.no_padding()
        tokens = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, tokens)) or "(?!)")

    def __call__(self, rows: list[Row]) -> Iterator[tuple[Row, Tokens | list[Finding]]]:
        rendered = [_render(self.template, row) for row in rows]
        texts = [each.text for each in rendered if not isinstance(each, list)]
        encodings = iter(self._rust.encode_batch(texts, add_special_tokens=False))
        for row, each in zip(rows, rendered, strict=True):
            if isinstance(each, list):
                yield row, each
                continue
            encoding = next(encodings)
            yield row, self._cut(encoding.ids, mask_tokens(encoding.offsets, each.learned))

    def holds_special_text(self, row: Row) -> bool:
        """Whether somebody wrote what reads as a special token: it is tokenised as one."""
        return any(self._special.search(message["content"]) for message in row.messages)

    def _cut(self, ids: list[int], learn: list[bool]) -> Tokens | list[Finding]:
        was_cut = len(ids) > self.max_seq_length
        kept = Tokens(ids[: self.max_seq_length], learn[: self.max_seq_length], was_cut)
        # The first token has nothing before it that it could be predicted from.
        if any(kept.learn[1:]):
            return kept
        fix = "Raise preprocess.max_seq_length, or shorten what stands before the first answer."
        shown = f"{len(ids)} tokens, none to learn among the first {self.max_seq_length}"
        return [Finding("learned_token", "messages", shown, fix)]


def _render(template: ChatTemplate, row: Row) -> Any:
    try:
        return template.segments(row.messages)
    except (DataError, Unsupported) as refused:
        fix = refused.next_move or "Change the conversation to what the template takes."
        roles = ", ".join(str(message["role"]) for message in row.messages[:4])
        return [Finding("template", "messages", f"roles {roles}: {refused.message}", fix)]


def _longest(model: Path, tokenizer: Any, wanted: int) -> int:
    config = json.loads((lm.resolve_folders(model)[0] / "config.json").read_text(encoding="utf-8"))
    bounds = [config.get("max_position_embeddings"), tokenizer.model_max_length]
    most = min(int(bound) for bound in bounds if bound)
    if wanted > most:
        raise Unsupported(
            f"preprocess.max_seq_length is {wanted}, and the model reads at most {most} tokens.",
            next_move=f"Set it to {most} or less, or to -1 for the model's maximum.",
        )
    return most if wanted < 0 else wanted


# ---------------------------------------------------------------- writing


@dataclass
class Split:
    rows: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    longest: int = 0
    cut_rows: int = 0
    first_cut_line: int | None = None
    """Line of the first row that was cut."""
    special_text_rows: int = 0
    """Rows in which somebody wrote the text of a special token."""


def _write_splits(
    context: StepContext,
    parameters: PreprocessParameters,
    tokenize: Tokenize,
    shares: Mapping[str, Share],
    target: Path,
) -> dict[str, Split]:
    complaints = Complaints()
    total = sum(share.stop - share.start for share in shares.values())
    meter = _Meter(context, total)
    statistics = {}
    for name, share in shares.items():
        statistics[name] = split = Split()
        rows = read_rows(context.inputs[share.source], share.start, share.stop)
        file = context.input_names[share.source]
        with pa.OSFile(str(target / f"{name}.arrow"), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            for batch in _batches(rows, parameters.batch_size):
                good = _checked(batch, file, complaints)
                encoded = _encode(tokenize, good, file, complaints, split)
                writer.write_batch(_record_batch(encoded))
                meter.add(len(batch), sum(len(tokens.input_ids) for _, tokens in encoded))
    complaints.raise_any()
    return statistics


def _batches(rows: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(itertools.islice(rows, size)):
        yield batch


def _checked(batch: list[tuple[int, Row | list[Finding]]], file: str, complaints: Complaints) -> list[Row]:
    good = []
    for line, each in batch:
        if isinstance(each, Row):
            good.append(each)
        else:
            complaints.add(file, line, each)
    return good


def _encode(
    tokenize: Tokenize, rows: list[Row], file: str, complaints: Complaints, split: Split
) -> list[tuple[Row, Tokens]]:
    encoded = []
    for row, each in tokenize(rows):
        if not isinstance(each, Tokens):
            complaints.add(file, row.line, each)
            continue
        encoded.append((row, each))
        split.rows += 1
        split.tokens += len(each.input_ids)
        split.learned_tokens += sum(each.learn)
        split.longest = max(split.longest, len(each.input_ids))
        split.special_text_rows += tokenize.holds_special_text(row)
        if each.was_cut:
            split.cut_rows += 1
            split.first_cut_line = split.first_cut_line or row.line
    return encoded


def _record_batch(encoded: list[tuple[Row, Tokens]]) -> pa.RecordBatch:
    ends = np.cumsum([0, *(len(tokens.input_ids) for _, tokens in encoded)]).astype(np.int32)
    ids = np.fromiter(itertools.chain.from_iterable(t.input_ids for _, t in encoded), np.int32, int(ends[-1]))
    learn = np.fromiter(itertools.chain.from_iterable(t.learn for _, t in encoded), np.bool_, int(ends[-1]))
    columns = [
        pa.ListArray.from_arrays(ends, ids),
        pa.ListArray.from_arrays(ends, pa.array(learn)),
        pa.array([row.line for row, _ in encoded], pa.int64()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


class _Meter:
    """Progress of the whole step, a few lines a second at most."""

    def __init__(self, context: StepContext, total: int) -> None:
        self._context = context
        self._total = total
        self._rows = self._tokens = 0
        self._started_at = time.monotonic()
        self._said_at = 0.0

    def add(self, rows: int, tokens: int) -> None:
        self._rows += rows
        self._tokens += tokens
        now = time.monotonic()
        if now - self._said_at < 0.25 and self._rows < self._total:
            return
        self._said_at = now
        seconds = max(now - self._started_at, 1e-6)
        self._context.progress(
            "tokenising",
            done=self._rows,
            total=self._total,
            unit="rows",
            remaining_seconds=seconds * (self._total - self._rows) / max(self._rows, 1),
            tokens_per_second=self._tokens / seconds,
        )


# ---------------------------------------------------------------- saying what happened


def _say_what_is_not_done(
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


def _say_what_was_done(
    context: StepContext, tokenize: Tokenize, shares: Mapping[str, Share], statistics: Mapping[str, Split]
) -> None:
    for name, share in shares.items():
        if name != share.source:
            context.warn(
                f"{name} was not given: rows {share.start + 1} to {share.stop} of the training file are used "
                "for it and not trained on. They are taken in file order: a sorted file gives a biased split."
            )
    for name, split in statistics.items():
        if split.cut_rows:
            context.warn(
                f"{split.cut_rows} of {split.rows} {name} rows are longer than {tokenize.max_seq_length} "
                f"tokens and were cut there (first: line {split.first_cut_line}): the rest is not learned."
            )
        if split.special_text_rows:
            context.warn(
                f"{split.special_text_rows} {name} rows hold the text of a special token, which is tokenised "
                "as that token."
            )
        context.summary[f"{name}_rows"] = split.rows
        context.summary[f"{name}_tokens"] = split.tokens
        context.summary[f"{name}_learned_tokens"] = split.learned_tokens
