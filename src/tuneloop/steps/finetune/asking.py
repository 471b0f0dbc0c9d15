"""How a step would be carried out, asked of a process that may import torch (`ask`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tuneloop.core.errors import StepFailed, from_json

SECONDS = 600.0


def ask(folder: Path, nodes: int) -> dict[str, Any]:
    """Raises what the plan raises."""
    command = [sys.executable, "-P", "-m", "tuneloop.steps.finetune.ask", str(folder), str(nodes)]
    asked = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        said, _ = asked.communicate(timeout=SECONDS)
    finally:
        asked.kill()
        asked.wait()
    try:
        told: dict[str, Any] = json.loads(said.splitlines()[-1])
    except (ValueError, IndexError):
        raise StepFailed(
            f"The process that asks torch for this machine's devices ended with code {asked.returncode}.",
            next_move="What it said last is in the step's log.",
        ) from None
    if "error" in told:
        raise from_json(told["error"])
    return told
