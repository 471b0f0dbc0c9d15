"""Tokens of the Azure gateway: what one is good for, and every way in which one is not."""

from __future__ import annotations

import base64
import json
from typing import Any

import jwt
import pytest

from tuneloop.server.azure.errors import Refusal
from tuneloop.server.azure.tokens import LIFETIME_SECONDS, ML_AUDIENCE, Tokens

URL = "https://127.0.0.1:8443"
SECRET = b"a secret of thirty-two characters"


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def tokens(secret: bytes = SECRET, home: str = "h", clock: Clock | None = None) -> Tokens:
    return Tokens(secret, home, URL, clock or Clock())


def refused(made: str, by: Tokens, audience: str = "arm") -> Refusal:
    with pytest.raises(Refusal) as caught:
        by.verify(made, by.audiences[audience])
    assert caught.value.status == 401
    return caught.value


def unsigned(claims: dict[str, Any], algorithm: str) -> str:
    def part(value: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    return f"{part({'alg': algorithm, 'typ': 'JWT'})}.{part(claims)}."


def test_a_token_says_what_the_sdk_looks_at() -> None:
    made, expires = tokens().issue(ML_AUDIENCE, "managed-identity")
    seen = jwt.decode(made, options={"verify_signature": False})
    assert seen["aud"] == ML_AUDIENCE
    assert seen["tid"] == "h"
    assert seen["exp"] == expires == 1_000_000 + LIFETIME_SECONDS


@pytest.mark.parametrize("audience", [URL, f"{URL}/", "https://management.azure.com", f"{URL}/.default"])
def test_what_the_resource_manager_is_called_does_not_matter(audience: str) -> None:
    by = tokens()
    made, _ = by.issue(audience, "x")
    assert by.verify(made, by.audiences["arm"]).name == "x"
    assert by.verify(made, by.audiences["ml"]).audience == audience


def test_a_token_for_azure_ml_is_none_for_the_resource_manager() -> None:
    by = tokens()
    made, _ = by.issue(ML_AUDIENCE, "x")
    assert by.verify(made, by.audiences["ml"]).name == "x"
    refusal = refused(made, by)
    assert refusal.code == "InvalidAuthenticationTokenAudience"
    assert f"is for {ML_AUDIENCE!r}; expected one of: {URL}" in refusal.message


@pytest.mark.parametrize("resource", ["", "https://graph.microsoft.com", "https://127.0.0.1:9999", "x\n"])
def test_there_are_tokens_for_our_own_services_only(resource: str) -> None:
    with pytest.raises(Refusal) as caught:
        tokens().issue(resource, "x")
    assert (caught.value.status, caught.value.code) == (400, "invalid_resource")


def test_a_token_expires() -> None:
    clock = Clock()
    by = tokens(clock=clock)
    made, expires = by.issue(URL, "x")
    clock.now = expires - 1
    by.verify(made, by.audiences["arm"])
    clock.now = expires
    assert refused(made, by).code == "ExpiredAuthenticationToken"


def test_a_token_of_tomorrow_is_none_of_today() -> None:
    clock = Clock()
    by = tokens(clock=clock)
    made, _ = by.issue(URL, "x")
    clock.now -= 86_400
    assert refused(made, by).code == "ExpiredAuthenticationToken"


def test_a_token_of_another_home_is_refused_a_copy_with_the_same_secret_included() -> None:
    made, _ = tokens(secret=b"another secret of many characters").issue(URL, "x")
    assert refused(made, tokens()).code == "InvalidAuthenticationToken"
    made, _ = tokens(home="original").issue(URL, "x")
    assert refused(made, tokens(home="copy")).code == "InvalidAuthenticationTokenTenant"


@pytest.mark.parametrize("algorithm", ["none", "None", "HS256"])
def test_a_token_without_a_signature_is_refused(algorithm: str) -> None:
    claims = {"aud": URL, "sub": "x", "tid": "h", "nbf": 0, "exp": 2_000_000}
    assert refused(unsigned(claims, algorithm), tokens()).code == "InvalidAuthenticationToken"


def test_a_token_signed_with_the_homes_secret_itself_or_another_algorithm_is_refused() -> None:
    claims = {"aud": URL, "sub": "x", "tid": "h", "nbf": 0, "exp": 2_000_000}
    assert (
        refused(jwt.encode(claims, SECRET, algorithm="HS256"), tokens()).code == "InvalidAuthenticationToken"
    )
    by = tokens()
    other = jwt.encode(claims, by._key * 2, algorithm="HS512")
    assert refused(other, by).code == "InvalidAuthenticationToken"


@pytest.mark.parametrize(
    "made", ["", "x", "a.b.c", "ü.ü.ü", "." * 1000, "eyJhbGciOiJIUzI1NiJ9.bm90IGpzb24.AA"]
)
def test_what_is_no_token_is_refused_in_words(made: str) -> None:
    assert refused(made, tokens()).code == "InvalidAuthenticationToken"


@pytest.mark.parametrize("missing", ["exp", "nbf", "aud", "sub", "tid"])
def test_a_token_that_leaves_something_out_is_refused(missing: str) -> None:
    by = tokens()
    claims = {"aud": URL, "sub": "x", "tid": "h", "nbf": 0, "exp": 2_000_000}
    del claims[missing]
    assert refused(jwt.encode(claims, by._key, algorithm="HS256"), by).code == "InvalidAuthenticationToken"


def test_the_submitters_token_of_a_job_is_for_azure_ml_or_refused() -> None:
    by = tokens()
    made, _ = by.issue(ML_AUDIENCE, "x")
    found = by.verify_user(made)
    assert found is not None
    assert found.name == "x"
    assert by.verify_user(None) is None
    wrong, _ = by.issue(URL, "x")
    for header in ("", "x", wrong):
        with pytest.raises(Refusal) as caught:
            by.verify_user(header)
        assert caught.value.status == 401
