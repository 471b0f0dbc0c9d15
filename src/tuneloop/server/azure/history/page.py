"""The page behind the Web View link: what a job is, where it stands, its steps and its log. Text only, every
word escaped; no script, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from urllib.parse import quote

from starlette.responses import HTMLResponse

from tuneloop.core.states import JOB_ENDED
from tuneloop.core.types import JobRecord, StepRecord
from tuneloop.server.azure.gateway import Gateway
from tuneloop.server.azure.history import words
from tuneloop.server.azure.jobs.facts import facts_of
from tuneloop.server.azure.jobs.links import STD_LOG

REFRESH_SECONDS = 5
MOST_BYTES = 1024 * 1024
"""Of the log: its end."""
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;"
    "color:#1b1b1b;background:#fff}pre{background:#f4f4f4;padding:1rem;overflow:auto;font-size:13px}"
    "table{border-collapse:collapse}td,th{padding:.2rem 1rem .2rem 0;text-align:left;vertical-align:top}"
    "@media(prefers-color-scheme:dark){body{color:#e8e8e8;background:#1b1b1b}pre{background:#262626}"
    "a{color:#8ab4f8}}"
)
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; form-action 'none'"


def of_job(gateway: Gateway, record: JobRecord, files: Mapping[str, Path | bytes]) -> HTMLResponse:
    job = record.job
    said = {
        "State": str(record.state),
        "Experiment": job.experiment,
        "Base model": job.base_model or "",
        "Submitted": f"{record.created_at:%Y-%m-%d %H:%M:%S} UTC",
        "Taken": words.seconds(record.started_at, record.finished_at).removeprefix(" in "),
        "Description": facts_of(gateway, job.name).description,
        "Tags": ", ".join(f"{name}={value}" for name, value in job.tags.items()),
        "Error": record.error.message if record.error else "",
    }
    steps = "".join(_step_row(step) for step in gateway.parts.jobs.steps(job.name))
    body = (
        _facts(said)
        + f"<h2>Steps</h2><table><tr><th>step<th>state<th>taken<th>{steps}</table>"
        + _files(files)
        + _log(files)
    )
    return _whole(f"{job.display_name} ({job.name})", body, is_running=record.state not in JOB_ENDED)


def of_step(record: JobRecord, step: StepRecord, files: Mapping[str, Path | bytes]) -> HTMLResponse:
    said = {
        "Job": record.key,
        "State": str(step.state),
        "Taken": words.seconds(step.started_at, step.finished_at).removeprefix(" in "),
        "Reason": step.reason or "",
    }
    title = f"{step.step} of {record.key}"
    return _whole(title, _facts(said) + _log(files), is_running=step.finished_at is None)


def _step_row(step: StepRecord) -> str:
    taken = words.seconds(step.started_at, step.finished_at).removeprefix(" in ")
    cells = (step.step, str(step.state), taken, step.reason or "")
    return "<tr>" + "".join(f"<td>{escape(cell)}" for cell in cells)


def _facts(said: Mapping[str, str]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}<td>{escape(value)}" for name, value in said.items() if value)
    return f"<table>{rows}</table>"


def _files(paths: Iterable[str]) -> str:
    # Relative: the address of the page holds the secret, the page itself need not.
    links = "".join(f'<li><a href="{quote(path)}">{escape(path)}</a>' for path in paths)
    return f"<h2>Logs</h2><ul>{links}</ul>"


def _log(files: Mapping[str, Path | bytes]) -> str:
    found = files.get(STD_LOG, b"")
    raw = found if isinstance(found, bytes) else _end_of(found)
    return f"<h2>Log</h2><pre>{escape(raw[-MOST_BYTES:].decode('utf-8', 'replace'))}</pre>"


def _end_of(path: Path) -> bytes:
    with open(path, "rb") as handle:
        handle.seek(max(0, path.stat().st_size - MOST_BYTES))
        return handle.read()


def _whole(title: str, body: str, *, is_running: bool) -> HTMLResponse:
    html = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style><h1>{escape(title)}</h1>{body}</html>"
    )
    headers = {"content-security-policy": _POLICY}
    if is_running:
        headers["refresh"] = str(REFRESH_SECONDS)
    return HTMLResponse(html, headers=headers)
