"""The reference pages that say what the code says, made from it.

    python docs/generate.py            write docs/reference/
    python docs/generate.py --check    exit 1 when a page is stale (a test asks the same)

Facts (names, defaults, codes, options) come from the code; what only a person can say (when an error is met and
what to do) stands here, and a test fails when something new has no such sentence.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints, is_typeddict

import click
from pydantic import BaseModel

from tuneloop.cli.root import root as command_line
from tuneloop.client import views
from tuneloop.core import errors, settings, states, support
from tuneloop.core.recipe.component import INPUTS
from tuneloop.core.recipe.key import STEP_VERSIONS
from tuneloop.core.recipe.written import SECTIONS, Recipe
from tuneloop.server.app import create_app

FOLDER = Path(__file__).parent / "reference"
NOTE = "<!-- Made by docs/generate.py; edit the code or that script, not this page. -->"
WIDTH = 100

# ---------------------------------------------------------------- errors

MEANING: Mapping[str, tuple[str, str]] = {
    "error": ("Something went wrong that has no class of its own.", "Read the message."),
    "usage": ("What was written or sent is wrong.", "Correct it; the message names the value and the choices."),
    "invalid_name": ("A name has characters that are not safe in a file name or a URL.", "Choose another."),
    "recipe": (
        "A recipe has mistakes. All of them are listed, each with its line.",
        "Correct them all, then run it again. [All keys](recipe.md).",
    ),
    "data": (
        "Rows of a data file cannot be learned from. Each finding has file, line, field, rule, value and fix; "
        "nothing was started.",
        "Mend those rows. [Your own data](../howto/own-data.md).",
    ),
    "unsupported": (
        "A value is understood and is not supported; it would have been ignored, so it is refused.",
        "Do what the message says, or leave the value out.",
    ),
    "not_found": ("Nothing has that name. The nearest name is given.", "List what there is."),
    "conflict": ("It does not go together with what is there.", "Look at what is there, then decide."),
    "already_exists": ("The name is taken.", "Choose another name or version."),
    "invalid_state": (
        "It is in a state in which that cannot be done (cancelling a job that has ended, say).",
        "The message says which state; [all states and moves](states.md).",
    ),
    "stale": ("Somebody else changed it between your look and your write.", "Look again, then repeat."),
    "not_allowed": (
        "The API's token, or an endpoint's key, is missing or wrong.",
        "The token is in the file `token` of the home; keys: `tuneloop endpoints keys NAME`.",
    ),
    "foreign_caller": (
        "The request came through a web page or a host name that is not this machine's.",
        "Call 127.0.0.1 or localhost, not through a browser page of another site.",
    ),
    "unavailable": ("Something is not ready or not reachable at the moment.", "Wait, then repeat."),
    "server_unreachable": (
        "The background server did not start or does not answer.",
        "Read `logs/server.log` in the home; `tuneloop doctor`.",
    ),
    "port_taken": (
        "Another program listens on the port.",
        "Choose another: [`TUNELOOP_PORT`, `TUNELOOP_ROUTER_PORT`](settings.md), or `tuneloop mlflow --port`.",
    ),
    "home_unusable": (
        "The home cannot be written, was made by a newer Tuneloop, or has a server already. Nothing was changed.",
        "Make it writable, upgrade, or choose another with `TUNELOOP_HOME`.",
    ),
    "version_mismatch": (
        "The background server is another version than the command.",
        "Restart it, jobs and endpoints go on: `tuneloop down --server-only`, then `tuneloop up`.",
    ),
    "step_failed": ("A step, or a deployment, ended without its result.", "`tuneloop jobs logs JOB`."),
    "model_unavailable": (
        "The weights cannot be had, are incomplete, or are not the ones whose digest the card names.",
        "Check the card's source: `tuneloop catalog show NAME`; `tuneloop catalog use NAME --source FOLDER`.",
    ),
    "export_mismatch": (
        "The merged weights do not answer as base and adapter do, or a tensor is empty. Nothing is exported.",
        "Report it with the job's log: a model that answers differently after export must not be served.",
    ),
    "diverged": (
        "The loss is not a number: training has gone astray.",
        "Lower `finetune.learning_rate`, raise `finetune.warmup_steps`, or look for odd rows in the data.",
    ),
    "internal": (
        "A defect of Tuneloop.",
        "Set `TUNELOOP_DEBUG=1` to see where, and report it with what you did.",
    ),
}
"""Error code -> (when you meet it, what to do)."""

ENDED: Mapping[str, tuple[str, str]] = {
    "step_vanished": (
        "A step's process ended without a result, as often as `max_attempts` allows: killed from outside, or by the "
        "system for lack of memory.",
        "`tuneloop jobs logs JOB --step STEP`; then `tuneloop jobs retry JOB`, which goes on from the last "
        "checkpoint.",
    ),
    "replica_vanished": (
        "A replica's process ended by itself. It is started again, with growing pauses.",
        "`tuneloop deployments logs NAME --endpoint E`.",
    ),
    "out_of_memory": (
        "Python could not get memory for a step.",
        "Lower `preprocess.max_seq_length` or `finetune.per_device_train_batch_size`.",
    ),
    "disk_full": ("The disk was full while a step wrote.", "Free some, then `tuneloop jobs retry JOB`."),
}
"""Codes of jobs, steps and deployments that are not exceptions: what became of a process."""


def errors_page() -> str:
    tree = inspect.getdoc(errors) or ""
    drawn = tree[tree.index("TuneloopError") : tree.index("`tuneloop run`")].rstrip()
    lines = [
        "# Errors",
        "",
        NOTE,
        "",
        "Every error has a stable code, says what happened, and says what to do next. On the command line it is one "
        "message on stderr and an [exit code](exit-codes.md); with `--json`, and over HTTP, it is "
        '`{"error": {"code", "message", "next", "details"}}`. A list of mistakes (of a recipe, of data) is in '
        "`details`.",
        "",
        "```text",
        "TuneloopError" + drawn.removeprefix("TuneloopError"),
        "```",
        "",
    ]
    for error in errors.all_errors():
        when, what = MEANING[error.code]
        lines += [
            f"## {error.code}",
            "",
            f"`{error.__name__}` · exit {error.exit_code} · HTTP {error.http_status}",
            "",
            f"{when} {what}",
            "",
        ]
    lines += [
        "## Codes of jobs and deployments",
        "",
        "What became of a process is told in the same shape, under `error` of a job, step or deployment.",
        "",
        *_table(("code", "when", "what to do"), [(f"`{code}`", *said) for code, said in ENDED.items()]),
        "",
        "Endpoints answer callers in OpenAI's or Azure's shape: [the endpoint API](endpoint-api.md#errors).",
    ]
    return _page(lines)


EXITS: Mapping[int, str] = {
    0: "Done. For `tuneloop run` and `jobs stream`: the job completed.",
    130: "The job was cancelled, or you left with Ctrl-C. What runs goes on.",
}


def exit_codes_page() -> str:
    by_code: dict[int, list[type[errors.TuneloopError]]] = {}
    for error in errors.all_errors():
        by_code.setdefault(error.exit_code, []).append(error)
    rows = [(0, EXITS[0], "")]
    for code in sorted(by_code):
        first = MEANING[by_code[code][0].code][0]
        said = "A job, a step or a check failed." if code == 1 else first
        rows.append((code, said, ", ".join(f"[{one.code}](errors.md#{one.code})" for one in by_code[code])))
    rows.append((130, EXITS[130], ""))
    return _page(
        [
            "# Exit codes",
            "",
            NOTE,
            "",
            "Of the command `tuneloop`. The same codes with and without `--json`.",
            "",
            *_table(("exit", "meaning", "errors"), rows),
            "",
            "A step run by hand (`python -m tuneloop.steps DIR`) exits with 0 when it succeeded, 1 when it failed (the "
            "reason is in `result.json`), 2 when it was called wrongly, 3 when its folder belongs to another process, "
            "and 143 when it was interrupted.",
        ]
    )


# ---------------------------------------------------------------- settings

VARIABLES: Mapping[str, str] = {
    "TUNELOOP_DEBUG": "Anything: tracebacks are shown with errors.",
    "NO_COLOR": "Anything: no colours.",
    "OMP_NUM_THREADS": "Threads of torch in steps and replicas; otherwise one per physical core.",
    "TUNELOOP_OWNER": "Set by Tuneloop in every process that it starts, to know its own again. Leave it alone.",
}
"""Environment variables that are not settings."""


def settings_page() -> str:
    said = _docs_of_fields(settings.Settings)
    rows = []
    for name, field in settings.Settings.__dataclass_fields__.items():
        default = "`~/.tuneloop`" if name == "home" else _code(field.default)
        rows.append((f"`{name}`", f"`TUNELOOP_{name.upper()}`", default, said[name]))
    layout = (inspect.getdoc(settings) or "").partition("    home/")[2]
    variables = [(f"`{name}`", meaning) for name, meaning in VARIABLES.items()]
    return _page(
        [
            "# Settings",
            "",
            NOTE,
            "",
            "A setting comes from its environment variable, else from the file `settings.yaml` in the home (a mapping of "
            "the names below), else it has its default. `home` itself is set by its variable alone. The server reads them "
            "when it starts: `tuneloop down --server-only` and `tuneloop up` apply a change while jobs and endpoints go "
            "on.",
            "",
            *_table(("setting", "variable", "default", "meaning"), rows),
            "",
            "Other variables that Tuneloop looks at:",
            "",
            *_table(("variable", "meaning"), variables),
            "",
            f"Variables of your shell that reach a job's steps: every `HF_*`, and {_listed(settings.PASSED_ON)}. They are "
            "taken at submission, and no others are.",
            "",
            "## The home",
            "",
            "```text",
            "home/" + inspect.cleandoc("\n" + "    home/" + layout).removeprefix("home/"),
            "```",
        ]
    )


def _docs_of_fields(kind: type) -> dict[str, str]:
    """The string below each field of a class, as it stands in its source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            is_doc = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            if is_doc:
                found[field.target.id] = " ".join(str(following.value.value).split())  # type: ignore[attr-defined]
    return found


# ---------------------------------------------------------------- the recipe

TOP: Mapping[str, str] = {
    "display_name": "What the job is called in lists. Left out: built from the parameters, as the Azure document does.",
    "experiment": "The experiment under which the job is listed, here and in MLflow.",
    "model": "The base model: `Name` or `Name:version` of the catalogue, or Azure's asset id.",
    "model_defaults": "`fill`: the model's defaults fill what is not written. `override`: they go over what is written, "
    "with a warning, as in the Azure document.",
    "data": "The files.",
    "compute": "One name for all stages, or a name per stage. There is one compute now, `local`.",
    "model_import": "The step that fetches and converts the base model.",
    "preprocess": "The step that turns conversations into tokens.",
    "finetune": "The training step.",
    "export": "The step that merges, checks and packs the model.",
    "evaluate": "The step that compares base and tuned model; `false` leaves it out.",
    "settings": "How the job runs.",
}
FIELDS: Mapping[str, str] = {
    "data.train": "Conversations to learn from, JSON Lines. Relative to the recipe's folder; `samples:...` ships.",
    "data.validation": "For the loss during training. Left out: the end of train is put aside.",
    "data.test": "For the comparison with the base model. Left out: carved like validation.",
    "data.questions": "Questions with listed facts, asked of base and tuned model.",
    "data.name": "The data's label in the display name.",
    **{
        f"compute.{stage}": f"Where {stage} runs."
        for stage in ("model_import", "preprocess", "finetune", "export", "evaluate")
    },
    "settings.force_rerun": "Run every step, even where the cache has an equal one.",
    "settings.continue_on_step_failure": "After a failed step go on with the steps that do not need it.",
}
PROBES: Sequence[Mapping[str, object]] = (
    {"apply_ort": True},
    {"deepspeed": "ds_config.json"},
    {"auto_find_batch_size": True},
    {"ignore_mismatched_sizes": True},
    {"metric_for_best_model": "f1"},
    {"apply_early_stopping": True, "evaluation_strategy": "disable"},
    {"apply_deepspeed": True},
    {"dataloader_num_workers": 4},
    {"eval_accumulation_steps": 8},
    {"apply_lora": True, "merge_lora_weights": False},
    {"optim": "adafactor"},
    {"max_steps": 100},
)
"""Values whose answer `core/support.py` gives in words."""


def recipe_page() -> str:
    lines = [
        "# The recipe",
        "",
        NOTE,
        "",
        "One YAML file. Unknown keys are refused with the nearest name, all mistakes are told at once with their lines, "
        "and the final value of every parameter is kept with the job together with its origin (`built-in`, `model`, "
        "`recipe`, `--set`). A recipe to start from: `tuneloop recipes show demo > my.yaml`.",
        "",
        "Names, types and defaults are those of Azure's chat-completion pipeline component, so that a value from there can "
        'be pasted; booleans may be written `true` or `"true"`, numbers with or without quotes.',
        "",
    ]
    rows = [
        (f"[`{name}`](#{name})" if name in SECTIONS else f"`{name}`", _default_of(field), TOP[name])
        for name, field in Recipe.model_fields.items()
    ]
    lines += [*_table(("key", "default", "meaning"), rows), ""]
    for name, model in SECTIONS.items():
        lines += [f"## {name}", "", TOP[name], "", *_table(*_parameters(name, model)), ""]
    lines += _support()
    lines += _component()
    return _page(lines)


def _default_of(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.default
    return "" if isinstance(value, BaseModel) else _code(value)


def _parameters(section: str, model: type[BaseModel]) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    schema = model.model_json_schema()
    rows = []
    for name, field in model.model_fields.items():
        described = FIELDS.get(f"{section}.{name}") or field.description or ""
        kind = _kind(schema["properties"][name], schema.get("$defs", {}))
        rows.append((f"`{name}`", kind, _default_of(field), described))
    return ("key", "value", "default", "meaning"), rows


def _kind(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return _kind(next(one for one in schema["anyOf"] if one.get("type") != "null"), definitions)
    if "enum" in schema:
        return " or ".join(f"`{choice}`" for choice in schema["enum"])
    names = {"integer": "whole number", "boolean": "true or false", "string": "text", "array": "list"}
    kind = names.get(schema.get("type", ""), schema.get("type", "text"))
    limits = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    said = [f"{word} {schema[limit]:g}" for limit, word in limits.items() if limit in schema]
    return ", ".join([kind, *said]) if kind in ("whole number", "number") else kind


def _support() -> list[str]:
    refused = [sentence for probe in PROBES for sentence in support.refusals(probe)]
    cautioned = [sentence for probe in PROBES for sentence in support.cautions(probe)]
    return [
        "## Values that are refused",
        "",
        "Nothing is half obeyed. These values are understood and refused, in these words:",
        "",
        *[f"- {sentence}" for sentence in refused],
        "",
        "## Values that do less than their name says",
        "",
        "These are accepted, with a warning in these words:",
        "",
        *[f"- {sentence}" for sentence in cautioned],
        "",
        "What depends on the machine (how many GPUs there are, whether 16-bit arithmetic is fast) is told by the finetune "
        "step in its warnings.",
        "",
    ]


def _component() -> list[str]:
    rows = [
        (f"`{name}`", f"`{given.place}`" if given.place else "refused", given.reason or "")
        for name, given in INPUTS.items()
    ]
    versions = ", ".join(f"{kind} {version}" for kind, version in STEP_VERSIONS.items())
    return [
        "## Inputs of the Azure component",
        "",
        "All inputs of `chat_completion_pipeline` 0.0.82, and where each stands in a recipe.",
        "",
        *_table(("input", "in a recipe", "why not"), rows),
        "",
        "## Versions of the steps",
        "",
        f"Part of every cache key: {versions}. A number rises when equal parameters and inputs give other outputs than "
        "before.",
    ]


# ---------------------------------------------------------------- the command line


def commands() -> Iterator[tuple[str, click.Command, click.Context]]:
    """`tuneloop run`, `tuneloop jobs list`, ...: every command and group, in the order of the help pages."""
    yield from _walk("tuneloop", command_line, None)


def _walk(
    path: str, command: click.Command, parent: click.Context | None
) -> Iterator[tuple[str, click.Command, click.Context]]:
    context = click.Context(
        command,
        parent=parent,
        info_name=path.split()[-1],
        terminal_width=WIDTH,
        max_content_width=WIDTH,
        color=False,
    )
    yield path, command, context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from _walk(f"{path} {name}", inner, context)


def cli_page() -> str:
    lines = [
        "# The command line",
        "",
        NOTE,
        "",
        "What `--help` says, of every command.",
        "",
    ]
    for path, command, context in commands():
        depth = min(len(path.split()), 3)
        text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
        lines += [f"{'#' * (depth + (depth == 1))} {path}", "", "```text", text, "```", ""]
    return _page(lines)


# ---------------------------------------------------------------- the HTTP API

ROUTES: Mapping[str, tuple[str, str]] = {
    "GET /api/health": ("Which server this is. Needs no token.", "HealthView"),
    "GET /api/status": ("What runs, and how far MLflow is behind.", "StatusView"),
    "GET /api/events": ("What happened since `after`, of all subjects or one.", "list of events"),
    "POST /api/shutdown": ("End the server (`server`), or it and every process (`all`).", "`{mode}`"),
    "GET /api/cards": ("Base models, the latest version of each.", "list of cards"),
    "GET /api/cards/{name}": ("A card: `Name` or `Name:version`, in any case.", "card"),
    "POST /api/cards": ("Add a card, as YAML text.", "card"),
    "POST /api/cards/{name}/source": ("Take a model's weights from a folder of this machine.", "card"),
    "GET /api/computes": ("Where steps can run.", "list of computes"),
    "POST /api/recipes/resolve": ("The final parameters of a recipe; nothing is recorded.", "Resolution"),
    "POST /api/jobs": ("Submit a recipe: everything is checked, data is copied in, the job is recorded.", "JobView"),
    "GET /api/jobs": ("Jobs, newest first.", "list of JobSummary"),
    "GET /api/jobs/{name}": ("A job with its steps.", "JobView"),
    "POST /api/jobs/{name}/cancel": ("Ask for its end; `canceling` until no process is left.", "JobView"),
    "POST /api/jobs/{name}/retry": ("Run again what failed, was skipped or cancelled.", "JobView"),
    "GET /api/jobs/{name}/events": ("What happened to a job.", "list of events"),
    "GET /api/jobs/{name}/progress": ("Progress since `cursor`, which the last answer gave; poll it.", "ProgressPage"),
    "GET /api/jobs/{name}/metrics": ("A step's curves; a later attempt replaces the steps it repeats.", "list of points"),
    "GET /api/jobs/{name}/logs/{step}": ("A step's log from `offset`.", "LogPage"),
    "GET /api/jobs/{name}/outputs/{output}/files": ("The files of an output.", "list of FileEntry"),
    "GET /api/jobs/{name}/outputs/{output}/files/{path}": ("One file.", "bytes"),
    "GET /api/models": ("Registered models, newest first.", "list of models"),
    "POST /api/models": ("Register a job's output.", "model"),
    "GET /api/models/{name}/{version}": ("A model; `latest` is the one registered last.", "model"),
    "DELETE /api/models/{name}/{version}": ("Give a version up; refused while it is served.", "model"),
    "GET /api/models/{name}/{version}/files": ("The files of a model.", "list of FileEntry"),
    "GET /api/models/{name}/{version}/files/{path}": ("One file.", "bytes"),
    "GET /api/endpoints": ("Endpoints with their deployments.", "list of EndpointView"),
    "POST /api/endpoints": ("Create an endpoint.", "EndpointView"),
    "GET /api/endpoints/{name}": ("An endpoint.", "EndpointView"),
    "DELETE /api/endpoints/{name}": ("Take it down; it is gone when no process of it is left.", "EndpointView"),
    "POST /api/endpoints/{name}/traffic": ("Weights in per cent: a mapping of deployment to number.", "EndpointView"),
    "GET /api/endpoints/{name}/keys": ("Both keys.", "KeysView"),
    "POST /api/endpoints/{name}/keys/regenerate": ("Replace the key in `slot`; the other stays good.", "KeysView"),
    "GET /api/endpoints/{name}/deployments": ("Its deployments.", "list of DeploymentView"),
    "POST /api/endpoints/{name}/deployments": ("Deploy a model.", "DeploymentView"),
    "GET /api/endpoints/{name}/deployments/{deployment}": ("A deployment.", "DeploymentView"),
    "DELETE /api/endpoints/{name}/deployments/{deployment}": (
        "Take it down; refused while it receives traffic.",
        "DeploymentView",
    ),
    "GET /api/endpoints/{name}/deployments/{deployment}/logs": ("The end of its replicas' logs.", "`{text}`"),
}
"""Method and path -> (what it does, what it answers)."""


def openapi() -> dict[str, Any]:
    """The description that the server gives at /openapi.json."""
    # The routes use their parts only when they are called.
    parts: Any = SimpleNamespace(token="")
    return create_app(parts).openapi()


def operations() -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in openapi()["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def http_page() -> str:
    schemas = openapi()["components"]["schemas"]
    lines = [
        "# The HTTP API",
        "",
        NOTE,
        "",
        "What the command line uses, and everything else may. The server listens on 127.0.0.1 only; its address is in "
        "`server.json` of the home (`tuneloop up` prints it). Send `Authorization: Bearer TOKEN` with the token from the "
        "file `token` of the home. That token is worth a shell: a recipe may name any file that you can read.",
        "",
        'Errors are `{"error": {"code", "message", "next", "details"}}` with the status of [their class](errors.md). '
        "Calls to a model go to another port: [the endpoint API](endpoint-api.md). A machine-readable description is at "
        "`/openapi.json` of a running server.",
        "",
    ]
    tag = ""
    for name, operation in operations():
        if operation["tags"][0] != tag:
            tag = operation["tags"][0]
            lines += [f"## {tag}", ""]
        lines += _operation(name, operation, schemas)
    lines += ["## Shapes", "", "Times are ISO 8601 in UTC, digests `sha256:` and 64 hex digits.", ""]
    for shape in vars(views).values():
        if is_typeddict(shape):
            lines += _shape(shape)
    return _page(lines)


def _operation(name: str, operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> list[str]:
    what, answer = ROUTES[name]
    status = next(code for code in operation["responses"] if code.startswith("2"))
    gives = f"[{answer}](#{answer.lower()})" if hasattr(views, answer) else answer
    lines = [f"### {name}", "", f"{what} Answers {status}: {gives}.", ""]
    query = [one for one in operation.get("parameters", []) if one["in"] == "query"]
    if query:
        wanted = ", ".join(f"`{one['name']}`" + (" (required)" if one.get("required") else "") for one in query)
        lines += [f"Query: {wanted}.", ""]
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    reference = body.get("$ref", "").rpartition("/")[2]
    if reference:
        schema = schemas[reference]
        fields = [
            f"`{field}`" + (" (required)" if field in schema.get("required", ()) else "")
            for field in schema["properties"]
        ]
        lines += [f"Body: {', '.join(fields)}.", ""]
    return lines


def _shape(shape: Any) -> list[str]:
    said = _docs_of_fields(shape)
    rows = [
        (f"`{field}`", f"`{_type_name(kind)}`", said.get(field, ""))
        for field, kind in get_type_hints(shape, include_extras=True).items()
    ]
    return [f"### {shape.__name__}", "", *_table(("field", "type", ""), rows), ""]


def _type_name(kind: Any) -> str:
    text = getattr(kind, "__name__", None) if isinstance(kind, type) and not hasattr(kind, "__args__") else None
    return text or str(kind).replace("tuneloop.client.views.", "").replace("typing.", "")


# ---------------------------------------------------------------- states


def states_page() -> str:
    lines = [
        "# States",
        "",
        NOTE,
        "",
        "Everything that lives is in one of these states, and moves only as the tables say. A move that is not there is "
        "refused with [invalid_state](errors.md#invalid_state).",
        "",
    ]
    for name, moves in states.TABLES.items():
        rows = [
            (f"`{state}`", ", ".join(f"`{one}`" for one in sorted(following)) or "nothing: it has ended")
            for state, following in moves.items()
        ]
        said = inspect.getdoc(type(next(iter(moves)))) or ""
        lines += [f"## {name}", ""]
        if said and not said.startswith("StrEnum") and said != inspect.getdoc(states.StrEnum):
            lines += [" ".join(said.split()), ""]
        lines += [*_table(("state", "may become"), rows), ""]
    return _page(lines)


# ---------------------------------------------------------------- Markdown


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [line(columns), "|" + "---|" * len(columns), *[line(row) for row in rows]]


def _code(value: object) -> str:
    if value is None:
        return "not set"
    if value == "":
        return "empty"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _page(lines: Iterable[str]) -> str:
    return "\n".join(lines).rstrip() + "\n"


def pages() -> dict[Path, str]:
    """Every generated page with its text."""
    return {
        FOLDER / "errors.md": errors_page(),
        FOLDER / "exit-codes.md": exit_codes_page(),
        FOLDER / "settings.md": settings_page(),
        FOLDER / "recipe.md": recipe_page(),
        FOLDER / "cli.md": cli_page(),
        FOLDER / "http-api.md": http_page(),
        FOLDER / "states.md": states_page(),
    }


def stale() -> list[Path]:
    """The pages that are not what the code says."""
    return [
        path for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text
    ]


def main(arguments: Sequence[str]) -> int:
    outdated = stale()
    if "--check" in arguments:
        for path in outdated:
            print(f"{path} is stale; run: python docs/generate.py", file=sys.stderr)
        return 1 if outdated else 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
