"""`python -m tuneloop.steps.launch.torchrun DIR NODE ARGUMENTS`: torchrun, that also writes down which of its
processes failed and how. Started by `group`; its standard input is a pipe that ends with the supervisor."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from tuneloop.steps.launch.reports import read_run, write_failures


def main(arguments: list[str]) -> int:
    folder, node, rest = Path(arguments[0]), int(arguments[1]), arguments[2:]
    run = read_run(folder)
    if run is None:
        print(f"{folder} holds no run", file=sys.stderr)
        return 2
    try:
        torchrun.run(torchrun.parse_args(rest))
    except ChildFailedError as error:
        failures = [(rank, failure.exitcode) for rank, failure in sorted(error.failures.items())]
        write_failures(folder, run, node, failures)
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    # Every word has been said and every process has ended: taking torch apart would take seconds more.
    os._exit(code)
