"""Who trains together, by environment variables: a person's, Slurm's, or whatever starts the machines.

TUNELOOP_NODES                 machines that train together, this one included (1)
TUNELOOP_NODE_ADDRESS          this machine's address among them
TUNELOOP_NODE_PORT             where the first machine waits for the others (29471); the next one is torch's
TUNELOOP_NODE_SECRET           a secret that all of them hold, at least 16 characters
TUNELOOP_NODE_WAIT_SECONDS     how long a step waits for all of them to come (120)
TUNELOOP_JOIN_SECONDS          how long a run's processes may take to start, imports included (60)
TUNELOOP_ALL_REDUCE_SECONDS    how long they may take to reach each other (10)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from tuneloop.core.errors import Unsupported, UsageError

LEAST_SECRET = 16
HOW_TO_MAKE_ONE = "python -c 'import secrets; print(secrets.token_hex(16))'"


@dataclass(frozen=True)
class Settings:
    nodes: int = 1
    address: str = ""
    port: int = 29471
    secret: str = ""
    wait_seconds: float = 120
    join_seconds: float = 60
    all_reduce_seconds: float = 10


def read(environment: Mapping[str, str]) -> Settings:
    """Raises `UsageError` for a value of the wrong kind."""
    return Settings(
        nodes=_whole(environment, "TUNELOOP_NODES", Settings.nodes, 1, 10_000),
        address=environment.get("TUNELOOP_NODE_ADDRESS", ""),
        port=_whole(environment, "TUNELOOP_NODE_PORT", Settings.port, 1, 65534),
        secret=environment.get("TUNELOOP_NODE_SECRET", ""),
        wait_seconds=_whole(environment, "TUNELOOP_NODE_WAIT_SECONDS", 120, 1, 86400),
        join_seconds=_whole(environment, "TUNELOOP_JOIN_SECONDS", 60, 1, 86400),
        all_reduce_seconds=_whole(environment, "TUNELOOP_ALL_REDUCE_SECONDS", 10, 1, 3600),
    )


def _whole(environment: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    written = environment.get(name, "")
    if not written:
        return default
    if not written.isdigit() or not least <= int(written) <= most:
        raise UsageError(f"{name} is {written!r}; expected a whole number from {least} to {most}.")
    return int(written)


def require_host(settings: Settings) -> None:
    """What the first machine of several needs. Raises `Unsupported` with all that is missing."""
    found = []
    if settings.address not in addresses():
        given = f"is {settings.address!r}" if settings.address else "is not set"
        found.append(
            f"TUNELOOP_NODE_ADDRESS {given}; this machine has {', '.join(sorted(addresses()))}. Name the one "
            "under which the other machines reach it."
        )
    found += weak_secret(settings.secret)
    if found:
        raise Unsupported(f"TUNELOOP_NODES is {settings.nodes}. {' '.join(found)}", details=found)


def weak_secret(secret: str) -> list[str]:
    if len(secret) >= LEAST_SECRET:
        return []
    return [
        f"TUNELOOP_NODE_SECRET has {len(secret)} characters, and at least {LEAST_SECRET} are needed, the "
        f"same on all machines: {HOW_TO_MAKE_ONE}"
    ]


def addresses() -> dict[str, str]:
    """The addresses of this machine, and the interface of each."""
    return {
        entry.address.partition("%")[0]: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family.name in ("AF_INET", "AF_INET6")
    }


def interface_of(address: str) -> str | None:
    """What GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME have to say for `address`."""
    return addresses().get(address)
