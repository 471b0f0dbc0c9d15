"""A certificate authority for this home alone, and the certificate of the listener.

The SDK sends tokens over TLS only, so the listener needs a certificate that the script's process trusts. The
authority is made once for a home, is valid for loopback names only (a critical name constraint, RFC 5280
section 4.2.1.10), and is handed to processes by `REQUESTS_CA_BUNDLE`; nothing is installed in the system.
"""

from __future__ import annotations

import ipaddress
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tuneloop.core.process import write_atomically

AUTHORITY_DAYS = 3650
LEAF_DAYS = 365
RENEW_DAYS = 60
"""A certificate that ends sooner is made anew at the next start."""


class Certificates:
    """The files of the listener, in a folder that only the owner can read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.authority = folder / "ca.pem"
        self.authority_key = folder / "ca.key"
        self.certificate = folder / "server.pem"
        self.key = folder / "server.key"
        self.bundle = folder / "bundle.pem"
        """certifi's roots and ours: `REQUESTS_CA_BUNDLE` replaces what requests trusts."""

    def ensure(self) -> None:
        """Make what is missing, or ends soon. A new authority makes everything anew."""
        self._folder.mkdir(parents=True, exist_ok=True)
        os.chmod(self._folder, 0o700)
        if not _is_good(self.authority, self.authority_key, RENEW_DAYS + LEAF_DAYS, self.authority):
            self._make_authority()
        if not _is_good(self.certificate, self.key, RENEW_DAYS, self.authority):
            self._make_leaf()
        self._bundle()

    def _make_authority(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Tuneloop on this machine only")])
        names = x509.NameConstraints(
            permitted_subtrees=[
                x509.DNSName("localhost"),
                x509.IPAddress(ipaddress.ip_network("127.0.0.0/8")),
                x509.IPAddress(ipaddress.ip_network("::1/128")),
            ],
            excluded_subtrees=None,
        )
        built = (
            _builder(name, name, key.public_key(), AUTHORITY_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(names, critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        _write_key(self.authority_key, key)
        write_atomically(self.authority, built.public_bytes(serialization.Encoding.PEM).decode())

    def _make_leaf(self) -> None:
        authority = x509.load_pem_x509_certificate(self.authority.read_bytes())
        signer = serialization.load_pem_private_key(self.authority_key.read_bytes(), password=None)
        assert isinstance(signer, ec.EllipticCurvePrivateKey)
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
        names = x509.SubjectAlternativeName(
            [
                x509.DNSName("localhost"),
                x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
                x509.IPAddress(ipaddress.ip_address("::1")),
            ]
        )
        built = (
            _builder(name, authority.subject, key.public_key(), LEAF_DAYS)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(names, critical=False)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
            )
            .sign(signer, hashes.SHA256())
        )
        _write_key(self.key, key)
        write_atomically(self.certificate, built.public_bytes(serialization.Encoding.PEM).decode())

    def _bundle(self) -> None:
        import certifi

        roots = Path(certifi.where()).read_text(encoding="utf-8")
        own = self.authority.read_text(encoding="utf-8")
        write_atomically(self.bundle, f"{roots.rstrip()}\n\n# Tuneloop on this machine\n{own}")


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        # A machine whose clock was set back a little trusts it all the same.
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    text = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    write_atomically(path, text.decode(), private=True)


def _is_good(path: Path, key: Path, days: int, issuer: Path) -> bool:
    """Whether there is a certificate of `issuer` that is valid for so many days more, and its key: a process
    may have ended between the writing of the two."""
    try:
        found = x509.load_pem_x509_certificate(path.read_bytes())
        found.verify_directly_issued_by(x509.load_pem_x509_certificate(issuer.read_bytes()))
        own = serialization.load_pem_private_key(key.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, InvalidSignature):
        return False
    lasts = found.not_valid_after_utc > datetime.now(UTC) + timedelta(days=days)
    return lasts and found.public_key() == own.public_key()
