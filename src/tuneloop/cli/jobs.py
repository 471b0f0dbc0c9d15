"""`tuneloop jobs`: what was run, what runs, and what came of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tuneloop.cli import live, output, run, session, streaming
from tuneloop.core.errors import NotFound
from tuneloop.core.names import did_you_mean
from tuneloop.core.states import STEP_ENDED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tuneloop.client import Client
    from tuneloop.client.views import JobView, LogPage, StepView

FOLLOW_SECONDS = 0.5


@click.group("jobs")
def jobs_() -> None:
    """What was run: list, show, stream, logs, cancel, retry, outputs.

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
@click.argument("name")
@click.option("--verbose", "-v", is_flag=True, help="Print every parameter, the built-in ones too.")
@output.json_option
def show_(name: str, verbose: bool, as_json: bool) -> None:
    """Show a job: state, steps, metrics, outputs and the parameters it ran with.

    \b
    Example:
      tuneloop jobs show swift_heron_4f1c9a02 -v
    """
    job = session.connect().client.job(name)
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
            "tags": job["tags"],
            "error": job["error"]["message"] if job["error"] else None,
        }
    )
    output.say()
    _tell_steps(job)
    output.say()
    run.tell_parameters(job, verbose)


def _tell_steps(job: JobView) -> None:
    """The graph of steps, then what each of them measured, warned of or failed with."""
    rows = [
        (
            step["name"],
            ", ".join(step["depends_on"]),
            step["state"],
            output.duration(output.between(step["started_at"], step["finished_at"]))
            if step["started_at"]
            else "",
            output.size(step["peak_memory_bytes"]),
            _note(step),
        )
        for step in job["steps"]
    ]
    output.table(("STEP", "AFTER", "STATE", "TIME", "PEAK MEMORY", "NOTE"), rows)
    warnings = live.Warnings(job["warnings"])
    told = [(step["name"], text) for step in job["steps"] for text in _results(step, warnings)]
    if told:
        output.say()
    for name, text in told:
        output.say(f"{name}: {output.clean(text)}")
    output.say()
    for name, made in job["outputs"].items():
        output.say(f"output {name}: {made['path'] or made['digest'] or 'not made'}")


def _note(step: StepView) -> str:
    """Where a step's outputs come from, or why it is in its state; attempts when there were several."""
    attempts = [f"{step['attempts']} attempts"] if step["attempts"] > 1 else []
    if step["state"] == "reused":
        return f"reused from {step['reused_from']}" if step["reused_from"] else ""
    why = step["reason"] if step["state"] not in ("succeeded", "running") and not step["error"] else None
    return output.clean(", ".join(attempts + ([why] if why else [])))


def _results(step: StepView, warnings: live.Warnings) -> Iterator[str]:
    if step["metrics"]:
        yield "  ".join(output.figure(name, value) for name, value in step["metrics"].items())
    for warning in warnings.of_step(step):
        yield f"warning: {warning}"
    if step["error"]:
        yield step["error"]["message"]


@jobs_.command("stream")
@click.argument("name")
@output.json_option
def stream_(name: str, as_json: bool) -> int:
    """Stream a job's progress until it ends; the same view as `tuneloop run`.

    Ctrl-C leaves the job running. With --json the job is printed as JSON at its end and the progress goes
    to stderr. Exit codes: 0 completed, 1 failed, 130 cancelled or left.

    \b
    Example:
      tuneloop jobs stream swift_heron_4f1c9a02
    """
    return streaming.watch(session.connect(), name, as_json=as_json)


@jobs_.command("logs")
@click.argument("name")
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
            raise NotFound(f"No step of job {job['name']} has run here, so there is no log.")
        return chosen[0]
    if step not in names:
        hint = did_you_mean(step, names) or ""
        raise NotFound(f"Job {job['name']} has no step {step!r}. {hint}".rstrip())
    return step


def _has_ended(job: JobView, step: str) -> bool:
    return next(item["state"] for item in job["steps"] if item["name"] == step) in STEP_ENDED


@jobs_.command("cancel")
@click.argument("name")
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


@jobs_.command("retry")
@click.argument("name")
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
@click.argument("name")
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
        hint = did_you_mean(download, made) or ""
        raise NotFound(f"Job {name} has no output {download!r}. {hint}".rstrip())
    files = connection.client.output_files(name, download)
    folder = to / download
    counts = connection.client.download_output(name, download, folder, force=force)
    output.download(counts, sum(item["size_bytes"] for item in files), folder)
    if as_json:
        output.print_json({"folder": str(folder.absolute()), "files": files})
