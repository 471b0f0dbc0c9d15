"""The application: routes, the guard in front of them, and one shape for every error."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from tuneloop import __version__
from tuneloop.core import disk
from tuneloop.core.errors import Internal, NotFound, TuneloopError, UsageError
from tuneloop.server.api import azure, catalog, datasets, endpoints, jobs, models, system
from tuneloop.server.parts import Parts
from tuneloop.server.security import OPEN_PATHS, Guard, error_json

log = logging.getLogger(__name__)


class ErrorBody(BaseModel):
    code: str
    message: str
    next: str | None = Field(description="What to do now: a sentence, or a command.")
    details: Any = Field(description="For programs; a list of mistakes where there can be several.")


class ErrorAnswer(BaseModel):
    """What every error looks like."""

    error: ErrorBody


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "Refused; `code` says why."},
    "5XX": {"model": ErrorAnswer, "description": "A defect, or something that is not there right now."},
}


class Api(FastAPI):
    """Says in its description that it wants the token, and where not."""

    def openapi(self) -> dict[str, Any]:
        if not self.openapi_schema:
            described = super().openapi()
            schemes = described.setdefault("components", {}).setdefault("securitySchemes", {})
            schemes["token"] = {"type": "http", "scheme": "bearer"}
            described["security"] = [{"token": []}]
            for path in OPEN_PATHS:
                for operation in described["paths"][path].values():
                    operation["security"] = []
        assert self.openapi_schema is not None
        return self.openapi_schema


def create_app(parts: Parts) -> FastAPI:
    app = Api(title="Tuneloop", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    for module in (system, catalog, datasets, jobs, models, endpoints, azure):
        app.include_router(module.routes(parts), prefix="/api", responses=ERRORS)
    app.add_exception_handler(TuneloopError, _known)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(OSError, _of_the_disk)
    app.add_exception_handler(Exception, _unexpected)
    app.add_middleware(Guard, token=parts.token, current=parts.current_token)
    return app


def _response(
    error: TuneloopError, status: int | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    # In ASCII: a value that is quoted may hold half of a surrogate pair, which UTF-8 does not know.
    return Response(
        error_json(error), status or error.http_status, headers=headers, media_type="application/json"
    )


async def _known(_request: Request, error: Exception) -> Response:
    assert isinstance(error, TuneloopError)
    return _response(error)


async def _invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    details: list[dict[str, Any]] = [
        {"field": ".".join(str(part) for part in found["loc"][1:]), "message": found["msg"]}
        for found in error.errors()
    ]
    said = "; ".join(f"{found['field'] or 'body'}: {found['message']}" for found in details)
    return _response(UsageError(f"The request is not as expected: {said}.", details=details))


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return _response(NotFound("There is no such address in the API.", next_move="See /openapi.json"))
    headers = {**(error.headers or {}), **_allowed(request)} if error.status_code == 405 else error.headers
    return _response(UsageError(f"{error.detail}."), error.status_code, headers)


def _allowed(request: Request) -> dict[str, str]:
    """Every method that an address has; the framework tells those of its first route only."""
    for path, methods in request.app.openapi()["paths"].items():
        if compile_path(path)[0].fullmatch(request.url.path):
            return {"allow": ", ".join(sorted(method.upper() for method in methods))}
    return {}


async def _of_the_disk(request: Request, error: Exception) -> Response:
    known = disk.explain(error, Path(getattr(error, "filename", None) or "/"))
    return await _unexpected(request, error) if known is None else _response(known)


async def _unexpected(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _response(
        Internal(
            f"{type(error).__name__}: {error}", next_move="The traceback is in logs/server.log of the home."
        )
    )
