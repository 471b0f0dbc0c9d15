"""What the handlers of the dialect share: the workspace, addresses, secrets, what only the dialect knows."""

from __future__ import annotations

import hashlib
import hmac
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tuneloop.core.types import AzureRecord, Event
from tuneloop.server.azure.tokens import Tokens
from tuneloop.server.parts import Parts

REGISTRY = "azureml"
"""The system registry: our catalogue."""
LOCATION = "local"
WARNINGS = "azure/warnings"
"""Events under this subject are what a script should know; `tuneloop azure run` shows them at its end."""


@dataclass(frozen=True)
class Gateway:
    parts: Parts
    base_url: str
    """`https://127.0.0.1:8443`, without a slash at its end."""
    folder: Path
    """`azure/` of the home: what was uploaded, and the files of the listener."""
    secret: bytes
    """The home's; only derived keys leave this class."""
    tokens: Tokens
    identity_secret: str
    """What `IDENTITY_HEADER` must hold; also a client's secret."""
    is_loose: bool = False
    """The setting `azure_loose`: fields that would be ignored are warnings instead of refusals."""
    locks: dict[str, threading.Lock] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def host(self) -> str:
        """`127.0.0.1:8443`."""
        return self.base_url.removeprefix("https://")

    def lock(self, name: str) -> threading.Lock:
        """One for each name; held while several records are read and written."""
        with self._lock:
            return self.locks.setdefault(name, threading.Lock())

    def key(self, purpose: str) -> bytes:
        """A key for one purpose, derived from the home's secret."""
        return hmac.new(self.secret, f"azure {purpose}".encode(), hashlib.sha256).digest()

    def signature(self, purpose: str, text: str) -> str:
        """Hex; what proves that an address was made here (log links)."""
        return hmac.new(self.key(purpose), text.encode(), hashlib.sha256).hexdigest()

    def now(self) -> datetime:
        return datetime.now(UTC)

    def warn(self, about: str, *texts: str) -> None:
        """Something is done in another way than Azure does it; `about` says of what (`job calm_fox_1`)."""
        for text in texts:
            self.parts.store.append(Event(at=self.now(), subject=WARNINGS, what=text, data={"about": about}))

    # ------------------------------------------------------------ what only the dialect knows

    def recall(self, collection: str, name: str) -> dict[str, Any] | None:
        """What was remembered of something: names match whatever their case."""
        found = self.parts.store.find(AzureRecord, _key(collection, name))
        return None if found is None else dict(found.body)

    def remember(self, collection: str, name: str, body: Mapping[str, Any]) -> None:
        """Replace what is remembered."""
        store = self.parts.store
        with store.transaction():
            found = store.find(AzureRecord, _key(collection, name))
            if found is None:
                record = AzureRecord(created_at=self.now(), collection=collection, name=name, body=dict(body))
                store.insert(record)
            else:
                store.update(found.model_copy(update={"body": dict(body)}))

    def forget(self, collection: str, name: str) -> None:
        """Nothing happens when nothing is remembered."""
        store = self.parts.store
        with store.transaction():
            found = store.find(AzureRecord, _key(collection, name))
            if found is not None:
                store.delete(found)

    def remembered(self, collection: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Name and body, newest first."""
        for record in self.parts.store.list(AzureRecord, parent=collection, newest_first=True):
            yield record.name, dict(record.body)


def _key(collection: str, name: str) -> str:
    return f"{collection}/{name.lower()}"
