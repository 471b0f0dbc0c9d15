"""`tuneloop recipes`: what ships, to run or to copy."""

from __future__ import annotations

import click

from tuneloop.cli import completion, output, recipe_file, shipped


@click.group("recipes")
def recipes_() -> None:
    """The recipes that ship with Tuneloop, to run or to copy.

    \b
    Examples:
      tuneloop recipes list
      tuneloop recipes show demo > my.yaml
      tuneloop run demo
    """


@recipes_.command("list")
@output.json_option
def list_(as_json: bool) -> None:
    """List the shipped recipes with what each of them does.

    \b
    Example:
      tuneloop recipes list
    """
    found = [
        {"name": name, "headline": shipped.headline(recipe_file.path_of(name))} for name in shipped.names()
    ]
    if as_json:
        output.print_json(found)
    else:
        output.table(("NAME", "WHAT IT DOES"), [(item["name"], item["headline"]) for item in found])


@recipes_.command("show")
@click.argument("name", shell_complete=completion.shipped_recipes)
@output.json_option
def show_(name: str, as_json: bool) -> None:
    """Print a shipped recipe, to read or to copy.

    Paths of data in a recipe start at the folder of its file; `samples:` ones ship with Tuneloop.

    \b
    Example:
      tuneloop recipes show demo > my.yaml
    """
    path = recipe_file.path_of(name)
    text = path.read_text(encoding="utf-8")
    if as_json:
        output.print_json({"name": path.stem, "path": str(path), "text": text})
    else:
        click.echo(text, nl=False)
