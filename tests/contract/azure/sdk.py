"""Drives the official SDK, in environments of its own (`make test` makes them in .azure/)."""

from __future__ import annotations

import json
import os
import subprocess
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.loop.world import LoopWorld
from tests.models import tiny_model
from tuneloop.core.azure import environment

ROOT = Path(__file__).parents[3]
ENVIRONMENTS = {"new": ROOT / ".azure" / "new", "older": ROOT / ".azure" / "older"}
"""The newest azure-ai-ml, and one that is a year old."""
BASE = "Phi-3-mini-4k-instruct"


def python_of(which: str) -> Path:
    return ENVIRONMENTS[which] / "bin" / "python"


@dataclass(frozen=True)
class Said:
    """What became of a piece of code."""

    result: Any
    printed: str
    error: dict[str, Any] | None

    def ok(self) -> Any:
        assert self.error is None, self.error["trace"]
        return self.result

    def failed(self) -> dict[str, Any]:
        """`{type, message, code, target, status}` of the exception."""
        assert self.error is not None, f"nothing was refused; result: {self.result!r}"
        return self.error


class Sdk:
    """One long-lived process: importing the SDK takes seconds."""

    def __init__(self, which: str, variables: dict[str, str], folder: Path) -> None:
        self.which = which
        with open(folder / f"sdk-{which}.log", "wb") as log:
            self._process = subprocess.Popen(
                [str(python_of(which)), str(Path(__file__).parent / "worker.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=folder,
                env=variables,
            )
        self._read()

    def run(self, code: str) -> Said:
        """Run code in which `result` is what a test wants to see (as JSON)."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"code": textwrap.dedent(code)}) + "\n")
        self._process.stdin.flush()
        return Said(**self._read())

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the SDK's process ended with {self._process.wait(10)}"
        return json.loads(line)


class AzureWorld(LoopWorld):
    """A workspace whose listener is open and whose Phi-3 is a tiny one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, tiny_model(folder / "phi3", family="phi3"))
        self.client.use_source(BASE, self.model)
        self.url = str(self.client.azure_up()["url"])
        self._sdks: dict[str, Sdk] = {}

    @property
    def azure_folder(self) -> Path:
        return self.home / "azure"

    def variables(self, identity: str = "managed") -> dict[str, str]:
        """Of a process of the SDK."""
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "HOME", "TMPDIR") if name in os.environ}
        told = environment(self.url, self.azure_folder, identity)
        return {**kept, **told, "PYTHONUTF8": "1", "PYTHONWARNINGS": "ignore"}

    def sdk(self, which: str = "new") -> Sdk:
        if which not in self._sdks:
            self._sdks[which] = Sdk(which, self.variables(), self.folder)
        return self._sdks[which]

    def run_script(
        self, text: str, which: str = "new", *, seconds: float = 300, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """A whole script as a person would run it, in a process of its own, where the data lie."""
        path = self.folder / "script.py"
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return subprocess.run(
            [str(python_of(which)), str(path)],
            cwd=self.folder,
            env={**self.variables(), **more},
            capture_output=True,
            text=True,
            timeout=seconds,
        )

    def run_file(
        self, path: Path, which: str = "new", *, identity: str = "managed", seconds: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """A script where it lies, in a process of its own."""
        return subprocess.run(
            [str(python_of(which)), str(path)],
            cwd=path.parent,
            env=self.variables(identity),
            capture_output=True,
            text=True,
            timeout=seconds,
        )

    def take_down(self) -> None:
        for one in self._sdks.values():
            one.close()
        super().take_down()
