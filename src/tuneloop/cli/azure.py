"""`tuneloop azure`: scripts and notebooks that were written for Azure's SDK, on this workspace.

The listener belongs to the background server. What a process of the SDK needs to find it is in environment
variables (`core.azure`), so each command here either opens the listener or hands those variables on.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import click

from tuneloop.cli import output, session
from tuneloop.cli.azure_kernel import USUAL_NAME, display_name, install, remove
from tuneloop.cli.azure_script import find_python, run_script, warnings_since
from tuneloop.core import azure as variables
from tuneloop.core import settings as settings_module
from tuneloop.core.errors import NotFound

SHELLS = ("bash", "fish", "powershell")


@click.group("azure")
def azure_() -> None:
    """Run scripts and notebooks for the official Azure ML SDK (azure-ai-ml) on this workspace, unmodified.

    The background server answers the SDK over HTTPS on 127.0.0.1. Only processes that get the environment
    from here speak to it; the same script without it speaks to the real Azure.

    \b
    Example:
      tuneloop azure run train.py
    """


# ---------------------------------------------------------------- the listener


@azure_.command("up")
@output.json_option
def up_(as_json: bool) -> None:
    """Open the HTTPS listener for Azure's SDK; the server is started when there is none.

    It listens on 127.0.0.1 only, and is opened again by every later server of this workspace until
    `tuneloop azure down`. The port is 8443, or a free one where that is taken, and stays the same.

    \b
    Example:
      tuneloop azure up
    """
    view = session.connect().client.azure_up()
    if as_json:
        output.print_json(view)
        return
    _show(view)
    output.say()
    output.say("Now a script, a shell, or a notebook:")
    output.say(f"  {session.pasteable('azure run SCRIPT')}")
    output.say(f'  eval "$({session.pasteable("azure env")})"')
    output.say(f"  {session.pasteable('azure kernel')}")


@azure_.command("down")
@output.json_option
def down_(as_json: bool) -> None:
    """Close the HTTPS listener. The server, jobs and endpoints go on.

    \b
    Example:
      tuneloop azure down
    """
    view: Any = _closed()
    found = session.find()
    if found is not None:
        view = found.client.azure_down()
    else:
        folder = _folder()
        variables.remember(folder, variables.Remembered(variables.remembered(folder).port, is_up=False))
    if as_json:
        output.print_json(view)
        return
    output.say("The listener for Azure's SDK is closed.")


@azure_.command("status")
@output.json_option
def status_(as_json: bool) -> None:
    """Show whether the listener is open, its address and where its files lie. Starts nothing.

    \b
    Example:
      tuneloop azure status
    """
    found = session.find()
    view: Any = found.client.azure() if found is not None else _closed()
    if as_json:
        output.print_json(view)
        return
    if view["url"] is not None:
        _show(view)
        return
    output.say(f"The listener for Azure's SDK is closed. Open it with: {session.pasteable('azure up')}")
    last = variables.remembered(_folder())
    if found is None and last.is_up:
        output.say(f"The next background server opens it again, on port {last.port} if that is free.")


def _show(view: Any) -> None:
    folder = Path(view["folder"])
    output.pairs(
        {
            "address": view["url"],
            "config.json": folder / "config.json",
            "certificates": folder / "bundle.pem",
            "fields without effect": "are warnings (azure_loose)" if view["is_loose"] else "are refused",
        }
    )


def _closed() -> dict[str, object]:
    """What a server would say, where none runs."""
    loose = settings_module.load().azure_loose
    return {"url": None, "folder": str(_folder()), "is_loose": loose, "newest_warning": 0}


def _folder() -> Path:
    return settings_module.load().home / "azure"


# ---------------------------------------------------------------- one script


_principal = click.option(
    "--principal",
    "is_principal",
    is_flag=True,
    help="Log in as a service principal (AZURE_CLIENT_ID and so on) instead of a managed identity.",
)
_python = click.option(
    "--python",
    "written_python",
    metavar="PATH",
    help="The Python that has azure-ai-ml; otherwise the one on your PATH.",
)


@azure_.command("run", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("-m", "is_module", is_flag=True, help="SCRIPT is the name of a module, as for python -m.")
@_python
@_principal
@output.json_option
def run_(
    script: str,
    arguments: tuple[str, ...],
    is_module: bool,
    written_python: str | None,
    is_principal: bool,
    as_json: bool,
) -> int:
    """Run a Python script that was written for Azure's SDK on this workspace.

    The listener is opened when it is not. The environment is set for this one process; the script runs in
    this folder, gets the terminal and what stands behind its name, and its exit code becomes this command's.
    At the end what was done in another way than Azure does it is told on stderr.

    MLClient.from_config looks for a config.json in this folder and those above; any will do, whatever
    workspace it names. `tuneloop azure up` says where one lies that can be copied.

    With --json the script's own output goes to stderr, and the exit code and the warnings to stdout.

    \b
    Examples:
      tuneloop azure run train.py
      tuneloop azure run --python ~/azure/bin/python train.py --epochs 3
      tuneloop azure run -m pytest tests
    """
    if not is_module and script != "-" and not Path(script).exists():
        raise NotFound(f"There is no script {script!r} in {os.getcwd()}.", next_move="Name a Python file.")
    python = find_python(written_python, ("azure.ai.ml", "azure.identity", "azureml"), "azure-ai-ml")
    connection = session.connect()
    view = connection.client.azure_up()
    folder = Path(view["folder"])
    if not is_module:
        _tell_of_config(Path(script), folder)
    environment = _environment(view, is_principal)
    if written_python is not None:
        # As in an environment that is activated: what the script starts as `python` is the same one.
        environment["PATH"] = os.pathsep.join((os.path.dirname(python), environment.get("PATH", os.defpath)))
    command = [python, *(["-m"] if is_module else []), script, *arguments]
    code = run_script(command, environment, quiet=as_json)
    warnings = warnings_since(connection, view["newest_warning"])
    if as_json:
        output.print_json({"exit_code": code, "warnings": warnings})
    elif warnings:
        output.note("")
        output.note("Done in another way than Azure does it:")
        for about, text in dict.fromkeys((one["about"], one["text"]) for one in warnings):
            output.note(f"  {about}: {text}")
    return code


def _environment(view: Any, is_principal: bool) -> dict[str, str]:
    """Of a process of the SDK: this one's, without what leads elsewhere."""
    inherited = dict(os.environ)
    kept = {name: value for name, value in inherited.items() if name not in variables.CONFLICTING}
    return {**kept, **_told(view, is_principal, inherited)}


def _told(view: Any, is_principal: bool, inherited: dict[str, str]) -> dict[str, str]:
    folder = Path(view["folder"])
    identity = "principal" if is_principal else "managed"
    told = variables.environment(view["url"], folder, identity, inherited)
    # What somebody says of telemetry of their own stands.
    own = {name: inherited[name] for name in variables.QUIET if inherited.get(name)}
    return {**told, **own, "REQUESTS_CA_BUNDLE": str(variables.bundle(folder, inherited))}


CONFIGS = [
    Path(place, name) for place in (".azureml", "aml_config", "") for name in ("config.json", "project.json")
]
"""Where `MLClient.from_config` looks, in the folder it runs in and in each above."""


def _tell_of_config(script: Path, folder: Path) -> None:
    """A script that asks for `config.json` and finds none fails in words that do not say what to do here."""
    try:
        asks = "from_config" in script.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    here = Path.cwd()
    if not asks or any((place / name).is_file() for place in (here, *here.parents) for name in CONFIGS):
        return
    output.note(
        "There is no config.json here or above: MLClient.from_config will find no workspace, and the script "
        f"goes on if it has names to fall back to (any will do). To give it one: "
        f"cp {shlex.quote(str(folder / 'config.json'))} ."
    )


# ---------------------------------------------------------------- a shell, a notebook


@azure_.command("env")
@click.option(
    "--shell", type=click.Choice(SHELLS), default="bash", show_default=True, help="bash: for sh and zsh, too."
)
@_principal
@output.json_option
def env_(shell: str, is_principal: bool, as_json: bool) -> None:
    """Print the environment of Azure's SDK for a shell to take over; opens the listener when it is closed.

    Everything that is started from that shell afterwards speaks to this workspace; other shells are as they
    were. It holds a secret: do not put it into a file.

    \b
    Examples:
      eval "$(tuneloop azure env)"
      tuneloop azure env --shell fish | source
    """
    view = session.connect().client.azure_up()
    inherited = dict(os.environ)
    told = _told(view, is_principal, inherited)
    removed = [name for name in variables.CONFLICTING if name in inherited and name not in told]
    if as_json:
        output.print_json({"set": told, "unset": removed})
        return
    for name in removed:
        click.echo(_unset(shell, name))
    for name, value in told.items():
        click.echo(_set(shell, name, value))


def _set(shell: str, name: str, value: str) -> str:
    if shell == "fish":
        quoted = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"set -gx {name} '{quoted}';"
    if shell == "powershell":
        quoted = value.replace("'", "''")
        return f"$env:{name} = '{quoted}'"
    return f"export {name}={shlex.quote(value)}"


def _unset(shell: str, name: str) -> str:
    if shell == "fish":
        return f"set -e {name};"
    if shell == "powershell":
        return f"Remove-Item Env:{name} -ErrorAction SilentlyContinue"
    return f"unset {name}"


@azure_.command("kernel")
@click.option("--name", default=USUAL_NAME, show_default=True, help="What Jupyter calls its folder.")
@click.option(
    "--prefix",
    type=click.Path(path_type=Path, file_okay=False),
    help="An environment to install it into (its share/jupyter); otherwise your own Jupyter folder.",
)
@click.option("--remove", "is_removed", is_flag=True, help="Take it away again.")
@_python
@_principal
@output.json_option
def kernel_(
    name: str,
    prefix: Path | None,
    is_removed: bool,
    written_python: str | None,
    is_principal: bool,
    as_json: bool,
) -> None:
    """Install a Jupyter kernel in which Azure's SDK speaks to this workspace.

    Choose it in Jupyter as "Azure ML on Tuneloop". It starts the server and the listener when they are not
    there, holds no secret itself, and keeps the SDK's reports of what a notebook does from Microsoft. It runs
    in the Python that has azure-ai-ml and ipykernel.

    \b
    Examples:
      tuneloop azure kernel
      tuneloop azure kernel --python ~/azure/bin/python
      tuneloop azure kernel --remove
    """
    if is_removed:
        path = remove(name, prefix)
    else:
        python = find_python(written_python, ("azure.ai.ml",), "azure-ai-ml")
        find_python(python, ("ipykernel",), "ipykernel")
        path = install(name, prefix, Path(python), settings_module.load().home, is_principal=is_principal)
    if as_json:
        output.print_json({"name": name, "path": str(path), "is_installed": not is_removed})
    elif is_removed:
        output.say(f"Removed {path}.")
    else:
        output.say(f"Installed {path}. In Jupyter, choose the kernel: {display_name(path)}")


# ---------------------------------------------------------------- what works


@azure_.command("coverage")
@click.argument("groups", metavar="[GROUP]...", nargs=-1)
@click.option(
    "--state", type=click.Choice(["works", "refused", "not there"]), help="Only calls of this state."
)
@click.option("--operations", "are_operations", is_flag=True, help="What the listener answers, by address.")
@output.json_option
def coverage_(groups: tuple[str, ...], state: str | None, are_operations: bool, as_json: bool) -> None:
    """Show which calls of Azure's SDK work here, are refused with a reason, or are not there.

    Tests with the real SDK say so: a call works when one shows it. GROUP is one of MLClient's, such as jobs,
    models or online_endpoints; `registry` and `mlflow` are what is called on the registry's client and by
    plain MLflow. Starts nothing.

    \b
    Examples:
      tuneloop azure coverage
      tuneloop azure coverage jobs --state works
      tuneloop azure coverage --operations
    """
    # The whole dialect: no other command pays for it.
    from tuneloop.server.azure import coverage

    shown = [
        one
        for one in (*coverage.calls(), *coverage.other_calls())
        if (not groups or one.name.partition(".")[0] in groups or one.group in groups)
        and state in (None, one.state)
    ]
    _require_known(groups, (*coverage.calls(), *coverage.other_calls()))
    spoken = coverage.operations() if are_operations else ()
    if as_json:
        calls = [one._asdict() for one in shown]
        operations = [one._asdict() for one in spoken]
        output.print_json({"sdk": coverage.sdk(), "calls": calls, "operations": operations})
        return
    if are_operations:
        output.table(
            ("METHOD", "ADDRESS", "STATE", "WHAT IT DOES"),
            [(one.method, one.address, one.state, one.summary) for one in spoken],
        )
        return
    output.table(
        ("CALL", "STATE", "SHOWN BY"),
        [(one.name, one.state, one.tests[0] if one.tests else "") for one in shown],
    )
    counted = ", ".join(f"{count} {state}" for state, count in coverage.counts(shown).items())
    output.note(f"{coverage.sdk()}: {counted}")


def _require_known(groups: tuple[str, ...], calls: tuple[Any, ...]) -> None:
    known = sorted({one.name.partition(".")[0] for one in calls if "." in one.name})
    for group in groups:
        if group not in known and group not in {one.group for one in calls}:
            raise NotFound(f"MLClient has no group {group!r}.", next_move=f"One of: {', '.join(known)}.")
