"""`python -m tuneloop.steps.finetune.ask DIR NODES`: how the step in DIR would be carried out on NODES
machines like this one, as JSON: `{machine, processes, strategy, pack_tokens, longest, is_checkpointed,
planned_bytes}`, or `{error}`.

A process of its own, because only torch knows what it can use, and a supervisor must not hold torch.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tuneloop.core.errors import TuneloopError
from tuneloop.core.types import StepFile


def main(arguments: list[str]) -> int:
    from tuneloop import training
    from tuneloop.steps.finetune.choice import carried_out

    step = StepFile.model_validate_json((Path(arguments[0]) / "step.json").read_text(encoding="utf-8"))
    try:
        machine = training.Machine.detect()
        found = carried_out(step, machine, int(arguments[1]))
        told: dict[str, Any] = {
            "machine": asdict(machine),
            "processes": found.plan.processes,
            "strategy": found.plan.strategy,
            "pack_tokens": found.pack_tokens,
            "longest": found.longest,
            "is_checkpointed": found.is_checkpointed,
            "planned_bytes": found.planned_bytes,
        }
    except TuneloopError as error:
        told = {"error": error.to_json()}
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
