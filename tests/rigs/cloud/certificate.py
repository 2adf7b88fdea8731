"""Certificates: one for localhost, and those of a private authority."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


def write_certificate(
    cert: Path, key: Path, *, name_in_it: str = "localhost", hours: tuple[int, int] = (-1, 1)
) -> None:
    """Write a self-signed certificate and its key. ``hours``: from when until when it is valid, from now on."""
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name_in_it)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(hours=hours[0]))
        .not_valid_after(now + timedelta(hours=hours[1]))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name_in_it)]), critical=False)
        .sign(private, hashes.SHA256())
    )
    cert.write_bytes(certificate.public_bytes(Encoding.PEM))
    key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


class Authority:
    """A private authority in ``folder`` that signs certificates of servers and clients."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        not_its = "digital_signature content_commitment key_encipherment data_encipherment key_agreement"
        uses = {**dict.fromkeys(not_its.split(), False), "encipher_only": False, "decipher_only": False}
        certificate = (
            self._builder(self._name, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **uses), critical=True)
        )
        self.path = folder / "ca.pem"
        self.path.write_bytes(certificate.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM))

    def sign(self, name: str) -> tuple[Path, Path]:
        """Write a certificate for ``name``, and its key; the same files if there was one before."""
        private = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        alternative = x509.SubjectAlternativeName([x509.DNSName(name)])
        certificate = self._builder(subject, private.public_key()).add_extension(alternative, critical=False)
        cert, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        # As a careful operator does it: the key first, each file at once.
        for path, data in (
            (key, private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())),
            (cert, certificate.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)),
        ):
            part = path.with_suffix(".part")
            part.write_bytes(data)
            part.replace(path)
        return cert, key

    def _builder(self, subject: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        """Begin a certificate with what a strict check wants (Python 3.13): whose key it is, and whose key signs it."""
        now, own = datetime.now(UTC), self._key.public_key()
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(own), critical=False)
        )
