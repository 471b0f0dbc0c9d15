"""`tuneloop data download`, `download-script`, `convert` and `split`, as they are typed."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.conftest import Ran
from tuneloop.cli import data_convert
from tuneloop.core.data.outputs import outputs
from tuneloop.core.errors import Conflict

Typed = Callable[..., Ran]


def written(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def asking(asked: str, answered: str = "yes") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}


def shared(asked: str, answered: str = "yes", **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]
    return {"conversations": turns, **more}


# ---------------------------------------------------------------- download


def test_a_folder_is_downloaded_by_a_process_of_its_own(tuneloop_command: Typed, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    written(tmp_path / "mine" / "train.jsonl", [asking(str(number)) for number in range(40)])
    ran = tuneloop_command(
        "data",
        "download",
        str(tmp_path / "mine"),
        "--split-pct",
        "5",
        "--to",
        str(tmp_path / "out"),
        "--json",
    )
    assert ran.code == 0, ran.err
    [split] = json.loads(ran.out)["splits"]
    assert (split["split"], split["rows"], split["of_rows"], split["state"]) == ("train", 2, 40, "written")
    assert rows_in(tmp_path / "out" / "train.jsonl") == [asking("0"), asking("1")]
    (tmp_path / "out" / "train.jsonl").unlink()
    again = tuneloop_command(
        "data", "download", str(tmp_path / "mine"), "--split-pct", "5", "--to", str(tmp_path / "out")
    )
    assert again.out.splitlines()[1].split() == ["FILE", "ROWS", "OF", "SIZE", "STATE"]
    assert (tmp_path / "out" / "train.jsonl").exists()


@pytest.mark.parametrize(
    ("typed", "code", "said"),
    [
        (["./nothing", "--to", "OUT"], 3, "nothing cannot be looked at"),
        (["FOLDER", "--to", "OUT", "--split-pct", "0"], 2, "0.0 is not in the range"),
        (["FOLDER", "--to", "OUT", "--split-pct", "nan"], 2, "nan is not a number"),
        (["FOLDER", "--to", "OUT", "--split-pct", "101"], 2, "is not in the range"),
        (["FOLDER", "--to", "OUT", "--splits", " , "], 2, "name at least one split"),
        (["FOLDER", "--to", "OUT", "--revision", "v1"], 2, "--revision is for the hub"),
        (["FOLDER"], 2, "Missing option '--to'"),
    ],
)
def test_what_cannot_be_downloaded_is_refused_at_once(
    tuneloop_command: Typed, tmp_path: Path, typed: list[str], code: int, said: str
) -> None:
    places = {"OUT": str(tmp_path / "out"), "FOLDER": str(tmp_path)}
    ran = tuneloop_command("data", "download", *(places.get(one, one) for one in typed))
    assert ran.code == code
    assert said in ran.err


# ---------------------------------------------------------------- the script

STAND_IN = """
import json, os, pathlib
__version__ = os.environ["STAND_IN_VERSION"]
LOG = pathlib.Path(os.environ["STAND_IN_LOG"])
def log(*call):
    with LOG.open("a") as file:
        file.write(json.dumps(call) + "\\n")
def get_dataset_split_names(path, config_name=None):
    log("names", path, config_name)
    return ["train_sft", "test_gen"]
class Rows:
    def to_json(self, path):
        pathlib.Path(path).write_text("{}\\n")
def load_dataset(path, name=None, split=None):
    log("load", path, name, split)
    return Rows()
"""
FILE_SYSTEM = "class LocalFileSystem:\n    protocol = ('file', 'local')\n"


def run_script(
    script: Path, stand_in: Path, *typed: str, version: str = "5.2.0"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-S", script.name, *typed],
        cwd=script.parent,
        env={"PYTHONPATH": str(stand_in), "STAND_IN_LOG": str(stand_in / "log"), "STAND_IN_VERSION": version},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A `datasets` that records what is asked of it."""
    folder = tmp_path / "packages"
    (folder / "fsspec" / "implementations").mkdir(parents=True)
    (folder / "datasets.py").write_text(STAND_IN)
    (folder / "fsspec" / "__init__.py").touch()
    (folder / "fsspec" / "implementations" / "__init__.py").touch()
    (folder / "fsspec" / "implementations" / "local.py").write_text(FILE_SYSTEM)
    return folder


@pytest.fixture
def script(tuneloop_command: Typed, tmp_path: Path) -> Path:
    path = tmp_path / "work" / "download-dataset.py"
    assert tuneloop_command("data", "download-script", "--to", str(path)).code == 0
    return path


GUIDE = "--dataset HuggingFaceH4/ultrachat_200k --download_dir ultrachat_200k_dataset --dataset_split_pc 5"


@pytest.mark.parametrize("version", ["2.9.0", "5.2.0"])
def test_the_guides_line_works_with_the_script_as_it_stands(
    script: Path, stand_in: Path, version: str
) -> None:
    ran = run_script(script, stand_in, *GUIDE.split(), version=version)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    assert rows_in(stand_in / "log") == [
        ["names", "HuggingFaceH4/ultrachat_200k", None],
        ["load", "HuggingFaceH4/ultrachat_200k", None, "train_sft[0%:5%]"],
        ["load", "HuggingFaceH4/ultrachat_200k", None, "test_gen[0%:5%]"],
    ]
    made = sorted(file.name for file in (script.parent / "ultrachat_200k_dataset").iterdir())
    assert made == ["test_gen.jsonl", "train_sft.jsonl"]


def test_without_arguments_all_of_samsum_goes_to_data(script: Path, stand_in: Path) -> None:
    assert run_script(script, stand_in).returncode == 0
    assert ["load", "samsum", None, "train_sft"] in rows_in(stand_in / "log")
    assert (script.parent / "data" / "train_sft.jsonl").exists()


def test_a_subset_is_handed_on(script: Path, stand_in: Path) -> None:
    assert run_script(script, stand_in, "--dataset_subset", "en", "--dataset_split_pc", "5%").returncode == 0
    assert rows_in(stand_in / "log")[:2] == [
        ["names", "samsum", "en"],
        ["load", "samsum", "en", "train_sft[0%:5%]"],
    ]


@pytest.mark.parametrize("share", ["0", "101", "half", "2.5"])
def test_a_share_that_datasets_would_not_take_is_refused(script: Path, stand_in: Path, share: str) -> None:
    ran = run_script(script, stand_in, "--dataset_split_pc", share)
    assert ran.returncode == 2
    assert "a whole number from 1 to 100" in ran.stderr


def test_without_datasets_the_script_says_what_to_install(script: Path, tmp_path: Path) -> None:
    ran = run_script(script, tmp_path)
    assert ran.returncode == 1
    assert ran.stderr.strip() == "The package datasets is missing: pip install datasets"


def test_the_script_goes_to_stdout_or_to_a_file_and_replaces_no_other(
    tuneloop_command: Typed, script: Path
) -> None:
    printed = tuneloop_command("data", "download-script", "--to", "-")
    assert printed.out == script.read_text()
    assert "there already" in tuneloop_command("data", "download-script", "--to", str(script)).out
    script.write_text("mine")
    assert tuneloop_command("data", "download-script", "--to", str(script)).code == 4
    assert script.read_text() == "mine"
    assert tuneloop_command("data", "download-script", "--to", str(script), "--force").code == 0


# ---------------------------------------------------------------- convert


def test_a_layout_is_found_and_said_and_what_was_done_is_counted(
    tuneloop_command: Typed, tmp_path: Path
) -> None:
    source = written(tmp_path / "in.jsonl", [shared("é", id=1), shared("b", id=2)])
    ran = tuneloop_command("data", "convert", str(source), "--to", str(tmp_path / "out.jsonl"))
    assert (ran.code, ran.out) == (0, f"2 conversations in {tmp_path / 'out.jsonl'}.\n")
    assert "sharegpt (a list 'conversations' of speaker and text in each of the first 2 rows)" in ran.err
    assert rows_in(tmp_path / "out.jsonl") == [{**asking("é"), "id": 1}, {**asking("b"), "id": 2}]
    assert "é" in (tmp_path / "out.jsonl").read_text(encoding="utf-8")


def test_a_json_array_and_a_table_are_read_too(tuneloop_command: Typed, tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(json.dumps([shared("a")], indent=2))
    assert (
        tuneloop_command("data", "convert", str(tmp_path / "in.json"), "--to", str(tmp_path / "1.jsonl")).code
        == 0
    )
    with open(tmp_path / "in.csv", "w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([["q", "a"], ['a, "b"\nc', "yes"]])
    typed = ["--from", "csv", "--map", "q=user", "--map", "a=assistant", "--to", str(tmp_path / "2.jsonl")]
    assert tuneloop_command("data", "convert", str(tmp_path / "in.csv"), *typed).code == 0
    assert rows_in(tmp_path / "1.jsonl") == [asking("a")]
    assert rows_in(tmp_path / "2.jsonl") == [asking('a, "b"\nc')]


def test_conversations_in_the_cells_of_a_table_are_found(tuneloop_command: Typed, tmp_path: Path) -> None:
    with open(tmp_path / "in.tsv", "w", newline="", encoding="utf-8") as handle:
        cell = json.dumps(shared("a")["conversations"])
        csv.writer(handle, delimiter="\t").writerows([["id", "conversations"], ["7", cell]])
    assert (
        tuneloop_command("data", "convert", str(tmp_path / "in.tsv"), "--to", str(tmp_path / "o.jsonl")).code
        == 0
    )
    assert rows_in(tmp_path / "o.jsonl") == [{**asking("a"), "id": "7"}]


def test_a_row_that_cannot_be_converted_stops_it_and_is_told_with_its_line(
    tuneloop_command: Typed, tmp_path: Path
) -> None:
    source = written(tmp_path / "in.jsonl", [shared("a"), shared("b", answered=""), shared("c")])
    source.write_text(source.read_text() + "\n{broken\n")
    ran = tuneloop_command("data", "convert", str(source), "--to", str(tmp_path / "out.jsonl"))
    assert ran.code == 2
    assert "2 of 4 rows" in ran.err
    assert f'{source} line 2: conversations[1].value: found "" (rule content_not_empty).' in ran.err
    assert f"{source} line 5" in ran.err
    assert "--bad-rows 2" in ran.err
    assert not (tmp_path / "out.jsonl").exists()
    assert [file.name for file in tmp_path.iterdir() if "partial" in file.name] == []


def test_a_budget_leaves_bad_rows_out_and_tells_them(tuneloop_command: Typed, tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", [shared("a"), shared("b", answered="")])
    typed = ["data", "convert", str(source), "--to", str(tmp_path / "out.jsonl"), "--bad-rows", "1"]
    ran = tuneloop_command(*typed)
    assert ran.code == 0
    assert "1 left out" in ran.out
    assert "line 2: conversations[1].value" in ran.err
    report = json.loads(tuneloop_command(*typed, "--json").out)
    assert (report["rows"], report["converted"], report["bad_rows"], report["state"]) == (
        2,
        1,
        1,
        "unchanged",
    )
    assert report["findings"][0]["line"] == 2


def test_bad_rows_are_all_counted_and_the_first_ones_listed(
    tuneloop_command: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_convert, "MOST_FINDINGS", 3)
    monkeypatch.setattr(data_convert, "MOST_TOLD", 2)
    source = written(tmp_path / "in.jsonl", [shared("a"), *(shared("b", answered="") for _ in range(9))])
    ran = tuneloop_command(
        "data", "convert", str(source), "--to", str(tmp_path / "o.jsonl"), "--bad-rows", "9"
    )
    assert "and 7 rows more" in ran.err
    ran = tuneloop_command("data", "convert", str(source), "--to", str(tmp_path / "o2.jsonl"), "--json")
    error = json.loads(ran.err)["error"]
    assert error["message"].startswith("9 of 10 rows")
    assert len(error["details"]) == 3


def test_when_no_row_can_be_converted_no_budget_helps(tuneloop_command: Typed, tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", [shared("a")])
    typed = ["--from", "alpaca", "--bad-rows", "5", "--to", str(tmp_path / "out.jsonl")]
    ran = tuneloop_command("data", "convert", str(source), *typed)
    assert ran.code == 2
    assert "Is --from right?" in ran.err


def test_the_file_that_is_read_is_not_written(tuneloop_command: Typed, tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", [shared("a")])
    ran = tuneloop_command("data", "convert", str(source), "--to", str(source), "--force")
    assert ran.code == 2
    assert "is the file that is read" in ran.err
    assert rows_in(source) == [shared("a")]


def test_other_content_is_replaced_only_when_it_is_said(tuneloop_command: Typed, tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", [shared("a")])
    (tmp_path / "out.jsonl").write_text("mine")
    typed = ["data", "convert", str(source), "--to", str(tmp_path / "out.jsonl")]
    assert tuneloop_command(*typed).code == 4
    assert (tmp_path / "out.jsonl").read_text() == "mine"
    assert tuneloop_command(*typed, "--force").code == 0
    assert rows_in(tmp_path / "out.jsonl") == [asking("a")]


# ---------------------------------------------------------------- split


def test_a_file_is_split_so_that_no_opening_line_is_in_two(tuneloop_command: Typed, tmp_path: Path) -> None:
    rows = [{**asking(f"Question {number % 60}", f"answer {number}"), "id": number} for number in range(180)]
    source = written(tmp_path / "in.jsonl", rows)
    ran = tuneloop_command("data", "split", str(source), "--to", str(tmp_path / "out"), "--json")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    found = {split["split"]: rows_in(Path(split["path"])) for split in report["splits"]}
    assert list(found) == ["train", "validation", "test"]
    assert {split["split"]: split["rows"] for split in report["splits"]} == {
        n: len(r) for n, r in found.items()
    }
    assert sorted((row for part in found.values() for row in part), key=lambda row: row["id"]) == rows
    openings = [{row["messages"][0]["content"] for row in part} for part in found.values()]
    assert sum(map(len, openings)) == len(set.union(*openings)) == 60
    assert all([row["id"] for row in part] == sorted(row["id"] for row in part) for part in found.values())


def test_the_order_of_the_rows_does_not_matter_and_the_seed_does(
    tuneloop_command: Typed, tmp_path: Path
) -> None:
    rows = [asking(str(number)) for number in range(100)]
    written(tmp_path / "a.jsonl", rows)
    written(tmp_path / "b.jsonl", reversed(rows))

    def test_set(name: str, *typed: str) -> set[str]:
        out = tmp_path / f"out-{name}-{len(typed)}"
        assert tuneloop_command("data", "split", str(tmp_path / name), "--to", str(out), *typed).code == 0
        return {row["messages"][0]["content"] for row in rows_in(out / "test.jsonl")}

    assert test_set("a.jsonl") == test_set("b.jsonl")
    assert test_set("a.jsonl") != test_set("a.jsonl", "--seed", "7")


def test_by_component_the_last_tenths_are_held_out(tuneloop_command: Typed, tmp_path: Path) -> None:
    rows = [asking(str(number)) for number in range(25)]
    source = written(tmp_path / "in.jsonl", rows)
    ran = tuneloop_command("data", "split", str(source), "--by", "component", "--to", str(tmp_path / "out"))
    assert ran.code == 0
    assert rows_in(tmp_path / "out" / "train.jsonl") == rows[:21]
    assert rows_in(tmp_path / "out" / "validation.jsonl") == rows[21:23]
    assert rows_in(tmp_path / "out" / "test.jsonl") == rows[23:]


def test_a_share_of_nothing_makes_no_file(tuneloop_command: Typed, tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", [asking(str(number)) for number in range(50)])
    typed = ["--validation", "20", "--test", "0", "--to", str(tmp_path / "out")]
    ran = tuneloop_command("data", "split", str(source), *typed)
    assert ran.code == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"train.jsonl", "validation.jsonl"}


@pytest.mark.parametrize(
    ("rows", "typed", "said"),
    [
        ([asking("a")], [], "1 different opening line"),
        ([asking("a"), {"text": "b"}], [], "line 2: messages"),
        ([asking("a")] * 9, ["--by", "component", "--test", "5"], "always takes 80/10/10"),
        ([asking("a")] * 9, ["--validation", "60", "--test", "40"], "100 % are held out"),
        ([asking("a")] * 2, ["--by", "component"], "too few to carve"),
    ],
)
def test_what_cannot_be_split_is_refused(
    tuneloop_command: Typed, tmp_path: Path, rows: list[dict[str, Any]], typed: list[str], said: str
) -> None:
    source = written(tmp_path / "in.jsonl", rows)
    ran = tuneloop_command("data", "split", str(source), "--to", str(tmp_path / "out"), *typed)
    assert ran.code == 2
    assert said in ran.err
    assert not (tmp_path / "out").exists()


def test_a_file_that_grows_between_the_readings_is_noticed(
    tuneloop_command: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written(tmp_path / "in.jsonl", [asking(str(number)) for number in range(50)])
    reading = data_convert.read_rows
    times = []

    def read_rows(path: Path, **options: Any) -> Any:
        times.append(path)
        if len(times) == 2:
            written(source, [asking(str(number)) for number in range(51)])
        return reading(path, **options)

    monkeypatch.setattr(data_convert, "read_rows", read_rows)
    ran = tuneloop_command("data", "split", str(source), "--to", str(tmp_path / "out"))
    assert ran.code == 2
    assert "was written to while it was read" in ran.err
    assert list((tmp_path / "out").iterdir()) == []


# ---------------------------------------------------------------- files that appear whole


def write_all(folder: Path, *names: str, fails: BaseException | None = None) -> None:
    with outputs(folder, force=False) as made:
        for name in names:
            made.begin(folder / name).write_text("new")
        if fails:
            raise fails
        made.finish()


def test_of_several_files_none_appears_when_one_would_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("mine")
    with pytest.raises(Conflict, match="b is there already"):
        write_all(tmp_path, "a", "b")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("b", "mine")]


def test_what_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_all(tmp_path, "a", fails=KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_cleared_away_and_what_another_makes_is_not(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / f".a.{gone.pid}.partial").write_text("half")
    (tmp_path / f".a.{os.getppid()}.partial").write_text("half")
    write_all(tmp_path, "a")
    assert sorted(file.name for file in tmp_path.iterdir()) == [f".a.{os.getppid()}.partial", "a"]
