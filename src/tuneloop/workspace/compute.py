"""Computes: places with capacity. In this version there is one, `local`: this machine."""

from __future__ import annotations

from collections.abc import Sequence

from tuneloop.core.ports import Clock, Store
from tuneloop.core.states import AttemptState
from tuneloop.core.types import AttemptRecord, Compute

ACTIVE = (AttemptState.CLAIMED, AttemptState.RUNNING)


class Computes:
    """What there is to run on, and what runs there now."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def declare_local(self, *, slots: int, cores: int, memory_bytes: int, gpus: int = 0) -> Compute:
        """Record this machine, or what has changed about it since the last start."""
        found = self._store.find(Compute, "local")
        if found is None:
            return self._store.insert(
                Compute(
                    created_at=self._clock.now(),
                    name="local",
                    slots=slots,
                    cores=cores,
                    memory_bytes=memory_bytes,
                    gpus=gpus,
                )
            )
        changed = found.model_copy(
            update={"slots": slots, "cores": cores, "memory_bytes": memory_bytes, "gpus": gpus}
        )
        return found if changed == found else self._store.update(changed)

    def get(self, name: str) -> Compute:
        return self._store.get(Compute, name)

    def list(self) -> Sequence[Compute]:
        return self._store.list(Compute)

    def active(self, name: str) -> Sequence[AttemptRecord]:
        """The attempts that hold a slot of this compute, oldest first."""
        attempts = self._store.list(AttemptRecord, states=ACTIVE)
        return [attempt for attempt in attempts if attempt.compute == name]

    def why_full(self, name: str) -> str | None:
        """None when a slot is free; otherwise who holds them, in a sentence."""
        compute = self.get(name)
        holders = self.active(name)
        if len(holders) < compute.slots:
            return None
        return _sentence(name, compute.slots, holders)


def _sentence(name: str, slots: int, holders: Sequence[AttemptRecord]) -> str:
    shown = ", ".join(holder.parent for holder in holders[:3])
    plural = "slot is" if slots == 1 else f"{slots} slots are"
    return f"waits for compute '{name}': its {plural} used by {shown}"
