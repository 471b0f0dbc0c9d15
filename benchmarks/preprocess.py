"""Preprocessing against TRL's own path and against the bare tokenizer, on the same rows, in one run.

    .venv/bin/python benchmarks/preprocess.py --model FOLDER --peer PYTHON [--rows 4000] [--repeats 3]
    .venv/bin/python benchmarks/preprocess.py --model FOLDER --memory 20000 200000

FOLDER is an imported SmolLM2 model or its tokenizer (tuneloop's artifact, or `tuneloop data check --model`
leaves one in the home's cache). PYTHON is the interpreter of another environment:

    python -m venv peer; peer/bin/pip install trl==1.16.0 datasets==5.2.0 transformers==5.23.0 torch==2.13.0

Rows have ultrachat's lengths: tokens lognormal with median 1,200 and sigma 0.45, clipped to 80 and 4,000, in
1 to 4 turns, nine tenths of the words the assistant's. Their words come from the conversations in --text.

What is compared, per repeat, in turns: `trl`: `apply_chat_template(return_assistant_tokens_mask=True)` row by
row through `datasets.map`, as SFTTrainer 1.16 does it, its template carrying generation markers; `bare`:
`encode_batch_fast` of the rendered texts, 200 at a time; `one` and `two`: the preprocess step on one core and
on two; `check`: `data check` with the tokenizer, on one core. CPU seconds are of the work and all its
processes, without imports; of `trl` and `bare` without loading the tokenizer, of the steps with it. Ids and
masks of `trl` and `one` are compared on every row, the datasets of `one` and `two` byte by byte.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MOST_TOKENS = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--text", type=Path, nargs="*", default=sorted(SAMPLES.glob("*.jsonl")))
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=int, nargs="*")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--side", choices=("trl", "bare", "step", "check"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.side:
        side = {"trl": side_trl, "bare": side_bare, "step": side_step, "check": side_check}[given.side]
        print(json.dumps(side(given.model, given.data, given.out)))
        return
    print("command:", " ".join([sys.executable, *sys.argv]))
    work = given.work or Path(tempfile.mkdtemp(prefix="tuneloop-bench-"))
    work.mkdir(parents=True, exist_ok=True)
    if given.memory:
        compare_memory(given, work)
    else:
        compare_speed(given, work)


SAMPLES = Path(__file__).parents[1] / "src" / "tuneloop" / "samples" / "guide"


# ---------------------------------------------------------------- rows


def write_rows(path: Path, count: int, texts: list[Path]) -> None:
    words = [word for text in texts for word in _words(text)]
    chance = random.Random(1)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            tokens = max(80, min(4000, int(chance.lognormvariate(math.log(1200), 0.45))))
            turns = chance.choice([1, 2, 3, 3, 4])
            messages = []
            for turn in range(turns):
                for role, share in (("user", 0.1), ("assistant", 0.9)):
                    length = max(3, int(tokens * 0.72 * share / turns))
                    start = chance.randrange(max(1, len(words) - length))
                    said = " ".join(words[start : start + length]).strip() or "yes"
                    messages.append({"role": role, "content": f"{number} {turn} {said}"})
            file.write(
                json.dumps({"prompt_id": str(number), "messages": messages}, ensure_ascii=False) + "\n"
            )


def _words(path: Path) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines():
        for message in json.loads(line).get("messages") or []:
            yield from message["content"].split(" ")


# ---------------------------------------------------------------- the sides, each in a process of its own


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def timed(work: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    began, used = time.monotonic(), cpu_seconds()
    found = work()
    return {"wall": time.monotonic() - began, "cpu": cpu_seconds() - used}, found


def side_trl(model: Path, data: Path, out: Path) -> dict[str, float]:
    """In the peer's environment."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    template = with_generation_markers(tokenizer.chat_template)
    shutil.rmtree(out, ignore_errors=True)
    rows = load_dataset("json", data_files=str(data), split="train", cache_dir=str(out / "cache"))

    def tokenize(example: dict[str, Any]) -> dict[str, Any]:
        processed = tokenizer.apply_chat_template(
            example["messages"],
            chat_template=template,
            tools=None,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return {name: processed[name] for name in ("input_ids", "assistant_masks")}

    figures, tokenized = timed(lambda: rows.map(tokenize))
    tokenized.select_columns(["input_ids", "assistant_masks"]).to_parquet(str(out / "trl.parquet"))
    return figures


def with_generation_markers(template: str) -> str:
    """SmolLM2's template, what the assistant writes put between markers."""
    turn = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    assert turn in template, "this benchmark knows the template of SmolLM2"
    marked = (
        "{% if message['role'] == 'assistant' %}{{'<|im_start|>assistant\n'}}{% generation %}"
        "{{message['content'] + '<|im_end|>'}}{% endgeneration %}{{'\n'}}{% else %}" + turn + "{% endif %}"
    )
    return template.replace(turn, marked)


def side_bare(model: Path, data: Path, out: Path) -> dict[str, float]:
    from tuneloop.tokens import load_backend, load_template

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    template = load_template(model)
    tokenizer = load_backend(model, out / "cache").tokenizer()
    lines = data.read_text(encoding="utf-8").splitlines()
    texts = [template.render(json.loads(line)["messages"]) for line in lines]

    def encode() -> None:
        for start in range(0, len(texts), 200):
            tokenizer.encode_batch_fast(texts[start : start + 200], add_special_tokens=False)

    return timed(encode)[0]


def side_step(model: Path, data: Path, out: Path) -> dict[str, float]:
    """All of the step but loading the tokenizer: reading, checking, splitting, writing; starting workers
    too."""
    few = data.with_name("few.jsonl")
    inputs = {"model": model, "train": data, "validation": few, "test": few}
    return run_step("preprocess", model, inputs, {"dataset": "dataset_folder"}, out)


def side_check(model: Path, data: Path, out: Path) -> dict[str, float]:
    """`tuneloop data check FILE --model M`, without the command around its process."""
    inputs = {"tokenizer": model, "data": data}
    return run_step("check", model, inputs, {"report": "file", "findings": "file"}, out)


def run_step(
    kind: str, model: Path, inputs: dict[str, Path], outputs: dict[str, str], out: Path
) -> dict[str, float]:
    import importlib

    from tuneloop.core.types import StepFile
    from tuneloop.steps.context import StepContext
    from tuneloop.tokens import load_backend

    cache = out.parent / "cache"
    # Asked of transformers once for every model, and kept in the home's cache.
    load_backend(model, cache)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    step = StepFile.model_validate(
        {
            "attempt": f"benchmark/{kind}/1",
            "attempt_id": "benchmark",
            "kind": kind,
            "parameters": {"max_seq_length": MOST_TOKENS},
            "inputs": {
                name: {"path": str(path), "digest": name, "name": path.name} for name, path in inputs.items()
            },
            "outputs": outputs,
            "cache_folder": str(cache),
        }
    )
    context = StepContext(out, step)
    module = importlib.import_module(f"tuneloop.steps.{kind}")
    figures, _ = timed(lambda: module.run(context))
    context.close()
    return figures


# ---------------------------------------------------------------- comparing


def run_side(side: str, given: argparse.Namespace, data: Path, out: Path, cores: int = 1) -> dict[str, float]:
    python = str(given.peer) if side == "trl" else sys.executable
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(cores),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    command = [
        python,
        __file__,
        "--side",
        side,
        "--model",
        str(given.model),
        "--data",
        str(data),
        "--out",
        str(out),
    ]
    ran = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(ran.stdout.splitlines()[-1]))


def compare_speed(given: argparse.Namespace, work: Path) -> None:
    data = work / "rows.jsonl"
    write_rows(data, given.rows, given.text)
    with open(data, encoding="utf-8") as file:
        (work / "few.jsonl").write_text("".join(next(file) for _ in range(2)), encoding="utf-8")
    sides = {"bare": ("bare", 1), "one": ("step", 1), "two": ("step", 2), "check": ("check", 1)}
    if given.peer:
        sides = {"trl": ("trl", 1), **sides}
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for repeat in range(given.repeats):
        for name, (side, cores) in sides.items():
            figures[name].append(run_side(side, given, data, work / name, cores))
            print(
                repeat + 1,
                name,
                {key: round(value, 2) for key, value in figures[name][-1].items()},
                flush=True,
            )
    dataset = work / "one" / "outputs" / "dataset"
    lengths = json.loads((dataset / "stats.json").read_text())["splits"]["train"]["lengths"]
    print("tokens a row:", {name: lengths[name] for name in ("median", "p90", "p99", "max")})
    same_bytes(dataset, work / "two" / "outputs" / "dataset")
    if given.peer:
        print("rows with equal ids and masks:", same_tokens(dataset / "train", work / "trl" / "trl.parquet"))
        said("TRL's CPU seconds by one core's", figures["trl"], figures["one"], "cpu")
    said("one core's CPU seconds by bare encode_batch_fast's", figures["one"], figures["bare"], "cpu")
    said("data check's CPU seconds by one core's", figures["check"], figures["one"], "cpu")
    said("one core's seconds by two cores'", figures["one"], figures["two"], "wall")


def said(what: str, above: list[dict[str, float]], below: list[dict[str, float]], key: str) -> None:
    ratios = [one[key] / other[key] for one, other in zip(above, below, strict=True)]
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"{what}: {statistics.median(ratios):.2f} ({spread})")


def same_bytes(one: Path, two: Path) -> None:
    from tuneloop.core.digest import of_path

    assert of_path(one) == of_path(two), "two cores wrote other bytes than one"
    print("one core and two cores wrote the same bytes")


def same_tokens(split: Path, parquet: Path) -> int:
    import pyarrow.parquet as pq

    from tuneloop.training.data import Conversations

    ours = Conversations(split)
    theirs = pq.read_table(parquet)
    assert len(ours) == len(theirs)
    for index, (ids, masks) in enumerate(zip(theirs["input_ids"], theirs["assistant_masks"], strict=True)):
        assert ours[index].input_ids.tolist() == ids.as_py(), f"row {index}: other ids"
        assert ours[index].learn.tolist() == [bool(mask) for mask in masks.as_py()], (
            f"row {index}: other mask"
        )
    return len(ours)


# ---------------------------------------------------------------- memory


def compare_memory(given: argparse.Namespace, work: Path) -> None:
    """The most that the step and its workers hold together, for each number of rows."""
    for rows in given.memory:
        data = work / f"rows-{rows}.jsonl"
        if not data.exists():
            write_rows(data, rows, given.text)
            with open(data, encoding="utf-8") as file:
                (work / "few.jsonl").write_text("".join(next(file) for _ in range(2)), encoding="utf-8")
        most = [0]
        ended = threading.Event()
        watch = threading.Thread(target=_watch, args=(most, ended))
        watch.start()
        figures = run_side("step", given, data, work / f"memory-{rows}", cores=2)
        ended.set()
        watch.join()
        spent = {name: round(value, 1) for name, value in figures.items()}
        print(
            f"{rows} rows: at most {most[0] / 1e6:.0f} MB (parent and 2 workers together, private), {spent}"
        )
        shutil.rmtree(work / f"memory-{rows}")


def _watch(most: list[int], ended: threading.Event) -> None:
    import psutil

    while not ended.wait(0.25):
        total = 0
        for child in psutil.Process().children(recursive=True):
            try:
                total += child.memory_full_info().uss
            except psutil.Error:
                continue
        most[0] = max(most[0], total)


if __name__ == "__main__":
    main()
