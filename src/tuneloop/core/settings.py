"""Settings, and the folder that is the workspace (the home).

Precedence: environment variable, then `settings.yaml` in the home, then the default here.

    home/
      home.json        schema version and id of this workspace
      token secret     owner-only: the API's token, the secret that endpoint keys derive from
      server.json      pid, start time, port and version of the running server
      tuneloop.db      the store (SQLite)
      artifacts/       immutable bytes by digest
      jobs/J/S/N/      one folder per attempt
      services/        tracker/ router/ (routes.json, demand.json)
      replicas/E/D/N/  one folder per replica
      mlflow/          mlflow.db and MLflow's own artifacts
      cache/           downloads of base models
      logs/            server.log
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tuneloop.core.errors import UsageError

PASSED_ON = (
    "CUDA_VISIBLE_DEVICES",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
)
"""Variables of the submitter that reach a step, besides HF_*."""


def passed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of `environment` that a submission carries to its steps."""
    return {name: value for name, value in environment.items() if name in PASSED_ON or name.startswith("HF_")}


@dataclass(frozen=True)
class Settings:
    """Everything that can be set, with its default; one environment variable each (`TUNELOOP_<NAME>`)."""

    home: Path = field(default_factory=lambda: Path.home() / ".tuneloop")
    """The folder that is the workspace; everything that Tuneloop keeps lies in it."""
    port: int = 0
    """The API's port on 127.0.0.1; 0 takes a free one and keeps it for this home."""
    router_port: int = 0
    """The endpoints' port on 127.0.0.1; 0 takes a free one and keeps it for this home."""
    slots: int = 1
    """Steps that may run at once on this machine."""
    max_attempts: int = 3
    """Attempts of one step when its process vanishes without a result."""
    mlflow_tracking_uri: str = ""
    """Empty: `mlflow/mlflow.db` in the home."""

    @property
    def database(self) -> Path:
        return self.home / "tuneloop.db"

    @property
    def tracking_uri(self) -> str:
        return self.mlflow_tracking_uri or f"sqlite:///{self.home / 'mlflow' / 'mlflow.db'}"


_NUMBERS = {"port": (0, 65535), "router_port": (0, 65535), "slots": (1, 1024), "max_attempts": (1, 1000)}
"""Least and greatest."""


def load(environment: Mapping[str, str] | None = None, home: Path | None = None) -> Settings:
    """The settings in force. Raises `UsageError` for an unknown key or a value of the wrong kind."""
    env = os.environ if environment is None else environment
    chosen_home = home or Path(env.get("TUNELOOP_HOME") or Path.home() / ".tuneloop")
    chosen_home = Path(os.path.abspath(chosen_home.expanduser()))
    values: dict[str, object] = {"home": chosen_home}
    names = {name for name in Settings.__dataclass_fields__ if name != "home"}
    values.update(_from_file(chosen_home / "settings.yaml", names))
    for name in names:
        written = env.get(f"TUNELOOP_{name.upper()}")
        if written:
            values[name] = written
    for name in _NUMBERS.keys() & values.keys():
        values[name] = _number(name, values[name])
    return Settings(**values)  # type: ignore[arg-type]


def _from_file(path: Path, names: set[str]) -> dict[str, object]:
    if not path.is_file():
        return {}
    import yaml

    try:
        written = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path} cannot be read: {reason}.", next_move="Mend it, or remove it.") from None
    if not isinstance(written, dict):
        raise UsageError(f"{path} is not a mapping of settings.")
    unknown = sorted(set(written) - names)
    if unknown:
        raise UsageError(f"{path}: unknown setting {unknown[0]!r}; there is: {', '.join(sorted(names))}.")
    return dict(written)


def _number(name: str, value: object) -> int:
    least, greatest = _NUMBERS[name]
    try:
        number = int(str(value))
    except ValueError:
        number = least - 1
    if not least <= number <= greatest:
        raise UsageError(
            f"The setting {name} is {value!r}; expected a whole number from {least} to {greatest}.",
            next_move=f"Set TUNELOOP_{name.upper()}, or {name} in settings.yaml of the home.",
        )
    return number
