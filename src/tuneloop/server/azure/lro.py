"""Operations that take a while, told the way azure-core asks: from records, so that nothing is lost with a
server that ends in between.

A PUT is answered with `Azure-AsyncOperation`, an address with `{"status": ...}`; azure-core looks there at
once, then after each `Retry-After`, and fetches the resource at the end. Anything else is answered with
`Location`: 202 while it goes on, then what became of it. `Retry-After` is whole seconds, at least one; what
is done within a moment is therefore waited for here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

from tuneloop.core.types import ErrorInfo
from tuneloop.server.azure.routing import Answer

Status = Literal["InProgress", "Succeeded", "Failed", "Canceled"]

MOMENT_SECONDS = 0.8
RETRY = {"Retry-After": "1"}


def settles(is_done: Callable[[], bool], seconds: float = MOMENT_SECONDS) -> bool:
    """Whether it is done within a moment."""
    give_up = time.monotonic() + seconds
    while not is_done():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.02)
    return True


def accepted(body: Any, status_address: str, *, is_new: bool) -> Answer:
    """Of a PUT that goes on."""
    headers = {"Azure-AsyncOperation": status_address, **RETRY}
    return Answer(body, 201 if is_new else 200, headers)


def goes_on(address: str) -> Answer:
    """Of a POST or DELETE, and of its address while it goes on."""
    return Answer(None, 202, {"Location": address, **RETRY})


def status(
    name: str, found: Status, error: ErrorInfo | None = None, code: str = "InternalServerError"
) -> Answer:
    """At the address that `accepted` gave."""
    body: dict[str, Any] = {"name": name, "status": found}
    if error is not None and found == "Failed":
        told = " ".join(part for part in (error.message, error.next) if part)
        body["error"] = {"code": code, "message": told, "details": [{"code": error.code, "message": told}]}
    return Answer(body, headers=RETRY if found == "InProgress" else {})
