"""`tuneloop run`: submit a recipe and watch it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tuneloop.cli import completion, output, planning, recipe_file, session, streaming, words

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from tuneloop.client import Submission


PRIORITIES = ("high", "medium", "low")


@click.command("run")
@click.argument("recipe", shell_complete=completion.recipes)
@click.option("changes", "--set", multiple=True, metavar="KEY=VALUE", help="Change one value of the recipe.")
@click.option("--experiment", metavar="NAME", help="List the job under this experiment.")
@click.option("--force-rerun", is_flag=True, help="Run every step, even where an equal one has a result.")
@click.option("--force", is_flag=True, help="Run it even where the planner says that it does not fit.")
@click.option(
    "--priority",
    type=click.Choice(PRIORITIES),
    help="Who starts first among what waits; default: what the recipe says, or medium.",
)
@click.option("--detach", is_flag=True, help="Submit, say the job's name, and do not watch.")
@click.option(
    "--dry-run", is_flag=True, help="Check recipe and data, print the final parameters, run nothing."
)
@click.option("--verbose", "-v", is_flag=True, help="Print the parameters at their built-in values too.")
@output.json_option
def run_(
    recipe: str,
    changes: Sequence[str],
    experiment: str | None,
    force_rerun: bool,
    force: bool,
    priority: str | None,
    detach: bool,
    dry_run: bool,
    verbose: bool,
    as_json: bool,
) -> int:
    """Run a recipe: import the base model, prepare the data, fine-tune, export and evaluate.

    RECIPE is a YAML file, or the name of a recipe that ships with Tuneloop (`tuneloop recipes list`).
    Paths of data in it start at the recipe's folder. Everything is checked before anything runs; the final
    parameters are printed with where each value came from (model, recipe, --set; with -v also built-in).
    What would not fit into memory or on the disk is refused, with the smallest changes that would fit
    (`tuneloop plan` shows the whole of it); --force runs it all the same.

    Then the job's progress is streamed. Ctrl-C detaches: the job goes on, and `tuneloop jobs stream NAME`
    comes back to it. Steps whose inputs and parameters were run before are reused.

    With --json the job is printed as JSON on stdout when it has ended (with --detach: when it is
    submitted) and the progress goes to stderr.

    \b
    Exit codes: 0 completed, 1 the job failed, 2 the recipe or the data is wrong, 4 it does not fit,
    130 cancelled, or detached with Ctrl-C.

    \b
    Examples:
      tuneloop run my.yaml
      tuneloop run my.yaml --set finetune.learning_rate=1e-4 --set finetune.num_train_epochs=2
      tuneloop run demo --dry-run -v
    """
    overrides = words.assignments(changes, "--set")
    submission = submission_of(recipe, overrides, experiment, force_rerun, priority)
    connection = session.connect()
    if dry_run:
        resolution = connection.client.resolve(submission)
        if as_json:
            output.print_json(resolution)
        else:
            tell_parameters(resolution, verbose)
        return 0
    if not force:
        planning.refuse_what_does_not_fit(recipe, overrides)
    try:
        job = connection.client.submit(submission)
    except KeyboardInterrupt:
        output.note(
            "\nInterrupted while the recipe was handed over: the job may have been made all the same."
        )
        output.note(f"  see:  {session.program()} jobs list --limit 3")
        return streaming.DETACHED
    if not as_json:
        tell_parameters(job, verbose)
        output.say(f"Job {job['name']} in experiment {job['experiment']}")
    if detach:
        _tell_detached(job, as_json)
        return 0
    told = () if as_json else job["warnings"]
    return streaming.watch(connection, job["name"], as_json=as_json, told=told)


def submission_of(
    recipe: str,
    overrides: Mapping[str, str],
    experiment: str | None = None,
    force_rerun: bool = False,
    priority: str | None = None,
) -> Submission:
    """The recipe at a path, or the shipped one of that name. Raises `NotFound` with the nearest name."""
    path = recipe_file.path_of(recipe)
    return session.submission(
        text=recipe_file.text_of(path),
        path=recipe if path == Path(recipe) else path.name,
        folder=str(path.parent.absolute()),
        overrides=dict(overrides),
        experiment=experiment,
        force_rerun=force_rerun,
        priority=priority,
    )


def tell_parameters(final: Mapping[str, Any], verbose: bool) -> None:
    """The final set by origin; the built-in values only when asked for."""
    output.say(final["display_name"])
    groups: dict[str, list[str]] = {}
    for name in final["parameters"]:
        groups.setdefault(final["origins"].get(name, "built-in"), []).append(name)
    for origin in sorted(groups, key=lambda name: (name == "built-in", name)):
        if origin == "built-in" and not verbose:
            continue
        output.say(f"  from {origin}:")
        for name in groups[origin]:
            output.say(f"    {name} = {_spelled(final['parameters'][name])}")
    hidden = len(groups.get("built-in", []))
    if hidden and not verbose:
        output.say(f"  and {hidden} at their built-in values (-v shows them)")
    for warning in final["warnings"]:
        output.warn(warning)


def _spelled(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)


def _tell_detached(job: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        output.print_json(job)
        return
    output.say(f"  watch it:  {session.program()} jobs stream {job['name']}")
    output.say(f"  stop it:   {session.program()} jobs cancel {job['name']}")
