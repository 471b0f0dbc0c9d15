"""Shared access signatures: what a script holds to read and write blobs, instead of a bearer's token.

Signed for one container, a folder or a blob in it, some permissions, and a time. The parameters have Azure's
names (learn.microsoft.com/rest/api/storageservices/create-service-sas); what is signed, and with which key,
is ours. They are secrets: nothing here logs one or says one in a message.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qsl, urlencode

from tuneloop.server.azure.blobs.errors import BlobError
from tuneloop.server.azure.gateway import Gateway

VERSION = "2024-11-04"
CONTAINER, FOLDER, BLOB = "c", "d", "b"
SIGNED = ("sv", "sp", "st", "se", "spr", "sr", "sdd", "si")
"""What is signed, beside the place: version, permissions, from, until, protocol, kind of place, depth of the
folder, and a text that tells two signatures apart."""
PARAMETERS = (*SIGNED, "sig")
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_LONGEST = 2048


def issue(
    gateway: Gateway,
    container: str,
    permissions: str,
    *,
    seconds: float,
    path: str = "",
    is_folder: bool = False,
) -> str:
    """A query string. Without `path` it is for the whole container; with it for that blob, or, with
    `is_folder`, for all that lies below it."""
    parts = [part for part in path.split("/") if part]
    kind = CONTAINER if not parts else FOLDER if is_folder else BLOB
    now = gateway.now()
    fields = {
        "sv": VERSION,
        "sp": permissions,
        "st": _text(now - timedelta(minutes=5)),
        "se": _text(now + timedelta(seconds=seconds)),
        "spr": "https",
        "sr": kind,
        # Two uploads of one blob are told apart by it: see `staging`.
        "si": secrets.token_hex(8),
    }
    if kind == FOLDER:
        fields["sdd"] = str(len(parts))
    return urlencode({**fields, "sig": _signature(gateway, container, parts, fields)})


@dataclass(frozen=True)
class Grant:
    """What a signature that was checked allows."""

    permissions: str
    signature: str
    """What tells it from others. Never to be logged or said."""

    @property
    def may_replace(self) -> bool:
        """Not only create what is not there yet."""
        return "w" in self.permissions


def verify(gateway: Gateway, query: str, container: str, blob: str, needs: str) -> Grant:
    """Raises `BlobError` unless `query` holds a signature of ours that is for this place, for one of the
    permissions in `needs`, and for now."""
    given = _read(query)
    kind = given.get("sr", "")
    parts = _signed_place(given, kind, blob)
    expected = _signature(gateway, container, parts, given)
    if not hmac.compare_digest(expected.encode(), given["sig"].encode()):
        raise _failed(
            "The signature is not one that was made here for this address. It is for one container, and for "
            "one path when it was made for one: ask for it anew (listSecrets of the datastore)."
        )
    _check_time(given, gateway.now())
    if not set(needs) & set(given.get("sp", "")):
        raise BlobError(
            403,
            "AuthorizationPermissionMismatch",
            f"The signature gives the permissions {given.get('sp', '')!r}; this takes one of {needs!r}.",
        )
    return Grant(given.get("sp", ""), given["sig"])


def _read(query: str) -> dict[str, str]:
    pairs = [(name.lower(), value) for name, value in parse_qsl(query, keep_blank_values=True)]
    given = {name: value for name, value in pairs if name in PARAMETERS}
    if "sig" not in given:
        raise BlobError(
            401,
            "NoAuthenticationInformation",
            "The address carries no shared access signature; listSecrets of the datastore gives one.",
            headers={"www-authenticate": "SharedAccessSignature"},
        )
    if len(given) != sum(name in PARAMETERS for name, _ in pairs):
        raise _failed("A parameter of the signature was sent more than once.")
    if any(len(value) > _LONGEST for value in given.values()):
        raise _failed("A parameter of the signature is too long.")
    return given


def _signed_place(given: Mapping[str, str], kind: str, blob: str) -> Sequence[str]:
    """The parts of the path for which the signature would have to be."""
    parts = [part for part in blob.split("/") if part]
    if kind == CONTAINER:
        return []
    if kind == BLOB:
        return parts
    depth = given.get("sdd", "")
    if kind == FOLDER and depth.isdigit() and 0 < int(depth[:4]) < len(parts):
        return parts[: int(depth[:4])]
    raise _failed("The signature is not for this address.")


def _signature(gateway: Gateway, container: str, parts: Sequence[str], fields: Mapping[str, str]) -> str:
    signed = [container, "/".join(parts), *(fields.get(name, "") for name in SIGNED)]
    # Each with its length: no two sets of fields give the same text.
    text = "".join(f"{len(part)}:{part}" for part in signed)
    return base64.b64encode(
        hmac.new(gateway.key("sas"), text.encode("utf-8", "surrogateescape"), hashlib.sha256).digest()
    ).decode()


def _check_time(given: Mapping[str, str], now: datetime) -> None:
    begins, ends = (_moment(given.get(name, "")) for name in ("st", "se"))
    if ends is None or now >= ends:
        raise _failed("The signature has expired; ask for a new one (listSecrets of the datastore).")
    if begins is not None and now < begins:
        raise _failed("The signature is not valid yet.")


def _text(at: datetime) -> str:
    return at.astimezone(UTC).strftime(_TIME)


def _moment(text: str) -> datetime | None:
    try:
        return datetime.strptime(text, _TIME).replace(tzinfo=UTC)
    except ValueError:
        return None


def _failed(why: str) -> BlobError:
    return BlobError(403, "AuthenticationFailed", why)
