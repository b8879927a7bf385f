"""Output and exit codes of the client commands."""

import json
from collections.abc import Mapping
from datetime import datetime
from enum import IntEnum
from typing import NoReturn

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from dedup.errors import CallFailed
from dedup.v1 import dedup_pb2


class ExitCode(IntEnum):
    """Exit codes of the client commands. ERROR is any error without its own code; invalid usage is 2."""

    ERROR = 1
    DUPLICATE = 3
    PAYLOAD_MISMATCH = 4
    NOT_FOUND = 5
    NOT_HELD = 6
    # The doctor's worst finding.
    FOUND_WARNING = 7
    FOUND_CRITICAL = 8
    # The code of a shell for SIGINT.
    INTERRUPTED = 130


_STATES = {
    dedup_pb2.TRANSACTION_STATE_IN_PROGRESS: "in progress",
    dedup_pb2.TRANSACTION_STATE_COMPLETED: "completed",
}


def as_dict(message: Message) -> dict[str, object]:
    """Return the JSON form of a message, with the contract's field names."""
    return MessageToDict(message, preserving_proto_field_name=True)


def print_json(fields: Mapping[str, object]) -> None:
    """Print one object on one line."""
    typer.echo(json.dumps(fields, ensure_ascii=False))


def print_table(headline: str, rows: Mapping[str, str]) -> None:
    """Print a headline and the rows with a value, neither cut nor wrapped."""
    typer.echo(headline)
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        if value:
            typer.echo(f"  {name:<{width}}  {value}")


def print_transaction(headline: str, transaction: dedup_pb2.Transaction, more: Mapping[str, str] | None = None) -> None:
    """Print a headline, the fields of a transaction, and the rows of `more`."""
    rows = {
        "transaction": transaction.transaction_id,
        "namespace": transaction.namespace,
        "state": state_word(transaction),
        "claimant": claimant_word(transaction),
        "claimed": local_time(transaction, "claim_time") or "unknown",
        "expires": local_time(transaction, "expire_time") or "unknown",
        "completed": local_time(transaction, "completion_time"),
        "result": repr(transaction.result)[1:] if transaction.result else "",
    }
    print_table(headline, rows | dict(more or {}))


def state_word(transaction: dedup_pb2.Transaction) -> str:
    """Return the state of a transaction in words."""
    return _STATES.get(transaction.state, "unknown")


def claimant_word(transaction: dedup_pb2.Transaction) -> str:
    """Return the claimant of a transaction, or that it has none."""
    return transaction.claimant or "not given"


def local_time(transaction: dedup_pb2.Transaction, field: str) -> str:
    """Return a time of a transaction in the local time zone, or "" if unset."""
    if not transaction.HasField(field):
        return ""
    time: Timestamp = getattr(transaction, field)
    local: datetime = time.ToDatetime().astimezone()
    return local.isoformat(sep=" ", timespec="milliseconds")


def error_fields(failure: CallFailed) -> dict[str, str]:
    """Return the printed fields of a failed call."""
    return make_error(failure.code.name, failure.reason, failure.applied, failure.message)


def make_error(code: str, reason: str, applied: str, message: str) -> dict[str, str]:
    """Return the fields of an error in printing order."""
    return {"code": code, "reason": reason, "applied": applied, "message": message}


def fail(failure: CallFailed, *, as_json: bool, advice: str = "") -> NoReturn:
    """Print an error on standard error, or as JSON on standard output, and exit with 1.

    The text form adds `advice` if the call may have been applied.
    """
    fields = error_fields(failure)
    if as_json:
        print_json({"error": fields})
    else:
        typer.echo(f"{fields['code']}: {fields['message']}", err=True)
        if fields["applied"] != "no" and advice:
            typer.echo(advice, err=True)
    raise typer.Exit(ExitCode.ERROR)
