"""Server credentials that reload the certificate when its files change."""

import threading
from typing import Any

import grpc

from dedup_service.config.errors import FatalError
from dedup_service.config.settings import Settings
from dedup_service.config.tls_files import TlsFiles, UnusableCertificate
from dedup_service.observability.logs import Logger
from dedup_service.server.engines import MakeCredentials


class Certificates:
    """The current certificate of the server; a new version applies to every later connection.

    An unusable version, such as a key that does not belong to the certificate, is logged, and the previous certificate
    stays in use. Raises FatalError without a usable certificate at the start.
    """

    def __init__(self, files: TlsFiles, log: Logger) -> None:
        self._files = files
        self._log = log
        # gRPC calls back on threads of its own.
        self._lock = threading.Lock()
        self._seen = files.stamps()
        try:
            self._configuration = self._read()
        except UnusableCertificate as error:
            raise FatalError(f"TLS cannot be offered: {error}") from None

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials for one listener, which look for a new certificate before every handshake."""
        given = self._configuration

        def newer() -> Any:  # noqa: ANN401 - the stubs do not know that None means "unchanged"
            nonlocal given
            latest = self._latest()
            if latest is given:
                return None
            given = latest
            return latest

        return grpc.dynamic_ssl_server_credentials(
            given, newer, require_client_authentication=self._files.client_ca is not None
        )

    def _latest(self) -> Any:  # noqa: ANN401 - an opaque type of gRPC
        with self._lock:
            stamps = self._files.stamps()
            if stamps != self._seen:
                # Before reading, so that a change during it is read again.
                self._seen = stamps
                try:
                    self._configuration = self._read()
                    self._log.info("tls_reloaded", certificate=str(self._files.cert))
                except UnusableCertificate as error:
                    self._log.error("tls_reload_failed", message=f"{error}; the previous certificate stays in use")
            return self._configuration

    def _read(self) -> Any:  # noqa: ANN401 - as above
        found = self._files.read()
        return grpc.ssl_server_certificate_configuration([(found.key, found.chain)], root_certificates=found.client_ca)


def tls_credentials(settings: Settings, log: Logger) -> MakeCredentials | None:
    """Return the factory of listener credentials, or None for plaintext. Raises FatalError for unusable files."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return Certificates(TlsFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca), log).credentials
