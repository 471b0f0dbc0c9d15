"""Run history: what `stream`, `download` and lists of children ask.

words    what the log says, line by line
log      the log that `stream` prints, appended to and never changed
files    the files of a run, by path
page     the page behind the Web View link
runs     a job and its steps as runs
operations   the routes
"""

from tuneloop.server.azure.history.files import run_files
from tuneloop.server.azure.history.operations import routes

__all__ = ["routes", "run_files"]
