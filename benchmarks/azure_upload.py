"""What an upload costs the server: CPU time and memory, with Azure's own client.

    make .azure/.installed
    .venv/bin/python benchmarks/azure_upload.py --folder /tmp/azure-upload [--repeats 3] [--megabytes 500]

A file of random bytes is sent by azure-storage-blob of the newest SDK as azure-ai-ml sends it: in blocks of
4 MiB, over 16 connections. Counted is the CPU time of the server's process, user and system, from the first
block to the answer to their list, TLS, checks and the copy into one file included, and how much its resident
memory has grown since before. Linux and macOS. Exit code 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.contract.azure.sdk import AzureWorld  # noqa: E402

MEGABYTE = 1_000_000
MEGABYTES = 500
GOAL_MEGABYTES_PER_SECOND = 200.0
GROWTH_BYTES = 64 * MEGABYTE
"""What may stay: 16 connections hold a batch of 1 MiB each, and TLS what it reads at once."""

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
    server = psutil.Process(world.server_pid())
    sdk = world.sdk("new")
    # Once, smaller: what is imported and allocated at the first request is no part of an upload.
    small = world.folder / "small.bin"
    small.write_bytes(os.urandom(80 * MEGABYTE))
    _upload(sdk, small, "warm", 80 * MEGABYTE)
    rates, growths = [], []
    for repeat in range(repeats):
        memory, before, began = server.memory_info().rss, _cpu(server), time.perf_counter()
        _upload(sdk, path, f"benchmark-{repeat}/upload.bin", size)
        seconds, wall = _cpu(server) - before, time.perf_counter() - began
        rates.append(size / MEGABYTE / seconds)
        growths.append((server.memory_info().rss - memory) / MEGABYTE)
        told = f"{seconds:.2f} s of CPU, {wall:.1f} s of wall time, memory {growths[-1]:+.1f} MB"
        print(f"  run {repeat + 1}: {told}", flush=True)
    path.unlink()
    print(
        f"{megabytes} MB uploaded: {statistics.median(rates):.0f} MB per second of server CPU "
        f"({min(rates):.0f} to {max(rates):.0f}, {repeats} repeats); goal {GOAL_MEGABYTES_PER_SECOND:g}",
        flush=True,
    )
    print(
        f"memory after an upload: {statistics.median(growths):+.1f} MB ({min(growths):+.1f} to "
        f"{max(growths):+.1f}); goal below {GROWTH_BYTES / MEGABYTE:g}",
        flush=True,
    )
    is_fast = statistics.median(rates) >= GOAL_MEGABYTES_PER_SECOND
    return is_fast and max(growths) * MEGABYTE < GROWTH_BYTES


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
