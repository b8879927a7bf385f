"""How the client commands reach a server, and how they say what it refused."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import grpc
import typer
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from dedup_service.durations import parse_duration
from dedup_service.settings import TARGET_VARIABLE, listening_address, target_from_environment

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

_WILDCARDS = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - read, not bound


def duration_option(name: str, text: str) -> int:
    """Return the milliseconds of a duration flag, or end with a usage error that names it."""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=f"--{name}") from None


@contextmanager
def open_channel(target: str | None) -> Iterator[grpc.Channel]:
    """Yield a channel to `target`, or to where a server with the present settings listens."""
    address = target or target_from_environment() or listening_address()
    host, colon, port = address.rpartition(":")
    with grpc.insecure_channel(f"{_WILDCARDS.get(host, host)}{colon}{port}") as channel:
        yield channel


def fail(error: grpc.RpcError, *, as_json: bool, advice: str = "") -> NoReturn:
    """Say on standard error (as JSON on standard output) what went wrong, and exit with 1."""
    code, message = error.code(), error.details() or ""
    info = _error_info(error)
    # Without the details of this service nobody knows how far the call came.
    applied = info.metadata.get("applied", "unknown") if info else "unknown"
    if as_json:
        fields = {"code": code.name, "reason": info.reason if info else "", "applied": applied, "message": message}
        typer.echo(json.dumps({"error": fields}))
    else:
        typer.echo(f"{code.name}: {message}", err=True)
        if applied != "no" and advice:
            typer.echo(advice, err=True)
    raise typer.Exit(1)


def _error_info(error: grpc.RpcError) -> error_details_pb2.ErrorInfo | None:
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return info
    return None
