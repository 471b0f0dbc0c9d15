"""`tuneloop compute`: clusters of an Azure size, and the table of sizes."""

from __future__ import annotations

import json
from collections.abc import Callable

from tests.unit.cli.conftest import Ran
from tests.unit.cli.fake_api import FakeApi


def test_create_names_a_cluster_and_says_where_its_steps_run(
    tuneloop_command: Callable[..., Ran], api: FakeApi
) -> None:
    ran = tuneloop_command("compute", "create", "big", "--size", "STANDARD_ND40RS_V2", "--max-instances", "2")
    assert ran.code == 0
    assert "up to 2 node(s), mapped onto this machine: steps run here" in ran.out
    assert api.calls[-1] == (
        "POST",
        "/api/computes",
        {"name": "big", "size": "STANDARD_ND40RS_V2", "max_instances": 2},
    )
    assert "big" in tuneloop_command("compute", "list").out


def test_delete_asks_the_server_and_says_what_is_gone(
    tuneloop_command: Callable[..., Ran], api: FakeApi
) -> None:
    tuneloop_command("compute", "create", "big", "--size", "NC6s_v3")
    ran = tuneloop_command("compute", "delete", "big")
    assert (ran.code, ran.err) == (0, "Deleted big.\n")
    assert api.calls[-1] == ("DELETE", "/api/computes/big", None)
    assert tuneloop_command("compute", "show", "big").code == 3


def test_show_tells_gpus_and_what_limits_the_machine(
    tuneloop_command: Callable[..., Ran], api: FakeApi
) -> None:
    api.computes["local"]["devices"] = [{"name": "NVIDIA L4", "memory_bytes": 24 * 10**9}]
    api.computes["local"]["limited_by"] = ["/sys/fs/cgroup/cpu.max: 2 cores"]
    out = tuneloop_command("compute", "show").out
    assert "NVIDIA L4 24.0 GB" in out
    assert "/sys/fs/cgroup/cpu.max: 2 cores" in out


def test_sizes_prints_the_table_without_a_server(tuneloop_command: Callable[..., Ran], api: FakeApi) -> None:
    out = tuneloop_command("compute", "sizes").out
    line = next(line for line in out.splitlines() if line.startswith("Standard_NC24ads_A100_v4"))
    assert line.split()[1:7] == ["24", "220", "GiB", "1", "A100", "80"]
    assert "Standard_NC24r " in out
    assert api.calls == []


def test_sizes_with_gpus_leaves_out_what_cannot_be_had(tuneloop_command: Callable[..., Ran]) -> None:
    listed = json.loads(tuneloop_command("compute", "sizes", "--gpus", "--json").out)
    assert len(listed) == 13
    assert all(size["gpus"] and not size["is_retired"] for size in listed)
