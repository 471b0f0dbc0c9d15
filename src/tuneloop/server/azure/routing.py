"""The operations of the dialect: method, address, what answers, and what the SDK calls it.

Addresses match whatever their case and whatever `api-version` says, as Azure's do; names keep the spelling
that was sent. `coverage` reads this table, so an operation that is not in it does not exist.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from tuneloop.server.azure.bodies import Body

if TYPE_CHECKING:
    from tuneloop.server.azure.gateway import Gateway
    from tuneloop.server.azure.tokens import Caller

_PROVIDER = "/providers/Microsoft.MachineLearningServices"
SHORTHANDS: Mapping[str, str] = {
    "{ws}": "/subscriptions/{subscription}/resourceGroups/{group}" + _PROVIDER + "/workspaces/{workspace}",
    "{reg}": "/mferp/managementfrontend/subscriptions/{subscription}/resourceGroups/{group}"
    + _PROVIDER
    + "/registries/{registry}",
}
"""What addresses begin with: a workspace of Azure's resource manager, a registry of its data plane."""

Audience = str
ARM, ML = "arm", "ml"
"""Whom a token must be for: the resource manager, or Azure ML's own services (either is taken there)."""
OPEN = "open"
"""No token: the address is public, or carries a secret of its own."""
ANY = "*"
"""Every method: of what is refused whatever is asked."""


@dataclass(frozen=True)
class Request:
    """What a handler is given."""

    http: HttpRequest
    params: Mapping[str, str]
    """The parts of the address, decoded, as they were spelled."""
    query: Mapping[str, str]
    """By lower-case name."""
    body: Body
    caller: Caller | None

    def __getitem__(self, name: str) -> str:
        return self.params[name]

    @property
    def workspace_id(self) -> str:
        """As the caller spells it."""
        return SHORTHANDS["{ws}"].format(**self.params)

    @property
    def registry_id(self) -> str:
        return SHORTHANDS["{reg}"].format(**self.params).removeprefix("/mferp/managementfrontend")


@dataclass(frozen=True)
class Answer:
    """JSON; None: no body."""

    body: Any = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


Handler = Callable[["Gateway", Request], Answer | Response]
RawHandler = Callable[["Gateway", HttpRequest, Mapping[str, str]], Any]
"""A coroutine: it reads the body itself, such as an upload."""


@dataclass(frozen=True)
class Operation:
    method: str
    pattern: str
    name: str
    handler: Callable[..., Any]
    audience: Audience
    is_raw: bool
    regex: re.Pattern[str]

    @property
    def summary(self) -> str:
        return (self.handler.__doc__ or "").strip().split("\n")[0]


class Routes:
    """A module's part of the table."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []

    def add(
        self, method: str, pattern: str, *, name: str = "", audience: Audience = ARM
    ) -> Callable[[Handler], Handler]:
        """Register a handler that gets a whole JSON body; it runs in a thread. `name` is the handler's,
        unless several addresses share it."""

        def register(handler: Handler) -> Handler:
            self._put(method, pattern, name or handler.__name__, handler, audience, is_raw=False)
            return handler

        return register

    def raw(self, method: str, pattern: str, *, name: str = "") -> Callable[[RawHandler], RawHandler]:
        """Register a coroutine that reads the request itself and checks by itself who asks."""

        def register(handler: RawHandler) -> RawHandler:
            self._put(method, pattern, name or handler.__name__, handler, OPEN, is_raw=True)
            return handler

        return register

    def _put(
        self,
        method: str,
        pattern: str,
        name: str,
        handler: Callable[..., Any],
        audience: str,
        *,
        is_raw: bool,
    ) -> None:
        self.operations.append(
            Operation(method, pattern, name, handler, audience, is_raw, _compiled(pattern))
        )


def _compiled(pattern: str) -> re.Pattern[str]:
    """`{name}` is one part of an address, `{name:path}` the rest of it."""
    for short, long in SHORTHANDS.items():
        pattern = pattern.replace(short, long)
    parts = re.split(r"(\{\w+(?::path)?\})", pattern)
    text = "".join(
        (f"(?P<{part[1:-6]}>.*)" if part.endswith(":path}") else f"(?P<{part[1:-1]}>[^/]+)")
        if part.startswith("{")
        else re.escape(part)
        for part in parts
    )
    return re.compile(text + "/?", re.IGNORECASE)


class Table:
    """All operations; the first that matches answers."""

    def __init__(self, routes: Sequence[Routes]) -> None:
        self.operations: tuple[Operation, ...] = tuple(one for each in routes for one in each.operations)
        names = [one.name for one in self.operations]
        assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)

    def find(self, method: str, path: str) -> tuple[Operation, dict[str, str]] | Sequence[str]:
        """The operation and the parts of the address; or the methods that the address has."""
        others = []
        for one in self.operations:
            found = one.regex.fullmatch(path)
            if found and one.method in (method, ANY):
                return one, found.groupdict()
            if found:
                others.append(one.method)
        return sorted(set(others))
