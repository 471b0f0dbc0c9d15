"""Rows of a dataset's files, written as JSON Lines or Parquet.

The JSON Lines are, byte for byte, what `datasets` writes with `to_json` (compared with 2.9.0 and 5.2.0),
so that both ways of fetching a dataset give files of one digest: ASCII, other characters and `/` escaped, no
spaces, keys in the order of the file. It differs on purpose where that loses something: fractions are
written with all their digits (it rounds to ten), whole numbers stay whole beside nulls (2.9.0 makes fractions
of them), dates are ISO 8601 (it writes milliseconds).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from tuneloop.core.data.reading import read_rows
from tuneloop.core.errors import DataError, Unsupported

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 1000

Values = list[dict[str, Any]]


def read_batches(files: Sequence[tuple[Path, str]], most: int | None = None) -> Iterator[Values]:
    """The first `most` rows (None: all) of files, each with what to call it. Raises `DataError` for a row
    that cannot be read."""
    left = math.inf if most is None else most
    for path, shown in files:
        for batch in _parquet(path, shown) if is_parquet(shown) else _text(path, shown):
            if left < len(batch):
                batch = batch[: int(left)]
            if batch:
                yield batch
            left -= len(batch)
            if left <= 0:
                return


def is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet")


def count(files: Iterable[tuple[Path, str]]) -> int:
    return sum(len(batch) for batch in read_batches(list(files)))


def _text(path: Path, shown: str) -> Iterator[Values]:
    batch: Values = []
    for row in read_rows(path, shown):
        if row.value is None:
            first = row.findings[0]
            raise DataError(
                f"{shown} line {row.line} cannot be read: found {first.value} (rule {first.rule}).",
                next_move=first.fix,
                details=[{"file": shown, "line": row.line, **each._asdict()} for each in row.findings],
            )
        batch.append(row.value)
        if len(batch) == BATCH_ROWS:
            yield batch
            batch = []
    yield batch


def _parquet(path: Path, shown: str) -> Iterator[Values]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as opened:
            for batch in opened.iter_batches(BATCH_ROWS):
                yield batch.to_pylist()
    except pa.ArrowException as error:
        raise DataError(
            f"{shown} cannot be read as Parquet: {str(error).splitlines()[0]}.",
            next_move="Fetch it anew, or take another revision.",
        ) from None


# ---------------------------------------------------------------- JSON Lines


def json_line(row: dict[str, Any]) -> bytes:
    """Raises `Unsupported` for what JSON has no words for (bytes, say)."""
    try:
        text = json.dumps(row, separators=(",", ":"), allow_nan=False, default=_as_json)
    except ValueError:
        text = json.dumps(_finite(row), separators=(",", ":"), allow_nan=False, default=_as_json)
    if "\\u007f" in text:
        # The one ASCII character that json escapes and pandas does not.
        text = re.sub(r"\\(u007f|.)", lambda found: "\x7f" if found[1] == "u007f" else found[0], text)
    return text.replace("/", "\\/").encode("ascii") + b"\n"


def _as_json(value: Any) -> Any:
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal | UUID):
        return str(value)
    if isinstance(value, timedelta):
        return value.total_seconds()
    raise Unsupported(
        f"A column holds {type(value).__name__}, which JSON has no words for.",
        next_move="Write Parquet: --format parquet",
    )


def _finite(value: Any) -> Any:
    """What is not a number is null, as pandas writes it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def write_jsonl(target: Path, batches: Iterable[Values], written: Callable[[int], None]) -> None:
    with open(target, "wb") as handle:
        for batch in batches:
            handle.write(b"".join(map(json_line, batch)))
            written(len(batch))


# ---------------------------------------------------------------- Parquet


def write_parquet(
    target: Path,
    files: Sequence[tuple[Path, str]],
    most: int | None,
    written: Callable[[int], None],
) -> None:
    """Columns are those of all files together; what a row lacks is null. Raises `DataError` where a column
    has two types."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if all(is_parquet(shown) for _, shown in files):
        schema = _unified([pq.read_schema(path) for path, _ in files])
    else:
        schema = _unified(_schemas(files, most))
    with pq.ParquetWriter(target, schema) as writer:
        for batch in read_batches(files, most):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
            written(len(batch))


def _schemas(files: Sequence[tuple[Path, str]], most: int | None) -> Iterator[pa.Schema]:
    import pyarrow as pa

    done = 0
    for batch in read_batches(files, most):
        names = dict.fromkeys(name for row in batch for name in row)
        try:
            yield pa.table({name: pa.array([row.get(name) for row in batch]) for name in names}).schema
        except (pa.ArrowException, OverflowError) as error:
            raise _mixed(f"rows {done + 1} to {done + len(batch)}: {error}") from None
        done += len(batch)


def _unified(schemas: Iterable[pa.Schema]) -> pa.Schema:
    import pyarrow as pa

    found: pa.Schema | None = None
    for schema in schemas:
        try:
            found = (
                schema if found is None else pa.unify_schemas([found, schema], promote_options="permissive")
            )
        except pa.ArrowException as error:
            raise _mixed(str(error)) from None
    assert found is not None
    return found


def _mixed(why: str) -> DataError:
    return DataError(
        f"A column holds more than one type, which Parquet does not have: {' '.join(why.split())}",
        next_move="Write JSON Lines, which does: --format jsonl",
    )
