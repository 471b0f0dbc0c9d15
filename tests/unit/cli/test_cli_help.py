"""Help pages, usage errors and how errors are told."""

from __future__ import annotations

import errno
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

import tuneloop.cli
from tests.unit.cli.conftest import FakeDaemon, Ran
from tests.unit.cli.fake_api import FakeApi
from tuneloop.cli import failures, root
from tuneloop.core import recipe as recipes
from tuneloop.core.errors import DataError, Internal, RecipeError
from tuneloop.workspace.data import check_chat_file

HEAVY = ("torch", "transformers", "mlflow", "httpx", "pydantic", "rich", "fastapi", "sqlalchemy")


def _commands() -> Iterator[tuple[str, ...]]:
    """Every command of the tree, groups included."""
    context = click.Context(root.root)
    for name in root.root.list_commands(context):
        yield (name,)
        command = root.root.get_command(context, name)
        if isinstance(command, click.Group):
            for inner in command.commands:
                yield (name, inner)


ALL_COMMANDS = list(_commands())


def test_the_tree_has_every_command() -> None:
    assert len(ALL_COMMANDS) == 73, "a command came or went: the list in docs goes with it"


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=" ".join)
def test_every_help_page_has_a_summary_and_an_example(
    command: tuple[str, ...], tuneloop_command: Callable[..., Ran]
) -> None:
    ran = tuneloop_command(*command, "--help")
    assert ran.code == 0
    assert "Example" in ran.out
    assert f"tuneloop {command[0]}" in ran.out.split("Example")[1]


def test_json_is_offered_by_every_command_that_prints_something_of_the_api() -> None:
    context = click.Context(root.root)
    without = set()
    for path in ALL_COMMANDS:
        command = root.root.get_command(context, path[0])
        if len(path) > 1:
            assert isinstance(command, click.Group)
            command = command.commands[path[1]]
        assert command is not None
        names = {option for parameter in command.params for option in parameter.opts}
        if not isinstance(command, click.Group) and "--json" not in names:
            without.add(" ".join(path))
    assert without == set()


def test_the_help_page_imports_nothing_heavy_and_takes_little_time() -> None:
    program = (
        "import sys; from tuneloop.cli import root; root.run(['--help']); "
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.stdout.rstrip().endswith("[]")
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 0.3


def test_an_unknown_command_is_refused_with_the_nearest_one(tuneloop_command: Callable[..., Ran]) -> None:
    ran = tuneloop_command("modls")
    assert ran.code == 2
    assert ran.err.startswith("error: No such command 'modls'. Did you mean 'models'?")


def test_a_missing_argument_is_a_usage_error_that_points_to_the_help(
    tuneloop_command: Callable[..., Ran],
) -> None:
    ran = tuneloop_command("jobs", "show")
    assert (ran.code, ran.out) == (2, "")
    assert "error: Missing argument 'NAME'." in ran.err
    assert "next: tuneloop jobs show --help" in ran.err


def test_an_error_of_the_server_gives_its_message_next_move_and_exit_code(
    tuneloop_command: Callable[..., Ran],
) -> None:
    ran = tuneloop_command("jobs", "show", "nope")
    assert (ran.code, ran.out) == (3, "")
    assert ran.err == "error: There is no job 'nope'.\n  next: List them with: tuneloop jobs list\n"


def test_with_json_an_error_is_one_object_on_stderr(tuneloop_command: Callable[..., Ran]) -> None:
    ran = tuneloop_command("jobs", "show", "nope", "--json")
    assert (ran.code, ran.out) == (3, "")
    assert json.loads(ran.err)["error"]["code"] == "not_found"


def test_with_json_a_usage_error_is_one_object_on_stderr(tuneloop_command: Callable[..., Ran]) -> None:
    ran = tuneloop_command("jobs", "show", "--json")
    assert ran.code == 2
    assert json.loads(ran.err)["error"]["code"] == "usage"


def test_a_defect_is_told_without_a_traceback(
    tuneloop_command: Callable[..., Ran], daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "find", lambda settings: 1 / 0)
    ran = tuneloop_command("jobs", "list")
    assert ran.code == Internal.exit_code
    assert ran.err.startswith("error: ZeroDivisionError: division by zero")
    assert "Traceback" not in ran.err


def test_debug_shows_the_traceback_of_an_error(
    tuneloop_command: Callable[..., Ran], api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNELOOP_DEBUG", "1")
    ran = tuneloop_command("jobs", "show", "nope")
    assert ran.code == 3
    assert "Traceback" in ran.err


def test_a_server_that_is_not_there_is_started_and_said(
    tuneloop_command: Callable[..., Ran], daemon: FakeDaemon
) -> None:
    daemon.is_up = False
    ran = tuneloop_command("jobs", "list")
    assert (ran.code, daemon.starts) == (0, 1)
    assert "Started the background server" in ran.err


def test_a_server_of_another_version_is_refused_with_the_restart(
    tuneloop_command: Callable[..., Ran], daemon: FakeDaemon
) -> None:
    daemon.server.version = "0.0.1"
    ran = tuneloop_command("jobs", "list")
    assert ran.code == 6
    assert "tuneloop down --server-only && tuneloop up" in ran.err


def test_all_mistakes_of_a_recipe_are_listed_with_their_lines() -> None:
    details = [
        {"line": 3, "field": "finetune.lora_rr", "message": "unknown; did you mean 'lora_r'?"},
        {"line": None, "field": None, "message": "no model"},
    ]
    error = RecipeError("r.yaml has 2 mistakes.", details=details)
    assert failures.describe(error.message, None, error.details) == [
        "error: r.yaml has 2 mistakes.",
        "  line 3: finetune.lora_rr unknown; did you mean 'lora_r'?",
        "  no model",
    ]


def _finding(line: int, **changes: object) -> dict[str, object]:
    return {
        "file": "train.jsonl",
        "line": line,
        "field": "messages[0].role",
        "rule": "role_known",
        "value": '"usr"',
        "fix": "Use one of system, user, assistant.",
    } | changes


def test_a_bad_row_is_one_sentence_of_file_line_field_value_rule_and_fix() -> None:
    found = [_finding(6), _finding(7, field="", rule="object", value="[1]", fix="Write an object.")]
    told = failures.describe("2 rows cannot be learned from.", None, found)
    assert told[1:] == [
        '  train.jsonl line 6: messages[0].role: found "usr" (rule role_known). '
        "Use one of system, user, assistant.",
        "  train.jsonl line 7: found [1] (rule object). Write an object.",
    ]


def test_the_finding_that_the_servers_message_tells_is_not_listed_again(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "a"}\n{bad\n{"messages": []}\n')
    with pytest.raises(DataError) as caught:
        check_chat_file(path, "train.jsonl")
    told = "\n".join(failures.describe(caught.value.message, None, caught.value.details)).splitlines()
    assert [line.split(": ")[0].strip() for line in told] == [
        "error",
        "train.jsonl line 1",
        "train.jsonl line 2",
        "train.jsonl line 3",
    ]
    assert "messages: found only 'prompt' (rule messages_present). Give every row a list" in told[1]
    assert 'found "{bad" (rule json)' in told[2]
    assert "found 0 messages, none of the assistant (rule assistant_turn)" in told[3]


def test_a_mistake_of_set_is_told_once() -> None:
    with pytest.raises(RecipeError) as caught:
        recipes.parse(
            "model: M\ndata: {train: a.jsonl}\n", path="my.yaml", overrides={"finetune.padding": "1"}
        )
    told = failures.describe(caught.value.message, None, caught.value.details)
    assert len(told) == 1
    assert told[0].startswith("error: my.yaml: --set finetune.padding is not a key")


def test_a_group_without_a_command_gives_its_help_and_no_error(tuneloop_command: Callable[..., Ran]) -> None:
    for words in ((), ("jobs",)):
        ran = tuneloop_command(*words)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.startswith("Usage: tuneloop")
        assert "error" not in ran.err.splitlines()[0]
    assert tuneloop_command("-h").code == 0
    assert tuneloop_command("jobs", "show", "-h").code == 0


def test_commands_in_errors_are_written_as_they_are_typed_from_here(
    tuneloop_command: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(tmp_path / ".venv" / "bin" / "tuneloop")])
    assert "next: List them with: .venv/bin/tuneloop jobs list" in tuneloop_command("jobs", "show", "no").err
    assert "next: .venv/bin/tuneloop jobs show --help" in tuneloop_command("jobs", "show").err
    assert (
        failures.as_typed_here("in /opt/tuneloop or tuneloop-guide") == "in /opt/tuneloop or tuneloop-guide"
    )


def test_a_folder_that_was_deleted_is_no_obstacle(
    tuneloop_command: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    monkeypatch.setattr("sys.argv", ["/opt/bin/tuneloop"])
    gone.rmdir()
    assert tuneloop_command("jobs", "list").code == 0
    assert tuneloop_command("run", "demo", "--dry-run").code == 0
    assert tuneloop_command("run", "my.yaml", "--dry-run").code == 3
    monkeypatch.setenv("TUNELOOP_HOME", "relative")
    ran = tuneloop_command("status")
    assert (ran.code, "was deleted" in ran.err) == (2, True)


def test_a_full_disk_is_no_defect(
    tuneloop_command: Callable[..., Ran], daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/home/x/a")

    monkeypatch.setattr(daemon, "find", full)
    ran = tuneloop_command("jobs", "list")
    assert ran.code == 6
    assert ran.err.startswith("error: /home/x/a cannot be written: No space left on device.")


def test_a_closed_output_is_no_defect() -> None:
    command = f'"{sys.executable}" -m tuneloop.cli recipes list >&-'
    ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_ctrl_c_while_a_command_is_loaded_is_told_in_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupted)
    with pytest.raises(SystemExit) as ended:
        tuneloop.cli.main(["jobs", "list"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_what_the_message_says_already_is_not_said_twice() -> None:
    details = [
        {"line": 1, "field": "model", "message": "is missing"},
        {"line": 7, "field": "x", "message": "is missing"},
    ]
    told = failures.describe("r.yaml line 1: model is missing (and 1 more)", None, details)
    assert told == ["error: r.yaml line 1: model is missing (and 1 more)", "  line 7: x is missing"]


def test_a_long_list_of_mistakes_is_counted() -> None:
    details = [{"line": number, "field": "x", "message": "bad"} for number in range(1, 80)]
    told = failures.describe("many", None, details)
    assert told[-1] == "  and 29 more"
