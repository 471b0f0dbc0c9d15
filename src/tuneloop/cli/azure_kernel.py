"""A Jupyter kernel whose notebooks speak to this workspace: `tuneloop azure run` around IPython's kernel.

Where a kernel lies and what its file says: "Kernel specs" in the documentation of jupyter_client.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

from tuneloop.cli.azure_script import in_command
from tuneloop.core.errors import AlreadyExists, NotFound, UsageError
from tuneloop.core.process import write_atomically

NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")
USUAL_NAME = "tuneloop-azure"
MARK = "tuneloop"
"""In the metadata of a kernel of ours: no other is written over or removed."""

WITHOUT_REPORTS = "import sys; sys.modules.setdefault('azure.monitor.opentelemetry', None)"
"""In a notebook azure-ai-ml reports to Microsoft what is called. It goes on without when the package that it
reports with cannot be imported; the environment alone leaves a sign of life (`core.azure.QUIET`)."""


def install(name: str, prefix: Path | None, python: Path, home: Path, *, is_principal: bool) -> Path:
    """The folder of the kernel. Raises `AlreadyExists` when another program's kernel has that name."""
    folder = _folder(name, prefix)
    if folder.exists() and not _is_ours(folder):
        raise AlreadyExists(
            f"{folder} holds a kernel that is not one of Tuneloop's.", next_move="Choose another --name."
        )
    identity = ["--principal"] if is_principal else []
    options = ["-m", "ipykernel_launcher", "-f", "{connection_file}"]
    quiet = f"--IPKernelApp.exec_lines={WITHOUT_REPORTS}"
    spec = {
        "argv": in_command(str(python), [*identity, *options, quiet]),
        "display_name": "Azure ML on Tuneloop" + ("" if name == USUAL_NAME else f" ({name})"),
        "language": "python",
        # By a message: a signal would reach it twice, from Jupyter and from the command around it.
        "interrupt_mode": "message",
        "env": {"TUNELOOP_HOME": str(home)},
        "metadata": {MARK: {"home": str(home), "python": str(python)}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "kernel.json", json.dumps(spec, indent=2) + "\n")
    return folder


def remove(name: str, prefix: Path | None) -> Path:
    folder = _folder(name, prefix)
    if not folder.exists():
        raise NotFound(f"There is no kernel in {folder}.")
    if not _is_ours(folder):
        raise AlreadyExists(f"{folder} holds a kernel that is not one of Tuneloop's; it is left alone.")
    shutil.rmtree(folder)
    return folder


def display_name(folder: Path) -> str:
    return str(json.loads((folder / "kernel.json").read_text(encoding="utf-8"))["display_name"])


def _folder(name: str, prefix: Path | None) -> Path:
    if NAME.fullmatch(name) is None or not name.strip("."):
        raise UsageError(f"A kernel's name has letters, digits, '.', '-' and '_' only; found {name!r}.")
    place = prefix.absolute() / "share" / "jupyter" if prefix is not None else _own_jupyter()
    return place / "kernels" / name.lower()


def _own_jupyter() -> Path:
    """As jupyter_core's `jupyter_data_dir` says."""
    told = os.environ.get("JUPYTER_DATA_DIR")
    if told:
        return Path(told)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Jupyter"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "jupyter"


def _is_ours(folder: Path) -> bool:
    try:
        spec = json.loads((folder / "kernel.json").read_text(encoding="utf-8"))
        return MARK in spec["metadata"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
