"""The documentation is true to the code: generated pages are fresh, nothing is without words, and what a page
names (files, tests, commands, links, recipes, requests) exists."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import click
import pytest
import yaml

from tuneloop.cli.root import root as command_line
from tuneloop.core import errors, recipe
from tuneloop.core.data.rules import RULES, check_row
from tuneloop.core.settings import Settings
from tuneloop.serving.protocol import read_score
from tuneloop.workspace.data import check_chat_file

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "tuneloop"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "changelog.d").glob("*.md")])
MODULES = sorted(SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------- generated pages


def test_the_generated_pages_say_what_the_code_says(generate: ModuleType) -> None:
    assert [name_of(path) for path in generate.stale()] == [], "run: python docs/generate.py"


def test_every_error_has_words_and_no_words_are_left_over(generate: ModuleType) -> None:
    assert set(generate.WORDS["errors"]) == {error.code for error in errors.all_errors()}


def test_every_code_that_is_no_exception_has_words(generate: ModuleType) -> None:
    coded = {code for path in MODULES for code in codes(ast.parse(path.read_text("utf-8")))}
    assert set(generate.WORDS["ended"]) == coded - set(generate.WORDS["errors"])


def codes(tree: ast.Module) -> Iterator[str]:
    """What is given as `code=`, spelled out or by a name that the module gives to a text."""
    named = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            pairs = [(node.targets[0], node.value)]
            if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(node.targets[0].elts, node.value.elts, strict=False))
            named |= {ast.unparse(target): value for target, value in pairs}
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "code":
            value = named.get(ast.unparse(node.value), node.value)
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value.value


def test_every_setting_is_described(generate: ModuleType) -> None:
    assert set(generate._docs_of_fields(Settings)) == set(Settings.__dataclass_fields__)


def test_every_variable_that_the_code_reads_is_in_the_settings_page(generate: ModuleType) -> None:
    text = "\n".join(path.read_text("utf-8") for path in MODULES)
    read = set(re.findall(r"\bTUNELOOP_[A-Z_]+\b", text))
    known = {f"TUNELOOP_{name.upper()}" for name in Settings.__dataclass_fields__}
    assert read <= known | set(generate.WORDS["variables"])


def test_every_key_of_a_recipe_is_described(generate: ModuleType) -> None:
    described = generate.WORDS["recipe_fields"]
    assert set(generate.WORDS["recipe"]) == set(generate.Recipe.model_fields)
    without = [
        f"{section}.{name}"
        for section, model in generate.SECTIONS.items()
        for name, field in model.model_fields.items()
        if not (field.description or described.get(f"{section}.{name}"))
    ]
    assert without == []


def test_every_route_has_words_and_no_words_are_left_over(generate: ModuleType) -> None:
    assert set(generate.WORDS["routes"]) == {name for name, _ in generate.operations()}


def test_every_error_of_the_data_plane_is_in_the_endpoint_page() -> None:
    page = (ROOT / "docs" / "reference" / "endpoint-api.md").read_text("utf-8")
    coded = {
        code
        for path in sorted((SOURCE / "serving").glob("*.py"))
        for code in re.findall(r'Refused\(\s*[\w.]+,\s*"(\w+)"', path.read_text("utf-8"))
    }
    assert len(coded) > 15
    assert sorted(code for code in coded if f"`{code}`" not in page) == []


def test_every_rule_for_data_is_on_its_page_and_no_other() -> None:
    page = (ROOT / "docs" / "reference" / "data-rules.md").read_text("utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE) == sorted(
        RULES, key=lambda name: ("file", "row", "template", "tokens").index(RULES[name].needs)
    )


def test_the_error_that_the_page_about_data_shows_is_the_one_that_is_given(tmp_path: Path) -> None:
    file = tmp_path / "support_train.jsonl"
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    file.write_text(f"{json.dumps(good)}\n" + '{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(errors.DataError) as raised:
        check_chat_file(file, file.name)
    page = (ROOT / "docs" / "howto" / "own-data.md").read_text("utf-8")
    assert f"error: {raised.value.message}\n" in page


# ---------------------------------------------------------------- links, files, tests


def anchors(path: Path) -> set[str]:
    """As GitHub and mkdocs make them of headings (those that our pages use are the same in both)."""
    found = set()
    for line in without_blocks(path.read_text("utf-8")).splitlines():
        if line.startswith("#"):
            heading = re.sub(r"[`*]", "", line.lstrip("#")).strip().lower()
            found.add(re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading)))
    return found


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page.read_text("utf-8"))):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        is_broken = not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path))
        if is_broken or not path.is_relative_to(ROOT):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", [page for page in PAGES if "docs" in page.parts], ids=name_of)
def test_pages_of_the_site_link_only_inside_it(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", without_blocks(page.read_text("utf-8")))
    paths = [(page.parent / target.partition("#")[0]).resolve() for target in targets if "://" not in target]
    assert [path for path in paths if not path.is_relative_to(ROOT / "docs")] == []


def test_every_page_is_in_the_sites_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    listed = set(re.findall(r"([\w./-]+\.md)", text.partition("\nnav:")[2]))
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert listed == there


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tests_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text("utf-8"))
    missing = [
        f"{file}::{test}"
        for file, test in named
        if not (ROOT / file).is_file() or f"def {test}(" not in (ROOT / file).read_text("utf-8")
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"`([a-z_.]+(?:/[\w.-]+)+/?)`", without_blocks(page.read_text("utf-8")))
    places = (ROOT, SOURCE, ROOT / "src", ROOT / "docs")
    ours = [name for name in named if name.split("/")[0] in OUR_FOLDERS]
    assert [name for name in ours if not any((place / name).exists() for place in places)] == []


OUR_FOLDERS = {
    *(path.name for path in SOURCE.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))),
    *("src", "tests", "docs", "changelog.d", "benchmarks", ".ci"),
} - {"mlflow", "jobs", "cache", "logs"}
"""The last ones are folders of a home."""


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "mechanisms").glob("[0-9]*.md")), ids=name_of)
def test_a_mechanism_says_what_it_promises_how_where_and_which_tests_show_it(page: Path) -> None:
    text = page.read_text("utf-8")
    for part in ("**Promise.**", "**How.**", "**Files.**", "**Shown by**"):
        assert part in text
    assert "`tests/" in text.partition("**Shown by**")[2]


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md")), ids=name_of)
def test_a_decision_says_why_what_was_rejected_and_how_it_would_be_seen_to_be_wrong(page: Path) -> None:
    text = page.read_text("utf-8")
    for part in ("**Context.**", "**Decision.**", "**Rejected.**", "**Easier.**", "**Harder.**"):
        assert part in text
    assert "**We would notice that it was wrong**" in text


# ---------------------------------------------------------------- commands


class Written(NamedTuple):
    """A command line as somebody wrote it; `is_whole` when it is meant to be typed as it stands."""

    where: str
    text: str
    is_whole: bool


COMMAND = re.compile(r"(?<![\w./-])tuneloop ((?:[a-z]+(?![\w]))(?:[^\n`|&;)(]|\$\(|'\([^)]*\)')*)")


WORD = re.compile(r"""\$\([^)]*\)|"[^"]*"|'[^']*'|[^\s"']+(?:"[^"]*")?""")


def blocks(text: str, *languages: str) -> Iterator[str]:
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        if language in languages:
            yield body


def in_pages() -> Iterator[Written]:
    for page in PAGES:
        text = page.read_text("utf-8")
        for block in blocks(text, "sh", ""):
            joined = block.replace("\\\n", " ")
            yield from (Written(name_of(page), found, True) for found in COMMAND.findall(joined))
        for code in re.findall(r"`([^`\n]+)`", without_blocks(text)):
            yield from (Written(name_of(page), found, False) for found in COMMAND.findall(code))


def in_messages() -> Iterator[Written]:
    """In strings of the code, which people are told to type. A value that is put in counts as one word."""
    for path in MODULES:
        for text in strings(ast.parse(path.read_text("utf-8"))):
            yield from (Written(name_of(path), found, False) for found in COMMAND.findall(text))


def strings(tree: ast.AST) -> Iterator[str]:
    inner = {
        id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                part.value if isinstance(part, ast.Constant) else program_or_word(part)
                for part in node.values
                if isinstance(part, ast.Constant | ast.FormattedValue)
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            yield node.value


def program_or_word(part: ast.FormattedValue) -> str:
    return "tuneloop" if ast.unparse(part.value).endswith("program()") else "WORD"


def mistake_of(written: Written) -> str | None:
    """Why this is no command of ours, or None."""
    text = re.split(r"\s+[>#\\]|\s{2,}|[.,:] ", f"{written.text} ")[0].strip()
    words = [word.strip("'\"") for word in WORD.findall(re.sub(r"(?<=\w)[.,:]+$", "", text))]
    command: click.Command = command_line
    context = click.Context(command, info_name="tuneloop")
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        inner = command.get_command(context, words[0])
        if inner is None:
            return f"no command {words[0]!r}"
        context = click.Context(
            inner, parent=context, info_name=words.pop(0), **getattr(inner, "context_settings", {})
        )
        command = inner
    if isinstance(command, click.Group):
        return None
    return _wrong_words(command, context, words, written.is_whole)


def _wrong_words(
    command: click.Command, context: click.Context, words: list[str], is_whole: bool
) -> str | None:
    options = {name for one in command.params if isinstance(one, click.Option) for name in one.opts}
    unknown = [word for word in words if word.startswith("--") and word.split("=")[0] not in options]
    # What stands behind the name of a script is the script's own.
    if unknown and context.allow_interspersed_args:
        return f"no option {unknown[0]}"
    try:
        given, left, _ = command.make_parser(context).parse_args(list(words))
    except click.UsageError as mistake:
        return mistake.format_message() if is_whole else None
    if left and not {"(", "[OPTIONS]"} & set(left) and (is_whole or all(word.isupper() for word in left)):
        return f"too many words: {left}"
    # Click's mark for "not given" is neither None nor a text.
    texts = {name for name, value in given.items() if any(isinstance(one, str) for one in as_list(value))}
    missing = [one.name for one in command.params if one.required and one.name not in texts]
    return f"without {missing}" if missing and is_whole else _wrong_value(command, context, given)


def _wrong_value(command: click.Command, context: click.Context, given: dict[str, Any]) -> str | None:
    """Of choices, numbers and the like; names in capitals and variables stand for any value."""
    for one in command.params:
        for value in as_list(given.get(str(one.name))):
            is_stand_in = not isinstance(value, str) or value.startswith("$") or value.isupper()
            if is_stand_in or isinstance(one.type, click.Path | click.File):
                continue
            try:
                one.type.convert(value, one, context)
            except click.UsageError as mistake:
                return mistake.format_message()
    return None


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("jobs priority JOB urgent", "'urgent' is not one of"),
        ("jobs list --limit many", "not a valid integer"),
        ("jobs lst", "no command 'lst'"),
        ("jobs show --nothing", "no option --nothing"),
        ("jobs show", "without ['name']"),
        ("jobs show one two", "too many words"),
    ],
)
def test_a_wrong_command_is_seen(text: str, why: str) -> None:
    assert why in (mistake_of(Written("here", text, True)) or "right")


@pytest.mark.parametrize("text", ["jobs priority $JOB high", "jobs list --limit N", "mlflow --port 5001"])
def test_a_right_command_and_one_with_stand_ins_pass(text: str) -> None:
    assert mistake_of(Written("here", text, True)) is None


def test_the_commands_on_the_pages_exist() -> None:
    written = list(in_pages())
    assert len(written) > 80
    assert [
        f"{one.where}: tuneloop {one.text}: {why}" for one in written if (why := mistake_of(one)) is not None
    ] == []


def test_the_commands_that_messages_tell_people_to_type_exist() -> None:
    written = list(in_messages())
    assert len(written) > 50
    assert [
        f"{one.where}: tuneloop {one.text}: {why}" for one in written if (why := mistake_of(one)) is not None
    ] == []


def test_the_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE))
    named = [
        (name_of(page), target)
        for page in PAGES
        for code in [
            *re.findall(r"`([^`\n]+)`", page.read_text("utf-8")),
            *blocks(page.read_text("utf-8"), "sh", ""),
        ]
        for target in re.findall(r"^make ([a-z-]+)", code, flags=re.MULTILINE)
    ]
    named += [
        (name_of(path), target)
        for path in MODULES
        for target in re.findall(r"(?:: |`)make ([a-z-]+)", path.read_text("utf-8"))
    ]
    assert [(where, target) for where, target in named if target not in targets] == []


def test_the_readme_begins_with_its_two_commands() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    found = re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    assert found[:2] == ["make demo\n", "make test\n"]


# ---------------------------------------------------------------- recipes and requests


LEAST = "experiment: page\nmodel: SmolLM2-135M-Instruct\ndata: {train: train.jsonl}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_recipes_and_rows_and_requests_on_a_page_are_good_ones(page: Path) -> None:
    text = page.read_text("utf-8")
    for block in blocks(text, "yaml"):
        keys = set(yaml.safe_load(block) or {})
        if keys & set(recipe.Recipe.model_fields) and not keys & {"license", "parameters"}:
            # A page may show one section alone; it has to be good in a whole recipe.
            whole = block if "model" in keys else f"{LEAST}\n{block}"
            recipe.parse(whole, path=name_of(page))
    for block in blocks(text, "json"):
        value = json.loads(block)
        if "messages" in value:
            assert check_row(value) == []
        if "input_data" in value:
            assert read_score(value).conversations


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_on_a_page_is_python(page: Path) -> None:
    for block in blocks(page.read_text("utf-8"), "python"):
        ast.parse(block)
