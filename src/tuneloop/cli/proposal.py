"""A recipe for a model and conversations, each choice with the reason beside it.

The numbers are rules of thumb, good enough to begin with: what they do to your data is told by the first run.
"""

from __future__ import annotations

import json
import os
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tuneloop.cli import output

if TYPE_CHECKING:
    from tuneloop.cli.look import Look
    from tuneloop.core.types import Card

LEAST_LENGTH = 256
STEP_LENGTH = 64
ROOM = 1.5
"""Times the longest estimate, since it is one."""
TOKENS_PER_MICRO_BATCH = 4096
SCORED_ROWS = 200
YAML_WORDS = {"yes", "no", "on", "off", "true", "false", "null", "y", "n"}
ADVICE = ("learning_rate_min", "learning_rate_max")


class Choice(NamedTuple):
    value: object
    reason: str


@dataclass(frozen=True)
class Files:
    train: Look
    validation: Look | None
    test: Look | None


def recipe(card: Card, files: Files, output_path: Path) -> str:
    """The text of the recipe that will lie at `output_path`."""
    return (
        "\n".join([*_head(card, files, output_path), *_data(files, output_path), *_stages(card, files)])
        + "\n"
    )


def learned_rows(files: Files) -> int:
    """Rows of train that are left when the splits that are not given were taken out of it."""
    kept = {0: 0.8, 1: 0.8, 2: 1.0}[(files.validation is not None) + (files.test is not None)]
    return max(1, int(files.train.rows * kept))


def choices(card: Card, files: Files) -> dict[str, dict[str, Choice]]:
    """By section of the recipe."""
    rows = learned_rows(files)
    length, cut = _length(card, files)
    epochs = _epochs(rows)
    micro, accumulated = _batch(rows, length)
    steps = max(1, rows * epochs // (micro * accumulated))
    rate, why_rate = _learning_rate(card)
    weights = output.size(card.parameters * 4.0)
    finetune = {
        "apply_lora": Choice(
            "true", f"an adapter beside the weights ({weights} in 32 bits), which stay as they are"
        ),
        "lora_r": Choice(16, "the adapter's rank: more can learn more, and takes more memory"),
        "lora_alpha": Choice(32, "the adapter counts alpha / r = 2 times"),
        "learning_rate": Choice(rate, why_rate),
        "lr_scheduler_type": Choice("cosine", "falls from the peak along a half cosine"),
        "warmup_steps": Choice(
            min(100, steps // 20), f"rises to the peak over the first of about {steps:,} steps"
        ),
        "num_train_epochs": Choice(
            epochs, f"rounds over {rows:,} rows; fewer when the validation loss rises again"
        ),
        "per_device_train_batch_size": Choice(
            micro, "rows that a step learns from, times the next line; takes no memory"
        ),
        "gradient_accumulation_steps": Choice(
            accumulated, f"so that a step learns from {micro * accumulated} rows"
        ),
        "per_device_eval_batch_size": Choice(micro, "does not change any result"),
        "evaluation_strategy": Choice("epoch", "a point of the validation curve after each round"),
        "logging_steps": Choice(
            max(1, min(10, steps // 20)), "a point of the training curve every so many steps"
        ),
        "save_total_limit": Choice(1, "keep the newest checkpoint only"),
    }
    long_rows = Choice("split_turns", "longer rows become several conversations; a turn stays whole")
    found = {
        "preprocess": {"max_seq_length": Choice(length, cut), "long_rows": long_rows},
        "finetune": finetune,
    }
    test_rows = files.test.rows if files.test else files.train.rows // 10
    found["evaluate"] = {"samples": Choice(5, "conversations that base and tuned model answer side by side")}
    if test_rows > SCORED_ROWS:
        found["evaluate"]["max_rows"] = Choice(
            SCORED_ROWS, f"of {test_rows:,}; enough to tell the models apart"
        )
    return found


def _length(card: Card, files: Files) -> tuple[int, str]:
    """The longest row with some room; a few very long rows are not worth the memory of all."""
    looks = [look for look in (files.train, files.validation, files.test) if look is not None]
    longest = max((max(look.lengths, default=0) for look in looks), default=0)
    usual = max((look.quantile(0.99) for look in looks), default=0)
    aim = usual if longest > 4 * usual else longest
    wanted = max(LEAST_LENGTH, -(-int(aim * ROOM) // STEP_LENGTH) * STEP_LENGTH)
    length = min(card.context_length, wanted)
    cut = sum(look.longer_than(length) for look in looks)
    said = f"the longest row has about {longest} tokens"
    if cut:
        said += f", and {cut} rows more than this"
    return length, f"{said}; {card.name} reads {card.context_length:,}"


def _epochs(rows: int) -> int:
    return 5 if rows < 100 else 3 if rows < 5_000 else 2 if rows < 20_000 else 1


def _batch(rows: int, length: int) -> tuple[int, int]:
    """(rows at a time, accumulated steps): small steps, and many of them, teach a small set best."""
    whole = 2 if rows < 500 else 8 if rows < 5_000 else 16
    micro = whole
    while micro > 1 and micro * length > TOKENS_PER_MICRO_BATCH:
        micro //= 2
    return micro, whole // micro


def _learning_rate(card: Card) -> tuple[str, str]:
    size = card.parameters
    rate = 1e-3 if size < 3e8 else 5e-4 if size < 1e9 else 2e-4 if size < 5e9 else 1e-4
    low, high = (card.defaults.get(f"learning_rate_{end}") for end in ("min", "max"))
    reason = f"the peak; usual for LoRA on a model of {_count(size)} parameters"
    if isinstance(high, int | float) and rate > high:
        rate, reason = float(high), f"the most that is advised for {card.name}"
    if isinstance(low, int | float) and rate < low:
        rate, reason = float(low), f"the least that is advised for {card.name}"
    # The mantissa gets its dot: YAML 1.1 reads 1e-3 as text.
    return re.sub(
        r"^(\d+)e", r"\1.0e", f"{rate:g}" if rate < 1e-4 else f"{rate:.0e}".replace("e-0", "e-")
    ), reason


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} billion" if parameters >= 1e9 else f"{parameters / 1e6:,.0f} million"


# ---------------------------------------------------------------- the text


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent="# ", subsequent_indent="#   ", break_long_words=False)


def _head(card: Card, files: Files, output_path: Path) -> Iterator[str]:
    stem = output_path.stem if output_path.name != "-" else files.train.path.stem
    name = output_path.name if output_path.name != "-" else f"{stem}.yaml"
    written = {key for section in choices(card, files).values() for key in section}
    yield f"# Tune {card.name} on {files.train.path.name}. Written by tuneloop init; change it as you like."
    yield "#"
    yield f"#   tuneloop run {name} --dry-run    check it, and see every parameter"
    yield f"#   tuneloop run {name}              run it"
    yield "#"
    yield "# Lengths in tokens are estimated from characters; the job counts them with the model's tokenizer."
    yield ""
    yield f"experiment: {_name(stem)}"
    yield ""
    note = f": {card.description}" if card.description else "."
    yield from _comment(f"{_count(card.parameters)} parameters, licence {card.license}{note}")
    own = ", ".join(
        f"{key} {value}" for key, value in card.defaults.items() if key not in {*ADVICE, *written}
    )
    if own:
        yield from _comment(f"Its own defaults fill in what is not written here ({own}).")
    yield f"model: {card.name}:{card.version}"
    yield ""


def _data(files: Files, output_path: Path) -> Iterator[str]:
    yield from _facts("train", files.train)
    for role, look in (("validation", files.validation), ("test", files.test)):
        if look is not None:
            yield from _facts(role, look)
            yield from _shared(role, look, files.train)
    yield from _splits(files)
    yield "data:"
    for role, look in (("train", files.train), ("validation", files.validation), ("test", files.test)):
        if look is not None:
            yield f"  {role}: {json.dumps(_path(look.path, output_path), ensure_ascii=False)}"
    yield f"  name: {_name(files.train.path.stem)}  # the data's label in the job's display name"
    yield ""


def _facts(role: str, look: Look) -> Iterator[str]:
    """What was seen, as comments."""
    told = look.to_json()
    messages, tokens = told["messages"], told["tokens"]
    least, most = messages["least"], messages["most"]
    turns = f"{most}" if least == most else f"{least} to {most}"
    yield from _comment(
        f"{role}: {'' if look.is_whole else 'about '}{look.rows:,} conversations of {turns} messages, "
        f"{look.system_rows:,} of them with a system message; columns {', '.join(look.columns)}. "
        f"Tokens: half of them have up to {tokens['median']}, 95 of 100 up to {tokens['p95']}, the longest "
        f"{tokens['most']}."
    )
    if look.repeated_rows:
        yield from _comment(
            f"  {look.repeated_rows:,} are there more than once, and are learned more than once."
        )


def _shared(role: str, look: Look, train: Look) -> Iterator[str]:
    known = len(look.digests & train.digests)
    if known:
        rest = "they say nothing about what was learned."
        yield from _comment(f"  Mind: {known} conversations of {role} are in train as well; {rest}")


def _splits(files: Files) -> Iterator[str]:
    """Which rows are taken out of train."""
    missing = [role for role in ("validation", "test") if getattr(files, role) is None]
    if not missing:
        return
    halves = "half each, " if len(missing) == 2 else ""
    taken = "are not given" if len(missing) == 2 else "is not given"
    yield from _comment(
        f"{' and '.join(missing)} {taken}: about a fifth of train ({files.train.rows // 5:,} rows) is taken, "
        f"{halves}and not learned from: chance chooses, with preprocess.split_seed, and rows with the same "
        "opening line stay together. Or name files of your own."
    )


def _stages(card: Card, files: Files) -> Iterator[str]:
    for section, values in choices(card, files).items():
        yield f"{section}:"
        width = max(len(f"{key}: {choice.value}") for key, choice in values.items())
        for key, choice in values.items():
            yield f"  {f'{key}: {choice.value}':<{width}}  # {choice.reason}"
        yield ""


def _path(path: Path, output_path: Path) -> str:
    """From the folder of the recipe, since that is where its paths start."""
    folder = Path.cwd() if output_path.name == "-" else output_path.absolute().parent
    return os.path.relpath(path.absolute(), folder)


def _name(text: str) -> str:
    made = re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-._")[:64]
    # YAML takes some words for something else (`no`, `null`), and what begins with a digit for a number.
    is_word = re.fullmatch(r"[A-Za-z].*", made) and made.lower() not in YAML_WORDS
    return made if is_word else f"data-{made}".rstrip("-")


def summary(card: Card, files: Files, text: str, path: str | None) -> dict[str, Any]:
    looks = {"train": files.train, "validation": files.validation, "test": files.test}
    return {
        "path": path,
        "recipe": text,
        "model": f"{card.name}:{card.version}",
        "data": {role: look.to_json() for role, look in looks.items() if look is not None},
    }
