"""`tuneloop init`: a recipe for your model and your data, to read, change and run."""

from __future__ import annotations

from pathlib import Path

import click

from tuneloop.cli import completion, look, output, proposal, session
from tuneloop.core.errors import AlreadyExists, UsageError

MODEL = "SmolLM2-135M-Instruct"
"""The smallest of the catalogue, so that a first run takes minutes."""

_file = click.Path(path_type=Path)


@click.command("init")
@click.option(
    "--data",
    required=True,
    type=_file,
    metavar="FILE",
    help="Conversations to learn: JSON Lines, JSON, CSV, TSV or Parquet.",
)
@click.option(
    "--model",
    default=MODEL,
    show_default=True,
    metavar="NAME",
    shell_complete=completion.cards,
    help="A base model of the catalogue.",
)
@click.option(
    "--validation", type=_file, metavar="FILE", help="Conversations that draw the validation curve."
)
@click.option("--test", type=_file, metavar="FILE", help="Conversations that both models are compared on.")
@click.option(
    "--output", "target", type=_file, metavar="FILE", help="Default: NAME_OF_DATA.yaml here; - for stdout."
)
@output.json_option
def init_(
    data: Path, model: str, validation: Path | None, test: Path | None, target: Path | None, as_json: bool
) -> None:
    """Write a commented recipe for a model and a data file, after a look at both.

    Reads the conversations (how many, how long, what is there twice) and the model's card (context length,
    parameters, defaults), chooses lengths, batch size, epochs and learning rate, and writes each choice with
    its reason. Recipe and data are checked as `tuneloop run` does before anything is written; no file is
    overwritten.

    \b
    Examples:
      tuneloop init --data my.jsonl
      tuneloop init --model Qwen2.5-0.5B-Instruct --data train.jsonl --test test.jsonl --output my.yaml
    """
    place = target or Path(f"{data.stem}.yaml")
    _refuse_taken(place)
    files = proposal.Files(
        look.look_at(data),
        look.look_at(validation) if validation else None,
        look.look_at(test) if test else None,
    )
    client = session.connect().client
    card = client.card(model)
    text = proposal.recipe(card, files, place)
    folder = Path.cwd() if place == Path("-") else place.absolute().parent
    client.resolve(session.submission(text=text, path=str(place), folder=str(folder)))
    if place != Path("-"):
        _write(place, text)
    if as_json:
        path = None if place == Path("-") else str(place.absolute())
        output.print_json(proposal.summary(card, files, text, path))
    elif place == Path("-"):
        output.say(text.rstrip("\n"))
    else:
        _tell(place, files)


def _refuse_taken(place: Path) -> None:
    if place != Path("-") and place.exists():
        raise AlreadyExists(f"{place} exists.", next_move="Choose another with --output, or remove it.")


def _write(place: Path, text: str) -> None:
    try:
        with place.open("x", encoding="utf-8") as handle:
            handle.write(text)
    except FileExistsError:
        _refuse_taken(place)
    except OSError as error:
        raise UsageError(
            f"{place} cannot be written: {error.strerror}.", next_move="Choose another with --output."
        ) from error


def _tell(place: Path, files: proposal.Files) -> None:
    output.say(
        f"Wrote {place}, for {files.train.rows:,} conversations; each choice has its reason beside it."
    )
    output.say(f"  check it:       {session.program()} run {place} --dry-run")
    output.say(f"  what it takes:  {session.program()} plan {place}")
    output.say(f"  run it:         {session.program()} run {place}")
