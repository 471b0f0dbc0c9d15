"""Lists of blobs and of blocks as XML, and the list of blocks that a blob is made of."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from xml.parsers import expat
from xml.sax.saxutils import escape, quoteattr

from tuneloop.server.azure.blobs.answers import created, when
from tuneloop.server.azure.blobs.errors import BlobError, bad_query
from tuneloop.server.azure.blobs.requests import Call
from tuneloop.server.azure.blobs.staging import MOST_BLOCKS, Block, read_id
from tuneloop.server.azure.blobs.store import Blob
from tuneloop.server.azure.blobs.trees import Tree, walk

PAGE = 5000
"""Names at once, as Azure has it."""
_INCLUDED = frozenset(
    {"metadata", "copy", "deleted", "deletedwithversions", "immutabilitypolicy", "legalhold", "permissions"}
    | {"snapshots", "tags", "versions"}
)
"""Nothing here is copied, deleted softly, held, tagged or kept in versions, so nothing is left out."""
LIST_PARAMETERS = ("prefix", "delimiter", "marker", "maxresults", "include", "showonly", "startfrom")


def list_blobs(call: Call, tree: Tree, look: Callable[[str], Blob | None]) -> str:
    """A page of names. Raises `BlobError`."""
    prefix, marker = call.query.get("prefix", ""), call.query.get("marker", "")
    begin = max(marker, call.query.get("startfrom", ""))
    delimiter = call.query.get("delimiter", "")
    if delimiter not in ("", "/"):
        raise bad_query("delimiter", delimiter, "the only delimiter here is '/'")
    if call.query.get("showonly"):
        raise bad_query("showonly", call.query["showonly"], "this operation does not read it")
    include = [one.lower() for one in call.query.get("include", "").split(",") if one]
    unknown = next((one for one in include if one not in _INCLUDED), None)
    if unknown is not None:
        raise bad_query("include", unknown, f"it may hold: {', '.join(sorted(_INCLUDED))}")
    most = _most(call.query.get("maxresults"))
    found = list(islice(walk(tree, prefix, begin, is_flat=not delimiter), most + 1))
    pieces = []
    for one in found[:most]:
        if one.is_prefix:
            pieces.append(f"<BlobPrefix><Name>{escape(one.name)}</Name></BlobPrefix>")
            continue
        # It may be gone by now, and then it is not listed.
        blob = look(one.name)
        if blob is not None:
            pieces.append(_blob(blob, with_metadata="metadata" in include))
    following = found[most].name if len(found) > most else ""
    endpoint = f"{call.gateway.base_url}/blob/store/"
    return (
        '<?xml version="1.0" encoding="utf-8"?>'
        f"<EnumerationResults ServiceEndpoint={quoteattr(endpoint)} "
        f"ContainerName={quoteattr(call.datastore.container)}>"
        f"<Prefix>{escape(prefix)}</Prefix><Marker>{escape(marker)}</Marker><MaxResults>{most}</MaxResults>"
        f"<Delimiter>{escape(delimiter)}</Delimiter><Blobs>{''.join(pieces)}</Blobs>"
        f"<NextMarker>{escape(following)}</NextMarker></EnumerationResults>"
    )


def _most(text: str | None) -> int:
    if text is None:
        return PAGE
    if not text.isdigit() or int(text[:9]) < 1:
        told = f"The query parameter maxresults is {text[:50]!r}; it has to be 1 to {PAGE}."
        raise BlobError(400, "OutOfRangeQueryParameterValue", told)
    return min(int(text[:9]), PAGE)


def _blob(blob: Blob, *, with_metadata: bool) -> str:
    headers = {"content-type": "application/octet-stream", **blob.facts.headers}
    said = {
        "Creation-Time": when(created(blob)),
        "Last-Modified": when(blob.modified),
        "Etag": blob.etag.strip('"'),
        "Content-Length": str(blob.size),
        "Content-Type": headers["content-type"],
        "Content-Encoding": headers.get("content-encoding", ""),
        "Content-Language": headers.get("content-language", ""),
        "Content-MD5": headers.get("content-md5", ""),
        "Cache-Control": headers.get("cache-control", ""),
        "Content-Disposition": headers.get("content-disposition", ""),
        "BlobType": "BlockBlob",
        "LeaseStatus": "unlocked",
        "LeaseState": "available",
        "ServerEncrypted": "false",
    }
    properties = "".join(f"<{key}>{escape(value)}</{key}>" for key, value in said.items())
    metadata = "".join(f"<{key}>{escape(value)}</{key}>" for key, value in blob.facts.metadata.items())
    return (
        f"<Blob><Name>{escape(blob.name)}</Name><Properties>{properties}</Properties>"
        + (f"<Metadata>{metadata}</Metadata>" if with_metadata else "")
        + "</Blob>"
    )


# ---------------------------------------------------------------- blocks


def list_blocks(blocks: Iterable[Block]) -> str:
    """Those that wait for their list."""
    told = "".join(
        f"<Block><Name>{base64.b64encode(block.id).decode()}</Name><Size>{block.size}</Size></Block>"
        for block in blocks
    )
    return (
        '<?xml version="1.0" encoding="utf-8"?><BlockList><CommittedBlocks/>'
        f"<UncommittedBlocks>{told}</UncommittedBlocks></BlockList>"
    )


def read_block_list(content: bytes) -> list[bytes]:
    """The ids, in order. Raises `BlobError` for what is no such list; entities are never read."""
    reader = _Reader()
    try:
        reader.parser.Parse(content, True)
    except (expat.ExpatError, ValueError) as mistake:
        raise BlobError(400, "InvalidXmlDocument", f"The list of blocks is not XML: {mistake}.") from None
    return reader.ids


class _Reader:
    """`<BlockList><Latest>id</Latest>...</BlockList>`; `Uncommitted` says the same here."""

    def __init__(self) -> None:
        self.ids: list[bytes] = []
        self._open: list[str] = []
        self._text = ""
        self.parser = expat.ParserCreate()
        self.parser.StartDoctypeDeclHandler = self._refuse_doctype
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._say

    def _refuse_doctype(self, *_: object) -> None:
        raise BlobError(400, "InvalidXmlDocument", "The list of blocks has a document type; leave it out.")

    def _start(self, name: str, _attributes: object) -> None:
        wanted = ("BlockList",) if not self._open else ("Latest", "Uncommitted", "Committed")
        if len(self._open) > 1 or name not in wanted:
            told = f"The list of blocks has an element {name[:100]!r}; expected: {', '.join(wanted)}."
            raise BlobError(400, "InvalidXmlNodeValue", told)
        if name == "Committed":
            told = "Blocks of a blob that is there already cannot be taken into a new one; send them again."
            raise BlobError(400, "InvalidBlockList", told)
        self._open.append(name)
        self._text = ""

    def _end(self, _name: str) -> None:
        if self._open.pop() != "BlockList":
            self.ids.append(read_id(self._text.strip()))
            if len(self.ids) > MOST_BLOCKS:
                told = f"The list has more than {MOST_BLOCKS:,} blocks."
                raise BlobError(400, "BlockListTooLong", told)

    def _say(self, text: str) -> None:
        self._text += text


def digest_of_list(ids: Sequence[bytes], upload: str) -> str:
    """What tells whether a list of an upload was put together already."""
    return hashlib.sha256("\n".join([upload, *(one.hex() for one in ids)]).encode()).hexdigest()
