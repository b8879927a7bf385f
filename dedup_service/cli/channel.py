"""How the client commands reach a server, and how they say what it refused."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import grpc
import typer
from google.rpc import status_pb2

from dedup.channels import channel_options
from dedup.error_details import failure_of_call, failure_of_status
from dedup_service.cli import exit_codes
from dedup_service.cli.access import Access, present_access
from dedup_service.config.settings import listening_address, target_from_environment

_WILDCARDS = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - read, not bound

# Who looks on or repeats a call learns nothing new from a channel that hurries, and nothing from one that waits longer.
_CHANNEL_OPTIONS = channel_options(
    (
        ("grpc.min_reconnect_backoff_ms", 1_000),
        # A thousand duplicates may each have a result as large as the server allows.
        ("grpc.max_receive_message_length", -1),
    )
)


@contextmanager
def open_channel(target: str | None, default: Callable[[], str] = listening_address) -> Iterator[grpc.Channel]:
    """Yield a channel to `target`, or to where a server with the present settings listens, as `default` finds."""
    address = target or target_from_environment() or default()
    host, colon, port = address.rpartition(":")
    access = present_access.get() or Access()
    with access.channel(f"{_WILDCARDS.get(host, host)}{colon}{port}", _CHANNEL_OPTIONS) as channel:
        yield channel


def error_fields(error: grpc.RpcError) -> dict[str, str]:
    """Return what the commands say of a failed call: code, reason, applied and message."""
    found = failure_of_call(error)
    return failure(found.code.name, found.reason, found.applied, error.details() or "")


def status_fields(status: status_pb2.Status) -> dict[str, str]:
    """Return the same of a google.rpc.Status, such as one entry of a batch carries."""
    found = failure_of_status(status)
    return failure(found.code.name, found.reason, found.applied, status.message)


def failure(code: str, reason: str, applied: str, message: str) -> dict[str, str]:
    """Return the fields of an error, in the order in which they are printed."""
    return {"code": code, "reason": reason, "applied": applied, "message": message}


def fail(error: grpc.RpcError, *, as_json: bool, advice: str = "") -> NoReturn:
    """Say on standard error (as JSON on standard output) what went wrong, and exit with 1.

    `advice` is for people, and said only when the call may have been carried out.
    """
    fields = error_fields(error)
    if as_json:
        typer.echo(json.dumps({"error": fields}))
    else:
        typer.echo(f"{fields['code']}: {fields['message']}", err=True)
        if fields["applied"] != "no" and advice:
            typer.echo(advice, err=True)
    raise typer.Exit(exit_codes.ERROR)
