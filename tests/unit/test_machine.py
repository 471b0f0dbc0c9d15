"""Cores and memory with the limits of a container, read from folders laid out as the kernel does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tuneloop.core.machine import Machine, group_memory, peak_resident_bytes, this_machine, within_limits

GIB = 1 << 30


def lay_out(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    return root


def test_version_2_limits_of_the_own_group_hold(tmp_path: Path) -> None:
    root = lay_out(
        tmp_path,
        {
            "proc/self/cgroup": "0::/",
            "sys/fs/cgroup/cpu.max": "200000 100000",
            "sys/fs/cgroup/memory.max": str(4 * GIB),
        },
    )
    found = within_limits(root, 16, 64 * GIB)
    assert (found.cores, found.memory_bytes) == (2, 4 * GIB)
    assert found.has_fewer_cores
    assert any("cpu.max" in limit for limit in found.limited_by)


def test_the_tightest_limit_on_the_way_to_the_root_holds(tmp_path: Path) -> None:
    root = lay_out(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b",
            "sys/fs/cgroup/a/memory.max": str(2 * GIB),
            "sys/fs/cgroup/a/b/memory.max": str(8 * GIB),
            "sys/fs/cgroup/a/b/cpu.max": "max 100000",
        },
    )
    found = within_limits(root, 16, 64 * GIB)
    assert (found.cores, found.memory_bytes) == (16, 2 * GIB)


def test_version_1_limits_hold_and_its_huge_number_is_no_limit(tmp_path: Path) -> None:
    root = lay_out(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/box\n1:cpu,cpuacct:/box\n0::/",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": str(3 * GIB),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "150000",
            "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
        },
    )
    found = within_limits(root, 8, 64 * GIB)
    assert (found.cores, found.memory_bytes) == (1, 3 * GIB)
    assert len(found.limited_by) == 2


def test_a_group_whose_path_is_not_mounted_falls_back_to_what_is(tmp_path: Path) -> None:
    """In a container the path of /proc/self/cgroup may be the host's."""
    root = lay_out(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/0123abc",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(GIB),
        },
    )
    assert within_limits(root, 8, 64 * GIB).memory_bytes == GIB


@pytest.mark.parametrize(
    "files", [{}, {"proc/self/cgroup": "rubbish"}, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "x"}]
)
def test_without_limits_the_machine_is_what_it_is(tmp_path: Path, files: dict[str, str]) -> None:
    assert within_limits(lay_out(tmp_path, files), 8, GIB) == Machine(8, GIB)


def test_a_share_of_a_core_counts_as_one(tmp_path: Path) -> None:
    root = lay_out(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"})
    assert within_limits(root, 8, GIB).cores == 1


def test_this_machine_has_cores_and_memory() -> None:
    found = this_machine()
    assert found.cores >= 1
    assert found.memory_bytes > 0


def test_what_is_left_is_that_of_the_group_that_leaves_the_least(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/outer/inner",
        "sys/fs/cgroup/memory.max": "max",
        "sys/fs/cgroup/memory.current": "700",
        "sys/fs/cgroup/outer/memory.max": "4000",
        "sys/fs/cgroup/outer/memory.current": "3900",
        "sys/fs/cgroup/outer/inner/memory.max": "2000",
        "sys/fs/cgroup/outer/inner/memory.current": "500",
    }
    assert group_memory(lay_out(tmp_path, files)) == (4000, 3900)


def test_version_1_tells_what_is_left_too(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "4000",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000",
    }
    assert group_memory(lay_out(tmp_path, files)) == (4000, 1000)


def test_without_a_group_nothing_is_said_of_it(tmp_path: Path) -> None:
    assert group_memory(tmp_path) is None


def test_the_peak_of_a_process_is_its_own_and_not_that_of_the_large_one_that_started_it() -> None:
    program = """
import subprocess, sys
from tuneloop.core.machine import own_peak_resident_bytes
big = bytearray(b"x") * 300_000_000
small = "from tuneloop.core.machine import own_peak_resident_bytes as peak; print(peak())"
print(own_peak_resident_bytes(), subprocess.check_output([sys.executable, "-c", small], text=True))
"""
    told = subprocess.check_output([sys.executable, "-c", program], text=True)
    large, small = map(int, told.split())
    assert large > 300_000_000
    assert 5_000_000 < small < 150_000_000


def test_the_peak_of_a_process_that_is_gone_is_not_known() -> None:
    assert peak_resident_bytes(2**22 + 1) is None
