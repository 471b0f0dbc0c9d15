"""What `train_speed.py` compares on: model, rows, first adapter, and the peers' environments.

Rows are eight conversations in SmolLM2's format with exact numbers of tokens; their words come from the
conversations that ship with Tuneloop, so that anybody makes the same ids.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

LENGTHS = (135, 214, 287, 356, 448, 602, 798, 1024)
"""Tokens of the conversations: 3,864."""
TARGETS = (85, 135, 181, 225, 283, 381, 505, 648)
"""Those of them that the assistant says: 2,443."""
MAX_LENGTH = 1024
TURN_TOKENS = 260
"""About so many to a question and its answer."""
LORA = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
LEARNING_RATE = 1e-4
CARD = "SmolLM2-135M-Instruct"
SAMPLES = Path(__file__).parents[1] / "src" / "tuneloop" / "samples" / "guide"

PEERS = {
    "trl": {
        "torch": "2.13.0",
        "trl": "1.16.0",
        "transformers": "5.23.0",
        "peft": "0.21.2",
        "accelerate": "1.15.0",
        "datasets": "5.2.0",
    },
    "llamafactory": {
        "torch": "2.13.0",
        "llamafactory": "0.9.5",
        "transformers": "5.6.0",
        "trl": "0.24.0",
        "peft": "0.18.1",
    },
}


def ensure_task(work: Path) -> Path:
    """`task.json` in `work`, with the model and the adapter that it names; made when they are not there."""
    work.mkdir(parents=True, exist_ok=True)
    model = ensure_model(work)
    adapter = work / "adapter.safetensors"
    if not adapter.exists():
        _make_adapter(model, adapter)
    task = {
        "model": str(model),
        "adapter": str(adapter),
        "lora": LORA,
        "learning_rate": LEARNING_RATE,
        "max_length": MAX_LENGTH,
        "rows": make_rows(model),
    }
    file = work / "task.json"
    file.write_text(json.dumps(task), encoding="utf-8")
    return file


# ---------------------------------------------------------------- the model


def ensure_model(work: Path) -> Path:
    """SmolLM2-135M-Instruct as the model_import step makes it out of its card, kept in `work`."""
    from tuneloop.core.recipe import ImportedCard
    from tuneloop.core.types import ResultFile, StepFile
    from tuneloop.workspace.catalog import shipped_cards

    model = work / "model"
    if (model / "config.json").exists():
        return model
    card = next(card for card in shipped_cards() if card.name == CARD)
    run = work / "import"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    step = StepFile.model_validate(
        {
            "attempt": "benchmark/import/1",
            "attempt_id": "benchmark",
            "kind": "model_import",
            "parameters": {"card": ImportedCard.of(card).model_dump(mode="json")},
            "outputs": {"model": "model_folder"},
            "cache_folder": str(work / "cache"),
        }
    )
    (run / "step.json").write_text(step.model_dump_json(exclude_none=True), encoding="utf-8")
    with open(run / "log.txt", "wb") as log:
        subprocess.run(
            [sys.executable, "-P", "-m", "tuneloop.steps", str(run)], stdout=log, stderr=subprocess.STDOUT
        )
    result = ResultFile.model_validate_json((run / "result.json").read_text(encoding="utf-8"))
    if result.status != "succeeded":
        raise SystemExit(f"importing the model: {result.error}; see {run / 'log.txt'}")
    (run / "outputs" / "model").rename(model)
    return model


def _make_adapter(model: Path, target: Path) -> None:
    """The adapter that Tuneloop starts from, in PEFT's names: the peers start from it too."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file
    from train_speed_tuneloop import SEED

    from tuneloop import lm

    lm.quiet()
    adapted = lm.add_lora(lm.load_model(model), LORA["r"], LORA["lora_alpha"], seed=SEED)  # type: ignore[arg-type]
    tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if {name.split(".")[-3] for name in tensors} != set(LORA["target_modules"]):  # type: ignore[arg-type]
        raise SystemExit("the adapter is on other layers than the comparison says")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target)


# ---------------------------------------------------------------- the rows


def make_rows(model: Path) -> list[dict[str, list[int]]]:
    """Eight conversations, `input_ids` and `learn`, in the order in which they are learned from."""
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(model / "tokenizer.json"))

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    words = itertools.cycle(encode("\n".join(_texts())))
    rows = [_row(LENGTHS[index], TARGETS[index], words, encode) for index in typical_order(LENGTHS, 4)]
    assert sorted(len(row["input_ids"]) for row in rows) == sorted(LENGTHS)
    assert sum(sum(row["learn"]) for row in rows) == sum(TARGETS) == 2443
    return rows


def _row(length: int, targets: int, words: Iterator[int], encode: Any) -> dict[str, list[int]]:
    """ChatML; what the assistant writes and its end-of-turn marker count."""
    question, answer, end, line = (
        encode("<|im_start|>user\n"),
        encode("<|im_start|>assistant\n"),
        encode("<|im_end|>"),
        encode("\n"),
    )
    turns = max(1, round(length / TURN_TOKENS))
    frame = len(question) + len(answer) + 2 * len(end) + 2 * len(line)
    asked = _shares(length - turns * frame - (targets - turns * len(end)), turns)
    said = _shares(targets - turns * len(end), turns)
    ids: list[int] = []
    learn: list[int] = []
    for questions, answers in zip(asked, said, strict=True):
        head = [*question, *itertools.islice(words, questions), *end, *line, *answer]
        body = [*itertools.islice(words, answers), *end]
        ids += [*head, *body, *line]
        learn += [0] * len(head) + [1] * len(body) + [0] * len(line)
    return {"input_ids": ids, "learn": learn}


def _shares(total: int, parts: int) -> list[int]:
    return [total // parts + (part < total % parts) for part in range(parts)]


def _texts() -> Iterator[str]:
    for file in sorted(SAMPLES.glob("*_sft.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            for message in json.loads(line)["messages"]:
                yield message["content"]


def typical_order(lengths: Sequence[int], batch: int) -> list[int]:
    """An order whose first and second `batch` rows are padded as much as is usual: of all ways to cut the
    rows in two, the median. More than half of the 35 ways (20) pad so much: the two longest lie apart."""

    def padded(first: tuple[int, ...]) -> int:
        second = [index for index in range(len(lengths)) if index not in first]
        return batch * (max(lengths[index] for index in first) + max(lengths[index] for index in second))

    ways = [(0, *rest) for rest in itertools.combinations(range(1, len(lengths)), batch - 1)]
    first = sorted(ways, key=lambda way: (padded(way), way))[len(ways) // 2]
    second = [index for index in range(len(lengths)) if index not in first]
    return [*first[::-1], *second]


# ---------------------------------------------------------------- the peers


def make_peers(folder: Path, index: str | None) -> None:
    """An environment for each peer, with the versions of `PEERS`; one that is there is left as it is.

    `index`: a further package index, such as that of torch's CPU wheels.
    """
    for name, pins in PEERS.items():
        python = python_of(folder, name)
        if python.exists():
            continue
        venv.create(folder / name, with_pip=True)
        wanted = [f"{package}=={version}" for package, version in pins.items()]
        more = ["--extra-index-url", index] if index else []
        command = [str(python), "-m", "pip", "install", "--quiet", *more, *wanted]
        print("$", " ".join(command), flush=True)
        subprocess.run(command, check=True)
        if name == "llamafactory":
            _without_media(python)


def _without_media(python: Path) -> None:
    """Both are built against another torch; LLaMA-Factory only asks for torchaudio's name."""
    command = [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision", "torchaudio"]
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True)
    where = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    empty = Path(where.stdout.strip()) / "torchaudio"
    empty.mkdir(exist_ok=True)
    (empty / "__init__.py").write_text('__version__ = "0"\n', encoding="utf-8")


def python_of(folder: Path, peer: str) -> Path:
    return folder / peer / ("Scripts" if os.name == "nt" else "bin") / "python"
