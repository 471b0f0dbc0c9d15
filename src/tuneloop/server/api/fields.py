"""What callers may write, as types: limits that are checked here, and rules of `core.names` that are
described here and checked there, with their own words."""

from __future__ import annotations

import os
from pathlib import Path as FilePath
from typing import Annotated

from fastapi import Path, Query
from pydantic import Field

from tuneloop.core.errors import UsageError
from tuneloop.core.names import ENDPOINT, NAME, VERSION

GREATEST = 2**63 - 1
"""What the store and the files can count to."""

Name = Annotated[str, Path(max_length=300)]
"""Of something that is there already: found or not, never used as a path."""
FileName = Annotated[str, Path(max_length=4096)]
MaybeName = Annotated[str | None, Query(max_length=300)]
Offset = Annotated[int, Query(ge=0, le=GREATEST)]
Number = Annotated[int, Query(ge=1, le=GREATEST)]
Lines = Annotated[int, Query(ge=1, le=10_000)]
Limit = Annotated[int, Query(ge=1, le=1_000_000)]
Word = Annotated[str, Query(max_length=1000)]


def _described(pattern: str) -> dict[str, object]:
    return {"pattern": f"^{pattern}$"}


NewName = Annotated[str, Field(json_schema_extra=_described(NAME.pattern))]
NewVersion = Annotated[str, Field(json_schema_extra=_described(VERSION.pattern))]
NewEndpoint = Annotated[str, Field(json_schema_extra=_described(ENDPOINT.pattern))]
Description = Annotated[str, Field(max_length=20_000)]
Tags = Annotated[
    dict[Annotated[str, Field(max_length=250)], Annotated[str, Field(max_length=5_000)]],
    Field(max_length=100),
]
Folder = Annotated[str, Field(max_length=4096, json_schema_extra={"pattern": "^/"})]
Text = Annotated[str, Field(max_length=1_000_000)]
Shown = Annotated[str, Field(max_length=1000)]
"""What mistakes call a file."""


def folder(written: str, what: str = "folder") -> FilePath:
    """An absolute path that can be looked at, whether something is there or not. Raises `UsageError`."""
    path = FilePath(written)
    if not path.is_absolute():
        raise UsageError(f"{what} is {written!r}; expected an absolute path.")
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as broken:
        raise UsageError(f"The {what} {written[:200]} cannot be looked at: {broken.strerror}.") from None
    return path
