"""How the client commands reach a server, and how they say what it refused."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import grpc
import typer
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from dedup_service.cli import exit_codes
from dedup_service.settings import listening_address, target_from_environment

_WILDCARDS = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - read, not bound

_CHANNEL_OPTIONS = [
    # By default a channel waits up to two minutes before it tries a server again that was away, and who looks on or
    # repeats a call learns nothing new in the meantime.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # A thousand duplicates with their results are more than the 4 MB of the default.
    ("grpc.max_receive_message_length", -1),
]
_CODE_NAMES: dict[int, str] = {code.value[0]: code.name for code in grpc.StatusCode}


@contextmanager
def open_channel(target: str | None) -> Iterator[grpc.Channel]:
    """Yield a channel to `target`, or to where a server with the present settings listens."""
    address = target or target_from_environment() or listening_address()
    host, colon, port = address.rpartition(":")
    with grpc.insecure_channel(f"{_WILDCARDS.get(host, host)}{colon}{port}", options=_CHANNEL_OPTIONS) as channel:
        yield channel


def error_fields(error: grpc.RpcError) -> dict[str, str]:
    """Return what the commands say of a failed call: code, reason, applied and message."""
    status = rpc_status.from_call(error)
    if status is not None:
        return status_fields(status)
    return failure(error.code().name, "", "unknown", error.details() or "")


def status_fields(status: Any) -> dict[str, str]:  # noqa: ANN401 - google.rpc has no types
    """Return the same of a google.rpc.Status, such as one entry of a batch carries."""
    info = error_details_pb2.ErrorInfo()
    if not any(detail.Unpack(info) for detail in status.details):
        info.Clear()
    # Without the details of this service nobody knows how far the call came.
    applied = info.metadata.get("applied", "unknown")
    return failure(_CODE_NAMES.get(status.code, "UNKNOWN"), info.reason, applied, status.message)


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
