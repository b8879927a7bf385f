"""Arguments and options shared by client commands, and checks of their values."""

from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf.duration_pb2 import Duration

from dedup_service.config.durations import parse_duration
from dedup_service.config.settings import (
    CONFIG_VARIABLE,
    TARGET_TLS_CA_VARIABLE,
    TARGET_TLS_CERT_VARIABLE,
    TARGET_TLS_KEY_VARIABLE,
    TARGET_TOKEN_FILE_VARIABLE,
    TARGET_VARIABLE,
)


def _file_option(text: str, variable: str) -> Any:  # noqa: ANN401 - The type of typer's options is private.
    return typer.Option(help=f"{text}  [env: {variable}]", metavar="FILE", show_default=False)


TransactionId = Annotated[str, typer.Argument(help="Transaction id.", metavar="ID", show_default=False)]
Namespace = Annotated[str, typer.Option(help="Namespace of the transaction id.")]
HolderToken = Annotated[str, typer.Option("--token", help="Token returned by the claim.", show_default=False)]
Timeout = Annotated[str, typer.Option(help="Timeout of the call, such as 500ms or 5s.", metavar="DURATION")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text, also for errors.")]
ConfigFile = Annotated[
    Path | None, typer.Option(help=f"TOML file of settings.  [env: {CONFIG_VARIABLE}]", show_default=False)
]

Target = Annotated[
    str | None,
    typer.Option(
        help="Server to call: host:port or unix:///path.  "
        f"[env: {TARGET_VARIABLE}] [default: the address `serve` listens on with these settings]",
        show_default=False,
    ),
]
TlsCa = Annotated[
    Path | None,
    _file_option("PEM file of authorities: use TLS, and verify the server against them.", TARGET_TLS_CA_VARIABLE),
]
TlsCert = Annotated[Path | None, _file_option("PEM file with the client certificate.", TARGET_TLS_CERT_VARIABLE)]
TlsKey = Annotated[
    Path | None, _file_option("PEM file with the key of the client certificate.", TARGET_TLS_KEY_VARIABLE)
]
TokenFile = Annotated[Path | None, _file_option("File with the bearer token to send.", TARGET_TOKEN_FILE_VARIABLE)]


def milliseconds_option(name: str, text: str) -> int:
    """Return the milliseconds of a duration flag. Raises a usage error that names the flag."""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=f"--{name}") from None


def positive_milliseconds_option(name: str, text: str) -> int:
    """Return the milliseconds of a flag above 0. Raises a usage error that names the flag."""
    milliseconds = milliseconds_option(name, text)
    if not milliseconds:
        raise typer.BadParameter(f"{text!r} is too short: write at least 1ms", param_hint=f"--{name}")
    return milliseconds


def duration_option(name: str, text: str | None) -> Duration | None:
    """Return a duration flag as a message field, None if absent. Raises a usage error that names the flag."""
    if text is None:
        return None
    duration = Duration()
    duration.FromMilliseconds(milliseconds_option(name, text))
    return duration


def text_option(where: str, text: str) -> str:
    """Return `text`. Raises a usage error that names `where` if no message can carry it."""
    # Python decodes invalid UTF-8 in arguments to surrogates.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise typer.BadParameter("is not valid UTF-8", param_hint=where) from None
    return text
