"""The processes of a home that are alive, with their memory and ports: what `status` and `demo` report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tuneloop.cli import session
from tuneloop.core.machine import peak_resident_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tuneloop.cli.session import RecordedProcess, Session


def alive(home: Path) -> list[RecordedProcess]:
    return [process for process in session.recorded_processes(home) if process.is_alive]


def measure(home: Path, connection: Session | None, status: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Server first, then what it started, as far as alive; helpers that are down are listed too.

    `{name, pid, memory_bytes, peak_memory_bytes, port, state}` each.
    """
    rows = []
    if connection is not None and status is not None:
        rows.append(_row("server", status["pid"], urlsplit(connection.client.url).port, "running"))
    services = {one["name"]: one for one in (status or {}).get("services", [])}
    ports = _replica_ports(connection)
    seen = set()
    for process in alive(home):
        service = services.get(process.name, {})
        seen.add(process.name)
        port = service.get("port") or ports.get(process.name, (None, None))[0]
        state = service.get("state") or ports.get(process.name, (None, "running"))[1]
        rows.append(_row(process.name, process.pid, port, str(state)))
    rows += [
        _row(name, None, one.get("port"), one["state"]) for name, one in services.items() if name not in seen
    ]
    return rows


def _row(name: str, pid: int | None, port: int | None, state: str) -> dict[str, Any]:
    now, peak = (None, None) if pid is None else memory(pid)
    return {
        "name": name,
        "pid": pid,
        "memory_bytes": now,
        "peak_memory_bytes": peak,
        "port": port,
        "state": state,
    }


def memory(pid: int) -> tuple[int | None, int | None]:
    """(bytes held now, the most that were held) of a process; None where it cannot be told."""
    import psutil

    try:
        now = int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return None, None
    return now, max(now, peak_resident_bytes(pid) or 0)


def _replica_ports(connection: Session | None) -> dict[str, tuple[int | None, str]]:
    """`replica E/D/N` -> (port, state), for every replica that the server knows."""
    if connection is None:
        return {}
    found = {}
    for endpoint in connection.client.endpoints():
        for deployment in endpoint["deployments"]:
            for replica in deployment["replica_states"]:
                name = f"replica {endpoint['name']}/{deployment['name']}/{replica['number']}"
                address = replica["address"]
                found[name] = (urlsplit(address).port if address else None, replica["state"])
    return found
