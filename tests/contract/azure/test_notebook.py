"""A notebook in the kernel that `tuneloop azure kernel` installs: the SDK speaks to this workspace in it, and
to nobody else. What runs it lies beside the SDK's environment, in .azure/notebook."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.contract.azure.sdk import BASE, ROOT, AzureWorld, python_of

PACKAGES = ROOT / ".azure" / "notebook"

RUNNER = """
import json, sys, nbformat
from nbclient import NotebookClient

cells = [nbformat.v4.new_code_cell(text) for text in json.load(sys.stdin)]
notebook = nbformat.v4.new_notebook(cells=cells)
NotebookClient(notebook, timeout=120, kernel_name="tuneloop-azure", allow_errors=True).execute()
print(json.dumps([cell.outputs for cell in notebook.cells]))
"""

WATCH = """
import sys

asked = set()

def watch(event, arguments):
    if event == "socket.getaddrinfo":
        asked.add(str(arguments[0]))
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        asked.add(str(arguments[1][0]))

sys.addaudithook(watch)
"""

DOCUMENT = f"""
from azure.ai.ml import MLClient
from azure.identity import DefaultAzureCredential

credential = DefaultAzureCredential()
credential.get_token("https://management.azure.com/.default")
workspace = MLClient.from_config(credential=credential)
registry = MLClient(credential, registry_name="azureml")
model = registry.models.get("{BASE}", label="latest")
print(workspace.workspace_name, model.name, model.version, model.id)
"""

AFTERWARDS = """
import json, logging, time

workspace.workspaces.get(workspace.workspace_name)
time.sleep(2)
print(json.dumps([sorted(asked), len(logging.getLogger("azure.ai.ml._telemetry").handlers)]))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SDK's Python with IPython's kernel in it, as a person has it."""
    if not (PACKAGES / "ipykernel").is_dir():
        pytest.skip("what runs a notebook is not in .azure/notebook: make .azure/.installed")
    made = tmp_path_factory.mktemp("python") / "python"
    made.write_text(f'#!/bin/sh\nPYTHONPATH={PACKAGES} exec {python_of("new")} "$@"\n')
    made.chmod(0o755)
    return made


Outputs = list[dict[str, Any]]


def run_notebook(azure: AzureWorld, python: Path, folder: Path, cells: list[str]) -> list[Outputs]:
    """The outputs of each cell."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "HOME", "PYTHONPATH") if name in os.environ}
    variables = {**kept, "TUNELOOP_HOME": str(azure.home), "JUPYTER_PATH": str(folder / "share" / "jupyter")}
    install = [sys.executable, "-m", "tuneloop.cli", "azure", "kernel", "--prefix", str(folder)]
    subprocess.run([*install, "--python", str(python)], env=variables, check=True, capture_output=True)
    ran = subprocess.run(
        [str(python), "-c", RUNNER],
        input=json.dumps(cells),
        env={**variables, "PYTHONWARNINGS": "ignore"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ran.returncode == 0, ran.stderr
    found: list[Outputs] = json.loads(ran.stdout.splitlines()[-1])
    return found


def printed(outputs: Outputs) -> str:
    assert [one for one in outputs if one["output_type"] == "error"] == []
    return "".join(one["text"] for one in outputs if one.get("name") == "stdout")


def test_a_notebook_speaks_to_this_workspace_and_to_nobody_else(
    azure: AzureWorld, python: Path, tmp_path: Path
) -> None:
    shutil.copy(azure.azure_folder / "config.json", tmp_path / "config.json")
    mistake = "registry.models.get('nothing', label='latest')"
    _, said, wrong, after = run_notebook(azure, python, tmp_path, [WATCH, DOCUMENT, mistake, AFTERWARDS])
    workspace, name, version, identity = printed(said).split()
    assert (workspace, name) == ("local", BASE)
    assert identity == f"azureml://registries/azureml/models/{BASE}/versions/{version}"
    # A mistake is the cell's; the kernel goes on.
    (error,) = [one for one in wrong if one["output_type"] == "error"]
    assert "nothing" in error["evalue"]
    # In a notebook the SDK would report to Microsoft what it was asked.
    asked, reporters = json.loads(printed(after).splitlines()[-1])
    assert asked == ["127.0.0.1"]
    assert reporters == 0
    spec = tmp_path / "share" / "jupyter" / "kernels" / "tuneloop-azure" / "kernel.json"
    assert (azure.azure_folder / "identity").read_text().strip() not in spec.read_text()
