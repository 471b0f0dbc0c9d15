"""What a request to the blob service says: operation, headers, conditions. What would be ignored is refused
by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from urllib.parse import parse_qsl

from starlette.requests import Request as HttpRequest

from tuneloop.server.azure import containers
from tuneloop.server.azure.blobs import sas
from tuneloop.server.azure.blobs.errors import BlobError, bad_header, bad_name, bad_query, blob_not_found
from tuneloop.server.azure.blobs.store import Blob
from tuneloop.server.azure.containers import BadName, Datastore
from tuneloop.server.azure.gateway import Gateway

COMMON_HEADERS = frozenset(
    {"x-ms-version", "x-ms-date", "x-ms-client-request-id", "x-ms-return-client-request-id"}
)
BLOB_HEADERS: Mapping[str, str] = {
    "x-ms-blob-content-type": "content-type",
    "x-ms-blob-content-encoding": "content-encoding",
    "x-ms-blob-content-language": "content-language",
    "x-ms-blob-content-disposition": "content-disposition",
    "x-ms-blob-cache-control": "cache-control",
    "x-ms-blob-content-md5": "content-md5",
}
"""What is kept of a blob, and the header under which it is said again."""
METADATA = "x-ms-meta-"
MOST_METADATA_BYTES = 8 * 1024
_METADATA_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Call:
    """One request, its address read and its signature not yet."""

    gateway: Gateway
    http: HttpRequest
    datastore: Datastore
    blob: str
    """Its name; empty when the container is meant."""
    query: Mapping[str, str]
    """By lower-case name, without the signature."""

    def grant(self, needs: str, *, below: str | None = None) -> sas.Grant:
        """Raises `BlobError` unless the signature allows one of `needs`; `below`: for all names that begin
        so, in the place of the blob's own."""
        place = self.blob if below is None else f"{below}*"
        text = self.http.scope["query_string"].decode("latin-1")
        granted = sas.verify(self.gateway, text, self.datastore.container, place, needs)
        if not set(needs) & set(self.datastore.permissions):
            told = (
                f"The container {self.datastore.container!r} is read-only: it shows what the workspace has."
            )
            raise BlobError(403, "AuthorizationPermissionMismatch", told)
        return granted

    def parts(self, *, of_read: bool = False) -> tuple[str, ...]:
        """Of the blob's name. Raises `BlobError` for one that is not allowed; `of_read`: the SDK asks whether
        `folder/` is a blob, and is told that it is none."""
        if of_read and self.blob.endswith("/"):
            raise blob_not_found(self.blob)
        try:
            return containers.check_name(self.blob)
        except BadName as mistake:
            raise bad_name(self.blob, str(mistake)) from None

    def expect(self, *, query: Collection[str] = (), headers: Collection[str] = ()) -> None:
        """Raises `BlobError` for a parameter, or a header of Azure's, that this operation does not know."""
        for name, value in self.query.items():
            if name not in query and name not in ("comp", "restype", "timeout"):
                raise bad_query(name, value, "this operation does not read it, so it is refused")
        for name in self.http.headers:
            if not name.startswith("x-ms-") or name in COMMON_HEADERS or name in headers:
                continue
            if name.startswith(METADATA) and METADATA in headers:
                continue
            told = f"The header {name[:100]!r} would be ignored here, so it is refused."
            raise BlobError(400, "UnsupportedHeader", told)

    @property
    def operation(self) -> str:
        """`comp` of the query."""
        return self.query.get("comp", "").lower()


def read_call(gateway: Gateway, http: HttpRequest, params: Mapping[str, str]) -> Call:
    """Raises `BlobError` for another account or container than ours."""
    account = params["account"].lower()
    if account != "store" and not account.startswith("store.blob."):
        raise BlobError(404, "ResourceNotFound", f"There is no storage account {account[:100]!r} here.")
    found = containers.by_container(params["container"])
    if found is None:
        there = ", ".join(one.container for one in containers.DATASTORES)
        told = f"There is no container {params['container'][:100]!r}; there is: {there}."
        raise BlobError(404, "ContainerNotFound", told)
    pairs = parse_qsl(http.scope["query_string"].decode("latin-1"), keep_blank_values=True)
    query: dict[str, str] = {}
    for name, value in pairs:
        key = name.lower()
        if key in sas.PARAMETERS:
            continue
        if key in query:
            raise bad_query(key, value, "it was sent more than once")
        query[key] = value
    return Call(gateway, http, found, params.get("blob", ""), query)


# ---------------------------------------------------------------- what is kept of a blob


def read_metadata(http: HttpRequest) -> dict[str, str]:
    """Raises `BlobError`."""
    found: dict[str, str] = {}
    for name, value in http.headers.items():
        if not name.startswith(METADATA):
            continue
        key = name.removeprefix(METADATA)
        if not _METADATA_NAME.fullmatch(key):
            told = f"The name of the metadata {key[:100]!r} is not a letter or '_' and letters, digits, '_'."
            raise BlobError(400, "InvalidMetadata", told)
        if key in found:
            raise BlobError(400, "InvalidMetadata", f"The metadata {key!r} was sent more than once.")
        found[key] = value
    size = sum(len(key) + len(value) for key, value in found.items())
    if size > MOST_METADATA_BYTES:
        told = f"The metadata have {size} bytes; the most is {MOST_METADATA_BYTES}."
        raise BlobError(400, "MetadataTooLarge", told)
    return found


def read_blob_headers(http: HttpRequest) -> dict[str, str]:
    return {said: http.headers[sent] for sent, said in BLOB_HEADERS.items() if http.headers.get(sent)}


# ---------------------------------------------------------------- conditions


@dataclass(frozen=True)
class Conditions:
    """RFC 9110, section 13, as Azure Storage applies it."""

    match: tuple[str, ...] = ()
    none_match: tuple[str, ...] = ()
    modified_since: datetime | None = None
    unmodified_since: datetime | None = None

    def check_write(self, before: Blob | None) -> None:
        """Raises `BlobError` unless what is there allows it."""
        if before is None:
            if self.match:
                raise _not_met()
            return
        if "*" in self.none_match:
            raise BlobError(409, "BlobAlreadyExists", f"The blob {before.name[:200]!r} already exists.")
        if self._fails(before) or self._is_known(before):
            raise _not_met()

    def check_read(self, blob: Blob) -> None:
        """Raises `BlobError`, 304 when the caller has the blob as it is."""
        if self._fails(blob):
            raise _not_met()
        if self._is_known(blob):
            raise BlobError(304, "ConditionNotMet", "", headers={"etag": blob.etag})

    def _fails(self, blob: Blob) -> bool:
        if self.match and "*" not in self.match and _tag(blob.etag) not in self.match:
            return True
        return self.unmodified_since is not None and blob.modified > self.unmodified_since

    def _is_known(self, blob: Blob) -> bool:
        if self.none_match:
            return "*" in self.none_match or _tag(blob.etag) in self.none_match
        return self.modified_since is not None and blob.modified <= self.modified_since


def read_conditions(http: HttpRequest) -> Conditions:
    """Raises `BlobError`."""
    return Conditions(
        match=_tags(http.headers.get("if-match", "")),
        none_match=_tags(http.headers.get("if-none-match", "")),
        modified_since=_moment(http, "if-modified-since"),
        unmodified_since=_moment(http, "if-unmodified-since"),
    )


def _tags(text: str) -> tuple[str, ...]:
    return tuple(_tag(one.strip()) for one in text.split(",") if one.strip())


def _tag(text: str) -> str:
    return text.removeprefix("W/").strip('"')


def _moment(http: HttpRequest, name: str) -> datetime | None:
    text = http.headers.get(name)
    if text is None:
        return None
    try:
        found = parsedate_to_datetime(text)
    except ValueError:
        found = None
    if found is None or found.tzinfo is None:
        raise bad_header(name, text, "it has to be a time such as 'Wed, 01 Jul 2026 12:00:00 GMT'")
    return found


def _not_met() -> BlobError:
    return BlobError(412, "ConditionNotMet", "The condition in the request's headers does not hold.")


# ---------------------------------------------------------------- ranges


def read_range(http: HttpRequest) -> tuple[int, int | None] | None:
    """First and last byte; None: all of it. Raises `BlobError`."""
    name = "x-ms-range" if "x-ms-range" in http.headers else "range"
    text = http.headers.get(name)
    if text is None:
        return None
    found = re.fullmatch(r"bytes=(\d{1,20})-(\d{0,20})", text.strip())
    if found is None or (found[2] and int(found[2]) < int(found[1])):
        raise bad_header(name, text, "it has to be 'bytes=FIRST-' or 'bytes=FIRST-LAST'")
    return int(found[1]), int(found[2]) if found[2] else None
