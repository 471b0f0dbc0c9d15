"""Settings, and the folder that is the workspace (the home).

Precedence: environment variable, then `settings.yaml` in the home, then the default here.

    home/
      home.json        schema version and id of this workspace
      token secret     owner-only: the API's token, the secret that endpoint keys derive from
      server.json      pid, start time, port and version of the running server
      tuneloop.db      the store (SQLite)
      artifacts/       immutable bytes by digest
      jobs/J/S/N/      one folder per attempt
      services/        tracker/ router/ (routes.json, demand.json, mirrors/) mlflow/
      replicas/E/D/N/  one folder per replica
      mlflow/          mlflow.db and MLflow's own artifacts
      cache/           downloads of base models
      azure/           the HTTPS listener's certificates and secret, and what was uploaded through it
      logs/            server.log
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
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
    memory_gb: int = 0
    """What steps and replicas together may be expected to take on this machine, in GB (10^9 bytes); 0: nine
    tenths of its memory, or of its container's."""
    max_attempts: int = 3
    """Attempts of one step when its process vanishes without a result."""
    mlflow_tracking_uri: str = ""
    """Address of an MLflow server, or its database; `home`: `mlflow/mlflow.db` in the home, whatever
    `MLFLOW_TRACKING_URI` says. Empty: `MLFLOW_TRACKING_URI` where that is set, else `home`."""
    azure_port: int = 0
    """The port on 127.0.0.1 of the HTTPS listener for Azure's SDK; 0: the last one, 8443, or a free one."""
    azure_loose: bool = False
    """Whether a field that Azure's SDK sends and that would have no effect here is a warning instead of an
    error."""

    @property
    def database(self) -> Path:
        return self.home / "tuneloop.db"

    def claimable_bytes(self, memory_bytes: int) -> int:
        """Of a machine or container with so much memory. The rest is for the servers and what else runs."""
        return self.memory_gb * 10**9 or memory_bytes * 9 // 10

    @property
    def tracking_uri(self) -> str:
        if self.mlflow_tracking_uri in ("", IN_THE_HOME):
            return f"sqlite:///{self.home / 'mlflow' / 'mlflow.db'}"
        return self.mlflow_tracking_uri

    @property
    def shown_tracking_uri(self) -> str:
        """For people, logs and answers: without a password."""
        return without_password(self.tracking_uri)


IN_THE_HOME = "home"
_TRACKING_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")


def tracking_fingerprint(settings: Settings, environment: Mapping[str, str]) -> str:
    """Changes with the address of MLflow and with what is needed to log in there, and tells neither."""
    used = {name: value for name, value in environment.items() if name.startswith("MLFLOW_TRACKING_")}
    text = json.dumps([settings.tracking_uri, used], sort_keys=True)
    secret = (settings.home / "secret").read_bytes()
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()


def without_password(text: str) -> str:
    """`text` with the name and password of every address in it left out."""
    return re.sub(r"://[^/\s]*@", "://", text)


_NUMBERS = {
    "port": (0, 65535),
    "router_port": (0, 65535),
    "azure_port": (0, 65535),
    "slots": (1, 1024),
    "memory_gb": (0, 1_000_000),
    "max_attempts": (1, 1000),
}
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
    _set_tracking(values, env)
    for name in _NUMBERS.keys() & values.keys():
        values[name] = _number(name, values[name])
    if "azure_loose" in values:
        values["azure_loose"] = _flag("azure_loose", values["azure_loose"])
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


def _set_tracking(values: dict[str, object], env: Mapping[str, str]) -> None:
    """MLflow's own variable counts where ours says nothing."""
    source = "mlflow_tracking_uri"
    if not values.get(source) and env.get("MLFLOW_TRACKING_URI"):
        values["mlflow_tracking_uri"] = env["MLFLOW_TRACKING_URI"]
        source = "MLFLOW_TRACKING_URI"
    uri = str(values.get("mlflow_tracking_uri") or IN_THE_HOME).strip().rstrip("/")
    values["mlflow_tracking_uri"] = "" if uri == IN_THE_HOME else uri
    scheme = uri.partition("://")[0].partition("+")[0].lower()
    if uri != IN_THE_HOME and ("://" not in uri or scheme not in _TRACKING_SCHEMES):
        raise UsageError(
            f"{source} is {without_password(uri)!r}; expected an MLflow server (http:// or https://), a "
            f"database ({', '.join(_TRACKING_SCHEMES[2:])}), or {IN_THE_HOME!r}.",
            next_move=f"To keep MLflow in the home: export TUNELOOP_MLFLOW_TRACKING_URI={IN_THE_HOME}",
        )


def _flag(name: str, value: object) -> bool:
    written = str(value).strip().lower()
    if written not in _FLAGS:
        raise UsageError(
            f"The setting {name} is {value!r}; expected true or false.",
            next_move=f"Set TUNELOOP_{name.upper()}, or {name} in settings.yaml of the home.",
        )
    return _FLAGS[written]


_FLAGS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


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
