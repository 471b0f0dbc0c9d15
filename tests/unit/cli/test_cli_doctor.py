"""`tuneloop doctor`: each trouble is found, explained and comes with a command; --fix does what is safe."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.cli.conftest import FakeDaemon, Ran
from tests.unit.cli.fake_api import FakeApi, model
from tuneloop.cli import checks
from tuneloop.cli.checks import home as homes
from tuneloop.cli.checks import machine, running, services
from tuneloop.core.errors import ServerUnreachable
from tuneloop.core.home import MARK, SCHEMA_VERSION, new_mark, text_of
from tuneloop.core.process import identity_of
from tuneloop.core.settings import Settings
from tuneloop.core.states import ModelState

Command = Callable[..., Ran]
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = tmp_path / "home"
    path.mkdir(exist_ok=True, mode=0o700)
    return path


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(SLEEP)
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def _nothing_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither torch nor the hub are asked."""
    monkeypatch.setattr(machine, "check_torch", lambda: checks.Check("torch", "ok", "2 threads"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def _record(folder: Path, pid: int, owner: str) -> None:
    folder.mkdir(parents=True)
    (folder / "process.json").write_text(identity_of(pid, owner).model_dump_json())


def _announce(home: Path, pid: int) -> None:
    (home / "server.json").write_text(json.dumps({"pid": pid, "port": 1}))


def _gone() -> int:
    """A pid that was somebody's and is nobody's."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


# ---------------------------------------------------------------- the command


@pytest.mark.usefixtures("_nothing_slow")
def test_doctor_is_content_with_a_sound_installation(tuneloop_command: Command) -> None:
    ran = tuneloop_command("doctor", "--json")
    found = json.loads(ran.out)
    assert (ran.code, found["ok"]) == (0, True), found
    names = {check["name"] for check in found["checks"]}
    assert names >= {"python", "packages", "torch", "memory", "open files", "clock", "home", "filesystem"}
    assert names >= {"disk space", "schema", "server file", "ports", "token", "server", "mlflow", "hub"}


@pytest.mark.usefixtures("_nothing_slow")
def test_doctor_says_what_is_wrong_why_it_matters_and_what_to_type(
    tuneloop_command: Command, home: Path
) -> None:
    (home / "token").write_text("t")
    (home / "token").chmod(0o644)
    ran = tuneloop_command("doctor")
    assert ran.code == 1
    told = ran.out.partition("\nhome: ")[2]
    assert "others may read" in told
    assert "can run commands as you" in told
    assert f"next: chmod go-rwx {home / 'token'}" in told
    assert "Safe to be done for you (home): tuneloop doctor --fix" in told


@pytest.mark.usefixtures("_nothing_slow")
def test_doctor_changes_nothing_unless_it_is_asked_to(tuneloop_command: Command, home: Path) -> None:
    (home / "token").write_text("t")
    (home / "token").chmod(0o644)
    tuneloop_command("doctor")
    assert (home / "token").stat().st_mode & 0o777 == 0o644


@pytest.mark.usefixtures("_nothing_slow")
def test_fix_does_what_is_safe_and_says_what_it_did(tuneloop_command: Command, home: Path) -> None:
    (home / "secret").write_text("s")
    (home / "secret").chmod(0o644)
    _announce(home, _gone())
    ran = tuneloop_command("doctor", "--fix")
    assert ran.code == 0, ran.out
    assert f"mended home: Closed to others: {home / 'secret'}" in ran.out
    assert "mended server file: Removed" in ran.out
    assert (home / "secret").stat().st_mode & 0o077 == 0
    assert not (home / "server.json").exists()


@pytest.mark.usefixtures("_nothing_slow")
def test_fix_that_fails_is_told_and_is_no_defect(
    tuneloop_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> str:
        raise ServerUnreachable("no answer")

    broken = checks.Check("token", "warn", "gone", "tuneloop up", "why", fail)
    monkeypatch.setattr(running, "check_token", lambda home: broken)
    ran = tuneloop_command("doctor", "--fix")
    assert (ran.code, "mended token: Not mended: no answer" in ran.out) == (0, True)


@pytest.mark.usefixtures("_nothing_slow")
def test_doctor_starts_no_server(tuneloop_command: Command, daemon: FakeDaemon) -> None:
    daemon.is_up = False
    assert tuneloop_command("doctor").code == 0
    assert daemon.starts == 0


# ---------------------------------------------------------------- the machine


def test_pins_are_read_and_compared_without_build_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text(
        "# made by hand\nclick==0.0.1 \\\n    --hash=sha256:00\ntorch==2.13.0 ; python_version > '3'\n"
    )
    assert machine.read_pins(lock.read_text()) == {"click": "0.0.1", "torch": "2.13.0"}
    monkeypatch.setattr(machine, "find_lock", lambda: lock)
    monkeypatch.setattr(machine, "_installed", lambda name: {"torch": "2.13.0+cpu"}.get(name, "9"))
    monkeypatch.setattr(machine, "_requirements", list)
    *_, found = machine.check_packages()
    assert (found.state, found.found) == ("warn", "click 9 instead of 0.0.1")


def test_a_package_that_is_missing_or_too_old_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["click>=99", "nosuchthing>=1", "pytest>=1; extra == 'dev'"]
    monkeypatch.setattr(machine, "_requirements", lambda: wanted)
    found = next(iter(machine.check_packages()))
    assert found.state == "fail"
    assert "nosuchthing is missing" in found.found
    assert "needed is >=99" in found.found
    assert "pytest" not in found.found


def test_doctor_says_how_to_install_with_a_command_that_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_installed", lambda name: None)
    fix = machine.check_torch().fix
    assert fix is not None
    assert f"{sys.executable} -m pip install -r " in fix


def _torch(**changes: Any) -> dict[str, Any]:
    return {"threads": 2, "cuda": None, "hip": None, "gpus": 0, "why": None} | changes


@pytest.mark.parametrize(
    ("answer", "gpu", "state", "said"),
    [
        (_torch(), None, "ok", "CPU build"),
        (_torch(), "an NVIDIA GPU (driver 550.1)", "warn", "while there is an NVIDIA GPU"),
        (_torch(cuda="13.0", gpus=1), "an NVIDIA GPU (driver 580.1)", "ok", "CUDA 13.0 build"),
        (_torch(cuda="13.0"), None, "ok", "no GPU is seen"),
        (_torch(cuda="13.0", why="driver too old"), "an NVIDIA GPU (driver 470)", "warn", "CUDA 13.0 build"),
        (_torch(threads=64), None, "warn", "on 2 cores"),
    ],
)
def test_torch_and_the_machine_must_agree_about_the_gpu(
    answer: dict[str, Any], gpu: str | None, state: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = machine.judge_torch("2.13.0", answer, gpu, cores=2)
    assert (found.state, said in found.found) == (state, True), found
    assert (found.fix is None) == (state == "ok")


def test_a_hidden_gpu_is_told_by_the_variable_that_hides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = machine.judge_torch("2.13.0", _torch(cuda="13.0"), "an NVIDIA GPU (driver 580.1)", cores=2)
    assert (found.state, found.fix) == ("warn", "unset CUDA_VISIBLE_DEVICES")


def test_few_open_files_come_with_the_command_that_allows_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (256, 1_000_000))
    found = machine.check_open_files()
    assert found.state == "warn"
    assert str(found.fix).startswith("ulimit -n 4096")


def test_a_clock_that_was_set_back_or_never_set_is_told(home: Path) -> None:
    (home / MARK).write_text("{}")
    now = time.time()
    assert machine.check_clock(home, now).state == "ok"
    assert machine.check_clock(home, now - 3600).state == "warn"
    assert machine.check_clock(home, 0.0).state == "fail"


# ---------------------------------------------------------------- the home


def test_a_home_that_is_a_file_or_would_lie_in_one_fails(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    assert homes.check_home(tmp_path / "f").state == "fail"
    assert homes.check_home(tmp_path / "f" / "home").state == "fail"


def test_a_home_in_a_file_system_of_the_kernel_fails() -> None:
    assert homes.check_home(Path("/proc/nothing/home")).state == "fail"
    assert list(homes.check_space(Path("/proc/nothing/home"))) == []
    found = homes.check_filesystem(Path("/proc/nothing/home"))
    assert (found.state, "is on proc" in found.found) == ("fail", True)


@pytest.mark.parametrize(
    ("kind", "state"),
    [("ext4", "ok"), ("overlay", "ok"), ("nfs4", "fail"), ("fuse.sshfs", "fail"), ("tmpfs", "warn")],
)
def test_the_file_system_is_judged_by_what_sqlite_needs(
    kind: str, state: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(homes, "filesystem", lambda path: kind)
    assert homes.check_filesystem(tmp_path).state == state


def test_the_file_system_is_that_of_the_innermost_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    inner = str(tmp_path).replace(" ", "\\040")
    mounts.write_text(
        f"1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 0:5 / {inner} rw shared:1 - nfs4 server:/x rw\n"
        f"3 1 0:6 / {inner}-beside rw - tmpfs none rw\n"
    )
    assert homes.filesystem(tmp_path / "home", mounts) == "nfs4"
    assert homes.filesystem(Path("/"), mounts) == "ext4"


def test_little_space_is_a_warning_and_none_a_failure(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    for free, state in ((50e9, "ok"), (1e9, "warn"), (1e6, "fail")):
        monkeypatch.setattr(
            homes.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free, total=1e12)
        )
        assert next(iter(homes.check_space(home))).state == state


@pytest.mark.parametrize(
    ("version", "state"), [(str(SCHEMA_VERSION), "ok"), (str(SCHEMA_VERSION + 1), "fail"), ("1", "ok")]
)
def test_the_schema_is_told_without_a_server(home: Path, version: str, state: str) -> None:
    with closing(sqlite3.connect(home / "tuneloop.db")) as database:
        database.execute("create table meta (name text, value text)")
        database.execute("insert into meta values ('schema_version', ?)", (version,))
        database.commit()
    assert homes.check_schema(Settings(home=home)).state == state


def test_a_store_that_is_none_fails(home: Path) -> None:
    (home / "tuneloop.db").write_bytes(b"not a database at all" * 100)
    assert homes.check_schema(Settings(home=home)).state == "fail"


# ---------------------------------------------------------------- what runs


def test_a_server_file_that_points_to_a_dead_or_foreign_process_is_told(
    home: Path, child: subprocess.Popen[bytes]
) -> None:
    assert running.check_server_file(home).state == "ok"
    _announce(home, _gone())
    assert "which has ended" in running.check_server_file(home).found
    _announce(home, child.pid)
    found = running.check_server_file(home)
    assert (found.state, "another program now" in found.found) == ("warn", True)


def test_a_port_of_another_program_fails_with_its_name(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        found = running.check_ports(Settings(home=tmp_path, port=taken.getsockname()[1]))
    assert found.state == "fail"
    assert f"pid {os.getpid()}" in found.found
    assert found.fix == "Set TUNELOOP_PORT to another port."


def test_a_port_that_is_free_is_ok(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert running.check_ports(Settings(home=tmp_path, port=port)).state == "ok"


def test_processes_without_a_server_are_a_warning(home: Path, child: subprocess.Popen[bytes]) -> None:
    _record(home / "jobs" / "j" / "finetune" / "1", child.pid, "a")
    (found,) = running.check_processes(home)
    assert found.state == "warn"
    assert str(child.pid) in found.found


def test_an_attempt_that_ended_without_a_result_is_told(home: Path, child: subprocess.Popen[bytes]) -> None:
    _record(home / "jobs" / "j" / "finetune" / "1", child.pid, "a")
    child.kill()
    child.wait()
    assert [found.name for found in running.check_processes(home)] == ["processes", "ended early"]


def test_a_process_with_the_mark_of_this_home_and_no_record_is_a_stray(home: Path) -> None:
    mark = new_mark(home)
    (home / MARK).write_text(text_of(mark))
    stray = subprocess.Popen(
        SLEEP, env={**os.environ, running.OWNER_VARIABLE: f"{mark.id}/x"}, start_new_session=True
    )
    try:
        found = {check.name: check for check in running.check_processes(home)}
        assert found["stray processes"].fix == f"kill {stray.pid}"
    finally:
        stray.kill()
        stray.wait()


def test_a_token_that_is_gone_while_a_server_runs_fails_and_is_made_anew(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / MARK).write_text(text_of(new_mark(home)))
    assert running.check_token(home).state == "ok"
    monkeypatch.setattr(running, "_has_server", lambda home: True)
    found = running.check_token(home)
    assert found.state == "fail"
    assert found.mend is not None
    found.mend()
    assert running.check_token(home).state == "ok"


def test_a_server_that_does_not_answer_fails_with_its_next_move() -> None:
    def find() -> None:
        raise ServerUnreachable("no answer", next_move="tuneloop up")

    found = running.check_server(find)
    assert (found.state, found.found, found.fix) == ("fail", "no answer", "tuneloop up")


# ---------------------------------------------------------------- MLflow and the hub


def test_a_database_that_is_none_fails(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"not a database at all" * 100)
    assert services.check_mlflow(f"sqlite:///{tmp_path / 'mlflow.db'}").state == "fail"


def test_a_sound_mlflow_database_is_told_with_its_runs(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "m.db")) as database:
        database.execute("create table alembic_version (version_num text)")
        database.execute("create table runs (run_uuid text)")
        database.execute("insert into alembic_version values ('abc')")
        database.commit()
    found = services.check_mlflow(f"sqlite:///{tmp_path / 'm.db'}")
    assert (found.state, found.found.endswith("schema abc, 0 runs")) == ("ok", True)


def test_doctor_tells_a_silent_mlflow_server_and_no_password() -> None:
    found = services.check_mlflow("http://ada:s3cret@127.0.0.1:1")
    assert (found.state, "Connection refused" in found.found) == ("warn", True)
    assert "s3cret" not in found.found


def _registry(home: Path, *models: tuple[str, str, int]) -> None:
    (home / "mlflow").mkdir()
    with closing(sqlite3.connect(home / "mlflow" / "mlflow.db")) as database:
        database.execute("create table model_versions (name text, version int, current_stage text)")
        database.execute("create table model_version_tags (key text, value text, name text, version int)")
        for name, version, number in models:
            database.execute("insert into model_versions values (?, ?, 'None')", (name, number))
            row = ("tuneloop.version", version, name, number)
            database.execute("insert into model_version_tags values (?, ?, ?, ?)", row)
        database.commit()


def _ours(*versions: tuple[str, int | None, ModelState]) -> Any:
    made = [
        model(version).model_copy(update={"mlflow_version": number, "state": state})
        for version, number, state in versions
    ]
    return SimpleNamespace(client=SimpleNamespace(models=lambda: made))


def test_a_registry_that_is_out_of_step_is_told_with_the_models(home: Path) -> None:
    guide = "tuneloop-guide"
    # The fourth is being registered: MLflow has it already, and we do not know yet.
    _registry(home, (guide, "1", 1), (guide, "2", 2), ("theirs", "1", 1), (guide, "4", 4))
    registered, pending = ModelState.REGISTERED, ModelState.PENDING
    ours = _ours(("1", 1, registered), ("2", 7, registered), ("3", 3, registered), ("4", None, pending))
    found = services.check_registry(Settings(home=home), ours)
    assert (found.state, found.fix) == ("warn", "tuneloop doctor --fix")
    assert found.found.endswith("about: theirs:1, tuneloop-guide:2, tuneloop-guide:3")


def test_a_registry_in_step_is_ok(home: Path) -> None:
    _registry(home, ("tuneloop-guide", "1", 1))
    ours = _ours(("1", 1, ModelState.REGISTERED))
    assert services.check_registry(Settings(home=home), ours).state == "ok"


def test_the_hub_token_is_never_shown() -> None:
    found = list(services.check_hub({"HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "1"}))
    assert [one.state for one in found] == ["warn", "ok"]
    assert not any("hf_secret" in str(one) for one in found)
    assert "offline" in found[1].found


def test_a_token_of_the_right_shape_is_ok() -> None:
    environment = {"HF_TOKEN": "hf_" + "a" * 34, "HF_HUB_OFFLINE": "1"}
    assert [one.state for one in services.check_hub(environment)] == ["ok", "ok"]


def test_a_hub_that_does_not_answer_is_a_warning_and_a_wrong_address_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HTTP_PROXY", raising=False)
    monkeypatch.delenv("http_proxy", raising=False)
    nobody = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:1"}
    assert [one.state for one in services.check_hub(nobody)] == ["ok", "warn"]
    wrong = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "huggingface.co"}
    assert [one.state for one in services.check_hub(wrong)] == ["ok", "fail"]


def test_a_hub_that_answers_is_ok(api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert [one.state for one in services.check_hub({"HF_HOME": str(tmp_path), "HF_ENDPOINT": api.url})] == [
        "ok",
        "ok",
    ]
