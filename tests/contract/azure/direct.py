"""Requests without the SDK: what it never sends, and what a server should say to it."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterator
from typing import Any

import httpx

from tests.contract.azure.sdk import AzureWorld

WORKSPACE = "/subscriptions/s/resourceGroups/g/providers/Microsoft.MachineLearningServices/workspaces/local"


@contextlib.contextmanager
def speaking_to(world: AzureWorld) -> Iterator[httpx.Client]:
    """A client of a world's listener, with a token as a managed identity gets it."""
    trusted = ssl.create_default_context(cafile=str(world.azure_folder / "bundle.pem"))
    secret = (world.azure_folder / "identity").read_text(encoding="utf-8").strip()
    with httpx.Client(base_url=world.url, verify=trusted, trust_env=False, timeout=60) as client:
        answer = client.get(
            "/msi/token", params={"resource": world.url}, headers={"X-IDENTITY-HEADER": secret}
        )
        client.headers["Authorization"] = f"Bearer {answer.json()['access_token']}"
        yield client


def refusal(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The error of a response, in Azure's shape with nothing missing."""
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"code", "message", "target", "details"}
    assert (error["code"], response.headers["x-ms-error-code"]) == (code, code), error
    return error


def warnings_of(world: AzureWorld, about: str) -> list[str]:
    """What `tuneloop azure run` would show of something (`compute cluster`), oldest first."""
    found, last = [], 0
    while page := world.client.azure_warnings(last):
        found += [one["text"] for one in page if one["about"] == about]
        last = page[-1]["number"]
    return found
