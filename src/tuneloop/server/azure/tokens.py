"""Tokens for the gateway: signed, expiring, for one audience. What proves who may ask for one: `identity`.

JSON Web Tokens (RFC 7519), HS256, by PyJWT: the SDK decodes what it gets and compares `aud` with what it
asked for, so an opaque text would not do.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import jwt

from tuneloop.server.azure.errors import Refusal

LIFETIME_SECONDS = 3600
ML_AUDIENCE = "https://ml.azure.local"
"""What azure-ai-ml makes of the portal's address in the metadata document."""
ARM_AUDIENCES = ("https://management.azure.com", "https://management.core.windows.net")


@dataclass(frozen=True)
class Caller:
    """Who a token speaks for."""

    name: str
    audience: str


class Tokens:
    def __init__(
        self, secret: bytes, home_id: str, base_url: str, clock: Callable[[], float] = time.time
    ) -> None:
        """`secret` is the home's; the key of these tokens is derived from it and signs nothing else."""
        self._clock = clock
        self._key = hmac.new(secret, b"azure gateway tokens", hashlib.sha256).digest()
        self._home_id = home_id
        self._base_url = base_url.rstrip("/")

    @property
    def audiences(self) -> dict[str, tuple[str, ...]]:
        """By what an operation asks for."""
        arm = (self._base_url, *ARM_AUDIENCES)
        return {"arm": arm, "ml": (*arm, ML_AUDIENCE)}

    def known(self) -> tuple[str, ...]:
        """Everything that a token can be asked for."""
        return self.audiences["ml"]

    def issue(self, audience: str, name: str) -> tuple[str, int]:
        """A token, and when it expires (seconds since the epoch). `audience` goes in as it was asked for: the
        SDK compares the two letter by letter. Raises `Refusal` for one that is not ours."""
        if _plain(audience) not in self.known():
            raise Refusal(
                400,
                "invalid_resource",
                f"There are no tokens for {audience!r} here; there are for: {', '.join(self.known())}.",
            )
        now = int(self._clock())
        claims = {
            "iss": f"{self._base_url}/",
            "aud": audience,
            "sub": name,
            "oid": self._home_id,
            "tid": self._home_id,
            "appid": name,
            "iat": now,
            "nbf": now - 60,
            "exp": now + LIFETIME_SECONDS,
        }
        return jwt.encode(claims, self._key, algorithm="HS256"), now + LIFETIME_SECONDS

    def verify(self, token: str, audiences: Collection[str]) -> Caller:
        """Raises `Refusal` (401) that says what is wrong with it."""
        try:
            claims = jwt.decode(
                token,
                self._key,
                algorithms=["HS256"],
                # Times are compared below, by our clock; the audience, too.
                options={
                    "verify_aud": False,
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                    "require": ["exp", "nbf", "aud", "sub", "tid"],
                },
            )
        except jwt.InvalidTokenError as error:
            raise _refused(
                "InvalidAuthenticationToken", f"The access token is not one of this home: {error}."
            ) from None
        if claims["tid"] != self._home_id:
            # A copied home has the secret of the first one.
            raise _refused("InvalidAuthenticationTokenTenant", "The access token is one of another home.")
        if not claims["nbf"] <= self._clock() < claims["exp"]:
            raise _refused(
                "ExpiredAuthenticationToken",
                f"The access token has expired: it is valid for {LIFETIME_SECONDS} s. Ask for a new one.",
            )
        audience = str(claims["aud"])
        if _plain(audience) not in audiences:
            raise _refused(
                "InvalidAuthenticationTokenAudience",
                f"The access token is for {audience!r}; expected one of: {', '.join(audiences)}.",
            )
        return Caller(str(claims["sub"]), audience)

    def verify_user(self, header: str | None) -> Caller | None:
        """Who `x-azureml-token` speaks for: with it the SDK hands a job its submitter's token for Azure ML.
        None without it; raises `Refusal` (401) for one that is wrong, expired or for another service."""
        if header is None:
            return None
        return self.verify(header.strip(), (ML_AUDIENCE,))


def _plain(audience: str) -> str:
    return audience.removesuffix("/.default").rstrip("/")


def _refused(code: str, message: str) -> Refusal:
    return Refusal(401, code, message)
