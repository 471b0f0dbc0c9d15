"""Shared access signatures: for one place, some permissions and a time, and for nothing else."""

from __future__ import annotations

import base64
import logging
from datetime import timedelta
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

import pytest

from tests.blob_service import (
    BLOCK_BLOB,
    MADE,
    UPLOADS,
    Service,
    put_block,
    put_list,
    refusal,
)
from tuneloop.server.azure.blobs import operations, sas


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    return Service(tmp_path / "home", monkeypatch)


# ---------------------------------------------------------------- signatures


def test_a_signature_is_asked_for(service: Service) -> None:
    service.put("x", b"1")
    answer = service.get("x", token="")
    assert "listSecrets" in refusal(answer, 401, "NoAuthenticationInformation")
    bearer = service.get("x", token="", headers={"Authorization": "Bearer abc"})
    refusal(bearer, 401, "NoAuthenticationInformation")


def test_a_signature_expires_and_begins(service: Service) -> None:
    service.put("x", b"1")
    token = service.sas(seconds=60)
    assert service.get("x", token=token).status_code == 200
    service.now += timedelta(seconds=61)
    assert "expired" in refusal(service.get("x", token=token), 403, "AuthenticationFailed")
    later = service.sas()
    service.now -= timedelta(hours=2)
    assert "not valid yet" in refusal(service.get("x", token=later), 403, "AuthenticationFailed")


@pytest.mark.parametrize(
    "change",
    [
        {"sig": "AAAA"},
        {"se": "2099-01-01T00:00:00Z"},
        {"sp": "racwdlx"},
        {"sr": "b"},
        {"sr": "d", "sdd": "1"},
        {"sr": "s"},
        {"si": "0000000000000000"},
        {"spr": "https,http"},
    ],
)
def test_a_signature_that_was_changed_is_none(service: Service, change: dict[str, str]) -> None:
    service.put("a/x", b"1")
    token = urlencode({**dict(parse_qsl(service.sas("r"))), **change})
    message = refusal(service.get("a/x", token=token), 403, "AuthenticationFailed")
    assert dict(parse_qsl(token))["sig"] not in message


def test_a_signature_is_for_one_container(service: Service) -> None:
    service.put("x", b"1")
    other = service.sas("racwdl", container="azureml")
    refusal(service.get("x", token=other), 403, "AuthenticationFailed")
    refusal(service.send("GET", f"{MADE}/x"), 403, "AuthenticationFailed")


def test_a_signature_may_be_for_one_folder_or_one_blob(service: Service) -> None:
    for name in ("a/b/one", "a/b/two", "a/c/one", "a/bb/one"):
        service.put(name, b"1")
    folder = service.sas("rwl", path="a/b", is_folder=True)
    assert service.get("a/b/one", token=folder).status_code == 200
    for name in ("a/c/one", "a/bb/one", "a/b"):
        refusal(service.get(name, token=folder), 403, "AuthenticationFailed")
    refusal(service.get("a/b/../c/one".replace("/", "%2F"), token=folder), 400, "InvalidResourceName")
    assert service.list("&prefix=a/b/", token=folder) == ["a/b/one", "a/b/two"]
    for prefix in ("", "a/b", "a/bb/", "a/c/"):
        answer = service.send("GET", f"{UPLOADS}?restype=container&comp=list&prefix={prefix}", token=folder)
        refusal(answer, 403, "AuthenticationFailed")
    blob = service.sas("r", path="a/b/one")
    assert service.get("a/b/one", token=blob).status_code == 200
    refusal(service.get("a/b/two", token=blob), 403, "AuthenticationFailed")


def test_a_signature_gives_what_it_says_and_no_more(service: Service) -> None:
    service.put("x", b"1")
    denied = "AuthorizationPermissionMismatch"
    refusal(
        service.send("PUT", f"{UPLOADS}/y", token=service.sas("rl"), content=b"", headers=BLOCK_BLOB),
        403,
        denied,
    )
    refusal(put_block(service, "y", 1, b"1", service.sas("rl")), 403, denied)
    refusal(put_list(service, "y", (1,), service.sas("r")), 403, denied)
    refusal(service.send("PUT", f"{UPLOADS}/x?comp=metadata", token=service.sas("rc")), 403, denied)
    refusal(service.send("DELETE", f"{UPLOADS}/x", token=service.sas("racwl")), 403, denied)
    refusal(service.get("x", token=service.sas("wl")), 403, denied)
    answer = service.send("GET", f"{UPLOADS}?restype=container&comp=list", token=service.sas("rw"))
    refusal(answer, 403, denied)


def test_a_parameter_of_a_signature_is_sent_once(service: Service) -> None:
    token = service.sas()
    refusal(service.get("x", token=f"{token}&sp=r"), 403, "AuthenticationFailed")
    refusal(service.get("x", token=f"{token}&SIG=abc"), 403, "AuthenticationFailed")


def test_signatures_are_compared_in_constant_time_and_never_logged(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compared = []
    real = sas.hmac.compare_digest
    monkeypatch.setattr(sas.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    monkeypatch.setattr(operations, "_find", lambda *_: 1 / 0)
    token = service.sas()
    with caplog.at_level(logging.DEBUG):
        answer = service.send("HEAD", f"{UPLOADS}/x", token=token)
    assert answer.status_code == 500
    assert len(compared) == 1
    signature = dict(parse_qsl(token))["sig"]
    assert "ZeroDivisionError" in caplog.text
    ours = [record for record in caplog.records if record.name.startswith("tuneloop")]
    assert ours
    assert not any(signature[:10] in record.getMessage() for record in ours)


def test_its_key_is_the_homes_and_for_this_alone(service: Service) -> None:
    fields = dict(parse_qsl(service.sas()))
    assert service.gateway.key("sas") != service.gateway.secret
    assert len(base64.b64decode(fields["sig"])) == 32
    assert set(fields) <= set(sas.PARAMETERS)
    assert service.sas() != service.sas()
