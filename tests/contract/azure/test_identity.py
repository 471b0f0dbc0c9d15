"""Who gets a token, what the SDK makes of it, and what is done with a wrong one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import jwt
import pytest

from tests.contract.azure.sdk import AzureWorld, Sdk
from tuneloop.core.azure import CLIENT_ID
from tuneloop.server.azure.tokens import ML_AUDIENCE

WORKSPACE = "/subscriptions/s/resourceGroups/g/providers/Microsoft.MachineLearningServices/workspaces/w"


@pytest.fixture(scope="module")
def wire(azure: AzureWorld) -> Iterator[httpx.Client]:
    """Requests that the SDK never sends."""
    import ssl

    trusted = ssl.create_default_context(cafile=str(azure.azure_folder / "bundle.pem"))
    with httpx.Client(base_url=azure.url, verify=trusted, trust_env=False) as client:
        yield client


def secret(azure: AzureWorld) -> str:
    return (azure.azure_folder / "identity").read_text().strip()


def managed(azure: AzureWorld, wire: httpx.Client, resource: str) -> httpx.Response:
    return wire.get("/msi/token", params={"resource": resource}, headers={"X-IDENTITY-HEADER": secret(azure)})


def refused(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """In Azure's error shape, with nothing missing."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"code", "message", "target", "details"}
    assert error["code"] == code == response.headers["x-ms-error-code"]
    assert response.headers["x-ms-request-id"]
    found: dict[str, Any] = error
    return found


# ---------------------------------------------------------------- through the SDK


@pytest.mark.verbs("workspaces.get")
def test_a_managed_identity_reaches_the_workspace_under_any_name(sdk: Sdk) -> None:
    code = "w = ml.workspaces.get('Any-Name'); result = [w.name, w.location, w.id, w.discovery_url]"
    found = sdk.run(code).ok()
    assert found[:2] == ["Any-Name", "local"]
    assert found[2].endswith("/workspaces/Any-Name")
    assert found[3].endswith("/discovery")


def test_the_tokens_that_the_sdk_gets_are_for_what_it_asked(azure: AzureWorld, sdk: Sdk) -> None:
    found = sdk.run(
        f"""
        asked = ["https://management.azure.com", "{azure.url}", "{ML_AUDIENCE}"]
        result = [credential.get_token(one + "/.default").token for one in asked]
        """
    ).ok()
    audiences = [jwt.decode(one, options={"verify_signature": False})["aud"] for one in found]
    assert audiences == ["https://management.azure.com", azure.url, ML_AUDIENCE]


def test_a_service_principal_reaches_the_workspace_and_the_registry(azure: AzureWorld) -> None:
    ran = azure.run_script(
        """
        from azure.ai.ml import MLClient
        from azure.identity import DefaultAzureCredential

        credential = DefaultAzureCredential()
        credential.get_token("https://management.azure.com/.default")
        print(MLClient(credential, "s", "g", "w").workspaces.get("w").name)
        registry = MLClient(credential, registry_name="azureml")
        print(registry.models.get("Phi-3-mini-4k-instruct", label="latest").name)
        """,
        IDENTITY_ENDPOINT="",
        IDENTITY_HEADER="",
        **azure.variables("principal"),
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["w", "Phi-3-mini-4k-instruct"]


def test_a_wrong_identity_header_is_told_by_the_sdk(sdk: Sdk) -> None:
    error = sdk.run(
        """
        import os
        from azure.identity import ManagedIdentityCredential

        right = os.environ["IDENTITY_HEADER"]
        os.environ["IDENTITY_HEADER"] = "wrong"
        try:
            ManagedIdentityCredential().get_token("https://management.azure.com/.default")
        finally:
            os.environ["IDENTITY_HEADER"] = right
        """
    ).failed()
    assert error["type"] in {"ClientAuthenticationError", "CredentialUnavailableError"}


def test_a_wrong_client_secret_is_told_by_the_sdk(azure: AzureWorld, sdk: Sdk) -> None:
    error = sdk.run(
        f"""
        from azure.identity import ClientSecretCredential

        credential_of_nobody = ClientSecretCredential("adfs", "{CLIENT_ID}", "wrong", authority="{azure.url}")
        credential_of_nobody.get_token("https://management.azure.com/.default")
        """
    ).failed()
    assert error["type"] == "ClientAuthenticationError"
    assert "tuneloop azure env --principal" in error["message"]


def test_a_wrong_token_is_told_by_the_sdk_with_its_code(sdk: Sdk) -> None:
    error = sdk.run(
        """
        from azure.core.credentials import AccessToken

        class Nobody:
            def get_token(self, *scopes, **options):
                return AccessToken("a.b.c", 4102444800)

        MLClient(Nobody(), "s", "g", "w").workspaces.get("w")
        """
    ).failed()
    assert error["type"] == "ClientAuthenticationError"
    assert (error["status"], error["code"]) == (401, "InvalidAuthenticationToken")
    assert "not one of this home" in error["message"]


def test_what_is_not_there_is_an_error_in_the_sdks_own_class(sdk: Sdk) -> None:
    error = sdk.run("ml.schedules.get('x')").failed()
    assert error["type"] in {"ResourceNotFoundError", "HttpResponseError"}, error


# ---------------------------------------------------------------- managed identity, on the wire


@pytest.mark.parametrize("header", [None, "", "wrong", "ü".encode()])
def test_without_the_homes_secret_there_is_no_token(wire: httpx.Client, header: Any) -> None:
    headers = {} if header is None else {"X-IDENTITY-HEADER": header}
    answer = wire.get("/msi/token", params={"resource": "https://management.azure.com"}, headers=headers)
    refused(answer, 401, "invalid_client")
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("resource", ["", "https://vault.azure.net", "https://127.0.0.1:1"])
def test_there_is_no_token_for_other_services(azure: AzureWorld, wire: httpx.Client, resource: str) -> None:
    error = refused(managed(azure, wire, resource), 400, "invalid_resource")
    assert azure.url in error["message"]


def test_the_secret_is_asked_of_whoever_calls_itself_a_managed_identity_only(wire: httpx.Client) -> None:
    for path in ("/metadata/endpoints", "/discovery", "/adfs/.well-known/openid-configuration"):
        assert wire.get(path).status_code == 200


# ---------------------------------------------------------------- service principal, on the wire


def principal(azure: AzureWorld, wire: httpx.Client, **changes: str) -> httpx.Response:
    form = {
        "grant_type": "client_credentials",
        "client_id": CLIENT_ID,
        "client_secret": secret(azure),
        "scope": "https://management.azure.com/.default",
    }
    return wire.post("/adfs/oauth2/token", data={**form, **changes})


def test_a_service_principal_gets_a_token_that_says_when_it_ends(
    azure: AzureWorld, wire: httpx.Client
) -> None:
    granted = principal(azure, wire).json()
    assert granted["expires_in"] == 3600
    claims = jwt.decode(granted["access_token"], options={"verify_signature": False})
    assert claims["aud"] == granted["resource"] == "https://management.azure.com"


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"client_secret": "wrong"}, 401, "invalid_client"),
        ({"client_secret": ""}, 401, "invalid_client"),
        ({"client_id": "somebody"}, 401, "invalid_client"),
        ({"client_id": "ü"}, 401, "invalid_client"),
        ({"grant_type": "password"}, 400, "unsupported_grant_type"),
        ({"scope": ""}, 400, "invalid_scope"),
        (
            {"scope": "https://management.azure.com/.default https://ml.azure.local"},
            400,
            "invalid_scope",
        ),
        ({"scope": "https://graph.microsoft.com/.default"}, 400, "invalid_resource"),
    ],
)
def test_what_is_wrong_with_a_form_is_told_as_oauth_tells_it(
    azure: AzureWorld, wire: httpx.Client, changes: dict[str, str], status: int, code: str
) -> None:
    answer = principal(azure, wire, **changes)
    assert answer.status_code == status, answer.text
    told = answer.json()
    assert told["error"] == code
    assert told["error_description"]
    assert secret(azure) not in answer.text


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"\xff\xfe=%ff", 400),
        (b"client_id=a&client_id=b", 400),
        (b"&".join(b"a%d=1" % number for number in range(100)), 400),
        (b"client_secret=" + b"x" * 70_000, 413),
        (b"", 400),
        (b"{}", 400),
    ],
)
def test_a_form_that_is_none_is_refused(wire: httpx.Client, body: bytes, status: int) -> None:
    answer = wire.post("/adfs/oauth2/token", content=body)
    assert answer.status_code == status
    assert answer.json()["error"] in {"invalid_request", "unsupported_grant_type"}


# ---------------------------------------------------------------- what a token opens


@pytest.mark.parametrize("header", [None, "", "Bearer", "Basic eDp5", "Bearer x", "Bearer a.b.c"])
def test_every_call_but_the_open_ones_wants_a_token(wire: httpx.Client, header: str | None) -> None:
    answer = wire.get(WORKSPACE, headers={} if header is None else {"Authorization": header})
    assert refused(answer, 401, answer.json()["error"]["code"])["message"]
    assert answer.json()["error"]["code"] in {"AuthenticationFailed", "InvalidAuthenticationToken"}


def test_a_token_for_azure_ml_does_not_open_the_resource_manager(
    azure: AzureWorld, wire: httpx.Client
) -> None:
    token = managed(azure, wire, ML_AUDIENCE).json()["access_token"]
    answer = wire.get(WORKSPACE, headers={"Authorization": f"Bearer {token}"})
    error = refused(answer, 401, "InvalidAuthenticationTokenAudience")
    assert ML_AUDIENCE in error["message"]
    discovery = "/registrymanagement/v1.0/registries/azureml/discovery"
    assert wire.get(discovery, headers={"Authorization": f"Bearer {token}"}).status_code == 200


def test_the_token_of_our_own_api_opens_nothing_here(azure: AzureWorld, wire: httpx.Client) -> None:
    token = (azure.home / "token").read_text().strip()
    refused(
        wire.get(WORKSPACE, headers={"Authorization": f"Bearer {token}"}), 401, "InvalidAuthenticationToken"
    )


def test_a_token_of_the_gateway_does_not_open_our_own_api(azure: AzureWorld, wire: httpx.Client) -> None:
    token = managed(azure, wire, azure.url).json()["access_token"]
    answer = httpx.get(
        f"{azure.client.url}/api/status", headers={"Authorization": f"Bearer {token}"}, trust_env=False
    )
    assert answer.status_code == 401


def test_ids_match_whatever_their_case_and_keep_the_callers_spelling(
    azure: AzureWorld, wire: httpx.Client
) -> None:
    token = managed(azure, wire, f"{azure.url}/").json()["access_token"]
    path = WORKSPACE.replace("resourceGroups/g", "resourcegroups/G").replace("workspaces", "WorkSpaces")
    answer = wire.get(
        path, params={"api-version": "2099-01-01"}, headers={"Authorization": f"bearer {token}"}
    )
    assert answer.status_code == 200
    assert "/resourceGroups/G/" in answer.json()["id"]
