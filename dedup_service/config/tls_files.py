"""The listeners' PEM files, read and checked together."""

import os
import ssl
from dataclasses import dataclass
from pathlib import Path

# Tells versions of a file apart, also through the symbolic links of a Kubernetes secret.
Stamp = tuple[int, int, int] | None


class UnusableCertificate(Exception):
    """The files do not form a certificate; the message names the file at fault."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """The files' content, PEM."""

    chain: bytes
    key: bytes
    client_ca: bytes | None


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of a certificate chain, its key, and the authority for client certificates if required."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    def stamps(self) -> tuple[Stamp, ...]:
        """Return a value that changes when a file is replaced."""
        return tuple(_stamp(path) for path in (self.cert, self.key, self.client_ca) if path is not None)

    def read(self) -> Certificate:
        """Return the content if OpenSSL accepts it. Raises UnusableCertificate; gRPC would not name the fault."""
        self._check()
        try:
            return Certificate(
                self.cert.read_bytes(),
                self.key.read_bytes(),
                self.client_ca.read_bytes() if self.client_ca else None,
            )
        except OSError as error:
            raise UnusableCertificate(f"{error.filename} cannot be read: {error.strerror}") from None

    def _check(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        for path in (self.cert, self.key, self.client_ca):
            if path is not None and not os.access(path, os.R_OK):
                raise UnusableCertificate(f"{path} does not exist or cannot be read")
        try:
            # Otherwise OpenSSL asks for the password of an encrypted key on the terminal.
            context.load_cert_chain(self.cert, self.key, password=lambda: "")
        except (ssl.SSLError, ValueError, OSError) as error:
            raise UnusableCertificate(
                f"{self.cert} and {self.key} are not a certificate and its unencrypted key: {error}"
            ) from None
        if self.client_ca is not None:
            try:
                context.load_verify_locations(self.client_ca)
            except (ssl.SSLError, ValueError, OSError) as error:
                raise UnusableCertificate(f"{self.client_ca} is not the certificate of an authority: {error}") from None


def _stamp(path: Path) -> Stamp:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
