"""Files of rows of every format are the same rows, and what is no such file is refused by name."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.unit.data.corpus import CASES, good, lines, table
from tuneloop.core.data.check import check_files
from tuneloop.core.data.reading import Source, open_source, read_rows
from tuneloop.core.errors import DataError, NotFound, TuneloopError, Unsupported, UsageError

ROWS = [good(number) for number in range(1, 4)]
LINES = lines(*ROWS)
TEXT = LINES.decode()


def as_parquet(path: Path, **options: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), path, **options)


def as_parquet_of_text(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [{**row, "messages": json.dumps(row["messages"])} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(cells), path)


FILES: dict[str, tuple[str, bytes | Callable[[Path], None], str, list[int]]] = {
    "JSON Lines": ("a.jsonl", LINES, "jsonl", [1, 2, 3]),
    "JSON Lines by another name": ("a.ndjson", LINES, "jsonl", [1, 2, 3]),
    "JSON Lines named JSON": ("a.json", LINES, "jsonl", [1, 2, 3]),
    "JSON Lines without a name": ("data", LINES, "jsonl", [1, 2, 3]),
    "JSON Lines named CSV": ("a.csv", LINES, "jsonl", [1, 2, 3]),
    "no line end at the end": ("a.jsonl", LINES.rstrip(), "jsonl", [1, 2, 3]),
    "blank lines": ("a.jsonl", b" \n\n" + LINES.replace(b"\n", b"\n\t\n") + b"\n\n", "jsonl", [3, 5, 7]),
    "CRLF": ("a.jsonl", LINES.replace(b"\n", b"\r\n"), "jsonl", [1, 2, 3]),
    "CR": ("a.jsonl", LINES.replace(b"\n", b"\r"), "jsonl", [1, 2, 3]),
    "UTF-8 with a mark": ("a.jsonl", b"\xef\xbb\xbf" + LINES, "jsonl", [1, 2, 3]),
    "UTF-16 LE": ("a.jsonl", b"\xff\xfe" + TEXT.encode("utf-16-le"), "jsonl", [1, 2, 3]),
    "UTF-16 BE": ("a.jsonl", b"\xfe\xff" + TEXT.encode("utf-16-be"), "jsonl", [1, 2, 3]),
    "UTF-16 LE without a mark": ("a.jsonl", TEXT.encode("utf-16-le"), "jsonl", [1, 2, 3]),
    "UTF-16 BE without a mark": ("a.jsonl", TEXT.encode("utf-16-be"), "jsonl", [1, 2, 3]),
    "gzip": ("a.jsonl.gz", gzip.compress(LINES), "jsonl", [1, 2, 3]),
    "gzip without its name": ("a.jsonl", gzip.compress(LINES), "jsonl", [1, 2, 3]),
    "gzip in two members": (
        "a.jsonl.gz",
        gzip.compress(lines(ROWS[0])) + bytes(70_000) + gzip.compress(lines(*ROWS[1:])) + bytes(99),
        "jsonl",
        [1, 2, 3],
    ),
    "gzip of UTF-16": ("a.jsonl.gz", gzip.compress(TEXT.encode("utf-16")), "jsonl", [1, 2, 3]),
    "an array": ("a.json", json.dumps(ROWS).encode(), "json", [1, 2, 3]),
    "an array over many lines": ("a.json", json.dumps(ROWS, indent=2).encode(), "json", [1, 2, 3]),
    "an array named JSON Lines": ("a.jsonl", json.dumps(ROWS, indent=2).encode(), "json", [1, 2, 3]),
    "a list in an object": (
        "a.json",
        json.dumps({"n": 3, "of": ["x"], "data": ROWS}).encode(),
        "json",
        [1, 2, 3],
    ),
    "a list in an object over many lines": (
        "a.json.gz",
        gzip.compress(json.dumps({"rows": ROWS, "next": None, "tags": []}, indent=1).encode()),
        "json",
        [1, 2, 3],
    ),
    "a list in an object beside deeper ones": (
        "a.json",
        json.dumps({"by": {"who": [{"name": 1}]}, "of": [["x"], [{}]], "data": ROWS}).encode(),
        "json",
        [1, 2, 3],
    ),
    "rows over many lines": (
        "a.jsonl",
        lines(*(json.dumps(row, indent=1) for row in ROWS)),
        "json",
        [1, 2, 3],
    ),
    "CSV": ("a.csv", table().encode(), "csv", [2, 12, 22]),
    "CSV with a mark": ("a.csv", b"\xef\xbb\xbf" + table().encode(), "csv", [2, 12, 22]),
    "CSV in UTF-16": ("a.csv", table().encode("utf-16"), "csv", [2, 12, 22]),
    "CSV in gzip": ("a.csv.gz", gzip.compress(table().encode()), "csv", [2, 12, 22]),
    "TSV": ("a.tsv", table("\t").encode(), "tsv", [2, 12, 22]),
    "Parquet": ("a.parquet", as_parquet, "parquet", [1, 2, 3]),
    "Parquet without its name": ("data", as_parquet, "parquet", [1, 2, 3]),
    "Parquet of text": ("a.parquet", as_parquet_of_text, "parquet", [1, 2, 3]),
}


def write(folder: Path, name: str, content: bytes | Callable[[Path], None]) -> Path:
    path = folder / name
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize("kind", FILES)
def test_the_same_rows_are_read_from_every_kind_of_file(kind: str, tmp_path: Path) -> None:
    name, content, format, at = FILES[kind]
    source = open_source(write(tmp_path, name, content), name)
    rows = [row for chunk in source.chunks() for row in chunk.rows()]
    assert [row.value for row in rows] == ROWS
    assert [(row.number, row.line) for row in rows] == [(1, at[0]), (2, at[1]), (3, at[2])]
    assert (source.format, source.compression) == (format, "gzip" if "gz" in name + kind else None)


@pytest.mark.parametrize("kind", FILES)
def test_the_size_of_chunks_changes_nothing_and_chunks_may_travel(kind: str, tmp_path: Path) -> None:
    name, content, _, _ = FILES[kind]
    source = open_source(write(tmp_path, name, content), name)
    whole = [row for chunk in source.chunks() for row in chunk.rows()]
    for size in (1, 2, 3, 7, 64, 500):
        chunks = [pickle.loads(pickle.dumps(chunk)) for chunk in source.chunks(size)]
        assert [row for chunk in chunks for row in chunk.rows()] == whole


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_size_of_chunks_changes_no_finding(case: Any, tmp_path: Path) -> None:
    if case.rule == "row_size":
        pytest.skip("17 MB, a few bytes at a time")
    path = tmp_path / case.file
    case.write(path)
    source = open_source(path, case.file)
    whole = [row for chunk in source.chunks() for row in chunk.rows()]
    for size in (1, 5, 333):
        rows = [row for chunk in source.chunks(size) for row in chunk.rows()]
        assert [(row.number, row.line, row.value) for row in rows] == [
            (row.number, row.line, row.value) for row in whole
        ]
        assert [[each.rule for each in row.findings] for row in rows] == [
            [each.rule for each in row.findings] for row in whole
        ]


def test_a_name_with_quotes_and_line_ends_is_a_name(tmp_path: Path) -> None:
    path = write(tmp_path, 'it\'s "a"\n file.jsonl', LINES)
    assert [row.value for row in read_rows(path)] == ROWS


def test_line_separators_of_unicode_do_not_end_a_row(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a\u2028b\u0085c\x0bd"}, ROWS[0]["messages"][1]]}
    path = write(tmp_path, "a.jsonl", lines(row, ROWS[1]))
    assert [(each.line, each.value) for each in read_rows(path)] == [(1, row), (2, ROWS[1])]


def test_the_column_of_a_table_that_is_json_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", b'messages,talk\n[1],"[{""role"": ""user""}]"\n')
    assert [row.value for row in read_rows(path, column="talk")] == [
        {"messages": "[1]", "talk": [{"role": "user"}]}
    ]


def test_a_table_of_an_old_macintosh_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", b'id,messages\r1,"[1]"\r2,"[2]"\r')
    assert [(row.line, row.value) for row in read_rows(path)] == [
        (2, {"id": "1", "messages": [1]}),
        (3, {"id": "2", "messages": [2]}),
    ]


def test_a_carriage_return_in_a_cell_stays(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", b'id,messages\n"a\rb",[]\n')
    assert [row.value for row in read_rows(path)] == [{"id": "a\rb", "messages": []}]


def test_what_stands_behind_a_list_is_told_for_what_it_is(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", json.dumps([ROWS[0]]).encode() + b"\n the end")
    assert "more after the end of the list: 'the end'" in list(read_rows(path))[1].findings[0].value


def test_rows_before_a_damaged_group_are_given_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr("tuneloop.core.data.reading_parquet._rows_of", lambda *_: 3)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [0, 1, 2, 3, 4, 5]}), path, row_group_size=2)
    whole = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(2).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    whole[start : start + 30] = b"\xff" * 30
    path.write_bytes(whole)
    rows = list(read_rows(path))
    assert [row.value for row in rows] == [{"n": 0}, {"n": 1}, {"n": 2}, {"n": 3}, None]
    assert (rows[-1].number, rows[-1].findings[0].rule) == (5, "parquet")


def test_rows_behind_one_that_is_too_long_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuneloop.core.data.reading_text.MAX_ROW_BYTES", 100)
    path = write(tmp_path, "a.csv", b"id,messages\n1,[]\n2,%s\n3,[]\n" % (b"x" * 200))
    rows = [row for chunk in open_source(path).chunks(16) for row in chunk.rows()]
    assert [(row.number, row.line, [each.rule for each in row.findings]) for row in rows] == [
        (1, 2, []),
        (2, 3, ["row_size"]),
        (3, 4, []),
    ]


def test_numbers_that_json_does_not_have_are_read_beside_the_conversation(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", b'{"score": NaN, "messages": []}\n')
    [row] = read_rows(path)
    assert row.value is not None
    assert row.value["score"] != row.value["score"]


# ---------------------------------------------------------------- refused


def folder(path: Path) -> None:
    path.mkdir()


def loop(path: Path) -> None:
    path.symlink_to(path)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def hanging_link(path: Path) -> None:
    path.symlink_to(path.parent / "gone")


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(path.parent)
        made.bind(path.name)
        os.chdir(here)


REFUSED: dict[str, tuple[str, bytes | Callable[[Path], None], type[TuneloopError], str]] = {
    "nothing": ("a.jsonl", lambda path: None, NotFound, "is not there"),
    "a folder": ("a.jsonl", folder, NotFound, "not a file but a folder"),
    "a loop of links": ("a.jsonl", loop, NotFound, "oo many levels of symbolic links"),
    "a link to nothing": ("a.jsonl", hanging_link, NotFound, "is not there"),
    "a pipe": ("a.jsonl", pipe, NotFound, "not a file but a pipe"),
    "a device": ("a.jsonl", device, NotFound, "not a file but a device"),
    "a socket": ("a.jsonl", a_socket, NotFound, "not a file but a socket"),
    "an empty file": ("a.jsonl", b"", DataError, "has no rows"),
    "a mark and nothing else": ("a.csv", b"\xef\xbb\xbf\n \n", DataError, "has no rows"),
    "an empty gzip": ("a.jsonl.gz", gzip.compress(b""), DataError, "has no rows"),
    "UTF-32": ("a.jsonl", TEXT.encode("utf-32"), Unsupported, "is UTF-32"),
    "a zip archive": ("a.jsonl", b"PK\x03\x04" + bytes(30), Unsupported, "zip archive"),
    "xz": ("a.jsonl.xz", b"\xfd7zXZ\x00" + bytes(30), Unsupported, "xz"),
    "bzip2": ("a.jsonl.bz2", b"BZh91AY&SY", Unsupported, "bzip2"),
    "zstd": ("a.jsonl.zst", b"\x28\xb5\x2f\xfd" + bytes(30), Unsupported, "zstd"),
    "an Arrow file": ("a.arrow", b"ARROW1\0\0", Unsupported, "Arrow file"),
    "an Arrow stream": ("a.arrow", b"\xff\xff\xff\xff\x10", Unsupported, "Arrow stream"),
    "a database": ("a.db", b"SQLite format 3\0", Unsupported, "SQLite"),
    "a Git LFS pointer": (
        "a.jsonl",
        b"version https://git-lfs.github.com/spec/v1\n",
        Unsupported,
        "git lfs pull",
    ),
    "a web page": ("a.jsonl", b"\n<!DOCTYPE html><html>", Unsupported, "web page"),
    "a Parquet file cut": ("a.parquet", b"PAR1" + bytes(64), DataError, "not a whole Parquet file"),
    "text named Parquet": ("a.parquet", b"hello", DataError, "named Parquet and is not"),
    "Parquet in gzip": ("a.parquet.gz", gzip.compress(b"PAR1" + bytes(64)), Unsupported, "gunzip"),
    "text without a format": ("a.txt", b"Once upon a time", Unsupported, "its format cannot be told"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_file_of_rows_is_refused_by_its_kind(kind: str, tmp_path: Path) -> None:
    name, content, error, words = REFUSED[kind]
    path = write(tmp_path, name, content)
    with pytest.raises(error) as raised:
        open_source(path, f"shown/{name}")
    assert words in str(raised.value)
    assert f"shown/{name}" in raised.value.message


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "x/" * 3000])
def test_a_name_that_no_file_can_have_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        open_source(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", LINES)
    path.chmod(0)
    with pytest.raises(UsageError, match="may not be read"):
        open_source(path)


# ---------------------------------------------------------------- while it is read


def after_first_chunk(source: Source, change: Callable[[], object]) -> None:
    for number, _ in enumerate(source.chunks(64)):
        if number == 0:
            change()


@pytest.mark.parametrize("kind", ["JSON Lines", "an array", "CSV", "Parquet", "gzip"])
def test_a_file_that_is_written_to_while_it_is_read_is_an_error(kind: str, tmp_path: Path) -> None:
    name, content, _, _ = FILES[kind]
    path = write(tmp_path, name, content)
    source = open_source(path, "train")

    def append() -> None:
        with open(path, "ab") as file:
            file.write(b"\n")

    with pytest.raises(DataError, match="train was written to while it was read"):
        after_first_chunk(source, append)


def test_a_file_that_is_replaced_by_one_like_it_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", LINES)
    source = open_source(path)
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)

    def replace() -> None:
        other = write(tmp_path, "b.jsonl", LINES)
        os.utime(other, ns=times)
        other.replace(path)

    with pytest.raises(DataError, match="written to"):
        after_first_chunk(source, replace)


def test_a_file_that_goes_away_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", LINES)
    with pytest.raises(NotFound):
        after_first_chunk(open_source(path), path.unlink)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_memory_does_not_grow_with_the_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    _write_many(path, 3000)
    source = open_source(path)
    tracemalloc.start()
    rows = sum(len(chunk.rows()) for chunk in source.chunks(1 << 16))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows == 3000
    assert peak < 1_500_000 < 3000 * 1000


def _write_many(path: Path, count: int) -> None:
    rows = [{**good(number), "pad": f"{number:06}" * 150} for number in range(count)]
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        cells = (
            f'{row["pad"]},"{json.dumps(row["messages"]).replace(chr(34), chr(34) * 2)}"\n' for row in rows
        )
        path.write_text("pad,messages\n" + "".join(cells))
    else:
        path.write_bytes(lines(*rows) if path.suffix == ".jsonl" else json.dumps(rows).encode())


@pytest.mark.parametrize("opening", [b"", b"[", b'{"rows": [', b'a,messages\n"'])
def test_a_row_that_never_ends_takes_no_more_than_its_limit(
    opening: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("text", "json", "csv"):
        monkeypatch.setattr(f"tuneloop.core.data.reading_{module}.MAX_ROW_BYTES", 1 << 18)
    path = tmp_path / ("a.csv" if b"," in opening else "a.json")
    with open(path, "wb") as file:
        file.write(opening + b'{"messages": "' if b"," not in opening else opening)
        for _ in range(800):
            file.write(b"x" * 10_000)
    source = open_source(path)
    tracemalloc.start()
    rows = [row for chunk in source.chunks(1 << 14) for row in chunk.rows()]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [each.rule for each in rows[-1].findings] == ["row_size"]
    assert peak < 2_500_000 < 8_000_000


# ---------------------------------------------------------------- any bytes

_NAMES = ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.csv.gz", "data"]
_SEEDS = [content for _, content, _, _ in FILES.values() if isinstance(content, bytes)]
_PIECES = st.sampled_from(
    [
        b"[",
        b"]",
        b"{",
        b"}",
        b",",
        b":",
        b'"',
        b"\\",
        b"\n",
        b"\r",
        b"\t",
        b"\0",
        b"\xff",
        b"\xfe",
        b"messages",
    ]
)

quick = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def reads_or_refuses(path: Path) -> None:
    try:
        report = check_files({"train": open_source(path)})
    except TuneloopError:
        return
    assert report.bad_rows <= report.rows
    assert all(finding.line >= 1 for finding in report.findings)


@quick
@given(st.sampled_from(_NAMES), st.binary(max_size=300) | st.lists(_PIECES, max_size=40).map(b"".join))
@example("a.csv", b'\r\n"')
@example("a.json", b"{")
def test_any_bytes_are_rows_or_findings_or_refused(tmp_path: Path, name: str, content: bytes) -> None:
    reads_or_refuses(write(tmp_path, name, content))


@quick
@given(st.sampled_from(_NAMES), st.sampled_from(_SEEDS), st.data())
def test_damaged_files_are_rows_or_findings_or_refused(
    tmp_path: Path, name: str, seed: bytes, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(seed)))
    stop = data.draw(st.integers(start, min(len(seed), start + 20)))
    middle = data.draw(st.binary(max_size=8) | _PIECES)
    reads_or_refuses(write(tmp_path, name, seed[:start] + middle + seed[stop:]))


@settings(quick, max_examples=60)
@given(st.data())
def test_damaged_parquet_is_rows_or_findings_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.parquet"
    as_parquet(path, row_group_size=2)
    whole = bytearray(path.read_bytes())
    start = data.draw(st.integers(4, len(whole)))
    whole[start : start + 3] = data.draw(st.binary(max_size=6))
    path.write_bytes(whole)
    reads_or_refuses(path)
