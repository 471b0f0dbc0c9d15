"""Tokens: who gets one, and what is done with a wrong one."""

from __future__ import annotations

from tests.contract.azure.sdk import Sdk


def test_what_is_not_there_is_an_error_in_the_sdks_own_class(sdk: Sdk) -> None:
    error = sdk.run("ml.schedules.get('x')").failed()
    assert error["type"] in {"ResourceNotFoundError", "HttpResponseError"}, error
