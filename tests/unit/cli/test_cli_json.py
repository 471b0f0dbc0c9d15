"""Every command with --json has a schema, and prints what the schema says and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from pydantic import TypeAdapter

from tests.unit.cli.conftest import Ran
from tests.unit.cli.fake_api import AT, FakeApi, job, line, model, page
from tuneloop.cli import azure_script, checks, looks, root, schemas, session
from tuneloop.cli.checks import machine
from tuneloop.core.errors import ModelUnavailable

ROW = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
CARD = "tuneloop cares for its own reading of a card\n"


def commands_with_json() -> set[str]:
    found = set()
    context = click.Context(root.root)
    for name in root.COMMANDS:
        command = root.root.get_command(context, name)
        assert command is not None
        inner = command.commands.items() if isinstance(command, click.Group) else [("", command)]
        for inner_name, one in inner:
            if any("--json" in parameter.opts for parameter in one.params):
                found.add(f"{name} {inner_name}".strip())
    return found


def validate(kind: Any, text: str) -> None:
    """A field that the schema does not have is a mistake of the schema."""
    TypeAdapter(kind).validate_json(text, extra="forbid")


def test_every_command_with_json_has_a_schema_and_no_schema_is_left_over() -> None:
    assert set(schemas.OUTPUTS) == commands_with_json()


@pytest.mark.parametrize("command", sorted(schemas.OUTPUTS))
def test_a_schema_can_be_made_of_every_type(command: str) -> None:
    for kind in schemas.OUTPUTS[command].values():
        assert {"type", "$ref"} & set(schemas.schema(kind))


COMMANDS: dict[str, list[str]] = {
    "recipes list": [],
    "recipes show": ["demo"],
    "run": ["demo"],
    "run --dry-run": ["demo"],
    "jobs list": [],
    "jobs show": ["j"],
    "jobs metrics": ["j"],
    "jobs stream": ["j"],
    "jobs logs": ["j"],
    "jobs priority": ["j", "high"],
    "compute list": [],
    "compute show": ["local"],
    "compute create": ["big", "--size", "STANDARD_NC24ADS_A100_V4"],
    "compute delete": ["local"],
    "compute sizes": [],
    "plan": ["demo", "--no-probe"],
    "plan --recommend": ["demo"],
    "jobs cancel": ["j"],
    "jobs retry": ["j"],
    "jobs outputs": ["j"],
    "jobs outputs --download": ["evaluation_result", "j", "--to", "FOLDER"],
    "catalog list": [],
    "catalog show": ["x"],
    "catalog add": ["CARD"],
    "catalog use": ["x", "--source", "FOLDER"],
    "models list": [],
    "models show": ["tuneloop-guide:1"],
    "models register": ["j", "--name", "x"],
    "models download": ["tuneloop-guide:1", "--to", "FOLDER"],
    "models delete": ["tuneloop-guide:1"],
    "endpoints create": ["new"],
    "endpoints list": [],
    "endpoints show": ["demo"],
    "endpoints invoke": ["demo", "--request-file", "REQUEST"],
    "endpoints traffic": ["demo", "tuned=100"],
    "endpoints keys": ["demo"],
    "endpoints delete": ["demo"],
    "deployments create": ["more", "--endpoint", "demo", "--model", "tuneloop-guide:1"],
    "deployments list": ["--endpoint", "demo"],
    "deployments logs": ["tuned", "--endpoint", "demo"],
    "deployments delete": ["tuned", "--endpoint", "demo"],
    "chat --message": ["hi", "demo"],
    "data check": ["DATA"],
    "data stats": ["DATA"],
    "data show": ["DATA"],
    "data list": [],
    "data register": ["DATA"],
    "data describe": ["support"],
    "data download": ["DATA", "--to", "NEW"],
    "data download-script": ["--to", "NEW"],
    "data convert": ["DATA", "--to", "NEW"],
    "data split": ["DATA", "--to", "FOLDER", "--validation", "0", "--test", "0"],
    "init": ["--data", "DATA", "--output", "NEW"],
    "azure up": [],
    "azure down": [],
    "azure status": [],
    "azure run": ["SCRIPT"],
    "azure env": [],
    "azure kernel": ["--prefix", "FOLDER"],
    "azure coverage": ["--operations"],
    "up": [],
    "down": [],
    "status": [],
    "doctor": [],
    "completion": ["bash"],
    "demo": [],
}
"""What is typed after each; `mlflow` has a test below, `demo` one in test_cli_demo.py."""


@pytest.fixture
def _full(api: FakeApi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Something of everything."""
    api.jobs["j"] = job("j")
    api.pages["swift_heron_1"] = [page(job()), page(job())]
    api.metrics = [{"at_ms": 1, "step": 1, "values": {"loss": None}}]
    api.models = [model()]
    api.make_endpoint("demo")
    made = {"name": "tuned", "model": "tuneloop-guide:1", "replicas": 1, "request_timeout_seconds": 90.0}
    api.make_deployment("demo", made)["state"] = "ready"
    api.pid = 2**22 + 1
    monkeypatch.setattr(machine, "check_torch", lambda: checks.Check("torch", "ok", "2 threads"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def nothing(model: str) -> Path:
        raise ModelUnavailable(f"the tokenizer of {model} is not fetched in a test")

    monkeypatch.setattr(looks, "tokenizer", nothing)
    api.azure_folder = tmp_path
    for name in ("identity", "ca.pem", "bundle.pem"):
        (tmp_path / name).write_text(f"{name}\n")
    api.azure_warnings = [{"number": 1, "at": AT, "about": "job x", "text": "told before"}]
    monkeypatch.setattr(azure_script, "_probe", lambda python, modules: ("3.11.7", list(modules)))


@pytest.mark.usefixtures("_full")
@pytest.mark.parametrize("typed", sorted(set(COMMANDS) - {"demo"}))
def test_what_a_command_prints_is_what_its_schema_says(
    typed: str, tuneloop_command: Callable[..., Ran], tmp_path: Path
) -> None:
    (tmp_path / "card.yaml").write_text(CARD)
    (tmp_path / "data.jsonl").write_text(ROW)
    places = {"FOLDER": tmp_path, "CARD": tmp_path / "card.yaml", "DATA": tmp_path / "data.jsonl"}
    (tmp_path / "request.json").write_text("{}")
    (tmp_path / "script.py").write_text("")
    places["SCRIPT"] = tmp_path / "script.py"
    places["REQUEST"] = tmp_path / "request.json"
    places["NEW"] = tmp_path / "new.yaml"
    arguments = [str(places.get(one, one)) for one in COMMANDS[typed]]
    command, _, option = typed.partition(" --")
    # First, because what stands behind a script's name is the script's own.
    ran = tuneloop_command(*command.split(), "--json", *typed.split()[len(command.split()) :], *arguments)
    assert ran.code == 0, ran.err
    validate(schemas.OUTPUTS[command][f"--{option}" if option else ""], ran.out)


def test_every_form_of_every_command_is_looked_at() -> None:
    forms = {f"{name} {option}".strip() for name, by in schemas.OUTPUTS.items() for option in by}
    assert forms == {*COMMANDS, "mlflow"}


def test_an_error_with_json_is_one_object_as_documented(tuneloop_command: Callable[..., Ran]) -> None:
    ran = tuneloop_command("jobs", "show", "nothing", "--json")
    assert (ran.code, ran.out) == (3, "")
    validate(schemas.Failure, ran.err)


def test_what_is_no_number_is_null_and_not_a_word_that_json_does_not_have(
    tuneloop_command: Callable[..., Ran], api: FakeApi
) -> None:
    api.jobs["j"] = job("j")
    api.metrics = [{"at_ms": 1, "step": 1, "values": {"loss": None}}]
    ran = tuneloop_command("jobs", "metrics", "j", "--json")

    def refuse(word: str) -> None:
        raise AssertionError(word)

    json.loads(ran.out, parse_constant=refuse)


def test_mlflow_prints_its_address_as_documented(
    tuneloop_command: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody listens there: the address is shown all the same.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ada:s3cret@127.0.0.1:1/")
    monkeypatch.setattr(session, "find", lambda: None)
    ran = tuneloop_command("mlflow", "--json")
    assert ran.code == 0
    validate(schemas.MlflowPages, ran.out)
    assert json.loads(ran.out)["is_elsewhere"]
    assert "s3cret" not in ran.out


def test_a_field_that_is_not_documented_is_found() -> None:
    with pytest.raises(ValueError, match="extra"):
        validate(schemas.Deleted, '{"deleted": "a", "more": 1}')


def test_progress_line_shapes_are_documented_in_a_running_job(
    tuneloop_command: Callable[..., Ran], api: FakeApi
) -> None:
    from tests.unit.cli.fake_api import step

    now = {key: value for key, value in line("finetune", "training", done=1.0).items() if key != "attempt"}
    api.jobs["j"] = job("j", "running", steps=[step("finetune", "running", progress=now)])
    validate(schemas.JobView, tuneloop_command("jobs", "show", "j", "--json").out)
