"""The arguments and options that several client commands take, and what they may contain."""

from typing import Annotated

import typer
from google.protobuf.duration_pb2 import Duration

from dedup_service.config.durations import UNITS_MS, parse_duration
from dedup_service.config.settings import TARGET_VARIABLE

TransactionId = Annotated[str, typer.Argument(help="The id of the transaction.", metavar="ID", show_default=False)]
Namespace = Annotated[str, typer.Option(help="The namespace of the id.")]
HolderToken = Annotated[str, typer.Option("--token", help="The token that the claim returned.", show_default=False)]
Target = Annotated[
    str | None,
    typer.Option(
        help="The server to call: host:port or unix:///path.  "
        f"[env: {TARGET_VARIABLE}] [default: where the settings make `serve` listen]",
        show_default=False,
    ),
]
Timeout = Annotated[str, typer.Option(help="How long to wait for the answer, such as 500ms or 5s.", metavar="DURATION")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text, for errors as well.")]

# Longer than anything here lives, and short enough for every clock and message that it is put into.
_MAX_DURATION = "36500d"
_MAX_DURATION_MS = 36_500 * UNITS_MS["d"]


def milliseconds_option(name: str, text: str) -> int:
    """Return the milliseconds of a duration flag, or end with a usage error that names it."""
    try:
        milliseconds = parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=f"--{name}") from None
    if milliseconds > _MAX_DURATION_MS:
        raise typer.BadParameter(f"{text!r} is longer than {_MAX_DURATION}", param_hint=f"--{name}")
    return milliseconds


def positive_milliseconds_option(name: str, text: str) -> int:
    """Return the milliseconds of a duration flag, or end with a usage error that names it, for 0 as well."""
    milliseconds = milliseconds_option(name, text)
    if not milliseconds:
        raise typer.BadParameter(f"{text!r} is no time at all: write at least 1ms", param_hint=f"--{name}")
    return milliseconds


def duration_option(name: str, text: str | None) -> Duration | None:
    """Return a duration flag as the field of a message, None when it was not given, or end with a usage error."""
    if text is None:
        return None
    duration = Duration()
    duration.FromMilliseconds(milliseconds_option(name, text))
    return duration


def text_option(where: str, text: str) -> str:
    """Return `text`, or end with a usage error that names `where` when no message can carry it."""
    # A terminal hands bytes that are no UTF-8 over as surrogates.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise typer.BadParameter("is not valid UTF-8", param_hint=where) from None
    return text
