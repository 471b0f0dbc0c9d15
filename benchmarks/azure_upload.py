"""What an upload costs the server: CPU time and memory, with Azure's own client.

    make .azure/.installed
    .venv/bin/python benchmarks/azure_upload.py --folder /tmp/azure-upload [--repeats 3] [--megabytes 500]

A file of random bytes is sent by azure-storage-blob of the newest SDK as azure-ai-ml sends it: in blocks of
4 MiB, over 16 connections. Counted is the CPU time of the server's process, user and system, from the first
block to the answer to their list, TLS, checks and the copy into one file included, and how far its resident
memory has grown meanwhile. Linux and macOS. Exit code 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.contract.azure.sdk import AzureWorld  # noqa: E402

MEGABYTE = 1_000_000
MEGABYTES = 500
GOAL_MEGABYTES_PER_SECOND = 200.0
GROWTH_MEGABYTES = 64.0
"""16 connections hold a batch of 1 MiB each, and TLS what it reads at once."""

UPLOAD = """
from azure.storage.blob import BlobClient
store = ml.datastores.get_default(include_secrets=True)
blob = BlobClient(
    account_url=f"https://{store.account_name}.blob.tuneloop.local",
    container_name=store.container_name,
    blob_name=name,
    credential=store.credentials.sas_token,
)
with open(path, "rb") as file:
    blob.upload_blob(file, overwrite=True, max_concurrency=16)
result = blob.get_blob_properties().size
blob.delete_blob()
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, required=True, help="where the workspace is made; emptied first"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=MEGABYTES)
    given = parser.parse_args()
    shutil.rmtree(given.folder, ignore_errors=True)
    world = AzureWorld(given.folder / "world")
    try:
        return int(not measure_upload(world, given.repeats, given.megabytes))
    finally:
        world.take_down()


def measure_upload(world: AzureWorld, repeats: int = 3, megabytes: int = MEGABYTES) -> bool:
    """Whether the goals of CPU and of memory are met."""
    path = world.folder / "upload.bin"
    size = megabytes * MEGABYTE
    with open(path, "wb") as file:
        for _ in range(megabytes):
            file.write(os.urandom(MEGABYTE))
        # Else the kernel would still write it while the upload is measured.
        file.flush()
        os.fsync(file.fileno())
    server = psutil.Process(world.server_pid())
    sdk = world.sdk("new")
    # Once uncounted: imports and buffers are no part of an upload, and memory that a virtual machine touches
    # for the first time costs its kernel up to ten times as much, whoever writes the file.
    _upload(sdk, path, "warm", size)
    rates, growths, peaks = [], [], []
    for repeat in range(repeats):
        before, began = _cpu(server), time.perf_counter()
        with _Memory(server) as memory:
            _upload(sdk, path, f"benchmark-{repeat}/upload.bin", size)
        seconds, wall = _cpu(server) - before, time.perf_counter() - began
        rates.append(size / MEGABYTE / seconds)
        growths.append(memory.after - memory.before)
        peaks.append(memory.highest - memory.before)
        told = f"{seconds:.2f} s of CPU, {wall:.1f} s of wall time, memory {peaks[-1]:+.1f} MB at most"
        print(f"  run {repeat + 1}: {told}, {growths[-1]:+.1f} MB after", flush=True)
    path.unlink()
    rate = statistics.median(rates)
    print(
        f"{megabytes} MB uploaded: {rate:.0f} MB per second of server CPU ({min(rates):.0f} to "
        f"{max(rates):.0f}, {repeats} repeats); goal {GOAL_MEGABYTES_PER_SECOND:g}",
        flush=True,
    )
    print(
        f"memory of the server: {max(peaks):+.1f} MB at most, {max(growths):+.1f} MB after; goal below "
        f"{GROWTH_MEGABYTES:g}",
        flush=True,
    )
    return rate >= GOAL_MEGABYTES_PER_SECOND and max(peaks) < GROWTH_MEGABYTES


class _Memory:
    """Resident megabytes of a process before, at most, and after; looked at 50 times a second."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self._is_over = threading.Event()
        self._looking = threading.Thread(target=self._look)
        self.before = self.highest = self.after = 0.0

    def __enter__(self) -> _Memory:
        self.before = self.highest = self._now()
        self._looking.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._looking.join()
        self.after = self._now()

    def _look(self) -> None:
        while not self._is_over.wait(0.02):
            self.highest = max(self.highest, self._now())

    def _now(self) -> float:
        return float(self._process.memory_info().rss) / MEGABYTE


def _upload(sdk: object, path: Path, name: str, size: int) -> None:
    code = f"name, path = {name!r}, {str(path)!r}\n{UPLOAD}"
    arrived = sdk.run(code).ok()  # type: ignore[attr-defined]
    if arrived != size:
        raise SystemExit(f"{arrived} bytes arrived instead of {size}")


def _cpu(process: psutil.Process) -> float:
    used = process.cpu_times()
    return float(used.user + used.system)


if __name__ == "__main__":
    raise SystemExit(main())
