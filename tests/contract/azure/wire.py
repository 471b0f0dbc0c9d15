"""Requests that the SDK never sends, over HTTPS with the listener's own authority."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import httpx

from tests.contract.azure.direct import speaking_to
from tests.contract.azure.sdk import AzureWorld

WORKSPACE = (
    "/subscriptions/00000000-0000-0000-0000-000000000000/resourceGroups/tuneloop"
    "/providers/Microsoft.MachineLearningServices/workspaces/local"
)


class Wire:
    """A client with a token of the managed identity."""

    def __init__(self, azure: AzureWorld) -> None:
        self._stack = contextlib.ExitStack()
        self.api = self._stack.enter_context(speaking_to(azure))
        self.token = self.api.headers["authorization"].removeprefix("Bearer ")

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def get(self, path: str) -> httpx.Response:
        return self.api.get(path)

    def put(self, path: str, body: Any) -> httpx.Response:
        return self.api.put(path, json=body)

    def post(self, path: str, body: Any = None) -> httpx.Response:
        return self.api.post(path, json=body)

    def delete(self, path: str) -> httpx.Response:
        return self.api.delete(path)

    @staticmethod
    def error(answer: httpx.Response, status: int) -> tuple[str, str | None]:
        """Code and target of an error with this status, in Azure's shape."""
        assert answer.status_code == status, (answer.status_code, answer.text)
        error = answer.json()["error"]
        assert set(error) == {"code", "message", "target", "details"}
        assert error["message"]
        return error["code"], error["target"]

    def finished(self, made: httpx.Response, seconds: float = 120) -> dict[str, Any]:
        """What the operation that a PUT began came to."""
        assert int(made.headers["retry-after"]) >= 1
        give_up = time.monotonic() + seconds
        while time.monotonic() < give_up:
            found: dict[str, Any] = self.get(made.headers["azure-asyncoperation"]).json()
            if found["status"] != "InProgress":
                return found
            time.sleep(0.1)
        raise AssertionError(f"not finished after {seconds} s")

    def vanished(self, deleted: httpx.Response, seconds: float = 60) -> None:
        """Until the operation that a DELETE began is over."""
        give_up = time.monotonic() + seconds
        while time.monotonic() < give_up:
            found = self.get(deleted.headers["location"])
            if found.status_code != 202:
                assert found.status_code == 200, found.text
                return
            time.sleep(0.1)
        raise AssertionError(f"not gone after {seconds} s")
