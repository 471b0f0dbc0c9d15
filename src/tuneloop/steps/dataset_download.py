"""The step `dataset_download`: the first rows of each split of a dataset, a file a split, as the guide's
`download-dataset.py` writes them.

From the hub (parameter `dataset`) or from a folder of data files (input `source`), into the folder that
the parameter `target` names; the output `report` says what lies there. Files appear whole, all of them or
none, and one with other content than what would be written is not replaced unless `force` says so. A killed
download goes on where it was; of Parquet only the files that hold the wanted rows are fetched.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, Field

from tuneloop.core import disk
from tuneloop.core.data.outputs import outputs
from tuneloop.core.errors import DataError, NotFound, UsageError
from tuneloop.core.process import write_atomically
from tuneloop.steps import dataset_rows
from tuneloop.steps.context import StepContext
from tuneloop.steps.hub.data_files import README, choose
from tuneloop.steps.hub.datasets import open_dataset
from tuneloop.steps.hub.source import DatasetSource

GROWTH = 4
"""Parquet to JSON Lines: a guess, on the safe side for text."""


class Parameters(BaseModel):
    model_config = ConfigDict(extra="forbid")

    dataset: str | None = None
    """A repository of the hub; None: the input `source`."""
    subset: str | None = None
    revision: str = "main"
    splits: tuple[str, ...] | None = None
    """None: all."""
    split_pct: float | None = Field(None, gt=0, le=100)
    """Per cent of each split, from its start; None: all of it."""
    target: str
    format: Literal["jsonl", "parquet"] = "jsonl"
    force: bool = False


class Files(Protocol):
    """A dataset's files, wherever they are."""

    @property
    def place(self) -> str: ...
    @property
    def commit(self) -> str | None: ...
    @property
    def names(self) -> list[str]: ...
    def size(self, name: str) -> int: ...
    def readme(self) -> str | None: ...
    def get(self, names: Sequence[str]) -> list[Path]: ...
    def count_rows(self, names: Sequence[str]) -> list[int] | None: ...


class Planned(NamedTuple):
    """What is taken of a split."""

    split: str
    names: list[str]
    """Of the files that are needed, in order."""
    of_files: int
    most: int | None
    """Rows from the start; None: all."""
    of_rows: int | None
    """Rows that the split has, where that is known."""


def run(context: StepContext) -> None:
    parameters = Parameters.model_validate(context.parameters)
    files = _files(context, parameters)
    chosen = choose(
        files.names,
        files.readme(),
        parameters.subset,
        parameters.splits,
        place=files.place,
        each_name_a_split=parameters.dataset is None,
    )
    for remark in chosen.remarks:
        context.warn(remark)
    target = Path(parameters.target)
    plan = [_plan(files, split, names, parameters.split_pct) for split, names in chosen.splits.items()]
    _check_space(files, plan, target, parameters.format)
    fetched = files.get([name for planned in plan for name in planned.names])
    report = _write(context, parameters, plan, _by_split(plan, fetched), target)
    about = {"dataset": files.place, "commit": files.commit, "folder": str(target), "splits": report}
    write_atomically(context.output("report"), json.dumps(about, indent=1) + "\n")
    context.summary["rows"] = sum(split["rows"] for split in report)


def _files(context: StepContext, parameters: Parameters) -> Files:
    if parameters.dataset is None:
        return FolderFiles(context.inputs["source"], context.input_names["source"])
    return open_dataset(context, DatasetSource(parameters.dataset, parameters.revision))


class FolderFiles:
    """A folder on this machine, or one file."""

    commit = None

    def __init__(self, path: Path, place: str) -> None:
        if not path.exists():
            raise NotFound(f"{place}: there is no such file or folder.")
        self._folder = path if path.is_dir() else path.parent
        self.place = place
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        self.names = [str(each.relative_to(self._folder)) for each in found if each.is_file()]

    def size(self, name: str) -> int:
        return (self._folder / name).stat().st_size

    def readme(self) -> str | None:
        path = self._folder / README
        return path.read_text(encoding="utf-8", errors="replace") if README in self.names else None

    def get(self, names: Sequence[str]) -> list[Path]:
        return [self._folder / name for name in names]

    def count_rows(self, names: Sequence[str]) -> list[int] | None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return [pq.read_metadata(path).num_rows for path in self.get(names)]
        except pa.ArrowException as error:
            raise DataError(f"{self.place}: no Parquet file: {str(error).splitlines()[0]}.") from None


# ---------------------------------------------------------------- which rows


def rows_of(percent: float, rows: int) -> int:
    """How many rows `[0%:percent%]` has, rounded to the nearest, a half to even, as `datasets` does
    (arrow_reader.py, `_pct_to_abs_closest`)."""
    return min(rows, round(percent * rows / 100.0))


def _plan(files: Files, split: str, names: list[str], percent: float | None) -> Planned:
    """The files that hold the first rows. Where counting needs the files themselves, all of them."""
    whole = Planned(split, names, len(names), None, None)
    if percent is None or percent == 100:
        return whole
    is_parquet = all(map(dataset_rows.is_parquet, names))
    counts = files.count_rows(names) if is_parquet else None
    if counts is None:
        counted = list(zip(files.get(names), names, strict=True))
        rows = dataset_rows.count(counted)
        return whole._replace(most=_at_least_one(percent, rows, split), of_rows=rows)
    most = _at_least_one(percent, sum(counts), split)
    needed, held = 0, 0
    while held < most:
        held += counts[needed]
        needed += 1
    return Planned(split, names[:needed], len(names), most, sum(counts))


def _at_least_one(percent: float, rows: int, split: str) -> int:
    if found := rows_of(percent, rows):
        return found
    if not rows:
        raise DataError(f"The split {split} has no rows.", next_move="Name the others with --splits.")
    raise UsageError(
        f"{percent:g} % of the {rows} rows of {split} are none.",
        next_move=f"One row is {100 / rows:.3g} %: take more, or name the splits that you want (--splits).",
    )


def _check_space(files: Files, plan: Sequence[Planned], target: Path, form: str) -> None:
    """An estimate: the share of the rows in the share of the files."""
    needed = 0.0
    for planned in plan:
        share = (planned.most or 1) / (planned.of_rows or 1) if planned.most else 1.0
        # The files that are not fetched hold no rows that are written.
        share = min(1.0, share * planned.of_files / len(planned.names))
        grows = form == "jsonl" and all(map(dataset_rows.is_parquet, planned.names))
        needed += sum(map(files.size, planned.names)) * share * (GROWTH if grows else 1)
    disk.require(
        target, int(needed), f"{target}, by estimate,", "Choose another disk with --to, or fewer rows."
    )


def _by_split(plan: Sequence[Planned], fetched: Sequence[Path]) -> list[list[tuple[Path, str]]]:
    paths = iter(fetched)
    return [[(next(paths), name) for name in planned.names] for planned in plan]


# ---------------------------------------------------------------- writing


def _write(
    context: StepContext,
    parameters: Parameters,
    plan: Sequence[Planned],
    files: Sequence[list[tuple[Path, str]]],
    target: Path,
) -> list[dict[str, Any]]:
    places = [target / f"{planned.split}.{parameters.format}" for planned in plan]
    with outputs(target, parameters.force) as made:
        counts = [
            _write_split(context, planned, read, made.begin(place), parameters.format)
            for planned, read, place in zip(plan, files, places, strict=True)
        ]
        states = made.finish()
    return [
        {
            "split": planned.split,
            "file": place.name,
            "rows": rows,
            "of_rows": planned.of_rows or rows,
            "size_bytes": place.stat().st_size,
            "state": states[place],
            "files_read": len(planned.names),
            "of_files": planned.of_files,
        }
        for planned, place, rows in zip(plan, places, counts, strict=True)
    ]


def _write_split(
    context: StepContext, planned: Planned, files: list[tuple[Path, str]], target: Path, form: str
) -> int:
    done = 0

    def written(count: int) -> None:
        nonlocal done
        done += count
        context.progress(f"writing {planned.split}", done=done, total=planned.most, unit="rows")

    if form == "parquet":
        dataset_rows.write_parquet(target, files, planned.most, written)
    else:
        dataset_rows.write_jsonl(target, dataset_rows.read_batches(files, planned.most), written)
    return done
