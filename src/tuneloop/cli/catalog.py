"""`tuneloop catalog`: the base models that can be tuned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tuneloop.cli import output, session
from tuneloop.core.errors import UsageError

if TYPE_CHECKING:
    from tuneloop.core.types import Card, CardSource


@click.group("catalog")
def catalog_() -> None:
    """Base models: list, show, add, use.

    A card describes a base model: version, licence, sizes, defaults for fine-tuning, and where its weights
    come from (a Python package, a folder of this machine, or the Hugging Face hub).

    \b
    Examples:
      tuneloop catalog list --task chat-completion
      tuneloop catalog show SmolLM2-135M-Instruct
      tuneloop catalog use Phi-3-mini-4k-instruct --source ~/weights/phi3
    """


@catalog_.command("list")
@click.option("--task", metavar="TASK", help="Only models for this task, such as chat-completion.")
@output.json_option
def list_(task: str | None, as_json: bool) -> None:
    """List the base models.

    \b
    Example:
      tuneloop catalog list --task chat-completion
    """
    cards = session.connect().client.cards(task)
    if as_json:
        output.print_json(cards)
        return
    rows = [
        (card.name, card.version, _count(card.parameters), card.context_length, card.license, _origin(card))
        for card in cards
    ]
    columns = ("NAME", "VERSION", "PARAMETERS", "CONTEXT", "LICENCE", "WEIGHTS FROM")
    output.table(columns, rows, empty=f"No base model for task {task!r}; without --task all are listed.")


@catalog_.command("show")
@click.argument("name")
@output.json_option
def show_(name: str, as_json: bool) -> None:
    """Show a card: NAME or NAME:VERSION, in any case.

    \b
    Example:
      tuneloop catalog show phi-3-mini-4k-instruct
    """
    card = session.connect().client.card(name)
    if as_json:
        output.print_json(card)
    else:
        _tell(card)


@catalog_.command("add")
@click.argument("card", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@output.json_option
def add_(card: Path, as_json: bool) -> None:
    """Add a base model from a YAML card.

    `tuneloop catalog show NAME --json` prints a card to start from (JSON is YAML).

    \b
    Example:
      tuneloop catalog add my-model.yaml
    """
    try:
        text = card.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{card} is not a text file: {error.reason} at byte {error.start}.") from error
    added = session.connect().client.add_card(text, str(card))
    if as_json:
        output.print_json(added)
    else:
        output.say(f"Added {added.name}, version {added.version}.")


@catalog_.command("use")
@click.argument("name")
@click.option(
    "--source",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="A folder in Hugging Face layout: config.json, safetensors, tokenizer.",
)
@output.json_option
def use_(name: str, source: Path, as_json: bool) -> None:
    """Take a base model's weights from a folder of this machine.

    \b
    Example:
      tuneloop catalog use Phi-3-mini-4k-instruct --source ~/weights/phi3
    """
    card = session.connect().client.use_source(name, source)
    if as_json:
        output.print_json(card)
    else:
        output.say(f"{card.name} now comes from {source.absolute()}.")


def _tell(card: Card) -> None:
    output.pairs(
        {
            "name": card.name,
            "version": card.version,
            "id": card.id,
            "task": card.task,
            "description": card.description,
            "publisher": card.publisher,
            "licence": card.license,
            "parameters": f"{card.parameters:,}",
            "context length": f"{card.context_length:,} tokens",
            "architecture": card.architecture.family,
            "template": card.template_family,
            "defaults": card.defaults,
        }
    )
    for source in card.sources:
        output.say(f"weights from    {_source(source)}")
    for name, value in card.tags.items():
        output.say(f"tag {name}: {value}")


def _source(source: CardSource) -> str:
    if source.type == "package":
        note = f", {source.note}" if source.note else ""
        return f"package {source.package} {source.version}{note}"
    if source.type == "hub":
        gated = ", needs a licence agreed to and HF_TOKEN" if source.gated else ""
        return f"hub {source.repository} at {source.revision[:12]}{gated}"
    return f"folder {source.path}"


def _origin(card: Card) -> str:
    return card.sources[0].type if card.sources else "nowhere yet"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.0f} M"
