"""What the dialect of Azure costs: the document's calls, the metadata, a list of 1,000 jobs.

    make .azure/.installed
    .venv/bin/python benchmarks/azure.py --folder /tmp/azure [--repeats 3] [--only document|metadata|jobs]

The document's script (tests/contract/azure/document.py) runs with the newest SDK as a process of its own on a
tiny model; what is counted is its wall time, the interpreter's start and the SDK's imports included, without
the time in which steps run (`jobs.stream`) and the model starts (the deployment's `wait`), and without the
download. Server time is the CPU time of the server's process, user and system. Uploads: `azure_upload.py`.
Linux and macOS. Exit code 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.contract.azure.sdk import AzureWorld  # noqa: E402
from tests.contract.azure.test_document import lay_out  # noqa: E402

from tuneloop.adapters.sql import SqlStore  # noqa: E402
from tuneloop.core.states import JobState, StepState  # noqa: E402
from tuneloop.core.types import JobRecord, StepRecord  # noqa: E402

DOCUMENT_SECONDS = 8.0
METADATA_SECONDS = 0.005
JOBS_SECONDS = 0.3
JOBS = 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, required=True, help="where the workspace is made; emptied first"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["document", "metadata", "jobs"])
    given = parser.parse_args()
    shutil.rmtree(given.folder, ignore_errors=True)
    world = AzureWorld(given.folder / "world")
    measures: dict[str, Callable[[AzureWorld, int], bool]] = {
        "document": document,
        "metadata": metadata,
        "jobs": jobs,
    }
    try:
        wanted = [given.only] if given.only else list(measures)
        reached = [measures[name](world, given.repeats) for name in wanted]
        return int(not all(reached))
    finally:
        world.take_down()


def document(world: AzureWorld, repeats: int) -> bool:
    """Wall seconds of the calls."""
    import json

    found = []
    for repeat in range(repeats):
        folder = lay_out(world.folder / f"document-{repeat}", world.azure_folder / "config.json")
        began = time.perf_counter()
        ran = world.run_file(folder / "document.py")
        wall = time.perf_counter() - began
        if ran.returncode:
            raise SystemExit(ran.stdout[-2000:] + ran.stderr[-4000:])
        laps = json.loads(ran.stdout.strip().splitlines()[-1])["laps"]
        waited = {
            "steps": laps["trained"] - laps["submitted"],
            "model start": laps["deployed"] - laps["endpoint"],
            "download": laps["data"] - laps["prepared"],
        }
        found.append(wall - sum(waited.values()))
        told = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in waited.items())
        imports = wall - (laps["deleted"] - laps["start"])
        told = f"{wall:.1f} s, of which {told}; start and imports {imports:.1f} s"
        print(f"  run {repeat + 1}: {told}", flush=True)
    return _judge("the document's calls", found, DOCUMENT_SECONDS, "s")


def metadata(world: AzureWorld, repeats: int) -> bool:
    """Seconds of one request, as its caller waits: over a connection that is open, and over a new one."""
    address = f"{world.url}/metadata/endpoints"
    bundle = str(world.azure_folder / "ca.pem")
    kept, fresh = [], []
    for _ in range(repeats):
        with httpx.Client(verify=bundle, trust_env=False) as client:
            client.get(address).raise_for_status()
            kept.append(statistics.median(_seconds(lambda c=client: c.get(address)) for _ in range(300)))
        context = httpx.create_ssl_context(verify=bundle)

        def alone(context: object = context) -> httpx.Response:
            with httpx.Client(verify=context, trust_env=False) as one:  # type: ignore[arg-type]
                return one.get(address)

        fresh.append(statistics.median(_seconds(alone) for _ in range(50)))
    _tell("metadata over a new connection, handshake included (median of 50)", fresh, "s", None)
    return _judge("metadata over an open connection (median of 300)", kept, METADATA_SECONDS, "s")


def jobs(world: AzureWorld, repeats: int) -> bool:
    """CPU seconds of the server while the SDK lists 1,000 jobs."""
    _fill(world)
    server = psutil.Process(world.server_pid())
    sdk = world.sdk("new")
    found = []
    for _ in range(repeats + 1):
        before = _cpu(server)
        count = sdk.run("result = len(list(ml.jobs.list()))").ok()
        found.append(_cpu(server) - before)
        if count < JOBS:
            raise SystemExit(f"{count} jobs came back")
    # The first one may find cold caches, as a person would: it is told, and judged with the others.
    return _judge(f"{JOBS} jobs listed (server CPU)", found, JOBS_SECONDS, "s")


def _fill(world: AzureWorld) -> None:
    """Ended jobs, copies of one that ran."""
    name = world.submit()
    world.wait_until_ended(name)
    store = SqlStore.open(world.settings.database)
    try:
        record = store.get(JobRecord, name)
        steps = store.list(StepRecord, parent=name)
        with store.transaction():
            for number in range(JOBS):
                at = datetime.now(UTC) - timedelta(hours=1)
                copy = record.job.model_copy(update={"name": f"copy_{number:04d}"})
                store.insert(
                    JobRecord(
                        created_at=at, job=copy, state=JobState.COMPLETED, started_at=at, finished_at=at
                    )
                )
                for step in steps:
                    assert step.state in (StepState.SUCCEEDED, StepState.REUSED)
                    store.insert(step.model_copy(update={"job": copy.name, "version": 0}))
    finally:
        store.close()


def _seconds(call: Callable[[], httpx.Response]) -> float:
    began = time.perf_counter()
    call().raise_for_status()
    return time.perf_counter() - began


def _cpu(process: psutil.Process) -> float:
    used = process.cpu_times()
    return float(used.user + used.system)


def _tell(what: str, found: list[float], unit: str, goal: float | None) -> None:
    scale, shown = (1000, "ms") if max(found) < 0.1 else (1, unit)
    places = 2 if scale == 1 and max(found) < 1 else 1
    told = f"{what}: {statistics.median(found) * scale:.{places}f} {shown}"
    told += f" ({min(found) * scale:.{places}f} to {max(found) * scale:.{places}f}, {len(found)} repeats)"
    print(told + ("" if goal is None else f"; goal {goal * scale:g} {shown}"), flush=True)


def _judge(what: str, found: list[float], goal: float, unit: str) -> bool:
    _tell(what, found, unit, goal)
    return statistics.median(found) < goal


if __name__ == "__main__":
    raise SystemExit(main())
