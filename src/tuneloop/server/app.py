"""The application: routes, the guard in front of them, and one shape for every error."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from tuneloop import __version__
from tuneloop.core.errors import Internal, NotFound, TuneloopError, UsageError
from tuneloop.server.api import catalog, endpoints, jobs, models, system
from tuneloop.server.parts import Parts
from tuneloop.server.security import Guard

log = logging.getLogger(__name__)


def create_app(parts: Parts) -> FastAPI:
    app = FastAPI(title="Tuneloop", version=__version__, docs_url=None, redoc_url=None)
    for module in (system, catalog, jobs, models, endpoints):
        app.include_router(module.routes(parts), prefix="/api")
    app.add_exception_handler(TuneloopError, _known)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)
    app.add_middleware(Guard, token=parts.token)
    return app


def _response(error: TuneloopError, status: int | None = None) -> JSONResponse:
    return JSONResponse({"error": error.to_json()}, status_code=status or error.http_status)


async def _known(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, TuneloopError)
    return _response(error)


async def _invalid(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    details: list[dict[str, Any]] = [
        {"field": ".".join(str(part) for part in found["loc"][1:]), "message": found["msg"]}
        for found in error.errors()
    ]
    said = "; ".join(f"{found['field'] or 'body'}: {found['message']}" for found in details)
    return _response(UsageError(f"The request is not as expected: {said}.", details=details))


async def _http(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return _response(NotFound("There is no such address in the API.", next_move="See /openapi.json"))
    return _response(UsageError(str(error.detail)), error.status_code)


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _response(
        Internal(
            f"{type(error).__name__}: {error}", next_move="The traceback is in logs/server.log of the home."
        )
    )
