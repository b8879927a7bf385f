"""Certificates for servers and callers, from an authority made for one test."""

import datetime as dt
from pathlib import Path

import grpc
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

_DAY = dt.timedelta(days=1)


class Authority:
    """A certificate authority; `file` has its own certificate."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._folder = folder
        self._ca = trustme.CA()
        self.file = folder / f"{name}.pem"
        self.pem = self._ca.cert_pem.bytes()
        self.file.write_bytes(self.pem)

    def server_files(self, name: str = "server") -> tuple[Path, Path]:
        """Write a new certificate and key for this host, replacing existing files; return both paths."""
        issued = self._ca.issue_cert("localhost", "127.0.0.1", "::1")
        return self._write(
            name, b"".join(pem.bytes() for pem in issued.cert_chain_pems), issued.private_key_pem.bytes()
        )

    def caller_files(self, name: str, *alternatives: str, common_name: str = "") -> tuple[Path, Path]:
        """Write a caller's certificate and key. Alternative names with a scheme are URIs, the others DNS names."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = dt.datetime.now(dt.UTC)
        authority = x509.load_pem_x509_certificate(self.pem)
        subject = [x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)] if common_name else []
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name(subject))
            .issuer_name(authority.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _DAY)
            .not_valid_after(now + _DAY)
        )
        if alternatives:
            names = [
                x509.UniformResourceIdentifier(text) if "://" in text else x509.DNSName(text) for text in alternatives
            ]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=not subject)
        signer = serialization.load_pem_private_key(self._ca.private_key_pem.bytes(), None)
        assert isinstance(signer, ec.EllipticCurvePrivateKey)
        pem = builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        plain = serialization.NoEncryption()
        form = serialization.PrivateFormat.PKCS8
        return self._write(name, pem, key.private_bytes(serialization.Encoding.PEM, form, plain))

    def credentials(self, caller: tuple[Path, Path] | None = None) -> grpc.ChannelCredentials:
        """Return channel credentials that trust this authority and present the certificate of `caller`, if given."""
        cert, key = (path.read_bytes() for path in caller) if caller else (None, None)
        return grpc.ssl_channel_credentials(self.pem, key, cert)

    def _write(self, name: str, cert: bytes, key: bytes) -> tuple[Path, Path]:
        paths = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        for path, pem in zip(paths, (cert, key), strict=True):
            replace(path, pem)
        return paths


def replace(path: Path, content: bytes) -> None:
    """Replace a file atomically, by renaming a new one."""
    new = path.with_suffix(".new")
    new.touch(0o600)
    new.write_bytes(content)
    new.replace(path)
