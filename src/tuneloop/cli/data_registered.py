"""`tuneloop data list | register | describe`: files of conversations that the workspace keeps by content."""

from __future__ import annotations

from pathlib import Path

import click

from tuneloop.cli import output, session


@click.command("list")
@click.option("--name", metavar="NAME", help="Only the versions of this one.")
@output.json_option
def list_(name: str | None, as_json: bool) -> None:
    """List the data that jobs brought in or that was registered, oldest first.

    The version is made of the content: the same bytes under the same name are the same version.

    \b
    Example:
      tuneloop data list
    """
    found = session.connect().client.datasets(name)
    if as_json:
        output.print_json(found)
        return
    rows = [
        (
            each.name,
            each.dataset_version,
            f"{each.rows:,}",
            f"{each.bad_rows:,}",
            each.format,
            each.license or "",
            output.when(each.created_at),
        )
        for each in found
    ]
    output.table(("NAME", "VERSION", "ROWS", "BAD", "FORMAT", "LICENCE", "STORED"), rows)


@click.command("register")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", metavar="NAME", help="Default: the file's name without its suffix.")
@click.option(
    "--licence", "license", metavar="TEXT", help="What the data may be used for, such as CC-BY-4.0."
)
@click.option(
    "--bad-rows",
    default=0,
    show_default=True,
    metavar="N",
    type=click.IntRange(min=0),
    help="So many bad rows are let through.",
)
@output.json_option
def register_(file: Path, name: str | None, license: str | None, bad_rows: int, as_json: bool) -> None:
    """Check FILE, store it in the workspace and give it a name.

    Every row is held to the rules that need no model. The file is copied: what happens to it later changes
    nothing.

    \b
    Example:
      tuneloop data register train.jsonl --name support --licence CC-BY-4.0
    """
    client = session.connect().client
    found = client.register_dataset(file.absolute(), name=name, license=license, bad_rows=bad_rows)
    if as_json:
        output.print_json(found)
        return
    output.say(f"{found.key}: {found.rows:,} rows, {found.format}")


@click.command("describe")
@click.argument("name")
@output.json_option
def describe_(name: str, as_json: bool) -> None:
    """Describe registered data: schema, counts, statistics, licence, digest.

    NAME is the version that was stored last, NAME:VERSION a certain one.

    \b
    Example:
      tuneloop data describe support
    """
    found = session.connect().client.dataset(name)
    if as_json:
        output.print_json(found)
        return
    counted = found.statistics
    output.pairs(
        {
            "name": found.name,
            "version": found.dataset_version,
            "digest": found.artifact,
            "stored": output.when(found.created_at),
            "from": found.source_path,
            "format": found.format,
            "licence": found.license,
            "rows": f"{found.rows:,}" + (f", {found.bad_rows:,} of them bad" if found.bad_rows else ""),
            "messages": counted
            and ", ".join(f"{n:,} {role}" for role, n in counted.messages_by_role.items() if n),
            "characters": counted and f"{counted.characters:,}, {counted.learned_characters:,} in answers",
            "longest": counted
            and f"{counted.most_messages:,} messages, {counted.most_characters:,} characters",
            "columns": counted and ", ".join(f"{name} ({kind})" for name, kind in counted.columns.items()),
        }
    )
