"""What of Azure's SDK works here, made of the SDK's classes, the marks of the contract tests and the routes.

    python docs/azure_coverage.py            write coverage.json and docs/reference/azure-coverage.md
    python docs/azure_coverage.py --check    exit 1 when one of them is stale (a test asks the same)
    python docs/azure_coverage.py --calls    first read the SDK's calls out of .azure/new (make test makes it)

A contract test says what it shows: `@pytest.mark.verbs("jobs.list")`, or
`@pytest.mark.refuses("schedules.get")`
if a script is told that it cannot be done. `registry.models.get` is a call of the registry's client,
`mlflow.log_metric` one of plain MLflow.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tuneloop.server.azure import coverage
from tuneloop.server.azure.coverage import ABSENT, REFUSED, WORKS, Call

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "contract" / "azure"
PAGE = ROOT / "docs" / "reference" / "azure-coverage.md"
SDK = ROOT / ".azure" / "new" / "bin" / "python"
NOTE = "<!-- Made by docs/azure_coverage.py; edit the code or that script, not this page. -->"
OTHERS = ("registry.", "mlflow.")
MARKS = {"verbs": WORKS, "refuses": REFUSED}

LIST_CALLS = """
import inspect, json, logging, sys
logging.disable(logging.CRITICAL)
from importlib.metadata import version
from azure.ai.ml import MLClient

def public(kind):
    return [name for name, value in inspect.getmembers(kind) if not name.startswith("_") and callable(value)]

found = []
for name, member in inspect.getmembers(MLClient):
    if name.startswith("_") or inspect.isclass(member):
        continue
    if not isinstance(member, property):
        found += [name] if inspect.isroutine(member) else []
        continue
    group = member.fget.__annotations__.get("return")
    if inspect.isclass(group) and group.__module__.startswith("azure.ai.ml.operations"):
        found += [f"{name}.{one}" for one in public(group)]
json.dump({"sdk": "azure-ai-ml " + version("azure-ai-ml"), "calls": sorted(found)}, sys.stdout)
"""

# ---------------------------------------------------------------- what the tests show


def marks(folder: Path = TESTS) -> Iterator[tuple[str, str, str]]:
    """Call, state and test of every mark, as they stand in the files."""
    for path in sorted(folder.glob("test_*.py")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        tables = dict(_tables(body))
        for node in body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for name, state in _marks_of(node, tables):
                    yield name, state, f"{path.name}::{node.name}"


def _tables(body: Iterable[ast.stmt]) -> Iterator[tuple[str, list[str]]]:
    """The keys of a module's dictionaries: a test may be marked with all of one, `@...refuses(*TABLE)`."""
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            keys = [str(key.value) for key in node.value.keys if isinstance(key, ast.Constant)]
            yield from ((target.id, keys) for target in targets if isinstance(target, ast.Name))


def _marks_of(test: ast.FunctionDef, tables: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str]]:
    for node in (inner for decorator in test.decorator_list for inner in ast.walk(decorator)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MARKS:
            for name in (one for argument in node.args for one in _names(argument, tables)):
                yield name, MARKS[node.func.attr]


def _names(argument: ast.expr, tables: Mapping[str, Sequence[str]]) -> Sequence[str]:
    if isinstance(argument, ast.Constant):
        return [str(argument.value)]
    if isinstance(argument, ast.Starred) and isinstance(argument.value, ast.Name):
        return tables[argument.value.id]
    raise SystemExit(f"A mark says {ast.unparse(argument)}; write the name of a call, or *TABLE.")


def facts(known: Iterable[str], sdk: str) -> dict[str, Any]:
    """What `coverage.json` holds. Raises `SystemExit` for a mark that names no call."""
    names = sorted(known)
    shown: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, state, test in marks():
        if name not in names and not name.startswith(OTHERS):
            raise SystemExit(f"{test} is marked with {name!r}, which is no call of {sdk}.")
        if test not in shown[name][state]:
            shown[name][state].append(test)
    others = sorted(name for name in shown if name not in names)
    return {
        "sdk": sdk,
        "calls": {name: _fact(shown.get(name, {})) for name in names},
        "others": {name: _fact(shown[name]) for name in others},
    }


def _fact(shown: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """A call that works in one form and is refused in another works."""
    state = next((state for state in (WORKS, REFUSED) if shown.get(state)), ABSENT)
    return {"state": state, "tests": sorted(shown.get(state, ()))}


def known_calls() -> tuple[list[str], str]:
    """The SDK's calls, as they were read last."""
    found = json.loads(coverage.FILE.read_text(encoding="utf-8"))
    return list(found["calls"]), str(found["sdk"])


def read_calls() -> tuple[list[str], str]:
    """Out of the SDK itself."""
    said = subprocess.run([str(SDK), "-c", LIST_CALLS], capture_output=True, text=True, check=True)
    found = json.loads(said.stdout)
    return list(found["calls"]), str(found["sdk"])


# ---------------------------------------------------------------- the page


def page(found: Mapping[str, Any]) -> str:
    calls = _calls(found["calls"])
    counted = coverage.counts(calls)
    told = coverage.operations()
    groups = sorted({call.group for call in calls})
    lines = [
        "# Coverage of the Azure ML SDK",
        "",
        NOTE,
        "",
        f"Of the {len(calls)} public calls of {found['sdk']} (the methods of `MLClient` and of its operation "
        f"groups), **{counted[WORKS]} work**, **{counted[REFUSED]} are refused** with a sentence that says "
        f"what to do instead, and {counted[ABSENT]} are not there.",
        "",
        "A call works when a test with the real SDK shows it, and is refused when one shows what a script is "
        "told; the last column names the first such test, in `tests/contract/azure/`. A call that is not "
        "there ends in an error as well, but no test looks at its words. `tuneloop azure coverage` prints "
        "the same.",
        "",
        *_table(
            ("group", *coverage.STATES),
            [
                (
                    f"[`{group}`](#{group})" if group else "[`MLClient`](#mlclient)",
                    *coverage.counts([call for call in calls if call.group == group]).values(),
                )
                for group in groups
            ],
        ),
        "",
    ]
    for group in groups:
        lines += [f"## {group or 'MLClient'}", "", *_shown(c for c in calls if c.group == group), ""]
    others = _calls(found["others"])
    for title, prefix in (("On the registry's client", "registry."), ("Plain MLflow", "mlflow.")):
        rows = [call for call in others if call.name.startswith(prefix)]
        if rows:
            lines += [f"## {title}", "", *_shown(rows), ""]
    lines += [
        "## Operations",
        "",
        f"What the listener answers: {len(told)} operations, matched from top to bottom. `{{ws}}` is the "
        "address of a workspace, `{reg}` that of a registry; `any` is every method.",
        "",
    ]
    for module in dict.fromkeys(one.module for one in told):
        rows = [
            (one.method, f"`{one.address}`", ("refused: " if one.state == REFUSED else "") + one.summary)
            for one in told
            if one.module == module
        ]
        lines += [f"### {module}", "", *_table(("method", "address", "what it does"), rows), ""]
    return "\n".join(lines).rstrip() + "\n"


def _calls(found: Mapping[str, Any]) -> list[Call]:
    return [Call(name, known["state"], tuple(known["tests"])) for name, known in found.items()]


def _shown(calls: Iterable[Call]) -> list[str]:
    return _table(
        ("call", "state", "shown by"),
        [(f"`{call.name}`", call.state, f"`{call.tests[0]}`" if call.tests else "") for call in calls],
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return [line(columns), "|" + "---|" * len(columns), *[line(row) for row in rows]]


# ---------------------------------------------------------------- running it


def texts(calls: Iterable[str], sdk: str) -> dict[Path, str]:
    """What the files should hold."""
    found = facts(calls, sdk)
    data = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    return {coverage.FILE: data, PAGE: page(found)}


def stale() -> list[Path]:
    """The files that do not say what tests and code say."""
    return [
        path
        for path, text in texts(*known_calls()).items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]


def main(arguments: Sequence[str]) -> int:
    if "--check" in arguments:
        outdated = stale()
        for path in outdated:
            print(f"{path} is stale; run: python docs/azure_coverage.py", file=sys.stderr)
        return 1 if outdated else 0
    for path, text in texts(*(read_calls() if "--calls" in arguments else known_calls())).items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
