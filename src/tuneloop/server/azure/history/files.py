"""The files of a run that a person wants: the log that `stream` prints, and what each step printed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tuneloop.core.types import JobRecord, StepRecord
from tuneloop.server.azure.gateway import Gateway
from tuneloop.server.azure.history import log
from tuneloop.server.azure.jobs.facts import find_child, find_job
from tuneloop.server.azure.jobs.links import STD_LOG, log_link


def run_files(gateway: Gateway, run: str) -> Mapping[str, Path | bytes]:
    """By path, of a job or of a step's own run; nothing where there is no such run. Bytes are what is known
    by now; a path may be of a file that grows."""
    record = find_job(gateway, run)
    if record is not None:
        return {STD_LOG: log.text(gateway, record), **_step_logs(gateway, record)}
    child = find_child(gateway, run)
    if child is None:
        return {}
    own = _newest_log(gateway, child[1])
    return {} if own is None else {STD_LOG: own}


def log_files(gateway: Gateway, run: str) -> dict[str, str]:
    """Name to address."""
    record = find_job(gateway, run)
    if record is None:
        return {name: log_link(gateway, run, name) for name in run_files(gateway, run)}
    names = [STD_LOG, *_step_logs(gateway, record)]
    return {name: log_link(gateway, record.key, name) for name in names}


def _step_logs(gateway: Gateway, record: JobRecord) -> dict[str, Path]:
    """`logs/finetune.txt` is the newest attempt's, `logs/finetune.1.txt` an earlier one's."""
    found = {}
    for step in gateway.parts.jobs.steps(record.key):
        newest = _newest_log(gateway, step)
        if newest is not None:
            found[f"logs/{step.step}.txt"] = newest
        for attempt in gateway.parts.jobs.attempts(record.key, step.step)[:-1]:
            path = gateway.parts.files.folder(attempt.folder) / "log.txt"
            if path.is_file():
                found[f"logs/{step.step}.{attempt.number}.txt"] = path
    return found


def _newest_log(gateway: Gateway, step: StepRecord) -> Path | None:
    """Of a step that was reused: the log of the attempt that it was reused from."""
    attempt = gateway.parts.jobs.source_attempt(step.job, step.step)
    if attempt is None:
        return None
    path = gateway.parts.files.folder(attempt.folder) / "log.txt"
    return path if path.is_file() else None
