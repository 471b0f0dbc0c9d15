"""Parquet as batches of rows. Pages are decoded as they come: a row group is never whole in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tuneloop.core.chat import Finding
from tuneloop.core.data.reading_csv import header_finding, with_parsed_cell
from tuneloop.core.data.rows import BadRows, Chunk, Row
from tuneloop.core.errors import DataError

_AGAIN = "Write or download the file again."


class BatchChunk(Chunk):
    """An Arrow record batch; sent to another process as an IPC stream, which holds its rows only."""

    def __init__(self, number: int, batch: Any, column: str) -> None:
        self.number, self.batch, self.column = number, batch, column

    def __reduce__(self) -> tuple[Any, ...]:
        import pyarrow as pa

        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.batch.schema) as writer:
            writer.write_batch(self.batch)
        return _from_stream, (self.number, sink.getvalue().to_pybytes(), self.column)

    def rows(self) -> list[Row]:
        values = self._values()
        rows = []
        for number, value in enumerate(values, self.number):
            if isinstance(value, Finding):
                rows.append(Row(number, number, None, (value,)))
            else:
                rows.append(with_parsed_cell(Row(number, number, value), self.column))
        return rows

    def _values(self) -> list[Any]:
        try:
            return list(self.batch.to_pylist())
        except Exception:
            return [_one_value(self.batch.slice(number, 1)) for number in range(self.batch.num_rows)]


def _from_stream(number: int, data: bytes, column: str) -> BatchChunk:
    import pyarrow as pa

    with pa.ipc.open_stream(data) as reader:
        return BatchChunk(number, reader.read_next_batch(), column)


def _one_value(batch: Any) -> Any:
    """Each cell may fail in its own way: text that is no UTF-8, a time that Python has no number for."""
    value = {}
    for name, cells in zip(batch.schema.names, batch.columns, strict=True):
        try:
            value[name] = cells[0].as_py()
        except UnicodeDecodeError as broken:
            byte = broken.object[broken.start]
            shown = f"byte {byte:#04x} at position {broken.start}"
            return Finding("encoding", name, shown, "Write the text as UTF-8.")
        except Exception as broken:
            return Finding("parquet", name, str(broken)[:80], "Leave this column out, or write it as text.")
    return value


def open_parquet(path: Path, shown: str) -> Any:
    """A `pyarrow.parquet.ParquetFile`. Raises `DataError`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError) as broken:
        raise DataError(
            f"{shown} is not a whole Parquet file: {_first_line(broken)}.", next_move=_AGAIN
        ) from None


def batch_chunks(path: Path, shown: str, column: str, target_bytes: int) -> Iterator[Chunk]:
    with open_parquet(path, shown) as file:
        if found := header_finding(file.schema_arrow.names):
            yield BadRows(Row(1, 1, None, (found,)))
            return
        number = 1
        try:
            for batch in _batches(file, _rows_of(file.metadata, target_bytes)):
                if batch.num_rows:
                    yield BatchChunk(number, batch, column)
                    number += batch.num_rows
            if number <= file.metadata.num_rows:  # Arrow may stop early without a word
                shown = f"{number - 1} rows of {file.metadata.num_rows}"
                yield BadRows(Row(number, number, None, (Finding("parquet", "", shown, _AGAIN),)))
        except Exception as broken:
            # Whatever Arrow raises for a damaged page: the rows before it were given.
            fix = f"{_AGAIN} What follows was not read."
            yield BadRows(Row(number, number, None, (Finding("parquet", "", _first_line(broken), fix),)))


def _batches(file: Any, size: int) -> Iterator[Any]:
    """Batches may reach over row groups. Where one cannot be read, the groups before it still can."""
    given = 0
    try:
        for batch in file.iter_batches(size, use_threads=False):
            given += batch.num_rows
            yield batch
        return
    except Exception:
        start = 0
    for group in range(file.metadata.num_row_groups):
        for batch in file.iter_batches(size, row_groups=[group], use_threads=False):
            if start + batch.num_rows > given:
                yield batch.slice(max(0, given - start))
            start += batch.num_rows


def _rows_of(metadata: Any, target_bytes: int) -> int:
    """So many rows that a batch has about `target_bytes`, going by the sizes before compression."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    size = sum(int(group.total_byte_size) for group in groups)
    rows = int(target_bytes * max(1, metadata.num_rows) // max(1, size))
    return max(1, min(8192, rows))


def _first_line(broken: BaseException) -> str:
    return (str(broken).splitlines() or [type(broken).__name__])[0][:120].rstrip(".")
