"""Where a script gets its token: the metadata of the cloud, managed identity, service principal.

Managed identity is App Service's: `IDENTITY_ENDPOINT` and the secret in `IDENTITY_HEADER` (Microsoft Learn:
How to use managed identities for App Service). A service principal comes by OAuth 2.0's client credentials
(RFC 6749 section 4.4) with the tenant `adfs`, for which MSAL asks no other server.
"""

from __future__ import annotations

import asyncio
import hmac
from urllib.parse import parse_qs

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from tuneloop.core.azure import CLIENT_ID, CLOUD
from tuneloop.server.azure.errors import Refusal
from tuneloop.server.azure.gateway import LOCATION, Gateway
from tuneloop.server.azure.routing import OPEN, Answer, Request, Routes
from tuneloop.server.azure.tokens import LIFETIME_SECONDS

FORM_BYTES = 64 * 1024
FORM_FIELDS = 32
FORM_SECONDS = 15.0
OPENID_SCOPES = ("openid", "profile", "offline_access")
"""What MSAL may ask for beside a resource."""

routes = Routes()


@routes.add("GET", "/metadata/endpoints", audience=OPEN)
def metadata(gateway: Gateway, request: Request) -> Answer:
    """Where the cloud's services are"""
    return Answer(
        [
            {
                "name": CLOUD,
                "portal": "https://portal.tuneloop.local/",
                "resourceManager": f"{gateway.base_url}/",
                "authentication": {"loginEndpoint": f"{gateway.base_url}/", "audiences": [gateway.base_url]},
                "suffixes": {"storage": "tuneloop.local"},
            }
        ]
    )


@routes.add("GET", "/msi/token", audience=OPEN)
def managed_identity(gateway: Gateway, request: Request) -> Answer:
    """A token for a managed identity"""
    given = request.http.headers.get("x-identity-header", "")
    if not hmac.compare_digest(given.encode(), gateway.identity_secret.encode()):
        raise Refusal(
            401,
            "invalid_client",
            "X-IDENTITY-HEADER is not the secret of this home. Set IDENTITY_HEADER as this command says: "
            "tuneloop azure env",
        )
    resource = request.query.get("resource", "")
    token, expires = gateway.tokens.issue(resource, "managed-identity")
    return Answer(
        {
            "access_token": token,
            "expires_on": str(expires),
            "resource": resource,
            "token_type": "Bearer",
        }
    )


@routes.add("GET", "/adfs/.well-known/openid-configuration", audience=OPEN)
def openid_configuration(gateway: Gateway, request: Request) -> Answer:
    """Where a service principal asks for its token"""
    base = f"{gateway.base_url}/adfs"
    return Answer(
        {
            "issuer": base,
            "authorization_endpoint": f"{base}/oauth2/authorize",
            "token_endpoint": f"{base}/oauth2/token",
            "response_types_supported": ["token"],
            "grant_types_supported": ["client_credentials"],
            "tenant_region_scope": LOCATION,
        }
    )


@routes.raw("POST", "/adfs/oauth2/token")
async def service_principal(gateway: Gateway, http: HttpRequest, params: object) -> Response:
    """A token for a service principal"""
    try:
        return JSONResponse(_granted(gateway, await _form(http)))
    except Refusal as refusal:
        # OAuth has an error shape of its own, RFC 6749 section 5.2.
        told = {"error": refusal.code, "error_description": refusal.message}
        headers = {"www-authenticate": "Bearer"} if refusal.status == 401 else {}
        if refusal.status in (408, 413):
            # The rest of the form is not read: the connection cannot be used again.
            headers["connection"] = "close"
        return JSONResponse(told, refusal.status, headers)


async def _form(http: HttpRequest) -> dict[str, str]:
    raw = b""
    try:
        async with asyncio.timeout(FORM_SECONDS):
            async for piece in http.stream():
                raw += piece
                if len(raw) > FORM_BYTES:
                    raise Refusal(413, "invalid_request", f"The form is larger than {FORM_BYTES} bytes.")
    except TimeoutError:
        raise Refusal(408, "invalid_request", f"The form did not arrive within {FORM_SECONDS:g} s.") from None
    try:
        found = parse_qs(raw.decode(), keep_blank_values=True, max_num_fields=FORM_FIELDS, errors="strict")
    except (UnicodeDecodeError, ValueError):
        raise Refusal(400, "invalid_request", "The body is not a form of at most 32 fields.") from None
    twice = [name for name, values in found.items() if len(values) > 1]
    if twice:
        raise Refusal(400, "invalid_request", f"The form says {', '.join(sorted(twice))} more than once.")
    return {name: values[0] for name, values in found.items()}


def _granted(gateway: Gateway, form: dict[str, str]) -> dict[str, object]:
    if form.get("grant_type") != "client_credentials":
        raise Refusal(
            400,
            "unsupported_grant_type",
            f"grant_type is {form.get('grant_type', '')[:100]!r}; only client_credentials is taken here.",
        )
    is_known = hmac.compare_digest(form.get("client_id", "").encode(), CLIENT_ID.encode())
    secret = form.get("client_secret", "")
    if not hmac.compare_digest(secret.encode(), gateway.identity_secret.encode()) or not is_known:
        raise Refusal(
            401,
            "invalid_client",
            f"The client is {CLIENT_ID!r} with the secret of this home: tuneloop azure env --principal",
        )
    scopes = [one for one in form.get("scope", "").split() if one not in OPENID_SCOPES]
    asked = [form["resource"]] if form.get("resource") else scopes
    if len(asked) != 1:
        raise Refusal(400, "invalid_scope", f"A token is for one resource; asked for: {' '.join(asked)!r}.")
    audience = asked[0].removesuffix("/.default")
    token, _ = gateway.tokens.issue(audience, CLIENT_ID)
    return {
        "access_token": token,
        "token_type": "Bearer",
        "expires_in": LIFETIME_SECONDS,
        "resource": audience,
    }
