"""Azure's walk-through, first to last, through the real SDK, on a tiny model: trained, registered, deployed,
called, deleted."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.contract.azure.sdk import BASE, AzureWorld
from tests.loop.world import row

SCRIPT = Path(__file__).parent / "document.py"
SPLITS = {"train_sft": 24, "test_sft": 4, "train_gen": 4, "test_gen": 3}
COPY = """
import argparse, pathlib, shutil
parser = argparse.ArgumentParser()
for name in ("--dataset", "--download_dir", "--dataset_split_pc"):
    parser.add_argument(name, required=True)
given = parser.parse_args()
assert given.dataset == "HuggingFaceH4/ultrachat_200k" and given.dataset_split_pc == "5"
shutil.copytree(pathlib.Path(__file__).parent / "downloaded", given.download_dir, dirs_exist_ok=True)
"""
"""In the place of `download-dataset.py`, which needs the hub and the package datasets: it takes the same
words and leaves the same files. The real one: tests/slow/test_download_script.py."""


def lay_out(folder: Path, config: Path | None) -> Path:
    """What lies in the folder of somebody who follows the document."""
    (folder / "downloaded").mkdir(parents=True)
    for split, count in SPLITS.items():
        rows = [row(f"What is {split} {n}?", f"It is number {n}.") for n in range(count)]
        (folder / "downloaded" / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "download-dataset.py").write_text(COPY, encoding="utf-8")
    shutil.copy(SCRIPT, folder / "document.py")
    if config is not None:
        shutil.copy(config, folder / "config.json")
    return folder


@pytest.fixture(scope="module")
def walked(azure: AzureWorld, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script said at its end, and all that it printed."""
    folder = lay_out(tmp_path_factory.mktemp("document"), azure.azure_folder / "config.json")
    ran = azure.run_file(folder / "document.py", "new")
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-5000:]
    return {**json.loads(ran.stdout.strip().splitlines()[-1]), "printed": ran.stdout}


@pytest.mark.verbs(
    "from_config",
    "models.get",
    "compute.get",
    "compute.begin_create_or_update",
    "compute.list_sizes",
    "components.get",
    "jobs.create_or_update",
    "jobs.stream",
    "jobs.get",
    "models.create_or_update",
    "online_endpoints.begin_create_or_update",
    "online_deployments.begin_create_or_update",
    "online_endpoints.invoke",
    "online_endpoints.begin_delete",
)
def test_the_document_runs_from_its_first_block_to_its_last(walked: dict[str, Any]) -> None:
    assert walked["gpus"] == 1
    assert walked["base"] == f"azureml://registries/azureml/models/{BASE}/versions/15"
    assert walked["display_name"] == f"{BASE}-ultrachat-bs1-cosine-ds2-lora-save_limit1-seqlen-1"
    assert walked["model"]["name"] == f"{BASE}-ultrachat-200k"
    assert walked["model"]["id"].endswith(
        f"/models/{BASE}-ultrachat-200k/versions/{walked['model']['version']}"
    )
    assert walked["traffic"] == {"demo": 100}
    assert isinstance(walked["response"]["output"], str)


def test_its_job_is_a_job_of_this_workspace_with_the_parameters_that_were_sent(
    azure: AzureWorld, walked: dict[str, Any]
) -> None:
    job = azure.client.job(walked["job"])
    assert job["state"] == "completed"
    assert job["experiment"] == "chat_completion_Phi-3-mini-4k-instruct"
    assert job["display_name"] == walked["display_name"]
    sent = {
        "finetune.apply_lora": True,
        "finetune.apply_deepspeed": True,
        "finetune.deepspeed_stage": "2",
        "finetune.precision": "16",
        "finetune.lr_scheduler_type": "cosine",
        "finetune.learning_rate": 5e-6,
        "finetune.num_train_epochs": 1,
        "finetune.save_total_limit": 1,
        "preprocess.long_rows": "cut",
    }
    assert {name: job["parameters"][name] for name in sent} == sent
    assert {step["name"] for step in job["steps"]} == {
        "model_import",
        "preprocess",
        "finetune",
        "export",
        "evaluate",
    }


def test_the_stream_shows_the_training_while_it_goes_on(walked: dict[str, Any]) -> None:
    """Between the stream's head and the SDK's summary: losses step by step, every step's end, the job's."""
    told = walked["printed"].partition("Streaming user_logs/std_log.txt")[2].partition("Execution Summary")[0]
    losses = re.findall(r"finetune +step (\d+)  loss ([\d.]+)", told)
    assert [int(step) for step, _ in losses] == sorted({int(step) for step, _ in losses})
    assert losses
    ended = re.findall(r"(\w+) +succeeded in [\d.:]+", told)
    assert ended == ["model_import", "preprocess", "finetune", "export", "evaluate"]
    assert re.search(r"job +completed in [\d.:]+", told)
    assert "warning: finetune.apply_deepspeed is true: training runs plain" in told


def test_its_model_says_where_it_comes_from(azure: AzureWorld, walked: dict[str, Any]) -> None:
    model = azure.client.model(walked["model"]["name"], walked["model"]["version"])
    assert model.lineage.job == walked["job"]
    assert model.lineage.base_model == f"{BASE}:15"
    assert model.description == f"{BASE} fine tuned model for ultrachat 200k chat-completion"


def test_nothing_is_left_of_its_endpoint(azure: AzureWorld, walked: dict[str, Any]) -> None:
    assert walked["endpoint"] not in {one["name"] for one in azure.client.endpoints()}
    assert not [owner for owner in azure.processes() if walked["endpoint"] in owner]


@pytest.mark.slow
def test_it_runs_with_placeholders_a_service_principal_and_a_year_old_sdk(
    azure: AzureWorld, walked: dict[str, Any], tmp_path: Path
) -> None:
    """Without `config.json`, whose place the document's own placeholders take; the steps come from the cache
    but for those that `force_rerun` runs again."""
    folder = lay_out(tmp_path / "again", None)
    ran = azure.run_file(folder / "document.py", "older", identity="principal")
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-5000:]
    said = json.loads(ran.stdout.strip().splitlines()[-1])
    assert said["job"] != walked["job"]
    assert "<WORKSPACE_NAME>" in said["model"]["id"]
    assert isinstance(said["response"]["output"], str)
