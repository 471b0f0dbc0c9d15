"""Where a script gets its token: the metadata of the cloud, managed identity, service principal.

Managed identity is App Service's: `IDENTITY_ENDPOINT` and the secret in `IDENTITY_HEADER` (Microsoft Learn:
How to use managed identities for App Service). A service principal comes by OAuth 2.0's client credentials
(RFC 6749 section 4.4) with the tenant `adfs`, for which MSAL asks no other server.
"""

from __future__ import annotations

import hmac
from urllib.parse import parse_qs

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from tuneloop.core.azure import CLIENT_ID, CLOUD
from tuneloop.server.azure.errors import Refusal
from tuneloop.server.azure.gateway import LOCATION, Gateway
from tuneloop.server.azure.routing import OPEN, Answer, Request, Routes

FORM_BYTES = 64 * 1024

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
        raise Refusal(401, "invalid_client", "X-IDENTITY-HEADER is not the secret of this home.")
    token, expires = gateway.tokens.issue(request.query.get("resource", ""), "managed-identity")
    return Answer(
        {
            "access_token": token,
            "expires_on": str(expires),
            "resource": request.query["resource"],
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
    raw = b""
    async for piece in http.stream():
        raw += piece
        if len(raw) > FORM_BYTES:
            raise Refusal(413, "invalid_request", f"The form is larger than {FORM_BYTES} bytes.")
    form = {name: values[0] for name, values in parse_qs(raw.decode("utf-8", "replace")).items()}
    try:
        return JSONResponse(_granted(gateway, form))
    except Refusal as refusal:
        # OAuth has an error shape of its own, RFC 6749 section 5.2.
        told = {"error": refusal.code, "error_description": refusal.message}
        return JSONResponse(told, refusal.status)


def _granted(gateway: Gateway, form: dict[str, str]) -> dict[str, object]:
    if form.get("grant_type") != "client_credentials":
        raise Refusal(400, "unsupported_grant_type", "Only client_credentials are taken here.")
    is_known = form.get("client_id", "") == CLIENT_ID
    secret = form.get("client_secret", "")
    if not hmac.compare_digest(secret.encode(), gateway.identity_secret.encode()) or not is_known:
        raise Refusal(401, "invalid_client", f"The client is {CLIENT_ID!r} with the secret of this home.")
    audience = form.get("resource") or form.get("scope", "").split(" ")[0].removesuffix("/.default")
    token, expires = gateway.tokens.issue(audience, CLIENT_ID)
    del expires
    return {"access_token": token, "token_type": "Bearer", "expires_in": 3600, "resource": audience}
