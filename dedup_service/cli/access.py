"""How the client commands show a secured server who they are: TLS, a client certificate, a bearer token from a file."""

import inspect
import re
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer

from dedup_service.config.settings import (
    TARGET_TLS_CA_VARIABLE,
    TARGET_TLS_CERT_VARIABLE,
    TARGET_TLS_KEY_VARIABLE,
    TARGET_TOKEN_FILE_VARIABLE,
    file_from_environment,
)

_TOKEN = re.compile(r"[\x21-\x7e]+")

Command = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Access:
    """The files of one command; None is what neither its flags nor the environment name."""

    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    token_file: Path | None = None

    def channel(self, address: str, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
        """Return a channel to `address`, or end with a usage error that names the file at fault."""
        if (self.tls_cert is None) != (self.tls_key is None):
            raise typer.BadParameter("a client certificate needs both", param_hint="--tls-cert, --tls-key")
        if self.tls_ca is not None:
            credentials = grpc.ssl_channel_credentials(
                _read("--tls-ca", self.tls_ca), _read("--tls-key", self.tls_key), _read("--tls-cert", self.tls_cert)
            )
            if address.startswith("unix:"):
                # No authority vouches for a path.
                options = (*options, ("grpc.ssl_target_name_override", "localhost"))
            channel = grpc.secure_channel(address, credentials, options=options)
        elif self.tls_cert is not None:
            raise typer.BadParameter("is needed too: a client certificate is shown over TLS", param_hint="--tls-ca")
        else:
            channel = grpc.insecure_channel(address, options=options)
        if self.token_file is None:
            return channel
        token = (_read("--token-file", self.token_file) or b"").decode("ascii", "replace").strip()
        if not _TOKEN.fullmatch(token):
            raise typer.BadParameter("holds no token: write one line of visible ASCII", param_hint="--token-file")
        return grpc.intercept_channel(channel, _WithToken(token))


present_access: ContextVar[Access | None] = ContextVar("present_access", default=None)
"""The access of the command that runs."""


def with_access(command: Command) -> Command:
    """Return the command with the options of this module, which it reads by way of `present_access`."""

    @wraps(command)
    def run(*args: Any, **values: Any) -> None:  # noqa: ANN401 - whatever the command takes
        files = {name: values.pop(name) or file_from_environment(variable) for name, variable in _VARIABLES.items()}
        present_access.set(Access(**files))
        command(*args, **values)

    signature = inspect.signature(command)
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in _OPTIONS.items()
    ]
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *extra])  # type: ignore[attr-defined]
    run.__annotations__ = {**command.__annotations__, **_OPTIONS}
    return run


class _WithToken(grpc.UnaryUnaryClientInterceptor):
    """Sends the token with every call, also over a loopback without TLS, where gRPC's own credentials do not."""

    def __init__(self, token: str) -> None:
        self._header = ("authorization", f"Bearer {token}")

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:  # noqa: ANN401 - gRPC's
        return continuation(_Details(details, (*(details.metadata or ()), self._header)), request)


class _Details(grpc.ClientCallDetails):
    def __init__(self, details: Any, metadata: tuple[tuple[str, str | bytes], ...]) -> None:  # noqa: ANN401 - gRPC's
        self.method, self.timeout, self.credentials = details.method, details.timeout, details.credentials
        self.wait_for_ready, self.compression = details.wait_for_ready, details.compression
        self.metadata = metadata


def _read(flag: str, path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be read: {error.strerror}", param_hint=flag) from None


def _option(text: str, variable: str) -> Any:  # noqa: ANN401 - as typer has it
    return Annotated[Path | None, typer.Option(help=f"{text}  [env: {variable}]", metavar="FILE", show_default=False)]


_VARIABLES = {
    "tls_ca": TARGET_TLS_CA_VARIABLE,
    "tls_cert": TARGET_TLS_CERT_VARIABLE,
    "tls_key": TARGET_TLS_KEY_VARIABLE,
    "token_file": TARGET_TOKEN_FILE_VARIABLE,
}
_OPTIONS = {
    "tls_ca": _option("Speak TLS, to a server that an authority of this PEM file vouches for.", TARGET_TLS_CA_VARIABLE),
    "tls_cert": _option("The client certificate to show, PEM.", TARGET_TLS_CERT_VARIABLE),
    "tls_key": _option("Its key, PEM.", TARGET_TLS_KEY_VARIABLE),
    "token_file": _option("A file with the bearer token to send.", TARGET_TOKEN_FILE_VARIABLE),
}
