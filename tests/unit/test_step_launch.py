"""The launcher of several processes, without torch: who is let in, who is missed, and what is blamed."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tuneloop.core.errors import (
    Diverged,
    Internal,
    NotAllowed,
    OutOfMemory,
    RankLost,
    Unavailable,
    Unsupported,
    UsageError,
)
from tuneloop.core.types import StepFile
from tuneloop.steps.context import StepContext
from tuneloop.steps.launch import nodes, supervise
from tuneloop.steps.launch.__main__ import Guest, Part, _parse
from tuneloop.steps.launch.group import environment_of, threads_each, torchrun_arguments
from tuneloop.steps.launch.nodes import Host, Link, hello
from tuneloop.steps.launch.reports import (
    Failure,
    Node,
    Report,
    Run,
    cause_of,
    ending,
    output_of,
    read_failures,
    read_reports,
    read_run,
    write_failures,
    write_report,
    write_run,
)
from tuneloop.steps.launch.settings import Settings, read, require_host
from tuneloop.steps.launch.wire import Channel, WrongSecret, call, welcome

SECRET = "sixteen letters.."
TWO = Run(
    token="t",
    nodes=(Node(0, "a", "10.0.0.1"), Node(1, "b", "10.0.0.2")),
    processes=2,
    machine={"device": "cpu", "gpus": 0, "has_fast_bf16": False},
    port=29472,
)
ONE = replace(TWO, nodes=(Node(0, "a"),))


# ---------------------------------------------------------------- the wire


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as opened:
        opened.settimeout(5)
        yield opened


def connected(listener: socket.socket, secret: str = SECRET) -> tuple[Any, Any]:
    """Host's and guest's side, or what either raised."""
    sides: dict[str, Any] = {}

    def host() -> None:
        connection, _ = listener.accept()
        try:
            sides["host"] = welcome(connection, SECRET)
        except Exception as error:
            connection.close()
            sides["host"] = error

    thread = threading.Thread(target=host)
    thread.start()
    try:
        sides["guest"] = call(*listener.getsockname(), secret)
    except Exception as error:
        sides["guest"] = error
    thread.join(5)
    return sides["host"], sides["guest"]


def test_messages_go_both_ways_between_those_who_hold_the_secret(listener: socket.socket) -> None:
    host, guest = connected(listener)
    with contextlib.closing(host), contextlib.closing(guest):
        host.send({"a": 1})
        guest.send({"b": [2]})
        assert guest.receive() == {"a": 1}
        assert host.receive() == {"b": [2]}


def test_another_secret_is_refused_on_both_sides(listener: socket.socket) -> None:
    host, guest = connected(listener, "another one of 16")
    assert isinstance(host, WrongSecret)
    assert isinstance(guest, WrongSecret)
    assert "holds another secret" in str(guest)


def test_a_host_that_does_not_know_the_secret_is_not_believed(listener: socket.socket) -> None:
    def pretend() -> None:
        with listener.accept()[0] as connection:
            connection.sendall(b"tuneloop-nodes/1" + bytes(32))
            connection.recv(64)
            connection.sendall(bytes(32))

    thread = threading.Thread(target=pretend)
    thread.start()
    with pytest.raises(WrongSecret, match="holds another secret"):
        call(*listener.getsockname(), SECRET)
    thread.join(5)


@pytest.mark.parametrize("change", ["repeated", "forged", "mirrored"])
def test_a_message_that_the_other_side_did_not_write_is_refused(listener: socket.socket, change: str) -> None:
    host, guest = connected(listener)
    with contextlib.closing(host), contextlib.closing(guest):
        guest.send({"type": "beat"})
        original = host._connection.recv(1 << 16)
        assert len(original) > 36
        if change == "mirrored":
            host._connection.sendall(original)
            victim = guest
        else:
            victim = host
            sent = original if change == "repeated" else original.replace(b"beat", b"lost")
            guest._connection.sendall(sent)
            if change == "repeated":
                host._received = 1
        with pytest.raises(WrongSecret, match="did not write"):
            victim.receive()


# ---------------------------------------------------------------- nodes


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def host(said: list[str]) -> Iterator[Host]:
    with Host("127.0.0.1", 0, SECRET, said.append) as opened:
        yield opened


class Guests:
    """Machines that come to a host, each on a thread of its own, and stay."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._channels: list[Channel] = []
        self._threads: list[threading.Thread] = []
        self.told: list[dict[str, Any]] = []

    def come(self, number: int, **changes: Any) -> None:
        def work() -> None:
            channel = call("127.0.0.1", self._host.port, SECRET)
            self._channels.append(channel)
            channel.send({**hello(number), **changes})
            with contextlib.suppress(OSError, EOFError):
                self.told.append(channel.receive())

        self._threads.append(threading.Thread(target=work))
        self._threads[-1].start()

    def leave(self) -> None:
        for channel in self._channels:
            channel.close()
        for thread in self._threads:
            thread.join(5)


@pytest.fixture
def guests(host: Host) -> Iterator[Guests]:
    made = Guests(host)
    yield made
    made.leave()


def test_all_nodes_that_come_are_gathered_in_order(host: Host, guests: Guests) -> None:
    guests.come(2)
    guests.come(1)
    links = host.gather(3, seconds=5)
    assert [link.node.number for link in links] == [1, 2]
    assert {link.node.address for link in links} == {"127.0.0.1"}


def test_a_node_that_does_not_come_is_named_with_the_command_that_brings_it(
    host: Host, guests: Guests
) -> None:
    guests.come(1)
    with pytest.raises(
        RankLost, match=r"node 2 of 3 did not come to 127\.0\.0\.1:\d+ within 1 s\. node 1 \("
    ) as lost:
        host.gather(3, seconds=1)
    assert f"--join 127.0.0.1:{host.port} --node-rank 2" in str(lost.value)


def test_a_node_with_another_secret_is_turned_away_and_the_others_are_awaited(
    host: Host, said: list[str]
) -> None:
    def wrong() -> None:
        with pytest.raises(WrongSecret):
            call("127.0.0.1", host.port, "another one of 16")

    thread = threading.Thread(target=wrong)
    thread.start()
    with pytest.raises(RankLost, match="node 1 of 2 did not come"):
        host.gather(2, seconds=1)
    thread.join(5)
    assert said == ["127.0.0.1 was turned away: it does not hold this run's secret"]


@pytest.mark.parametrize(
    ("number", "changes", "why"),
    [
        (2, {}, "this run has nodes 1 to 1 beside the first, and it says that it is 2"),
        (0, {}, "it says that it is 0"),
        (1, {"versions": {"tuneloop": "0", "torch": "1"}}, "install the same"),
    ],
)
def test_a_node_that_does_not_belong_to_the_run_is_told_why(
    host: Host, guests: Guests, number: int, changes: dict[str, Any], why: str
) -> None:
    guests.come(number, **changes)
    with pytest.raises(RankLost):
        host.gather(2, seconds=1)
    until(lambda: guests.told)
    assert guests.told[0]["type"] == "refused"
    assert why in guests.told[0]["why"]


def test_a_port_that_is_taken_is_told(host: Host) -> None:
    with pytest.raises(Unavailable, match=f"127.0.0.1:{host.port}, where the other machines are to come"):
        Host("127.0.0.1", host.port, SECRET, print)


def until(is_so: Any, seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_side_that_says_nothing_for_long_is_lost_and_one_that_beats_is_not(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "SILENCE_SECONDS", 0.4)
    monkeypatch.setattr(nodes, "BEAT_SECONDS", 0.1)
    ours, theirs = connected(listener)
    with contextlib.closing(Link(ours, Node(1, "b", "10.0.0.2"))) as link:
        beating = time.monotonic()
        while time.monotonic() - beating < 1:
            theirs.send({"type": "beat"})
            time.sleep(0.1)
        assert link.lost is None
        until(lambda: link.lost is not None)
        assert link.lost == "has not been heard for 0.4 s"
    theirs.close()


def test_a_side_that_closes_is_lost_at_once(listener: socket.socket) -> None:
    ours, theirs = connected(listener)
    with contextlib.closing(Link(ours, Node(1))) as link:
        theirs.close()
        until(lambda: link.lost is not None, 2)
        assert "its launcher ended" in str(link.lost)


# ---------------------------------------------------------------- the other machines' launcher


def test_the_launcher_of_another_machine_ends_with_5_when_its_secret_is_wrong(host: Host) -> None:
    environment = {"TUNELOOP_NODE_SECRET": "another one of 16"}
    guest = Guest.of(_parse(["--join", f"127.0.0.1:{host.port}", "--node-rank", "1"]), environment)

    def wait() -> None:
        with contextlib.suppress(RankLost):
            host.gather(2, seconds=2)

    waiting = threading.Thread(target=wait)
    waiting.start()
    with pytest.raises(NotAllowed, match="holds another secret") as refused:
        guest.attend()
    assert refused.value.exit_code == 5
    waiting.join(5)


@pytest.mark.parametrize(
    ("arguments", "environment", "why"),
    [
        (["--join", "10.0.0.1", "--node-rank", "1"], {}, "expected HOST:PORT"),
        (["--join", "10.0.0.1:1", "--node-rank", "1"], {"TUNELOOP_NODE_SECRET": "short"}, "has 5 characters"),
        (["--join", "10.0.0.1:1"], {}, "--node-rank is 0; expected 1 or more"),
        (["--join", "10.0.0.1:1", "--node-rank", "1", "--interface", "no0"], {}, "--interface is 'no0'"),
    ],
)
def test_what_the_launcher_cannot_mean_is_refused(
    arguments: list[str], environment: dict[str, str], why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        Guest.of(_parse(arguments), {"TUNELOOP_NODE_SECRET": SECRET, **environment})


def test_the_number_of_a_machine_may_come_from_slurm() -> None:
    guest = Guest.of(_parse(["--join", "h:1"]), {"TUNELOOP_NODE_SECRET": SECRET, "SLURM_NODEID": "3"})
    assert guest._number == 3


def test_a_machine_that_does_not_share_the_folder_says_so(
    tmp_path: Path, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuneloop.steps.launch.__main__.FOLDER_SECONDS", 0.1)
    ours, theirs = connected(listener)
    with contextlib.closing(Link(ours, Node(0))) as link, contextlib.closing(theirs):
        part = Part(link, 1)
        part.hear({"type": "run", "folder": str(tmp_path), "run": TWO.to_json()})
        message = theirs.receive()
        while message["type"] == "beat":
            message = theirs.receive()
    assert not part.is_running
    (failure,) = map(Failure.from_json, message["failures"])
    error = supervise.error_of(TWO, failure)
    assert isinstance(error, Unsupported)
    assert f"node 1 (b, 10.0.0.2) does not see {tmp_path} as node 0 (a, 10.0.0.1) does" in str(error)


# ---------------------------------------------------------------- settings and commands


def test_the_first_machine_needs_an_address_of_its_own_and_a_secret() -> None:
    with pytest.raises(Unsupported) as refused:
        require_host(read({"TUNELOOP_NODES": "2", "TUNELOOP_NODE_ADDRESS": "192.0.2.1"}))
    assert "TUNELOOP_NODE_ADDRESS is '192.0.2.1'; this machine has" in str(refused.value)
    assert "TUNELOOP_NODE_SECRET has 0 characters" in str(refused.value)
    require_host(Settings(nodes=2, address="127.0.0.1", secret=SECRET))


def test_a_setting_that_is_no_number_is_refused() -> None:
    with pytest.raises(UsageError, match="TUNELOOP_NODES is 'two'; expected a whole number from 1"):
        read({"TUNELOOP_NODES": "two"})


def test_one_machine_meets_on_loopback_and_several_at_the_first_ones_address() -> None:
    assert "--standalone" in torchrun_arguments(ONE, 0)
    several = torchrun_arguments(TWO, 1)
    assert "--standalone" not in several
    assert {"--nnodes=2", "--node-rank=1", "--master-addr=10.0.0.1", "--master-port=29472"} <= set(several)
    assert "--max-restarts=0" in several


def test_processes_get_their_interface_and_no_secret() -> None:
    given = {"TUNELOOP_NODE_SECRET": SECRET, "OMP_NUM_THREADS": "6", "PATH": "/bin"}
    told = environment_of(ONE, 0, given)
    assert SECRET not in told.values()
    assert told["PATH"] == "/bin"
    assert told["OMP_NUM_THREADS"] == "3"
    assert told["GLOO_SOCKET_IFNAME"] == _loopback()
    assert "NCCL_SOCKET_IFNAME" not in told
    mine = replace(TWO, nodes=(Node(0, "a", "127.0.0.1"), Node(1)))
    assert environment_of(mine, 0, {})["NCCL_SOCKET_IFNAME"] == _loopback()
    assert environment_of(ONE, 0, {"GLOO_SOCKET_IFNAME": "eth7"})["GLOO_SOCKET_IFNAME"] == "eth7"


def _loopback() -> str:
    return "lo0" if sys.platform == "darwin" else "lo"


def test_processes_share_the_cores() -> None:
    assert threads_each(2, {"OMP_NUM_THREADS": "8"}) == 4
    assert threads_each(8, {"OMP_NUM_THREADS": "2"}) == 1
    assert threads_each(1, {}) >= threads_each(2, {}) >= 1


def test_the_supervisor_holds_no_torch() -> None:
    script = "import sys, tuneloop.steps.__main__, tuneloop.steps.finetune; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert said.stdout == "False\n"


# ---------------------------------------------------------------- reports and causes


def test_what_an_earlier_run_left_behind_counts_for_nothing(tmp_path: Path) -> None:
    write_run(tmp_path, TWO)
    assert read_run(tmp_path) == TWO
    write_report(tmp_path, Report("t", 0, "done", summary={"loss": 1.5}, warnings=("w",)))
    write_report(tmp_path, Report("earlier", 1, "failed", error={}))
    write_failures(tmp_path, TWO, 0, [(1, -9)])
    assert read_reports(tmp_path, TWO, range(4)) == {
        0: Report("t", 0, "done", summary={"loss": 1.5}, warnings=("w",))
    }
    assert read_failures(tmp_path, replace(TWO, token="later"), 0, {}) == []


def test_a_failure_carries_the_last_lines_of_its_process(tmp_path: Path) -> None:
    write_run(tmp_path, TWO)
    output_of(tmp_path, 1).write_text("".join(f"line {number}\n" for number in range(30)))
    write_failures(tmp_path, TWO, 0, [(1, -9)])
    (failure,) = read_failures(tmp_path, TWO, 0, {})
    assert failure.last_lines == tuple(f"line {number}" for number in range(20, 30))
    assert failure.what == "was ended by SIGKILL: by somebody, or because memory ran out"
    assert Failure.from_json(failure.to_json()) == failure


def _failed(rank: int, error: Exception, **changes: Any) -> Failure:
    as_json = error.to_json() if isinstance(error, Diverged | OutOfMemory | Internal | RankLost) else {}
    return Failure(rank // 2, f"failed: {error}", rank, error=as_json, **changes)


KILLED = Failure(1, ending(-9), 3, -9)
CONSEQUENCE = _failed(0, Internal("RuntimeError: gloo: Connection reset by peer"), is_consequence=True)
MISTAKE = _failed(2, Diverged("the loss is nan", details={"rows": [4]}))
DEFECT = _failed(1, Internal("ZeroDivisionError: division by zero", details={"traceback": "T"}))
ENDED_BY_TORCHRUN = Failure(0, ending(-15), 1, -15)
SILENT = Failure(1, "has not been heard for 10 s")


@pytest.mark.parametrize(
    ("failures", "cause"),
    [
        ([CONSEQUENCE, KILLED], KILLED),
        ([ENDED_BY_TORCHRUN, KILLED], KILLED),
        ([replace(ENDED_BY_TORCHRUN, at=0.0), KILLED], KILLED),
        ([CONSEQUENCE, DEFECT], DEFECT),
        ([CONSEQUENCE, ENDED_BY_TORCHRUN, MISTAKE], MISTAKE),
        ([CONSEQUENCE, SILENT], SILENT),
        ([CONSEQUENCE, ENDED_BY_TORCHRUN], ENDED_BY_TORCHRUN),
    ],
)
def test_the_failure_that_the_others_followed_from_is_blamed(failures: list[Failure], cause: Failure) -> None:
    assert cause_of(failures) is cause
    assert cause_of(failures[::-1]) is cause


def test_a_mistake_is_told_as_one_process_would_tell_it() -> None:
    error = supervise.error_of(TWO, MISTAKE)
    assert isinstance(error, Diverged)
    assert (error.message, error.details) == ("the loss is nan", {"rows": [4]})


def test_a_defect_keeps_its_traceback_and_says_where_it_was() -> None:
    error = supervise.error_of(ONE, DEFECT)
    assert isinstance(error, Internal)
    assert error.message == "process 2 of 2 (rank 1): ZeroDivisionError: division by zero"
    assert isinstance(error.details, dict)
    assert error.details["traceback"] == "T"


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (KILLED, "Process 4 of 4 (rank 3) on node 1 (b, 10.0.0.2) was ended by SIGKILL"),
        (SILENT, "Node 1 (b, 10.0.0.2) has not been heard for 10 s."),
        (CONSEQUENCE, "Process 1 of 4 (rank 0) on node 0 (a, 10.0.0.1) failed: RuntimeError: gloo"),
        (replace(KILLED, last_lines=("x", "out of luck ")), "Its last line: 'out of luck'."),
    ],
)
def test_a_process_or_a_machine_that_is_gone_is_named(failure: Failure, told: str) -> None:
    error = supervise.error_of(TWO, failure)
    assert isinstance(error, RankLost)
    assert told in error.message
    assert isinstance(error.details, dict)
    assert error.details["node"] == failure.node
    assert error.details["last_lines"] == "\n".join(failure.last_lines)


# ---------------------------------------------------------------- memory


WANTED = supervise.Wanted(
    processes=2,
    nodes=1,
    machine=ONE.machine,
    strategy="ddp",
    pack_tokens=1024,
    longest=300,
    is_checkpointed=False,
    may_lower_packs=True,
)
FULL = _failed(1, OutOfMemory("no memory left."))


@pytest.mark.parametrize(
    ("cause", "changes", "is_short", "lower"),
    [
        (FULL, {}, False, 512),
        (FULL, {"pack_tokens": 400}, False, 300),
        (FULL, {"pack_tokens": 300}, False, None),
        (FULL, {"may_lower_packs": False}, False, None),
        (KILLED, {}, True, 512),
        (KILLED, {}, False, None),
        (MISTAKE, {}, True, None),
    ],
)
def test_packs_are_halved_when_memory_ran_out_and_that_is_allowed(
    cause: Failure, changes: dict[str, Any], is_short: bool, lower: int | None
) -> None:
    assert supervise.lower_packs(cause, replace(WANTED, **changes), is_memory_short=is_short) == lower


def test_the_processes_start_again_with_smaller_packs_and_it_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def once(context: StepContext, made: Run, links: Any) -> list[Failure]:
        tried.append(made.pack_tokens)
        if made.pack_tokens > 512:
            return [FULL]
        write_run(context.folder, made)
        write_report(context.folder, Report(made.token, 0, "done", summary={"loss": 2.0}, warnings=("w",)))
        return []

    monkeypatch.setattr(supervise, "_run_once", once)
    step = StepFile(attempt="j/finetune/1", attempt_id="a", kind="finetune")
    context = StepContext(tmp_path, step)
    supervise.run(context, WANTED, Settings())
    assert tried == [1024, 512]
    assert context.summary == {"loss": 2.0}
    assert len(context.warnings) == 2
    assert "at most 512 tokens are computed at a time from the last checkpoint on" in context.warnings[0]
    context.close()


def test_what_the_first_process_prints_reaches_the_log_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "0.txt"
    file.write_text("of an earlier run\n")
    follower = supervise.Follower(file)
    for text in ("one\n", "tw", "o\n"):
        with open(file, "a") as handle:
            handle.write(text)
        follower.forward()
    follower.forward()
    assert capfd.readouterr().out == "one\ntwo\n"


def test_the_kernels_count_of_processes_ended_for_memory_is_read() -> None:
    if not os.path.exists("/proc/vmstat"):
        pytest.skip("no /proc/vmstat here")
    assert supervise.killed_for_memory() >= 0
