"""`tuneloop doctor`: is this installation and this workspace sound, and if not, what to do."""

from __future__ import annotations

import click

from tuneloop.cli import checks, output, session
from tuneloop.core import settings as settings_module


@click.command("doctor")
@output.json_option
def doctor_(as_json: bool) -> int:
    """Check this installation and this workspace, and say what to fix.

    Python and package versions against the lock file, torch and its threads, the home (permissions, schema,
    disk space), ports, processes that outlived their server, the server, MLflow's database, hub settings.
    Changes and starts nothing. Exit code 1 when a check failed, 0 when all are ok or warnings.

    \b
    Example:
      tuneloop doctor
    """
    found = checks.run(settings_module.load(), session.find)
    failed = any(check.state == "fail" for check in found)
    if as_json:
        output.print_json({"checks": [vars(check) for check in found], "ok": not failed})
    else:
        _tell(found)
    return 1 if failed else 0


def _tell(found: list[checks.Check]) -> None:
    output.table(("CHECK", "STATE", "FOUND"), [(check.name, check.state, check.found) for check in found])
    wrong = [check for check in found if check.fix and check.state != "ok"]
    if wrong:
        output.say()
    for check in wrong:
        output.say(f"{check.name}: {check.fix}")
