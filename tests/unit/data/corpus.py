"""Bad files, each written for one rule: no two cases differ in values only.

`write` makes the file; its finding is expected at `row`, `line` and `field`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GOOD: dict[str, Any] = {
    "prompt_id": "p",
    "messages": [
        {"role": "user", "content": 'Where is "Málaga", [1] {2}?\n'},
        {"role": "assistant", "content": "In Spain. \\ 🙂"},
    ],
}


def good(number: int) -> dict[str, Any]:
    user, assistant = GOOD["messages"]
    asked = {**user, "content": f"{number}: {user['content']}"}
    return {"prompt_id": f"p{number}", "messages": [asked, assistant]}


@dataclass(frozen=True)
class Case:
    name: str
    file: str
    write: Callable[[Path], None]
    rule: str
    row: int
    line: int
    field: str = ""
    rows: int = 3
    """In the whole file, as far as it can be read."""


def lines(*rows: dict[str, Any] | str | bytes) -> bytes:
    return b"".join(_bytes(row) + b"\n" for row in rows)


def _bytes(row: dict[str, Any] | str | bytes) -> bytes:
    if isinstance(row, bytes):
        return row
    return (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)).encode()


def data(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def around(row: dict[str, Any] | str | bytes) -> Callable[[Path], None]:
    """The row in the middle of two good ones."""
    return data(lines(good(1), row, good(3)))


def talk(*messages: Any, **columns: Any) -> dict[str, Any]:
    return {"prompt_id": "bad", "messages": list(messages), **columns}


def table(delimiter: str = ",", rows: int = 3) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(["prompt_id", "messages"])
    for number in range(1, rows + 1):
        row = good(number)
        writer.writerow([row["prompt_id"], json.dumps(row["messages"], indent=1, ensure_ascii=False)])
    return text.getvalue()


def rows_of_table(text: str) -> list[str]:
    """Header and records, quoted line ends and all."""
    return [text[: text.index("\r\n") + 2], *(f"p{part}" for part in text.split("\r\np")[1:])]


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "Be brief."}


def parquet(**changes: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = changes.get("columns") or {"messages": pa.array([good(n)["messages"] for n in (1, 2, 3)])}
        names = changes.get("names") or list(columns)
        pq.write_table(pa.table(list(columns.values()), names=names), path, row_group_size=1)
        if "damage" in changes:
            whole = bytearray(path.read_bytes())
            start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
            whole[start : start + 40] = b"\xff" * 40
            path.write_bytes(whole)

    return write


def binary_text(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    raw = pa.array([b"fine", b"ol\xe9", b"fine"], pa.binary())
    text = pa.StringArray.from_buffers(3, *raw.buffers()[1:])
    messages = pa.array([good(n)["messages"] for n in (1, 2, 3)])
    pq.write_table(pa.table({"note": text, "messages": messages}), path)


def text_cells(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [json.dumps(good(1)["messages"]), "hello there", json.dumps(good(3)["messages"])]
    pq.write_table(pa.table({"messages": cells}), path)


def damaged_gzip(path: Path) -> None:
    packed = bytearray(gzip.compress(lines(good(1), good(2))))
    packed[-8:-4] = b"\0\0\0\0"  # the check sum
    path.write_bytes(packed)


def long_row() -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with open(path, "wb") as file:
            file.write(lines(good(1)) + b'{"messages": "')
            for _ in range(17):
                file.write(b"x" * (1 << 20))
            file.write(b'"}\n' + lines(good(3)))

    return write


_HALF = '{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "b"}]}'
_TWICE = (
    '{"messages": [{"role": "user", "role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
)
_UTF16 = lines(good(1), good(2)).decode()
_CSV = rows_of_table(table())

CASES = (
    # ------------------------------------------------------------ JSON Lines
    Case("byte that is no UTF-8", "a.jsonl", around(b'{"prompt": "caf\xe9"}'), "encoding", 2, 2),
    Case("missing comma", "a.jsonl", around('{"a": 1 "b": 2}'), "json", 2, 2),
    Case("nested without end", "a.jsonl", around("[" * 9000 + "]" * 9000), "json", 2, 2),
    Case(
        "number of 5,000 digits", "a.jsonl", around('{"a": "\\ud83d", "n": ' + "1" * 5000 + "}"), "json", 2, 2
    ),
    Case("two rows on a line", "a.jsonl", around('{"a": 1}{"a": 2}'), "json", 2, 2),
    Case(
        "row after blank lines",
        "a.jsonl",
        data(lines(good(1), " ", "", "[]", good(3))),
        "row_is_object",
        2,
        4,
    ),
    Case("last row cut", "a.jsonl", data(lines(good(1), good(2)) + b'{"mess'), "truncated", 3, 3),
    Case(
        "last row cut in a character",
        "a.jsonl",
        data(lines(good(1)) + b'{"a": "\xf0\x9f'),
        "truncated",
        2,
        2,
        rows=2,
    ),
    Case(
        "last row cut between values",
        "a.jsonl",
        data(lines(good(1), good(2)) + b'{"a": 1,'),
        "truncated",
        3,
        3,
    ),
    Case("zeros at the end", "a.jsonl", data(lines(good(1), good(2)) + bytes(64)), "nul_bytes", 3, 3),
    Case("a key twice", "a.jsonl", around(_TWICE), "key_once", 2, 2),
    Case("a row of 17 MB", "a.jsonl", long_row(), "row_size", 2, 2),
    # ------------------------------------------------------------ a row
    Case("no messages", "a.jsonl", around({"prompt": "a"}), "messages_present", 2, 2, "messages"),
    Case("messages in a string", "a.jsonl", around({"messages": "[]"}), "messages_is_list", 2, 2, "messages"),
    Case(
        "a text for a message",
        "a.jsonl",
        around(talk("hi", ANSWER)),
        "message_is_object",
        2,
        2,
        "messages[0]",
    ),
    Case(
        "a role of nobody",
        "a.jsonl",
        around(talk(USER, {"role": "robot", "content": "b"}, ANSWER)),
        "role_known",
        2,
        2,
        "messages[1].role",
    ),
    Case(
        "no role", "a.jsonl", around(talk({"content": "a"}, ANSWER)), "role_known", 2, 2, "messages[0].role"
    ),
    Case(
        "content of parts",
        "a.jsonl",
        around(talk({"role": "user", "content": [{"type": "image_url"}]}, ANSWER)),
        "content_is_text",
        2,
        2,
        "messages[0].content",
    ),
    Case(
        "content left out",
        "a.jsonl",
        around(talk({"role": "user"}, ANSWER)),
        "content_is_text",
        2,
        2,
        "messages[0].content",
    ),
    Case(
        "content of spaces",
        "a.jsonl",
        around(talk(USER, {"role": "assistant", "content": " \n\u00a0"})),
        "content_not_empty",
        2,
        2,
        "messages[1].content",
    ),
    Case(
        "half a surrogate pair", "a.jsonl", around(_HALF), "content_is_unicode", 2, 2, "messages[0].content"
    ),
    Case("no answer", "a.jsonl", around(talk(USER)), "assistant_turn", 2, 2, "messages"),
    Case("an empty list", "a.jsonl", around(talk()), "assistant_turn", 2, 2, "messages"),
    Case(
        "answers of no weight",
        "a.jsonl",
        around(talk(USER, {**ANSWER, "weight": 0})),
        "assistant_turn",
        2,
        2,
        "messages",
    ),
    Case(
        "a weight of a half",
        "a.jsonl",
        around(talk(USER, {**ANSWER, "weight": 0.5})),
        "weight",
        2,
        2,
        "messages[1].weight",
    ),
    Case(
        "tools",
        "a.jsonl",
        around(talk(USER, ANSWER, tools=[{"type": "function"}])),
        "tools_unsupported",
        2,
        2,
        "tools",
    ),
    Case(
        "a call of a tool",
        "a.jsonl",
        around(talk(USER, {**ANSWER, "tool_calls": [1]})),
        "key_unsupported",
        2,
        2,
        "messages[1].tool_calls",
    ),
    Case(
        "a name",
        "a.jsonl",
        around(talk({**USER, "name": "Ann"}, ANSWER)),
        "key_ignored",
        2,
        2,
        "messages[0].name",
    ),
    Case(
        "system in the middle",
        "a.jsonl",
        around(talk(USER, SYSTEM, ANSWER)),
        "system_first",
        2,
        2,
        "messages[1].role",
    ),
    Case("user last", "a.jsonl", around(talk(USER, ANSWER, USER)), "last_turn", 2, 2, "messages[2].role"),
    # ------------------------------------------------------------ other encodings
    Case(
        "UTF-16 cut in a character", "a.jsonl", data(_UTF16.encode("utf-16")[:-3]), "truncated", 2, 2, rows=2
    ),
    Case(
        "UTF-16 with half a pair",
        "a.jsonl",
        data(b"\xff\xfe" + f'{_UTF16}{{"a": "\ud83d"}}\n'.encode("utf-16-le", "surrogatepass")),
        "encoding",
        3,
        3,
    ),
    Case(
        "line ends of an old Macintosh",
        "a.jsonl",
        data(lines(good(1), "oops", good(3)).replace(b"\n", b"\r")),
        "json",
        2,
        2,
    ),
    # ------------------------------------------------------------ gzip
    Case(
        "gzip cut",
        "a.jsonl.gz",
        data(gzip.compress(lines(good(1)), mtime=0) + gzip.compress(lines(good(2)))[:-12]),
        "truncated",
        2,
        2,
        rows=2,
    ),
    Case("gzip with a wrong check sum", "a.jsonl.gz", damaged_gzip, "gzip", 3, 3),
    # ------------------------------------------------------------ JSON
    Case(
        "an array cut",
        "a.json",
        data(json.dumps([good(1), good(2)]).encode()[:-60]),
        "truncated",
        2,
        2,
        rows=2,
    ),
    Case(
        "an element that is no row",
        "a.json",
        data(json.dumps([good(1), "hi", good(3)], indent=1).encode()),
        "row_is_object",
        2,
        2,
    ),
    Case("a comma too many", "a.json", data(b"[%s,]" % json.dumps(good(1)).encode()), "json", 2, 2, rows=2),
    Case(
        "text behind the array",
        "a.json",
        data(b"[%s]\n: end" % json.dumps(good(1)).encode()),
        "json",
        2,
        2,
        rows=2,
    ),
    Case(
        "a bracket too many",
        "a.json",
        data(json.dumps(good(1), indent=1).encode() + b"\n}\n"),
        "json",
        2,
        2,
        rows=2,
    ),
    Case(
        "two lists in an object",
        "a.json",
        data(json.dumps({"train": [good(1)], "test": [good(2)]}).encode()),
        "one_list",
        2,
        2,
        rows=2,
    ),
    # ------------------------------------------------------------ CSV and TSV
    Case(
        "a cell too many",
        "a.csv",
        data(f"{_CSV[0]}{_CSV[1]}\r\np,[1,2]\r\n{_CSV[3]}".encode()),
        "cells",
        2,
        12,
    ),
    Case(
        "single quotes inside of quotes",
        "a.csv",
        data(f'{_CSV[0]}p,"[{{"role": 1}}]"\r\n'.encode()),
        "quotes",
        1,
        2,
        rows=1,
    ),
    Case("a quote that never ends", "a.csv", data(table(rows=2).encode()[:-30]), "truncated", 2, 12, rows=2),
    Case("a column twice", "a.csv", data(b"messages,messages\n[],[]\n"), "header", 1, 1, rows=1),
    Case(
        "a cell of broken JSON",
        "a.csv",
        data(b'prompt_id,messages\np,"[{""role"": }]"\n'),
        "cell_is_json",
        1,
        2,
        "messages",
        1,
    ),
    Case(
        "a table in Latin-1",
        "a.csv",
        data(table(rows=1).replace("🙂", "").encode("latin-1")),
        "encoding",
        1,
        2,
        "messages",
        1,
    ),
    Case(
        "a table without the column",
        "a.csv",
        data(b"prompt,answer\na,b\n"),
        "messages_present",
        1,
        2,
        "messages",
        1,
    ),
    Case(
        "commas in a table of tabs",
        "a.tsv",
        data(b"id,messages\na,[]\n"),
        "messages_present",
        1,
        2,
        "messages",
        1,
    ),
    Case(
        "a table cut in its gzip",
        "a.tsv.gz",
        data(gzip.compress(table("\t", 2).encode())[:-9]),
        "truncated",
        3,
        22,
    ),
    # ------------------------------------------------------------ Parquet
    Case("a damaged page", "a.parquet", parquet(damage=True), "parquet", 2, 2, rows=2),
    Case("text that is no UTF-8", "a.parquet", binary_text, "encoding", 2, 2, "note"),
    Case("text where JSON should be", "a.parquet", text_cells, "cell_is_json", 2, 2, "messages"),
    Case(
        "a column of Parquet twice",
        "a.parquet",
        parquet(columns={"a": [[1]], "b": [[2]]}, names=["m", "m"]),
        "header",
        1,
        1,
        rows=1,
    ),
)
