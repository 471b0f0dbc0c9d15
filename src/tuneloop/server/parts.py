"""What the server's routes work with; `daemon` puts it together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from tuneloop.core.ports import Executor, Files, Store
from tuneloop.core.settings import Settings
from tuneloop.workspace.catalog import Catalog
from tuneloop.workspace.compute import Computes
from tuneloop.workspace.data import Data
from tuneloop.workspace.endpoints import Endpoints
from tuneloop.workspace.jobs import Jobs
from tuneloop.workspace.models import Models


@dataclass(frozen=True)
class AzureStatus:
    url: str | None
    """None: it is closed."""
    folder: Path
    """Where certificates, `config.json` and the identity's secret lie."""
    is_loose: bool


class AzureControl(Protocol):
    """Opens and closes the HTTPS listener."""

    def up(self) -> AzureStatus: ...

    def down(self) -> AzureStatus: ...

    def status(self) -> AzureStatus: ...


@dataclass(frozen=True)
class Parts:
    settings: Settings
    home_id: str
    token: str
    started_at: datetime
    store: Store
    files: Files
    executor: Executor
    catalog: Catalog
    computes: Computes
    data: Data
    jobs: Jobs
    models: Models
    endpoints: Endpoints
    wake: Callable[[], None]
    """Tell the reconciler that there is something new."""
    shut_down: Callable[[str], None]
    """`all` or `server`: begin to end; returns at once."""
    azure: AzureControl | None = None
    current_token: Callable[[], str] | None = None
    """The token as its file has it now; without it `token` stands."""

    @property
    def home(self) -> Path:
        return self.settings.home
