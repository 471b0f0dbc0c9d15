"""What MLflow is told about jobs, attempts and models, and how far it has been told.

The tracker process calls `Tracker.tick` about once a second; nothing else in Tuneloop writes to MLflow or
waits for it. Everything is carried the same way: say it (`ports.TrackingServer`, where twice is once), then
write down how far that was (`TrackingRecord`). A tracker killed in between says the last thing again, and
nothing is lost or doubled. Nobody answering means lag: the files of the attempts keep everything.
Must never import mlflow.
"""

from tuneloop.workspace.tracking.registry import rebuild
from tuneloop.workspace.tracking.tracker import TickReport, Tracker

__all__ = ["TickReport", "Tracker", "rebuild"]
