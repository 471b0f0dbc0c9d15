"""Endpoint keys: derived, so that they can be shown again and yet are stored nowhere.

key = HMAC-SHA256(the workspace's secret, "endpoint id / slot / generation"). The store and the route table
hold SHA-256 hashes of keys; regenerating raises the slot's generation.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Iterable


def endpoint_key(secret: bytes, endpoint_id: str, slot: str, generation: int) -> str:
    """43 characters, safe in a header and a URL."""
    message = f"endpoint/{endpoint_id}/{slot}/{generation}".encode()
    digest = hmac.new(secret, message, hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def key_hash(key: str) -> str:
    """64 hex digits."""
    return hashlib.sha256(key.encode()).hexdigest()


def key_matches(key: str, hashes: Iterable[str]) -> bool:
    """Compares with every hash, in constant time each, whatever the outcome of the others."""
    seen = key_hash(key)
    matched = False
    for known in hashes:
        matched |= hmac.compare_digest(seen, known)
    return matched
