"""What a process of Azure's SDK has to be told so that it speaks to this workspace: environment variables.

Which variable is read where: azure-ai-ml's `_azure_environments` and `_telemetry`, azure-identity's
`managed_identity`, azure-monitor-opentelemetry's `configurations`, and the merging of the environment in
requests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from tuneloop.core.process import write_atomically

CLOUD = "TuneloopCloud"
CLIENT_ID = "tuneloop"
"""Of the service principal; its secret is the one of the managed identity."""

CONFLICTING = (
    "AZURE_CLIENT_ID",
    "AZURE_CLIENT_SECRET",
    "AZURE_TENANT_ID",
    "AZURE_AUTHORITY_HOST",
    "AZURE_CLIENT_CERTIFICATE_PATH",
    "AZURE_USERNAME",
    "AZURE_PASSWORD",
    "AZURE_FEDERATED_TOKEN_FILE",
    "IDENTITY_ENDPOINT",
    "IDENTITY_HEADER",
    "IDENTITY_SERVER_THUMBPRINT",
    "IMDS_ENDPOINT",
    "MSI_ENDPOINT",
    "MSI_SECRET",
    "AZUREML_DEV_URL_MFE",
    "CURL_CA_BUNDLE",
)
"""What somebody has set for the real Azure, and what would lead the SDK there or spoil its identity here.
Taken out of the environment unless `environment` sets it."""

QUIET: Mapping[str, str] = {
    "OTEL_LOGS_EXPORTER": "none",
    "OTEL_TRACES_EXPORTER": "none",
    "OTEL_METRICS_EXPORTER": "none",
    "OTEL_EXPERIMENTAL_RESOURCE_DETECTORS": "otel",
    "APPLICATIONINSIGHTS_STATSBEAT_DISABLED_ALL": "true",
    "APPLICATIONINSIGHTS_CONTROLPLANE_DISABLED": "true",
}
"""In a notebook the SDK reports every call to Microsoft. With these it does not; what is left of it there, a
sign of life with the machine's name, ends with `MLClient(..., enable_telemetry=False)` or in our kernel."""

_PROXIES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
_HOSTS = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class Remembered:
    """What `listener.json` says: it is up until it is taken down, whichever server runs."""

    port: int = 0
    """The last one; 0: it never was up."""
    is_up: bool = False


def remembered(folder: Path) -> Remembered:
    try:
        found = json.loads((folder / "listener.json").read_text(encoding="utf-8"))
        return Remembered(port=int(found["port"]), is_up=bool(found["is_up"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Remembered()


def remember(folder: Path, state: Remembered) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomically(folder / "listener.json", json.dumps(asdict(state)), private=True)


def environment(
    url: str, folder: Path, identity: str = "managed", inherited: Mapping[str, str] | None = None
) -> dict[str, str]:
    """For a listener at `url` whose files lie in `folder`; `identity`: `managed`, or `principal` for a
    service principal. `inherited` is what the process has already: a proxy is kept, and not asked for this
    machine. Raises `OSError` when the secret cannot be read."""
    secret = (folder / "identity").read_text(encoding="utf-8").strip()
    found = {
        "ARM_CLOUD_METADATA_URL": f"{url}/metadata/endpoints",
        "AZUREML_CURRENT_CLOUD": CLOUD,
        "REGISTRY_DISCOVERY_ENDPOINT_URL": f"{url}/",
        "REQUESTS_CA_BUNDLE": str(folder / "bundle.pem"),
        # Logs are looked at again after 1 to 5 seconds instead of 2 to 60.
        "AZUREML_RUN_POLLING_INTERVAL_MIN": "1",
        "AZUREML_RUN_POLLING_INTERVAL_MAX": "5",
        **QUIET,
        **_past_proxies(inherited or {}),
    }
    if identity == "principal":
        return {
            **found,
            "AZURE_CLIENT_ID": CLIENT_ID,
            "AZURE_CLIENT_SECRET": secret,
            "AZURE_TENANT_ID": "adfs",
            "AZURE_AUTHORITY_HOST": url,
            "AZURE_TOKEN_CREDENTIALS": "EnvironmentCredential",
        }
    return {
        **found,
        "IDENTITY_ENDPOINT": f"{url}/msi/token",
        "IDENTITY_HEADER": secret,
        # Nobody else is asked: not a login of this person at the real Azure, not a browser.
        "AZURE_TOKEN_CREDENTIALS": "ManagedIdentityCredential",
    }


def _past_proxies(inherited: Mapping[str, str]) -> dict[str, str]:
    """requests sends calls to 127.0.0.1 through a proxy, too, unless it is told not to. It reads `no_proxy`
    before `NO_PROXY`."""
    if not any(inherited.get(name) for name in _PROXIES):
        return {}
    said = inherited.get("no_proxy") or inherited.get("NO_PROXY") or ""
    listed = [part.strip() for part in said.split(",") if part.strip()]
    if "*" in listed:
        return {}
    together = ",".join([*listed, *(host for host in _HOSTS if host not in listed)])
    return {"no_proxy": together, "NO_PROXY": together}


def bundle(folder: Path, inherited: Mapping[str, str]) -> Path:
    """What requests shall trust: `bundle.pem`; where somebody trusts a file of certificates already (that of
    a company's proxy, say), that and ours together. Raises `OSError`."""
    usual = folder / "bundle.pem"
    theirs = Path(inherited.get("REQUESTS_CA_BUNDLE") or inherited.get("CURL_CA_BUNDLE") or usual)
    if theirs == usual or not theirs.is_file():
        return usual
    trusted, own = theirs.read_text("utf-8").rstrip(), (folder / "ca.pem").read_text("utf-8").strip()
    if own in trusted:
        return theirs
    together = f"{trusted}\n{own}\n"
    merged = folder / f"bundle-{sha256(together.encode()).hexdigest()[:12]}.pem"
    if not merged.is_file():
        write_atomically(merged, together, private=True)
    return merged
