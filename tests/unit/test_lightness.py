"""What the command line and the server must not load: they stay light however heavy the steps are."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "peft", "tokenizers", "mlflow", "pandas", "datasets")


def loaded(program: str) -> set[str]:
    code = f"{program}\nimport sys; print(' '.join(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in ran.stdout.splitlines()[-1].split()}


@pytest.mark.parametrize(
    "program",
    [
        "import tuneloop.daemon, tuneloop.server.app",
        "import tuneloop.serving.router",
        "import tuneloop.client",
    ],
)
def test_neither_torch_nor_mlflow_come_with_the_server_the_router_or_the_client(program: str) -> None:
    assert loaded(program).isdisjoint(HEAVY)


def test_help_loads_neither_http_nor_models() -> None:
    program = (
        "import contextlib\nfrom tuneloop.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])"
    )
    assert loaded(program).isdisjoint({*HEAVY, "httpx", "pydantic", "rich", "sqlalchemy", "fastapi"})


def test_a_running_server_holds_neither_torch_nor_mlflow() -> None:
    program = """
import tempfile, pathlib
from tuneloop import daemon
from tuneloop.core.settings import Settings
from tuneloop.server.app import create_app
settings = Settings(home=pathlib.Path(tempfile.mkdtemp()))
daemon.prepare_home(settings)
parts, reconciler = daemon.assemble(settings, daemon.Lifetime())
create_app(parts)
"""
    assert loaded(program).isdisjoint(HEAVY)
