"""The certificate authority of a home: good for this machine's names, in its own processes, and no more."""

from __future__ import annotations

import ipaddress
import os
import socket
import ssl
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tuneloop.server.azure.certificates import LEAF_DAYS, RENEW_DAYS, Certificates


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    certificates = Certificates(tmp_path_factory.mktemp("certificates") / "azure")
    certificates.ensure()
    return certificates


def forged(made: Certificates, *names: x509.GeneralName, signer: Path | None = None) -> tuple[Path, Path]:
    """A certificate of the home's authority for any names, as somebody would make one who got its key."""
    authority = x509.load_pem_x509_certificate((signer or made.authority).read_bytes())
    signing = serialization.load_pem_private_key(made.authority_key.read_bytes(), password=None)
    assert isinstance(signing, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "example.com")]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False
        )
        .sign(signing, hashes.SHA256())
    )
    folder = made.authority.parent
    (folder / "forged.pem").write_bytes(built.public_bytes(serialization.Encoding.PEM))
    (folder / "forged.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return folder / "forged.pem", folder / "forged.key"


def shake_hands(certificate: Path, key: Path, trusted: Path, name: str) -> None:
    """A TLS handshake in which the client wants `name`. Raises `ssl.SSLCertVerificationError`."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(certificate, key)
    asking = ssl.create_default_context(cafile=str(trusted))
    # Python 3.13's default: certificates have to be as RFC 5280 wants them.
    asking.verify_flags |= ssl.VERIFY_X509_STRICT
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            serving.wrap_socket(theirs, server_side=True).close()
        except OSError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with asking.wrap_socket(ours, server_hostname=name):
            pass
    finally:
        ours.close()
        thread.join(10)


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "::1"])
def test_the_listener_is_trusted_under_this_machines_names(made: Certificates, name: str) -> None:
    shake_hands(made.certificate, made.key, made.bundle, name)


@pytest.mark.parametrize(
    ("name", "alternative"),
    [
        ("example.com", x509.DNSName("example.com")),
        ("login.microsoftonline.com", x509.DNSName("login.microsoftonline.com")),
        ("localhost.example.com", x509.DNSName("localhost.example.com")),
        ("8.8.8.8", x509.IPAddress(ipaddress.ip_address("8.8.8.8"))),
        ("128.0.0.1", x509.IPAddress(ipaddress.ip_address("128.0.0.1"))),
        ("fe80::1", x509.IPAddress(ipaddress.ip_address("fe80::1"))),
    ],
)
def test_the_authority_cannot_vouch_for_any_other_name(
    made: Certificates, name: str, alternative: x509.GeneralName
) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="permitted subtree violation"):
        shake_hands(*forged(made, alternative), made.bundle, name)


def test_one_good_name_does_not_carry_a_bad_one(made: Certificates) -> None:
    pair = forged(made, x509.DNSName("localhost"), x509.DNSName("example.com"))
    with pytest.raises(ssl.SSLCertVerificationError, match="permitted subtree violation"):
        shake_hands(*pair, made.bundle, "localhost")


def test_it_is_trusted_by_who_is_given_the_bundle_and_by_nobody_else(made: Certificates) -> None:
    import certifi

    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(made.certificate, made.key, Path(certifi.where()), "localhost")
    # The bundle replaces what requests trusts: the world's roots have to be in it.
    assert Path(certifi.where()).read_text("utf-8").strip() in made.bundle.read_text("utf-8")


def test_the_listeners_certificate_signs_nothing(made: Certificates) -> None:
    leaf = x509.load_pem_x509_certificate(made.certificate.read_bytes())
    assert leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert leaf.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign is False
    authority = x509.load_pem_x509_certificate(made.authority.read_bytes())
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
    assert authority.extensions.get_extension_for_class(x509.NameConstraints).critical


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_keys_are_their_owners_alone_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        made = Certificates(tmp_path / "azure")
        made.ensure()
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.lstat(made.authority_key).st_mode) == 0o600
    assert stat.S_IMODE(os.lstat(made.key).st_mode) == 0o600
    assert stat.S_IMODE(os.lstat(tmp_path / "azure").st_mode) == 0o700


def test_what_is_good_is_kept_and_what_is_broken_or_gone_is_made_anew(tmp_path: Path) -> None:
    made = Certificates(tmp_path / "azure")
    made.ensure()
    files = (made.authority, made.authority_key, made.certificate, made.key)
    first = [path.read_bytes() for path in files]
    made.ensure()
    assert [path.read_bytes() for path in files] == first
    made.certificate.write_text("not a certificate")
    made.ensure()
    assert made.authority.read_bytes() == first[0]
    shake_hands(made.certificate, made.key, made.bundle, "localhost")
    made.authority_key.unlink()
    made.ensure()
    assert made.authority.read_bytes() != first[0]
    shake_hands(made.certificate, made.key, made.bundle, "localhost")


def test_a_key_of_another_certificate_is_not_served_with(tmp_path: Path) -> None:
    made = Certificates(tmp_path / "azure")
    made.ensure()
    other = Certificates(tmp_path / "other")
    other.ensure()
    made.key.write_bytes(other.key.read_bytes())
    made.ensure()
    shake_hands(made.certificate, made.key, made.bundle, "localhost")


def test_a_certificate_that_ends_soon_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuneloop.server.azure.certificates.LEAF_DAYS", RENEW_DAYS - 1)
    made = Certificates(tmp_path / "azure")
    made.ensure()
    authority, first = made.authority.read_bytes(), made.certificate.read_bytes()
    monkeypatch.setattr("tuneloop.server.azure.certificates.LEAF_DAYS", LEAF_DAYS)
    made.ensure()
    assert made.certificate.read_bytes() != first
    assert made.authority.read_bytes() == authority
