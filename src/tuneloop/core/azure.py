"""What a process of Azure's SDK has to be told so that it speaks to this workspace: environment variables.

Which variable is read where: azure-ai-ml's `_azure_environments`, azure-identity's `managed_identity`, and
the merging of the environment in requests.
"""

from __future__ import annotations

from pathlib import Path

CLOUD = "TuneloopCloud"
CLIENT_ID = "tuneloop"
"""Of the service principal; its secret is the one of the managed identity."""


def environment(url: str, folder: Path, identity: str = "managed") -> dict[str, str]:
    """For a listener at `url` whose files lie in `folder`; `identity`: `managed`, or `principal` for a
    service principal. Raises `OSError` when the secret cannot be read."""
    secret = (folder / "identity").read_text(encoding="utf-8").strip()
    found = {
        "ARM_CLOUD_METADATA_URL": f"{url}/metadata/endpoints",
        "AZUREML_CURRENT_CLOUD": CLOUD,
        "REGISTRY_DISCOVERY_ENDPOINT_URL": f"{url}/",
        "REQUESTS_CA_BUNDLE": str(folder / "bundle.pem"),
        # Logs are looked at again after 1 to 5 seconds instead of 2 to 60.
        "AZUREML_RUN_POLLING_INTERVAL_MIN": "1",
        "AZUREML_RUN_POLLING_INTERVAL_MAX": "5",
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
