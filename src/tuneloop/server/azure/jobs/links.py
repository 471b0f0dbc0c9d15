"""Addresses under which a browser and the SDK's `stream` read a run without a token: they hold a secret."""

from __future__ import annotations

import hmac
from urllib.parse import quote

from tuneloop.server.azure.gateway import Gateway

STD_LOG = "user_logs/std_log.txt"
"""The one that `stream` prints."""


def log_link(gateway: Gateway, run: str, path: str) -> str:
    return f"{gateway.base_url}/logs/{run}/{gateway.signature('logs', run)}/{quote(path)}"


def page_link(gateway: Gateway, run: str) -> str:
    """A page to look at. The SDK appends `&tid=...`, so there is a question mark."""
    return f"{log_link(gateway, run, '')}?view=run"


def is_signed(gateway: Gateway, run: str, signature: str) -> bool:
    return hmac.compare_digest(signature.encode(), gateway.signature("logs", run).encode())
