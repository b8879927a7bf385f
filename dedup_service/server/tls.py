"""TLS: the certificate, key and client authority of the settings, read anew when their files change."""

import os
import ssl
import threading
from pathlib import Path
from typing import Any

import grpc

from dedup_service.server.engines import MakeCredentials
from dedup_service.server.listeners import StartRefused
from dedup_service.config.settings import Settings

# What tells one version of a file from another, also where links lead to it as in a Kubernetes secret.
_Stamp = tuple[int, int, int] | None


class _Unusable(Exception):
    """The files make no certificate; the message is a sentence that names the one at fault."""


class Certificates:
    """What the server shows its callers, and whom it believes; a new version counts for every later connection.

    One that is not usable, such as a key that is not that of the certificate, changes nothing, and the log says why.
    Raises StartRefused when there is none to begin with.
    """

    def __init__(self, cert: Path, key: Path, client_ca: Path | None, log: Any) -> None:  # noqa: ANN401 - as logger()
        self._cert, self._key, self._client_ca = cert, key, client_ca
        self._log = log
        # gRPC asks on threads of its own.
        self._lock = threading.Lock()
        self._seen = self._stamps()
        try:
            self._configuration = self._read()
        except _Unusable as error:
            raise StartRefused(f"TLS cannot be offered: {error}") from None

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials for one address, which asks before every handshake whether there is something new."""
        given = self._configuration

        def newer() -> Any:  # noqa: ANN401 - the stubs do not know that None says "as before"
            nonlocal given
            latest = self._latest()
            if latest is given:
                return None
            given = latest
            return latest

        return grpc.dynamic_ssl_server_credentials(
            given, newer, require_client_authentication=self._client_ca is not None
        )

    def _latest(self) -> Any:  # noqa: ANN401 - an opaque type of gRPC
        with self._lock:
            stamps = self._stamps()
            if stamps != self._seen:
                # Before the reading, so that what changes during it is read once more.
                self._seen = stamps
                try:
                    self._configuration = self._read()
                    self._log.info("tls_reloaded", certificate=str(self._cert))
                except _Unusable as error:
                    self._log.error("tls_reload_failed", message=f"{error}; the certificate of before stays in use")
            return self._configuration

    def _read(self) -> Any:  # noqa: ANN401 - as above
        self._check()
        try:
            pair = (self._key.read_bytes(), self._cert.read_bytes())
            client_ca = self._client_ca.read_bytes() if self._client_ca else None
        except OSError as error:
            raise _Unusable(f"{error.filename} cannot be read: {error.strerror}") from None
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=client_ca)

    def _check(self) -> None:
        # gRPC would say nothing of what is wrong, and serve nobody.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        for path in (self._cert, self._key, self._client_ca):
            if path is not None and not os.access(path, os.R_OK):
                raise _Unusable(f"{path} does not exist or cannot be read")
        try:
            # Without the password OpenSSL would ask for that of an encrypted key on the terminal.
            context.load_cert_chain(self._cert, self._key, password=lambda: "")
        except (ssl.SSLError, ValueError, OSError) as error:
            raise _Unusable(
                f"{self._cert} and {self._key} are no certificate with its unencrypted key: {error}"
            ) from None
        if self._client_ca is not None:
            try:
                context.load_verify_locations(self._client_ca)
            except (ssl.SSLError, ValueError, OSError) as error:
                raise _Unusable(f"{self._client_ca} has no certificate of an authority: {error}") from None

    def _stamps(self) -> tuple[_Stamp, ...]:
        return tuple(_stamp(path) for path in (self._cert, self._key, self._client_ca) if path is not None)


def tls_credentials(settings: Settings, log: Any) -> MakeCredentials | None:  # noqa: ANN401 - as logger()
    """Return what makes the credentials of each address, or None where the settings want plaintext.

    Raises StartRefused when the files of the settings are not usable.
    """
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return Certificates(settings.tls_cert, settings.tls_key, settings.tls_client_ca, log).credentials


def _stamp(path: Path) -> _Stamp:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
