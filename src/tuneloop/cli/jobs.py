"""`tuneloop jobs`: what was run, what runs, and what came of it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tuneloop.cli import completion, curves, graph, live, output, run, session, streaming
from tuneloop.core.errors import NotFound
from tuneloop.core.names import did_you_mean
from tuneloop.core.states import STEP_ENDED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tuneloop.client import Client
    from tuneloop.client.views import JobView, LogPage, StepView

FOLLOW_SECONDS = 0.5


@click.group("jobs")
def jobs_() -> None:
    """What was run: list, show, stream, metrics, logs, priority, cancel, retry, outputs.

    A job is one submission of a recipe: a graph of steps. Its name is given at submission
    (such as swift_heron_4f1c9a02) and is what these commands take.

    \b
    Examples:
      tuneloop jobs list
      tuneloop jobs stream swift_heron_4f1c9a02
      tuneloop jobs outputs swift_heron_4f1c9a02 --download trained_model --to ./model
    """


@jobs_.command("list")
@click.option("--experiment", metavar="NAME", help="Only the jobs of this experiment.")
@click.option(
    "--limit", type=click.IntRange(1, 1_000_000), default=20, show_default=True, help="At most so many."
)
@output.json_option
def list_(experiment: str | None, limit: int, as_json: bool) -> None:
    """List jobs, newest first.

    \b
    Example:
      tuneloop jobs list --experiment demo --limit 5
    """
    found = session.connect().client.jobs(experiment, limit)
    if as_json:
        output.print_json(found)
        return
    rows = [
        (
            job["name"],
            job["state"],
            output.when(job["created_at"]),
            output.duration(output.between(job["created_at"], job["finished_at"])),
            job["experiment"],
            job["base_model"],
        )
        for job in found
    ]
    output.table(
        ("NAME", "STATE", "CREATED", "TIME", "EXPERIMENT", "BASE MODEL"),
        rows,
        empty=f"No jobs in experiment {experiment!r}. All of them: {session.program()} jobs list"
        if experiment
        else f"No jobs yet. Start one with: {session.program()} run demo",
    )


@jobs_.command("show")
@click.argument("name", shell_complete=completion.jobs)
@click.option("--verbose", "-v", is_flag=True, help="Print every parameter, the built-in ones too.")
@output.json_option
def show_(name: str, verbose: bool, as_json: bool) -> None:
    """Show a job: state, graph of steps, metrics, outputs and the parameters it ran with.

    Each step is shown with its state, time and attempts, and with what it does, waits for or was reused from.

    \b
    Example:
      tuneloop jobs show swift_heron_4f1c9a02 -v
    """
    connection = session.connect()
    job = connection.client.job(name)
    if as_json:
        output.print_json(job)
        return
    output.pairs(
        {
            "job": job["name"],
            "state": job["state"],
            "experiment": job["experiment"],
            "base model": job["base_model"],
            "data": job["datasets"],
            "created": output.when(job["created_at"]),
            "time": output.duration(output.between(job["started_at"], job["finished_at"])),
            "priority": job["priority"] if job["priority"] != "medium" else None,
            "tags": job["tags"],
            "error": job["error"]["message"] if job["error"] else None,
        }
    )
    output.say()
    _tell_steps(connection, job)
    output.say()
    run.tell_parameters(job, verbose)


def _tell_steps(connection: session.Session, job: JobView) -> None:
    """The graph of steps, then what each of them measured, warned of or failed with."""
    graph.tell(job["steps"])
    warnings = live.Warnings(job["warnings"])
    told = [(step["name"], text) for step in job["steps"] for text in _results(step, warnings)]
    if told:
        output.say()
    for name, text in told:
        output.say(f"{name}: {output.clean(text)}")
    for step in job["steps"]:
        for picture in streaming.pictures(connection, job["name"], step):
            output.say(f"{step['name']}: picture {picture}")
    output.say()
    for name, made in job["outputs"].items():
        output.say(f"output {name}: {made['path'] or made['digest'] or 'not made'}")


def _results(step: StepView, warnings: live.Warnings) -> Iterator[str]:
    yield from streaming.figures(step["metrics"])
    for warning in warnings.of_step(step):
        yield f"warning: {warning}"
    if step["error"]:
        yield step["error"]["message"]


@jobs_.command("metrics")
@click.argument("name", shell_complete=completion.jobs)
@click.option("--step", metavar="STEP", default="finetune", show_default=True, help="Whose metrics.")
@click.option(
    "--metric", "wanted", multiple=True, metavar="M", help="May be given several times; default: the losses."
)
@output.json_option
def metrics_(name: str, step: str, wanted: Sequence[str], as_json: bool) -> None:
    """Draw what a step measured as it ran: the curve of its loss, or of any other metric.

    On a terminal it is drawn; in a pipe or a file each metric is one line. --json prints every point.

    \b
    Examples:
      tuneloop jobs metrics swift_heron_4f1c9a02
      tuneloop jobs metrics swift_heron_4f1c9a02 --metric learning_rate
    """
    client = session.connect().client
    _step_of(client.job(name), step)
    lines = client.metrics(name, step)
    if as_json:
        output.print_json(lines)
        return
    there = curves.names_of(lines)
    if not there:
        output.note(f"Step {step} of job {name} has measured nothing over time.")
        output.note(f"  what it measured at its end:  {session.program()} jobs show {name}")
        return
    for metric in wanted:
        if metric not in there:
            raise NotFound(
                f"Step {step} of job {name} has no metric {metric!r}.",
                next_move=did_you_mean(metric, there) or f"There is: {', '.join(sorted(there))}.",
            )
    found = curves.series(lines, wanted or curves.LOSSES) or curves.series(lines, there[:1])
    _tell_metrics(found, there)


def _tell_metrics(found: Sequence[curves.Series], there: Sequence[str]) -> None:
    if output.is_drawable(sys.stdout):
        on = output.console()
        on.print(curves.drawing(found, sys.stdout, on.width, rows=12), soft_wrap=True)
    for one in found:
        output.say(curves.in_one_line(one))
    others = [name for name in there if name not in {one.name for one in found}]
    if others:
        output.note(f"Also measured (--metric): {', '.join(others)}")


@jobs_.command("stream")
@click.argument("name", shell_complete=completion.jobs)
@output.json_option
def stream_(name: str, as_json: bool) -> int:
    """Stream a job's progress until it ends; the same view as `tuneloop run`.

    On a terminal the loss is drawn as a curve while the model is tuned; in a file or a pipe there is a line
    every few seconds.

    Ctrl-C leaves the job running. With --json the job is printed as JSON at its end and the progress goes
    to stderr. Exit codes: 0 completed, 1 failed, 130 cancelled or left.

    \b
    Example:
      tuneloop jobs stream swift_heron_4f1c9a02
    """
    return streaming.watch(session.connect(), name, as_json=as_json)


@jobs_.command("logs")
@click.argument("name", shell_complete=completion.jobs)
@click.option("--step", metavar="STEP", help="Default: the failed step, or the one that ran last.")
@click.option("--attempt", type=click.IntRange(1), help="Default: the last.")
@click.option("--follow", "-f", is_flag=True, help="Go on printing until the step ends.")
@output.json_option
def logs_(name: str, step: str | None, attempt: int | None, follow: bool, as_json: bool) -> None:
    """Print the log of one step of a job.

    \b
    Examples:
      tuneloop jobs logs swift_heron_4f1c9a02
      tuneloop jobs logs swift_heron_4f1c9a02 --step finetune --follow
    """
    connection = session.connect()
    chosen = _step_of(connection.client.job(name), step)
    page = connection.client.logs(name, chosen, attempt)
    if as_json:
        output.print_json(page)
        return
    _tell_page(page)
    has_ended = False
    while follow and not has_ended:
        time.sleep(FOLLOW_SECONDS)
        has_ended = _has_ended(connection.client.job(name), chosen)
        page = _next_page(connection.client, name, chosen, attempt, page)


def _next_page(client: Client, name: str, step: str, attempt: int | None, page: LogPage) -> LogPage:
    """Prints and returns what was written since; a new attempt is read from its beginning."""
    newer = client.logs(name, step, attempt, page["offset"])
    if newer["attempt"] != page["attempt"]:
        newer = client.logs(name, step, attempt)
        _tell_page(newer)
    else:
        click.echo(output.clean(newer["text"]), nl=False)
    return newer


def _tell_page(page: LogPage) -> None:
    output.note(f"attempt {page['attempt']}")
    click.echo(output.clean(page["text"]), nl=False)


def _step_of(job: JobView, step: str | None) -> str:
    names = [item["name"] for item in job["steps"]]
    if step is None:
        failed = [item["name"] for item in job["steps"] if item["state"] == "failed"]
        started = [item["name"] for item in job["steps"] if item["attempts"]]
        chosen = failed[:1] or started[-1:]
        if not chosen:
            raise NotFound(
                f"No step of job {job['name']} has run here, so there is no log.",
                next_move=f"See why: {session.program()} jobs show {job['name']}",
            )
        return chosen[0]
    if step not in names:
        raise NotFound(f"Job {job['name']} has no step {step!r}.", next_move=did_you_mean(step, names))
    return step


def _has_ended(job: JobView, step: str) -> bool:
    return next(item["state"] for item in job["steps"] if item["name"] == step) in STEP_ENDED


@jobs_.command("priority")
@click.argument("name", shell_complete=completion.jobs)
@click.argument("priority", type=click.Choice(run.PRIORITIES))
@output.json_option
def priority_(name: str, priority: str, as_json: bool) -> None:
    """Move a job up or down among those that wait; what runs is never stopped for it.

    The queue, with positions and estimates: tuneloop compute show local

    \b
    Example:
      tuneloop jobs priority swift_heron_4f1c9a02 high
    """
    job = session.connect().client.prioritise(name, priority)
    if as_json:
        output.print_json(job)
        return
    output.say(f"Job {name} has priority {job['priority']}.")
    for step in job["steps"]:
        if step["queue"]:
            output.say(f"  {step['name']}: {live.queue_text(step)}")


@jobs_.command("cancel")
@click.argument("name", shell_complete=completion.jobs)
@output.json_option
def cancel_(name: str, as_json: bool) -> None:
    """Cancel a job: its steps are stopped, what is finished is kept.

    \b
    Example:
      tuneloop jobs cancel swift_heron_4f1c9a02
    """
    job = session.connect().client.cancel(name)
    if as_json:
        output.print_json(job)
    else:
        output.say(f"Job {name} is {job['state']}.")
        output.say(f"  take it up again:  {session.program()} jobs retry {name}")


@jobs_.command("retry")
@click.argument("name", shell_complete=completion.jobs)
@output.json_option
def retry_(name: str, as_json: bool) -> None:
    """Take up a failed or cancelled job again, where it stopped.

    Finished steps are kept; a fine-tuning goes on from its last checkpoint.

    \b
    Example:
      tuneloop jobs retry swift_heron_4f1c9a02
    """
    job = session.connect().client.retry(name)
    if as_json:
        output.print_json(job)
    else:
        output.say(f"Job {name} is {job['state']}.")
        output.say(f"  watch it:  {session.program()} jobs stream {name}")


@jobs_.command("outputs")
@click.argument("name", shell_complete=completion.jobs)
@click.option("--download", metavar="OUTPUT", help="Copy the files of this output.")
@click.option("--to", type=click.Path(path_type=Path, file_okay=False), default=".", help="Into this folder.")
@click.option("--force", is_flag=True, help="Overwrite files that exist.")
@output.json_option
def outputs_(name: str, download: str | None, to: Path, force: bool, as_json: bool) -> None:
    """List a job's outputs, or copy one of them.

    The files of OUTPUT are written into a folder of its name under --to (default: here).

    \b
    Examples:
      tuneloop jobs outputs swift_heron_4f1c9a02
      tuneloop jobs outputs swift_heron_4f1c9a02 --download evaluation_result --to results
    """
    connection = session.connect()
    made = connection.client.job(name)["outputs"]
    if download is None:
        if as_json:
            output.print_json(made)
        else:
            rows = [
                (key, f"{one['step']}.{one['output']}", one["path"] or "not made yet")
                for key, one in made.items()
            ]
            output.table(("OUTPUT", "MADE BY", "WHERE"), rows, empty=f"Job {name} has no outputs.")
        return
    if download not in made:
        raise NotFound(
            f"Job {name} has no output {download!r}.",
            next_move=did_you_mean(download, made)
            or f"List them with: {session.program()} jobs outputs {name}",
        )
    files = connection.client.output_files(name, download)
    folder = to / download
    counts = connection.client.download_output(name, download, folder, force=force)
    output.download(counts, sum(item["size_bytes"] for item in files), folder)
    if as_json:
        output.print_json({"folder": str(folder.absolute()), "files": files})
