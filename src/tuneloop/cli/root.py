"""The root command and the one place where an error becomes a message and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

import tuneloop
from tuneloop.cli import failures
from tuneloop.cli.lazy import LazyGroup
from tuneloop.core.errors import TuneloopError

COMMANDS = {
    "demo": ("demo", "See the whole loop: tune a small model, evaluate, deploy and talk to it."),
    "recipes": ("recipes", "The recipes that ship with Tuneloop, to run or to copy."),
    "init": ("init", "Write a recipe for a model and a data file, after a look at both."),
    "run": ("run", "Run a recipe: fine-tune, export and evaluate a model."),
    "plan": ("plan", "What a recipe will take: memory by cause, disk, time, and whether it fits."),
    "jobs": ("jobs", "What was run: list, show, stream, metrics, logs, priority, cancel, retry, outputs."),
    "data": ("data", "Your data: download, check, stats, show, convert, split, register, list."),
    "compute": ("compute", "This machine, and clusters mapped onto it; Azure's sizes."),
    "catalog": ("catalog", "Base models: list, show, add, use."),
    "models": ("models", "Your models: list, show, register, download, delete."),
    "endpoints": ("endpoints", "Addresses that answer: create, show, list, invoke, traffic, keys, delete."),
    "deployments": ("deployments", "Models behind an endpoint: create, list, logs, delete."),
    "chat": ("chat", "Talk to an endpoint in the terminal."),
    "azure": ("azure", "Scripts for the official Azure ML SDK, here: up, run, env, kernel, coverage."),
    "up": ("server", "Start the background server."),
    "down": ("server", "Stop the server and every process that it started."),
    "status": ("server", "What runs: processes, jobs, endpoints."),
    "doctor": ("doctor", "Check this installation and this workspace, and say what to fix."),
    "completion": ("completion", "Complete commands and names in your shell: bash, zsh, fish."),
    "mlflow": ("mlflow", "Open MLflow's pages on this workspace."),
}
"""Command -> (module of this package, the line in `tuneloop --help`), in the order of that page."""

EPILOG = """
\b
Start here:
  tuneloop demo                          the whole loop in a few minutes
  tuneloop init --data my.jsonl          a recipe for your own conversations
  tuneloop run my.yaml                   run it, with live progress

Commands start the background server when there is none; jobs and endpoints outlive the terminal, and
`tuneloop down` stops everything. The workspace is the folder in TUNELOOP_HOME (default: ~/.tuneloop).

With --json a command prints JSON on stdout (docs/reference/json.md has its schemas); an error is then one
JSON object on stderr, {"error": {"code", "message", "next", "details"}}. TUNELOOP_DEBUG=1 adds the
traceback; NO_COLOR=1 turns colours off, FORCE_COLOR=1 turns them on in a pipe.

\b
Exit codes: 0 done, 1 the job or a check failed, 2 wrong usage, recipe or data, 3 not found,
4 conflict, 5 not allowed, 6 not available, 70 a defect of Tuneloop, 130 cancelled or detached.
"""


CONTEXT = {"max_content_width": 100, "help_option_names": ["-h", "--help"]}


@click.group(cls=LazyGroup, modules=COMMANDS, epilog=EPILOG, context_settings=CONTEXT)
@click.version_option(tuneloop.__version__, prog_name="tuneloop")
def root() -> None:
    """Tuneloop: the managed fine-tuning loop for chat models, on machines that you own."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and leave the process with its exit code."""
    _open_closed_streams()
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def _open_closed_streams() -> None:
    """Python gives None for a stream that the shell has closed (`>&-`); nobody reads it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - for the whole process


def run(arguments: Sequence[str]) -> int:
    """The exit code of a command; every error has been printed."""
    as_json = "--json" in arguments
    try:
        code = root.main(list(arguments), prog_name="tuneloop", standalone_mode=False)
        return int(code or 0)
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        return 130
    except click.ClickException as error:
        return failures.show_usage(error, as_json)
    except TuneloopError as error:
        failures.show(error, as_json)
        return error.exit_code
    except Exception as error:
        known = failures.of_this_machine(error)
        if known is not None:
            failures.show(known, as_json)
            return known.exit_code
        if os.environ.get("TUNELOOP_DEBUG"):
            raise
        internal = failures.defect(error)
        failures.show(internal, as_json)
        return internal.exit_code
