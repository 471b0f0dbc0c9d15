"""A process of Azure's SDK, in an environment of its own, that runs what it is sent; started by `sdk`.

Reads lines of JSON `{"code": ...}` and answers each with one line: what the code put into `result`, what it
printed, and the exception that ended it. Everything that a script would import is there already: `ml` is the
client of the workspace, `registry` that of the system registry.
"""

import contextlib
import io
import json
import logging
import os
import sys
import traceback

answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)
logging.disable(logging.WARNING)

from azure.ai.ml import (  # noqa: E402, F401
    Input,
    MLClient,
    Output,
    dsl,
    entities,
    load_job,
)
from azure.ai.ml.constants import AssetTypes  # noqa: E402, F401
from azure.ai.ml.entities import *  # noqa: E402, F403
from azure.identity import DefaultAzureCredential  # noqa: E402

credential = DefaultAzureCredential()
ml = MLClient(credential, "00000000-0000-0000-0000-000000000000", "tuneloop", "local")
registry = MLClient(credential, registry_name="azureml")
names = {**globals(), "__name__": "script", "entities": entities}


def told(error):
    """What a test looks at: class, message, Azure's code and target, status."""
    inner = getattr(error, "error", None)
    return {
        "type": type(error).__name__,
        "message": str(error),
        "code": getattr(inner, "code", None),
        "target": getattr(inner, "target", None),
        "status": getattr(error, "status_code", None),
        "trace": traceback.format_exc(),
    }


def run(code):
    names.pop("result", None)
    printed, error = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        try:
            exec(compile(code, "script", "exec"), names)
        except BaseException as raised:
            error = told(raised)
    return {"result": names.get("result"), "printed": printed.getvalue(), "error": error}


answers.write(json.dumps({"ready": True}) + "\n")
answers.flush()
for line in sys.stdin:
    answers.write(json.dumps(run(json.loads(line)["code"]), default=str) + "\n")
    answers.flush()
