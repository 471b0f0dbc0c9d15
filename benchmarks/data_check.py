"""Megabytes a second of `data check` on one core, without the tokenizer: read, parse, hold every row to the
rules, count, and find duplicates and leakage.

    .venv/bin/python benchmarks/data_check.py [--rows 40000] [--repeats 3] [--formats jsonl]

Rows are drawn like those of ultrachat_200k: 2 to 14 messages (median 6), the length of a row in tokens
log-normal around 1,200 (sigma 0.6, at about 4.4 characters a token), prose of words drawn by Zipf's law, one
text in seven with letters beyond ASCII, escapes as json.dumps writes them; a `prompt` and a `prompt_id`
beside the messages. Nine rows in ten are for training, one for test. Each format is measured in a process of
its own, whose peak of resident memory is told.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import json
import multiprocessing
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tuneloop.core.data.check import check_files
from tuneloop.core.data.reading import open_source

CHARACTERS_PER_TOKEN = 4.4
LETTERS = "etaoinshrdlucmfwypvbgk"
ACCENTS = "éüñçøλдя界🙂"


def words(chance: random.Random, count: int = 4000) -> tuple[list[str], list[float]]:
    made = ["".join(chance.choices(LETTERS, k=chance.randint(2, 9))) for _ in range(count)]
    return made, [1 / (rank + 2) for rank in range(count)]


def prose(chance: random.Random) -> str:
    """A million characters to cut texts out of, with sentences, paragraphs, quotes."""
    made, weights = words(chance)
    parts = []
    for number, word in enumerate(chance.choices(made, weights, k=180_000)):
        end = "" if number % 14 else chance.choice([". ", ", ", '."\n\n', ".\n", ' "', ": "])
        parts.append(word + (end or " "))
    return "".join(parts)


def rows(count: int, seed: int) -> Iterator[dict[str, Any]]:
    chance = random.Random(seed)
    text = prose(chance)
    for number in range(count):
        characters = chance.lognormvariate(0, 0.6) * 1200 * CHARACTERS_PER_TOKEN
        turns = chance.choice([1, 2, 2, 3, 3, 3, 4, 4, 5, 7])
        messages = []
        for turn in range(turns):
            share = characters / turns
            messages.append({"role": "user", "content": cut(chance, text, share * 0.15, f"{number}.{turn} ")})
            messages.append({"role": "assistant", "content": cut(chance, text, share * 0.85)})
        prompt = messages[0]["content"]
        name = hashlib.sha256(prompt.encode()).hexdigest()
        yield {"prompt": prompt, "messages": messages, "prompt_id": name}


def cut(chance: random.Random, text: str, characters: float, lead: str = "") -> str:
    start = chance.randrange(len(text) - 50_000)
    accent = chance.choice(ACCENTS) * 2 if chance.random() < 1 / 7 else ""
    return lead + text[start : start + max(8, min(50_000, int(characters)))] + accent + "."


def write(folder: Path, count: int, format: str, repeats: int) -> None:
    for role, share, seed in (("train", count * 9 // 10, 1), ("test", count - count * 9 // 10, 2)):
        WRITERS[format](folder / f"{role}.{format}", rows(share, seed))


def write_jsonl(path: Path, content: Iterator[dict[str, Any]]) -> None:
    with open(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in content)


def write_gzip(path: Path, content: Iterator[dict[str, Any]]) -> None:
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.writelines(json.dumps(row) + "\n" for row in content)


def write_json(path: Path, content: Iterator[dict[str, Any]]) -> None:
    with open(path, "w") as file:
        file.write("[")
        file.writelines(
            ("," if number else "") + json.dumps(row, indent=1) for number, row in enumerate(content)
        )
        file.write("]")


def write_csv(path: Path, content: Iterator[dict[str, Any]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "messages", "prompt_id"])
        writer.writerows([row["prompt"], json.dumps(row["messages"]), row["prompt_id"]] for row in content)


def write_parquet(path: Path, content: Iterator[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(list(content)), path, row_group_size=1000)


WRITERS: dict[str, Callable[[Path, Iterator[dict[str, Any]]], None]] = {
    "jsonl": write_jsonl,
    "jsonl.gz": write_gzip,
    "json": write_json,
    "csv": write_csv,
    "parquet": write_parquet,
}


def measure(paths: dict[str, Path], count: int) -> tuple[float, float]:
    """CPU and wall seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    report = check_files({role: open_source(path, path.name) for role, path in paths.items()})
    took = time.process_time() - cpu, time.perf_counter() - wall
    assert (report.rows, report.bad_rows, report.findings_count) == (count, 0, 0), report.by_rule
    return took


def show(folder: Path, count: int, format: str, repeats: int) -> None:
    paths = {role: folder / f"{role}.{format}" for role in ("train", "test")}
    size = sum(path.stat().st_size for path in paths.values())
    taken = [measure(paths, count) for _ in range(repeats)]
    rates = [size / 1e6 / cpu for cpu, _ in taken]
    print(
        f"{format:<9} {size / 1e6:8.1f} MB  {count} rows  "
        f"{statistics.median(rates):7.1f} MB/s per CPU second (min {min(rates):.1f}, max {max(rates):.1f})  "
        f"{count / statistics.median(cpu for cpu, _ in taken):8.0f} rows/s  "
        f"wall {statistics.median(wall for _, wall in taken):.2f} s  "
        f"peak memory {peak_megabytes():.0f} MB"
    )


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--formats", nargs="*", choices=list(WRITERS), default=["jsonl"])
    asked = parser.parse_args()
    print("$", "python", *sys.argv, flush=True)
    spawn = multiprocessing.get_context("spawn")
    for format in asked.formats:
        with tempfile.TemporaryDirectory() as folder:
            for work in (write, show):  # writing the rows takes memory of its own
                one = spawn.Process(target=work, args=(Path(folder), asked.rows, format, asked.repeats))
                one.start()
                one.join()
                if one.exitcode:
                    sys.exit(one.exitcode)


if __name__ == "__main__":
    main()
