"""Connections of the client commands: address, TLS and credentials."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import typer

from dedup.channels import channel_options
from dedup_service.config.settings import (
    TARGET_TLS_CA_VARIABLE,
    TARGET_TLS_CERT_VARIABLE,
    TARGET_TLS_KEY_VARIABLE,
    TARGET_TOKEN_FILE_VARIABLE,
    file_from_environment,
    listening_address,
    target_from_environment,
)

_TOKEN = re.compile(r"[\x21-\x7e]+")
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - Replaced, never bound.
_CHANNEL_OPTIONS = channel_options(
    (
        # With the client's maximum of 1 s: `watch` and `batch` reconnect once a second in an outage.
        ("grpc.min_reconnect_backoff_ms", 1_000),
        # Each of a thousand duplicates may carry the largest result.
        ("grpc.max_receive_message_length", -1),
    )
)


@dataclass(frozen=True, slots=True)
class Server:
    """Flags for the server and its credentials. The environment decides where a flag is None."""

    target: str | None
    tls_ca: Path | None
    tls_cert: Path | None
    tls_key: Path | None
    token_file: Path | None

    @contextmanager
    def connect(self, default_address: Callable[[], str] = listening_address) -> Iterator[grpc.Channel]:
        """Yield a channel. Raises a usage error that names the flag of an unusable file.

        `default_address` is used without a target in the flags or the environment.
        """
        address = self.target or target_from_environment() or default_address()
        host, colon, port = address.rpartition(":")
        token_file = self.token_file or file_from_environment(TARGET_TOKEN_FILE_VARIABLE)
        token = _read_token(token_file) if token_file else None
        with self._channel(f"{_WILDCARDS.get(host, host)}{colon}{port}") as channel:
            yield grpc.intercept_channel(channel, _BearerToken(token)) if token else channel

    def _channel(self, address: str) -> grpc.Channel:
        ca = self.tls_ca or file_from_environment(TARGET_TLS_CA_VARIABLE)
        cert = self.tls_cert or file_from_environment(TARGET_TLS_CERT_VARIABLE)
        key = self.tls_key or file_from_environment(TARGET_TLS_KEY_VARIABLE)
        if (cert is None) != (key is None):
            raise typer.BadParameter("a client certificate needs both", param_hint="--tls-cert, --tls-key")
        if ca is None:
            if cert is not None:
                raise typer.BadParameter(
                    "is missing: a client certificate is sent over TLS only", param_hint="--tls-ca"
                )
            return grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        credentials = grpc.ssl_channel_credentials(
            _read("--tls-ca", ca),
            _read("--tls-key", key) if key else None,
            _read("--tls-cert", cert) if cert else None,
        )
        options = list(_CHANNEL_OPTIONS)
        if address.startswith("unix:"):
            # A certificate cannot name a socket path.
            options.append(("grpc.ssl_target_name_override", "localhost"))
        return grpc.secure_channel(address, credentials, options=options)


class _BearerToken(grpc.UnaryUnaryClientInterceptor):
    """Adds the token to every call. gRPC's call credentials refuse connections without TLS."""

    def __init__(self, token: str) -> None:
        self._header = ("authorization", f"Bearer {token}")

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:  # noqa: ANN401 - gRPC's types.
        return continuation(_CallDetails(details, (*(details.metadata or ()), self._header)), request)


class _CallDetails(grpc.ClientCallDetails):
    def __init__(self, details: Any, metadata: tuple[tuple[str, str | bytes], ...]) -> None:  # noqa: ANN401 - gRPC's type.
        self.method, self.timeout, self.credentials = details.method, details.timeout, details.credentials
        self.wait_for_ready, self.compression = details.wait_for_ready, details.compression
        self.metadata = metadata


def _read(flag: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be read: {error.strerror}", param_hint=flag) from None


def _read_token(path: Path) -> str:
    token = _read("--token-file", path).decode("ascii", "replace").strip()
    if not _TOKEN.fullmatch(token):
        raise typer.BadParameter(
            f"{path} does not contain a token: write one line of visible ASCII characters", param_hint="--token-file"
        )
    return token
