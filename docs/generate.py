"""The reference pages that say what the code says, made from it.

    python docs/generate.py            write docs/reference/
    python docs/generate.py --check    exit 1 when a page is stale (a test asks the same)

Facts (names, defaults, codes, options) come from the code. What only a person can say stands in
docs/reference.yaml; a test fails when something new has no words there.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import click
import yaml
from pydantic import BaseModel
from typing_extensions import is_typeddict

from tuneloop.cli import schemas
from tuneloop.cli.root import root as command_line
from tuneloop.client import views
from tuneloop.core import errors, settings, states, support
from tuneloop.core.data.rules import RULES
from tuneloop.core.recipe.component import INPUTS
from tuneloop.core.recipe.key import STEP_VERSIONS
from tuneloop.core.recipe.values import GREATEST
from tuneloop.core.recipe.written import SECTIONS, Recipe
from tuneloop.server.app import create_app

FOLDER = Path(__file__).parent / "reference"
WORDS: Mapping[str, Any] = yaml.safe_load(
    (Path(__file__).parent / "reference.yaml").read_text(encoding="utf-8")
)
NOTE = "<!-- Made by docs/generate.py; edit the code or that script, not this page. -->"
WIDTH = 100
"""Columns of a help page."""

# ---------------------------------------------------------------- errors


def errors_page() -> str:
    tree = inspect.getdoc(errors) or ""
    drawn = textwrap.dedent(
        "    " + tree[tree.index("TuneloopError") : tree.index("`tuneloop run`")]
    ).rstrip()
    lines = [
        "```text",
        drawn,
        "```",
        "",
    ]
    for error in errors.all_errors():
        words = WORDS["errors"][error.code]
        lines += [
            f"## {error.code}",
            "",
            f"`{error.__name__}` · exit {error.exit_code} · HTTP {error.http_status}",
            "",
            f"{words['when']} {words['then']}",
            "",
        ]
    lines += [
        "## Codes of jobs and deployments",
        "",
        "What became of a process is told in the same shape, under `error` of a job, step or deployment.",
        "",
        *_table(
            ("code", "when", "what to do"),
            [(f"`{code}`", said["when"], said["then"]) for code, said in WORDS["ended"].items()],
        ),
        "",
        "Endpoints answer callers in OpenAI's or Azure's shape: [the endpoint API](endpoint-api.md#errors).",
    ]
    return _page("Errors", "errors", lines)


def exit_codes_page() -> str:
    by_code: dict[int, list[type[errors.TuneloopError]]] = {}
    for error in errors.all_errors():
        by_code.setdefault(error.exit_code, []).append(error)
    rows = [(0, WORDS["exits"][0], "")]
    for code in sorted(by_code):
        first = WORDS["errors"][by_code[code][0].code]["when"]
        said = "A job, a step or a check failed." if code == 1 else first
        rows.append((code, said, ", ".join(f"[{one.code}](errors.md#{one.code})" for one in by_code[code])))
    rows.append((130, WORDS["exits"][130], ""))
    lines = [
        *_table(("exit", "meaning", "errors"), rows),
        "",
        WORDS["pages"]["step-exit-codes"],
    ]
    return _page("Exit codes", "exit-codes", lines)


# ---------------------------------------------------------------- settings


def settings_page() -> str:
    said = _docs_of_fields(settings.Settings)
    rows = []
    for name, field in settings.Settings.__dataclass_fields__.items():
        default = "`~/.tuneloop`" if name == "home" else _code(field.default)
        rows.append((f"`{name}`", f"`TUNELOOP_{name.upper()}`", default, said[name]))
    layout = (inspect.getdoc(settings) or "").partition("    home/")[2]
    variables = [(f"`{name}`", meaning) for name, meaning in WORDS["variables"].items()]
    lines = [
        *_table(("setting", "variable", "default", "meaning"), rows),
        "",
        "Other variables that Tuneloop looks at:",
        "",
        *_table(("variable", "meaning"), variables),
        "",
        "Variables of your shell that reach a job's steps, as they are at submission: every `HF_*`, and "
        f"{_listed(settings.PASSED_ON)}. No others do.",
        "",
        "## The home",
        "",
        "```text",
        "home/" + inspect.cleandoc("\n" + "    home/" + layout).removeprefix("home/"),
        "```",
    ]
    return _page("Settings", "settings", lines)


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

PROBES: Sequence[Mapping[str, object]] = (
    {"apply_ort": True},
    {"deepspeed": "ds_config.json"},
    {"auto_find_batch_size": True, "apply_deepspeed": True},
    {"ignore_mismatched_sizes": True, "apply_lora": True},
    {"strategy": "fsdp", "apply_deepspeed": True},
    {"lora_use_dora": True},
    {"quantization": "4bit"},
    {"metric_for_best_model": "f1"},
    {"apply_early_stopping": True, "evaluation_strategy": "disable"},
    {"apply_deepspeed": True},
    {"eval_accumulation_steps": 8},
    {"apply_lora": True, "merge_lora_weights": False},
    {"optim": "adafactor"},
    {"max_steps": 100},
)
"""Values whose answer `core/support.py` gives in words."""


def recipe_page() -> str:
    rows = [
        (
            f"[`{name}`](#{name})" if name in SECTIONS else f"`{name}`",
            _default_of(field),
            WORDS["recipe"][name],
        )
        for name, field in Recipe.model_fields.items()
    ]
    lines = [*_table(("key", "default", "meaning"), rows), ""]
    for name, model in SECTIONS.items():
        lines += [f"## {name}", "", WORDS["recipe"][name], "", *_table(*_parameters(name, model)), ""]
    lines += _support()
    lines += _component()
    return _page("The recipe", "recipe", lines)


def _default_of(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.default
    return "" if isinstance(value, BaseModel) else _code(value)


def _parameters(section: str, model: type[BaseModel]) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    schema = model.model_json_schema()
    rows = []
    for name, field in model.model_fields.items():
        described = WORDS["recipe_fields"].get(f"{section}.{name}") or field.description or ""
        kind = ", ".join([_kind(schema["properties"][name]), *_limits(field)])
        rows.append((f"`{name}`", kind, _default_of(field), described))
    return ("key", "value", "default", "meaning"), rows


def _kind(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return _kind(next(one for one in schema["anyOf"] if one.get("type") != "null"))
    if "enum" in schema:
        return ", ".join(f"`{choice}`" for choice in schema["enum"])
    names = {"integer": "whole number", "boolean": "true or false", "string": "text", "array": "list"}
    return names.get(schema.get("type", ""), schema.get("type", "text"))


def _limits(field: Any) -> list[str]:
    """From the constraints of the field's type; they stand one level down when it may be left out."""
    kinds = [field, *(one for one in getattr(field.annotation, "__args__", ()))]
    given = [
        one for kind in kinds for one in getattr(kind, "metadata", None) or getattr(kind, "__metadata__", ())
    ]
    found = [inner for one in given for inner in (one, *getattr(one, "metadata", ()))]
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return [
        f"{word} {getattr(one, limit):g}"
        for one in found
        for limit, word in words.items()
        if getattr(one, limit, None) not in {None, GREATEST}  # said once, at the top of the page
    ]


def _support() -> list[str]:
    refused = [sentence for probe in PROBES for sentence in support.refusals(probe)]
    cautioned = [
        sentence for probe in PROBES if not support.refusals(probe) for sentence in support.cautions(probe)
    ]
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
        "What depends on the machine (how many GPUs there are, whether 16-bit arithmetic is fast) is told by "
        "the finetune step in its warnings.",
        "",
    ]


def _place_of(given: Any) -> str:
    if given.place:
        return f"`{given.place}`"
    if given.only:
        return f"under `component`; always `{given.only}`"
    return "under `component`; has no effect" if given.note else "refused"


def _component() -> list[str]:
    rows = [
        (f"`{name}`", _place_of(given), given.reason or given.note or "") for name, given in INPUTS.items()
    ]
    versions = ", ".join(f"{kind} {version}" for kind, version in STEP_VERSIONS.items())
    return [
        "## Inputs of the Azure component",
        "",
        "All inputs of `chat_completion_pipeline` 0.0.82, and where each stands in a recipe. A script's call "
        "can be pasted whole under `component`; each input goes to its place.",
        "",
        *_table(("input", "in a recipe", "why"), rows),
        "",
        "## Versions of the steps",
        "",
        f"Part of every cache key: {versions}. A number rises when equal parameters and inputs give other "
        "outputs than before.",
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
        help_option_names=command_line.context_settings["help_option_names"],
    )
    yield path, command, context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from _walk(f"{path} {name}", inner, context)


def cli_page() -> str:
    lines: list[str] = []
    for path, command, context in commands():
        depth = min(len(path.split()), 3)
        text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
        lines += [f"{'#' * (depth + (depth == 1))} {path}", "", "```text", text, "```", ""]
    return _page("The command line", "cli", lines)


def json_page() -> str:
    """Each command refers to shapes, which stand once, below."""
    shapes: dict[str, Any] = {}
    lines = ["## Errors", "", *_schema_block(schemas.Failure, shapes)]
    for command, by_option in schemas.OUTPUTS.items():
        lines += [f"## tuneloop {command}", ""]
        for option, kind in by_option.items():
            lines += [f"With `{option}`:", ""] if option else []
            lines += _schema_block(kind, shapes)
    lines += ["## Shapes", ""]
    for name in sorted(shapes):
        lines += [
            f"### {name}",
            "",
            "```json",
            json.dumps(shapes[name], indent=2, ensure_ascii=False),
            "```",
            "",
        ]
    return _page("JSON of the commands", "json", lines)


def _schema_block(kind: Any, shapes: dict[str, Any]) -> list[str]:
    """The schema without its definitions, which go to `shapes` with what the code says of their fields."""
    schema = schemas.schema(kind)
    for name, shape in schema.pop("$defs", {}).items():
        shapes[name] = _explained(name, shape)
    if "title" in schema and schema.get("type") == "object" and "properties" in schema:
        name = schema["title"]
        shapes[name] = _explained(name, schema)
        schema = {"$ref": f"#/$defs/{name}"}
    return ["```json", json.dumps(schema, indent=2), "```", ""]


def _explained(name: str, shape: dict[str, Any]) -> dict[str, Any]:
    kind = getattr(schemas, name, None) or getattr(views, name, None)
    said = _docs_of_fields(kind) if is_typeddict(kind) else {}
    properties = {
        field: one | ({"description": said[field]} if field in said else {})
        for field, one in shape.get("properties", {}).items()
    }
    return shape | ({"properties": properties} if properties else {})


# ---------------------------------------------------------------- the HTTP API


def openapi() -> dict[str, Any]:
    """The description that the server gives at /openapi.json."""
    # The routes use their parts only when they are called.
    parts: Any = SimpleNamespace(token="", current_token=str)
    return create_app(parts).openapi()


def operations() -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in openapi()["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def http_page() -> str:
    schemas = openapi()["components"]["schemas"]
    lines: list[str] = []
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
    return _page("The HTTP API", "http-api", lines)


def _operation(name: str, operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> list[str]:
    what, answer = WORDS["routes"][name]["does"], WORDS["routes"][name]["answers"]
    status = next(code for code in operation["responses"] if code.startswith("2"))
    gives = f"[{answer}](#{answer.lower()})" if hasattr(views, answer) else answer
    lines = [f"### {name}", "", f"{what} Answers {status}: {gives}.", ""]
    query = [one for one in operation.get("parameters", []) if one["in"] == "query"]
    if query:
        wanted = ", ".join(
            f"`{one['name']}`" + (" (required)" if one.get("required") else "") for one in query
        )
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
    text = (
        getattr(kind, "__name__", None) if isinstance(kind, type) and not hasattr(kind, "__args__") else None
    )
    return text or str(kind).replace("tuneloop.client.views.", "").replace("typing.", "")


# ---------------------------------------------------------------- states


def states_page() -> str:
    lines: list[str] = []
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
    return _page("States", "states", lines)


# ---------------------------------------------------------------- rules for data

RULE_GROUPS = {
    "file": "Files",
    "row": "Rows",
    "template": "The model's chat template",
    "tokens": "The model's tokens",
}


def data_rules_page() -> str:
    lines: list[str] = []
    for needs, title in RULE_GROUPS.items():
        rows = [
            (f"`{rule.name}`", rule.what, rule.severity, rule.fix)
            for rule in RULES.values()
            if rule.needs == needs
        ]
        lines += [f"## {title}", "", *_table(("rule", "what is needed", "otherwise", "what to do"), rows), ""]
    return _page("Rules for data", "data-rules", lines)


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


def _page(title: str, words: str, lines: Iterable[str]) -> str:
    """`words`: where its introduction stands in reference.yaml."""
    return "\n".join([f"# {title}", "", NOTE, "", WORDS["pages"][words], "", *lines]).rstrip() + "\n"


def pages() -> dict[Path, str]:
    """Every generated page with its text."""
    return {
        FOLDER / "errors.md": errors_page(),
        FOLDER / "exit-codes.md": exit_codes_page(),
        FOLDER / "settings.md": settings_page(),
        FOLDER / "recipe.md": recipe_page(),
        FOLDER / "cli.md": cli_page(),
        FOLDER / "json.md": json_page(),
        FOLDER / "http-api.md": http_page(),
        FOLDER / "states.md": states_page(),
        FOLDER / "data-rules.md": data_rules_page(),
    }


def stale() -> list[Path]:
    """The pages that are not what the code says."""
    return [
        path
        for path, text in pages().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
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
