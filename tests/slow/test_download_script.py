"""The script that `tuneloop data download-script` writes, run with the package that it needs and nothing
else, and what it writes next to what `tuneloop data download` writes."""

from __future__ import annotations

import json
import os
import subprocess
import venv
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.hub import Hub
from tests.steps import step_context
from tuneloop.cli.data import SCRIPT
from tuneloop.steps import dataset_download

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NAME = "HuggingFaceH4/ultrachat_200k"
GUIDE = f"--dataset {NAME} --download_dir ultrachat_200k_dataset --dataset_split_pc 5".split()
SPLITS = {"train_sft": (70, 70, 67), "test_sft": (23,), "train_gen": (256,), "test_gen": (28,)}
PACKAGES = {
    "2.9.0": ("datasets==2.9.0", "pyarrow<15", "numpy<2", "pandas<2.2"),
    "5.2.0": ("datasets==5.2.0",),
}
"""The first is what the guide pins; what it does not pin is what that version ran with."""


@pytest.fixture(params=sorted(PACKAGES), scope="module")
def python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment that holds one version of datasets, and no Tuneloop."""
    folder = tmp_path_factory.mktemp(f"datasets-{request.param}")
    venv.create(folder, with_pip=True)
    program = folder / "bin" / "python"
    install = [program, "-m", "pip", "install", "--quiet", *PACKAGES[request.param]]
    ran = subprocess.run(install, capture_output=True, text=True, check=False)
    if ran.returncode:
        pytest.skip(f"datasets {request.param} cannot be installed here: {ran.stderr.strip()[-300:]}")
    return program


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    listed = "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in SPLITS)
    head = f"---\nconfigs:\n- config_name: default\n  data_files:\n{listed}---\n"
    (folder / "README.md").write_text(head)
    for split, sizes in SPLITS.items():
        for number, size in enumerate(sizes):
            rows = [
                {
                    "prompt": f"é/{split} {number} {row}",
                    "prompt_id": f"{row:064x}",
                    "messages": [
                        {"content": f"\u4f60\u597d {row} \U0001f600 \x7f", "role": "user"},
                        {"content": 'a\n"b"\\ </s>', "role": "assistant"},
                    ],
                }
                for row in range(size)
            ]
            name = f"{split}-{number:05}-of-{len(sizes):05}-a3ecf92756993583.parquet"
            pq.write_table(pa.Table.from_pylist(rows), folder / "data" / name)
    with Hub() as running:
        running.publish(f"datasets/{NAME}", folder)
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "ours"))
        yield running


def test_the_guides_line_writes_the_bytes_that_download_writes(
    python: Path, hub: Hub, tmp_path: Path
) -> None:
    script = tmp_path / "download-dataset.py"
    script.write_text(SCRIPT.read_text())
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "theirs"),
    }
    ran = subprocess.run(
        [python, script.name, *GUIDE],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    context = step_context(
        tmp_path / "step",
        "dataset_download",
        outputs={"report": "file"},
        parameters={"dataset": NAME, "split_pct": 5, "target": str(tmp_path / "out")},
    )
    dataset_download.run(context)
    context.close()
    rows = {
        split["split"]: split["rows"] for split in json.loads(context.output("report").read_text())["splits"]
    }
    assert rows == {"train_sft": 10, "test_sft": 1, "train_gen": 13, "test_gen": 1}
    theirs = {file.name: file.read_bytes() for file in (tmp_path / "ultrachat_200k_dataset").iterdir()}
    ours = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert theirs == ours
    assert set(ours) == {f"{split}.jsonl" for split in SPLITS}
