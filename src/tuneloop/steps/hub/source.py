"""What is asked of the hub: a repository of a model or of a dataset, at a revision."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from tuneloop.core.types import HubSource

Kind = Literal["model", "dataset"]

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class DatasetSource:
    """A dataset repository. `revision` is a branch, a tag, `refs/...` or a commit."""

    repository: str
    revision: str = "main"

    @property
    def is_pinned(self) -> bool:
        return _COMMIT.fullmatch(self.revision) is not None


Source = HubSource | DatasetSource


def kind_of(source: Source) -> Kind:
    return "dataset" if isinstance(source, DatasetSource) else "model"


def path_of(source: Source) -> str:
    """Where its page is, below the hub's address."""
    return f"datasets/{source.repository}" if isinstance(source, DatasetSource) else source.repository
