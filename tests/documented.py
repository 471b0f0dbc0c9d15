"""README and tutorial as a reader types them: one bash for a page, in order, in an empty home.

Every command runs exactly as it stands on the page, except for the few in `TREATED`.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs" / "tutorial").glob("*.md")))

TYPED = {"sh", ""}
"""What a block in the shell calls itself."""
SHOWN = {"text", "json", "yaml", "python"}
"""Blocks to look at. Whatever else a block calls itself is refused: nobody has said whether it runs."""

QUESTION = "What is a recipe in Tuneloop?"
MLFLOW_PORT = 5000
OWN_ROWS = 24


@dataclass(frozen=True)
class Block:
    language: str
    body: str

    def commands(self) -> Iterator[str]:
        """Line by line; lines that end in a backslash go with the next one."""
        lines: list[str] = []
        for line in self.body.splitlines():
            lines.append(line)
            if not line.endswith("\\"):
                yield "\n".join(lines)
                lines = []


def blocks(text: str) -> list[Block]:
    found = re.findall(r"^ *(?:```|~~~)([^\n]*)\n(.*?)^ *(?:```|~~~)$", text, flags=re.DOTALL | re.MULTILINE)
    return [Block(language.strip(), body) for language, body in found]


def commands(page: Path) -> list[str]:
    return [
        command
        for block in blocks(page.read_text("utf-8"))
        if block.language in TYPED
        for command in block.commands()
    ]


# ---------------------------------------------------------------- what is not run as it stands


@dataclass(frozen=True)
class Treated:
    why: str
    script: Callable[[str], str]
    """The bash that runs in the command's place."""


def _look_at_target(command: str) -> str:
    return f"make --dry-run --directory {shlex.quote(str(ROOT))} {command.removeprefix('make ')}"


def _with_a_question(command: str) -> str:
    return f"{command} <<< {shlex.quote(QUESTION)}"


def _open_and_interrupt(command: str) -> str:
    """In a process group of its own, as in a terminal: otherwise bash has it ignore Ctrl-C."""
    port = MLFLOW_PORT if is_free(MLFLOW_PORT) else free_port()
    command = command if port == MLFLOW_PORT else f"{command} --port {port}"
    return f"""\
set -m
{command} &
set +m
pages=$!
until curl -sf http://127.0.0.1:{port}/health; do kill -0 $pages; sleep 0.5; done
curl -sf http://127.0.0.1:{port}/ | grep -i '<title>mlflow'
kill -INT -- -$pages
wait $pages"""


TREATED = {
    "make demo": Treated(
        "its target must exist and run the demo, which tests/slow/test_demo.py runs", _look_at_target
    ),
    "make test": Treated("its target must exist: a test cannot run the suite that it is in", _look_at_target),
    "tuneloop chat guide": Treated("a conversation: one question is on stdin", _with_a_question),
    "tuneloop mlflow": Treated(
        "runs until Ctrl-C: its pages are asked, then it gets one; another port when 5000 is taken",
        _open_and_interrupt,
    ),
}


AZURE_PAGE = ROOT / "docs" / "tutorial" / "azure.md"
SDK = ROOT / ".azure" / "new"
FIRST_BLOCKS = 3
"""Who asks, a base model, a cluster: what takes no weights."""


def _link_the_sdk(command: str) -> str:
    return f"rm -r azure-sdk\nln -s {shlex.quote(str(SDK))} azure-sdk\nazure-sdk/bin/python -c 'import azure'"


def _with_the_pages_first_blocks(command: str) -> str:
    shown = [one.body for one in blocks(AZURE_PAGE.read_text("utf-8")) if one.language == "python"]
    text = "\n".join(shown[:FIRST_BLOCKS])
    return f"printf '%s' {shlex.quote(text)} > walk.py\n{command}"


def _see_that_it_is_there(command: str) -> str:
    return " ".join([*command.split()[:3], "--help"])


TREATED |= {
    "azure-sdk/bin/python -m pip install azure-ai-ml azure-identity datasets": Treated(
        "the SDK, in the versions that the tests of its dialect use", _link_the_sdk
    ),
    "tuneloop azure run --python azure-sdk/bin/python walk.py": Treated(
        "the page's first blocks as a script; all of them, with a small Phi-3, are run by "
        "tests/contract/azure/test_document.py",
        _with_the_pages_first_blocks,
    ),
    "tuneloop azure kernel --python azure-sdk/bin/python --prefix azure-sdk": Treated(
        "ipykernel lies beside that SDK; tests/contract/azure/test_notebook.py runs a notebook in the kernel",
        _see_that_it_is_there,
    ),
}


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---------------------------------------------------------------- what is seen

REPLY = r"\w+"

PROMISED = {
    "make demo": r"(?m)bin/tuneloop demo$",
    "make test": r"-m pytest tests/unit",
    "tuneloop doctor": r"(?m)^.*\bpython\b.*\bok\b|\bok\b.*\bpython\b",
    "tuneloop catalog list": r"SmolLM2-135M-Instruct",
    "tuneloop catalog show": r"apache-2\.0",
    "tuneloop run my.yaml --dry-run": r"num_train_epochs",
    "tuneloop run my.yaml --set": r"completed",
    "tuneloop run support.yaml --dry-run": r"num_train_epochs",
    "tuneloop run support.yaml": r"completed",
    "tuneloop init": r"Wrote support\.yaml",
    "tuneloop jobs stream": r"completed",
    "tuneloop jobs show": r"completed",
    "tuneloop jobs metrics": r"loss",
    "tuneloop jobs outputs $JOB --download": r"evaluation_result",
    "tuneloop jobs outputs": r"trained_model",
    "tuneloop models register": r"guide",
    "tuneloop models show": r"SmolLM2-135M-Instruct",
    "tuneloop endpoints create": r"guide",
    "tuneloop deployments create": r"ready",
    "tuneloop chat": REPLY,
    "curl": r'"content": ?"[^"]*\w',
    "tuneloop mlflow": r"http://127\.0\.0\.1:\d+/#/experiments",
    "tuneloop status": r"No background server runs",
    "tuneloop azure up": r"(?m)^address +https://127\.0\.0\.1:\d+$",
    "tuneloop azure status": r"(?m)^address +https://127\.0\.0\.1:\d+$",
    "tuneloop azure run": r"GPUs of Standard_NC24ads_A100_v4: 1",
    "tuneloop azure env": r"set -gx IDENTITY_HEADER",
    "tuneloop azure coverage": r"jobs\.create_or_update +works",
    "tuneloop azure down": r"closed",
}
"""The beginning of a command, and what its output holds; the longest beginning that fits counts."""


def promised(command: str) -> str | None:
    fitting = [beginning for beginning in PROMISED if command.startswith(beginning)]
    return PROMISED[max(fitting, key=len)] if fitting else None


# ---------------------------------------------------------------- the reader


@dataclass
class Ran:
    command: str
    output: str
    seconds: float


@dataclass
class Reader:
    """Somebody with an empty home folder, in a folder with the checkout's `.venv` and data of their own."""

    folder: Path
    checkout: Path = field(init=False)
    home: Path = field(init=False)

    def __post_init__(self) -> None:
        self.checkout, self.home = self.folder / "checkout", self.folder / "reader"
        for folder in (self.checkout, self.home, self.folder / "output"):
            folder.mkdir(parents=True)
        # `source .venv/bin/activate` is then typed as the page has it.
        (self.checkout / ".venv").symlink_to(sys.prefix)

    def environment(self) -> dict[str, str]:
        ours = ("TUNELOOP_", "MLFLOW_", "HF_", "XDG_", "VIRTUAL_ENV", "PYTHON")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        places = {"HOME": str(self.home), "TUNELOOP_HOME": str(self.home / ".tuneloop")}
        return kept | places | {"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}

    def type(self, typed: list[str], seconds: float) -> tuple[int, list[Ran]]:
        """One bash for all; its exit code, and what was run: the last one failed when the code is not 0."""
        place = self.folder / "page.sh"
        place.write_text(script(typed, self.folder / "output"), encoding="utf-8")
        ran = subprocess.run(
            ["bash", str(place)],
            cwd=self.checkout,
            env=self.environment(),
            timeout=seconds,
            check=False,
            preexec_fn=_hear_interrupts,
        )
        return ran.returncode, list(self._ran(typed))

    def _ran(self, typed: list[str]) -> Iterator[Ran]:
        for number, command in enumerate(typed):
            output = self.folder / "output" / f"{number:02}.txt"
            if output.exists():
                text = output.read_text("utf-8")
                began = float((output.with_suffix(".began")).read_text())
                yield Ran(command, text, max(0.0, output.stat().st_mtime - began))

    def processes(self) -> list[psutil.Process]:
        """Those that were started in this home and are alive."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("TUNELOOP_HOME") == str(self.home / ".tuneloop"):
                    found.append(process)
            except psutil.Error:
                continue
        return [one for one in found if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]

    def leave(self) -> None:
        """Take down what a page that failed has left running."""
        if self.processes():
            down = [sys.executable, "-m", "tuneloop.cli", "down"]
            subprocess.run(down, env=self.environment(), capture_output=True, check=False, timeout=120)
        for process in self.processes():
            process.kill()


def _hear_interrupts() -> None:
    """Tests that run in the background ignore Ctrl-C, and so would all that they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def script(typed: list[str], output: Path) -> str:
    """Each command's output goes to a file of its own; nobody sits at the keyboard."""
    lines = ["set -eu"]
    for number, command in enumerate(typed):
        place = shlex.quote(str(output / f"{number:02}"))
        lines.append(f'echo "$EPOCHREALTIME" > {place}.began')
        lines.append(f"exec < /dev/null > {place}.txt 2>&1")
        lines.append(TREATED[command].script(command) if command in TREATED else command)
    return "\n".join(lines) + "\n"
