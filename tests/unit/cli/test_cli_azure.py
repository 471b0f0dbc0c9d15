"""`tuneloop azure`: which Python runs a script, in which environment, and what is told of it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.cli.conftest import FakeDaemon, Ran
from tests.unit.cli.fake_api import AT, AZURE_URL, FakeApi
from tuneloop.cli import azure_script, root
from tuneloop.core.azure import CONFLICTING, QUIET, Remembered, remember, remembered
from tuneloop.core.errors import PortTaken

SHOW = "import json, os; print(json.dumps(dict(os.environ)))"
SECRET = "the secret of 'this' home"


@pytest.fixture(autouse=True)
def folder(api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`azure/` of a home whose server has opened the listener, and a shell that knows nothing of Azure."""
    made = tmp_path / "home" / "azure"
    made.mkdir(parents=True)
    (made / "identity").write_text(f"{SECRET}\n")
    (made / "ca.pem").write_text("ours\n")
    (made / "bundle.pem").write_text("roots\nours\n")
    (made / "config.json").write_text("{}")
    api.azure_folder = made
    proxies = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy")
    for name in (*CONFLICTING, *QUIET, "REQUESTS_CA_BUNDLE", *proxies):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return made


@pytest.fixture
def with_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever Python is asked has everything."""
    monkeypatch.setattr(azure_script, "_probe", lambda python, modules: ("3.11.7", list(modules)))


@pytest.fixture
def run(
    tmp_path: Path, daemon: FakeDaemon, capfd: pytest.CaptureFixture[str], with_sdk: None
) -> Callable[..., Ran]:
    """`tuneloop azure run [options] script.py [arguments]`, with this Python."""

    def ran(text: str, *arguments: str, options: tuple[str, ...] = ()) -> Ran:
        (tmp_path / "script.py").write_text(text)
        code = root.run(["azure", "run", "--python", sys.executable, *options, "script.py", *arguments])
        captured = capfd.readouterr()
        return Ran(code, captured.out, captured.err)

    return ran


def exported(ran: Ran) -> dict[str, str]:
    """The variables of a shell that has evaluated it."""
    script = f"{ran.out}\n{shlex.quote(sys.executable)} -c {shlex.quote(SHOW)}"
    shell = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(shell.stdout)
    return found


# ---------------------------------------------------------------- the listener


def test_up_says_the_address_the_files_and_what_to_type_next(
    tuneloop_command: Callable[..., Ran], folder: Path
) -> None:
    ran = tuneloop_command("azure", "up")
    assert ran.code == 0
    assert f"address                {AZURE_URL}\n" in ran.out
    assert f"config.json            {folder}/config.json\n" in ran.out
    assert "tuneloop azure run SCRIPT" in ran.out
    assert 'eval "$(' in ran.out


def test_up_tells_a_taken_port(tuneloop_command: Callable[..., Ran], api: FakeApi) -> None:
    taken = PortTaken("Port 8443 on 127.0.0.1 is taken by another program.", next_move="Choose another.")
    api.errors["POST", "/api/azure/up"] = taken
    ran = tuneloop_command("azure", "up")
    assert ran.code == PortTaken.exit_code
    assert "Port 8443" in ran.err


def test_status_starts_nothing_and_says_that_the_next_server_opens_it_again(
    tuneloop_command: Callable[..., Ran], daemon: FakeDaemon, folder: Path
) -> None:
    daemon.is_up = False
    remember(folder, Remembered(port=8443, is_up=True))
    ran = tuneloop_command("azure", "status")
    assert "is closed" in ran.out
    assert "opens it again, on port 8443" in ran.out
    assert daemon.starts == 0


def test_down_without_a_server_starts_none_and_keeps_the_port(
    tuneloop_command: Callable[..., Ran], daemon: FakeDaemon, folder: Path
) -> None:
    daemon.is_up = False
    remember(folder, Remembered(port=9001, is_up=True))
    assert tuneloop_command("azure", "down").code == 0
    assert remembered(folder) == Remembered(port=9001, is_up=False)
    assert daemon.starts == 0


# ---------------------------------------------------------------- a script


def test_the_script_gets_its_arguments_its_folder_and_the_environment(
    run: Callable[..., Ran], tmp_path: Path, folder: Path
) -> None:
    text = "import json, os, sys; print(json.dumps([sys.argv, os.getcwd(), dict(os.environ)]))"
    ran = run(text, "--epochs", "3", "-m", "--json")
    assert ran.code == 0, ran.err
    argv, place, variables = json.loads(ran.out)
    assert argv == ["script.py", "--epochs", "3", "-m", "--json"]
    assert place == str(tmp_path)
    assert variables["ARM_CLOUD_METADATA_URL"] == f"{AZURE_URL}/metadata/endpoints"
    assert variables["IDENTITY_HEADER"] == SECRET
    assert variables["REQUESTS_CA_BUNDLE"] == f"{folder}/bundle.pem"
    assert variables["HOME"] == os.environ["HOME"]
    assert variables["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert "IDENTITY_HEADER" not in os.environ


def test_what_somebody_set_for_the_real_azure_does_not_reach_the_script(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in CONFLICTING:
        monkeypatch.setenv(name, "theirs")
    ran = run(SHOW)
    variables = json.loads(ran.out)
    left = {name: variables[name] for name in CONFLICTING if name in variables}
    assert left == {"IDENTITY_ENDPOINT": f"{AZURE_URL}/msi/token", "IDENTITY_HEADER": SECRET}


def test_principal_logs_in_by_its_secret_at_a_tenant_for_which_nobody_else_is_asked(
    run: Callable[..., Ran],
) -> None:
    ran = run(SHOW, options=("--principal",))
    variables = json.loads(ran.out)
    assert variables["AZURE_TENANT_ID"] == "adfs"
    assert variables["AZURE_CLIENT_SECRET"] == SECRET
    assert variables["AZURE_AUTHORITY_HOST"] == AZURE_URL
    assert "IDENTITY_HEADER" not in variables


def test_a_proxy_is_kept_and_not_asked_for_this_machine(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "intranet, localhost")
    variables = json.loads(run(SHOW).out)
    assert variables["HTTPS_PROXY"] == "http://proxy:3128"
    assert variables["NO_PROXY"] == variables["no_proxy"] == "intranet,localhost,127.0.0.1"


def test_certificates_that_somebody_trusts_already_are_trusted_still(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "company.pem").write_text("company's")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "company.pem"))
    text = "import os; print(open(os.environ['REQUESTS_CA_BUNDLE']).read())"
    assert run(text).out.split() == ["company's", "ours"]
    # In a shell that has it already nothing is added again.
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", json.loads(run(SHOW).out)["REQUESTS_CA_BUNDLE"])
    assert run(text).out.split() == ["company's", "ours"]


def test_telemetry_of_ones_own_stays_as_it_was_set(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_LOGS_EXPORTER", "otlp")
    variables = json.loads(run(SHOW).out)
    assert variables["OTEL_LOGS_EXPORTER"] == "otlp"
    assert variables["OTEL_TRACES_EXPORTER"] == "none"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("raise SystemExit(7)", 7),
        ("1 / 0", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", 128 + signal.SIGTERM),
    ],
)
def test_the_exit_code_is_the_scripts(run: Callable[..., Ran], text: str, code: int) -> None:
    assert run(text).code == code


def test_warnings_since_the_start_are_told_at_the_end_and_each_once(
    run: Callable[..., Ran], api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warning(number: int, text: str) -> dict[str, object]:
        return {"number": number, "at": AT, "about": "job calm_fox_1", "text": text}

    api.azure_warnings = [warning(1, "of another script")]
    before = azure_script.run_script

    def and_warn(*arguments: object, **options: object) -> int:
        code = before(*arguments, **options)  # type: ignore[arg-type]
        api.azure_warnings += [warning(2, "apply_ort has no effect"), warning(3, "apply_ort has no effect")]
        return code

    monkeypatch.setattr("tuneloop.cli.azure.run_script", and_warn)
    ran = run("print('done')")
    assert ran.out == "done\n"
    assert ran.err.count("job calm_fox_1: apply_ort has no effect") == 1
    assert "of another script" not in ran.err


def test_with_json_the_scripts_output_stays_out_of_what_a_program_reads(run: Callable[..., Ran]) -> None:
    ran = run("print('done')", options=("--json",))
    assert json.loads(ran.out) == {"exit_code": 0, "warnings": []}
    assert ran.err == "done\n"


def test_a_script_that_asks_for_config_json_and_has_none_is_told_where_one_lies(
    run: Callable[..., Ran], tmp_path: Path, folder: Path
) -> None:
    text = "# MLClient.from_config(credential)"
    assert f"cp {folder}/config.json ." in run(text).err
    (tmp_path / ".azureml").mkdir()
    (tmp_path / ".azureml" / "config.json").write_text("{}")
    assert run(text).err == ""
    assert not (tmp_path / "config.json").exists()


def test_a_script_that_is_not_there_is_told_before_anything_starts(
    tuneloop_command: Callable[..., Ran], daemon: FakeDaemon
) -> None:
    daemon.is_up = False
    ran = tuneloop_command("azure", "run", "nothing.py")
    assert (ran.code, daemon.starts) == (3, 0)
    assert "no script 'nothing.py'" in ran.err


def test_a_python_without_the_sdk_is_told_with_the_way_to_one(
    tuneloop_command: Callable[..., Ran], tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text("")
    ran = tuneloop_command("azure", "run", "--python", sys.executable, "script.py")
    assert ran.code == 6
    assert "azure-ai-ml cannot be imported by" in ran.err
    assert "Tuneloop's own; make another: python3 -m venv ~/azure" in ran.err


@pytest.mark.parametrize(
    ("python", "said"), [("nowhere/python", "is no program"), ("/bin/false", "is no Python")]
)
def test_what_is_no_python_is_told(
    tuneloop_command: Callable[..., Ran], tmp_path: Path, python: str, said: str
) -> None:
    (tmp_path / "script.py").write_text("")
    ran = tuneloop_command("azure", "run", "--python", python, "script.py")
    assert ran.code in (3, 6)
    assert said in ran.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_the_script_which_decides_what_they_end(tmp_path: Path, number: int) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import signal, sys, time\n"
        f"signal.signal({int(number)}, lambda *_: sys.exit(42))\n"
        "print('ready', flush=True)\n"
        "time.sleep(30)\n"
    )
    program = (
        "import sys; from tuneloop.cli.azure_script import run_script; "
        "sys.exit(run_script([sys.executable, sys.argv[1]], {}, quiet=False))"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", program, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    time.sleep(0.1)
    started.send_signal(number)
    assert started.wait(10) == 42
    started.stdout.close()


# ---------------------------------------------------------------- a shell, a notebook


def test_env_is_what_a_shell_evaluates_whatever_is_in_a_value(
    tuneloop_command: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_CLIENT_ID", "theirs")
    variables = exported(tuneloop_command("azure", "env"))
    assert variables["IDENTITY_HEADER"] == SECRET
    assert "AZURE_CLIENT_ID" not in variables


@pytest.mark.parametrize(
    ("shell", "line"),
    [
        ("fish", "set -gx IDENTITY_HEADER 'the secret of \\'this\\' home';"),
        ("powershell", "$env:IDENTITY_HEADER = 'the secret of ''this'' home'"),
    ],
)
def test_env_speaks_other_shells(tuneloop_command: Callable[..., Ran], shell: str, line: str) -> None:
    assert line in tuneloop_command("azure", "env", "--shell", shell).out.splitlines()


@pytest.mark.usefixtures("with_sdk")
def test_the_kernel_holds_no_secret_and_starts_the_command(
    tuneloop_command: Callable[..., Ran], tmp_path: Path
) -> None:
    ran = tuneloop_command("azure", "kernel", "--python", sys.executable, "--prefix", str(tmp_path / "p"))
    assert ran.code == 0, ran.err
    path = tmp_path / "p" / "share" / "jupyter" / "kernels" / "tuneloop-azure" / "kernel.json"
    spec = json.loads(path.read_text())
    assert SECRET not in path.read_text()
    assert spec["display_name"] == "Azure ML on Tuneloop"
    assert spec["argv"][:6] == [sys.executable, "-P", "-m", "tuneloop.cli", "azure", "run"]
    assert "{connection_file}" in spec["argv"]
    assert spec["env"] == {"TUNELOOP_HOME": os.environ["TUNELOOP_HOME"]}


@pytest.mark.usefixtures("with_sdk")
def test_a_kernel_is_removed_again_and_another_programs_kernel_is_left_alone(
    tuneloop_command: Callable[..., Ran], tmp_path: Path
) -> None:
    where = ["--prefix", str(tmp_path / "p"), "--python", sys.executable]
    assert tuneloop_command("azure", "kernel", *where).code == 0
    assert tuneloop_command("azure", "kernel", *where).code == 0
    assert tuneloop_command("azure", "kernel", "--remove", *where).code == 0
    assert tuneloop_command("azure", "kernel", "--remove", *where).code == 3
    theirs = tmp_path / "p" / "share" / "jupyter" / "kernels" / "python3"
    theirs.mkdir(parents=True)
    (theirs / "kernel.json").write_text('{"argv": []}')
    assert tuneloop_command("azure", "kernel", "--name", "python3", *where).code == 4
    assert tuneloop_command("azure", "kernel", "--remove", "--name", "python3", *where).code == 4
    assert (theirs / "kernel.json").is_file()
    assert tuneloop_command("azure", "kernel", "--name", "../x", *where).code == 2


def test_your_own_jupyter_folder_is_jupyters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tuneloop.cli import azure_kernel

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("JUPYTER_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert azure_kernel._own_jupyter() == tmp_path / "jupyter"
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "j"))
    assert azure_kernel._own_jupyter() == tmp_path / "j"


# ---------------------------------------------------------------- what works


def test_coverage_lists_calls_with_their_states_and_starts_nothing(
    tuneloop_command: Callable[..., Ran], daemon: FakeDaemon
) -> None:
    daemon.is_up = False
    ran = tuneloop_command("azure", "coverage", "jobs")
    assert ran.code == 0, ran.err
    lines = {line.split()[0]: line for line in ran.out.splitlines()}
    assert "jobs.create_or_update" in lines
    assert all(name.startswith("jobs.") for name in lines if name != "CALL")
    assert "azure-ai-ml" in ran.err
    only = tuneloop_command("azure", "coverage", "--state", "works", "--json")
    assert {one["state"] for one in json.loads(only.out)["calls"]} == {"works"}
    assert daemon.starts == 0


def test_coverage_of_a_group_that_is_none_names_those_that_are(tuneloop_command: Callable[..., Ran]) -> None:
    ran = tuneloop_command("azure", "coverage", "job")
    assert ran.code == 3
    assert "jobs" in ran.err
