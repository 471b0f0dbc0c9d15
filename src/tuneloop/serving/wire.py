"""How the data plane says no: one exception, two JSON shapes (OpenAI's, and `/score`'s). Pure."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from typing import Any

DEPLOYMENT_HEADER = "azureml-model-deployment"
REPLICA_HEADER = "x-tuneloop-replica"
REQUEST_ID_HEADER = "x-request-id"
WARNING_HEADER = "x-tuneloop-warning"

BODY_BYTES = 32 * 1024 * 1024
"""The largest request that is read."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Refused(Exception):
    """A request that gets an error instead of a reply. `param` names the field that is wrong."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = dict(headers or {})


def invalid(param: str, message: str) -> Refused:
    """A field whose value cannot be obeyed."""
    return Refused(400, "invalid_value", f"{param}: {message}", param=param)


def unsupported(param: str, message: str) -> Refused:
    """A field that is understood, and refused rather than ignored."""
    return Refused(400, "unsupported", f"{param}: {message}", param=param)


def too_large(limit_bytes: int) -> Refused:
    return Refused(
        413, "too_large", f"The request is larger than {limit_bytes} bytes, the most that is read."
    )


def openai_error(error: Refused) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`."""
    return {
        "error": {
            "message": error.message,
            "type": _openai_type(error.status),
            "param": error.param,
            "code": error.code,
        }
    }


def score_error(error: Refused) -> dict[str, Any]:
    """`{"error": {"code", "message"}}`."""
    return {"error": {"code": error.code, "message": error.message}}


def error_body(path: str, error: Refused) -> dict[str, Any]:
    """In the shape of the API that `path` belongs to."""
    return openai_error(error) if "/v1/" in path else score_error(error)


def error_event(error: Refused) -> bytes:
    """The last event of a stream that broke. The blank line first ends an event that was cut in half."""
    return b"\n\ndata: " + json.dumps(openai_error(error)).encode() + b"\n\n"


def _openai_type(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def request_id(given: str | None) -> str:
    """The caller's own id when it is a harmless one, else a new one."""
    return given if given and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. Refuses what JSON does not know (NaN, Infinity) and broken UTF-8."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as mistake:
        raise Refused(
            400, "invalid_json", f"The body is not UTF-8: {mistake.reason} at byte {mistake.start}."
        ) from None
    except RecursionError:
        raise Refused(400, "invalid_json", "The body is nested too deeply.") from None
    except ValueError as mistake:
        raise Refused(400, "invalid_json", f"The body is not JSON: {mistake}.") from None
    if not isinstance(value, dict):
        raise Refused(400, "invalid_json", f"The body is a JSON {_kind(value)}, expected an object.")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _kind(value: object) -> str:
    names = {list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
