"""How the client commands print a transaction and a reply."""

import json
from collections.abc import Mapping
from datetime import datetime

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from dedup.v1 import dedup_pb2

_STATES = {
    dedup_pb2.TRANSACTION_STATE_IN_PROGRESS: "in progress",
    dedup_pb2.TRANSACTION_STATE_COMPLETED: "completed",
}


def as_dict(message: Message) -> dict[str, object]:
    """Return a message as JSON has it, with the names of the contract."""
    return MessageToDict(message, preserving_proto_field_name=True)


def print_json(fields: Mapping[str, object]) -> None:
    """Print one object on one line."""
    typer.echo(json.dumps(fields, ensure_ascii=False))


def print_transaction(headline: str, transaction: dedup_pb2.Transaction, more: dict[str, str] | None = None) -> None:
    """Print a headline, and below it what is known of a transaction."""
    print_table(headline, transaction_rows(transaction) | (more or {}))


def print_table(headline: str, rows: dict[str, str]) -> None:
    """Print a headline, and below it the rows that have a value; long values are neither cut nor broken."""
    typer.echo(headline)
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        if value:
            typer.echo(f"  {name:<{width}}  {value}")


def transaction_rows(transaction: dedup_pb2.Transaction) -> dict[str, str]:
    """Return what is known of a transaction, in the words of people; empty where there is nothing to say."""
    return {
        "transaction": transaction.transaction_id,
        "namespace": transaction.namespace,
        "state": state_word(transaction),
        "claimant": transaction.claimant or "not said",
        "claimed": when(transaction, "claim_time") or "unknown",
        "expires": when(transaction, "expire_time") or "unknown",
        "completed": when(transaction, "completion_time"),
        "result": repr(transaction.result)[1:] if transaction.result else "",
    }


def state_word(transaction: dedup_pb2.Transaction) -> str:
    """Return the state of a transaction in words."""
    return _STATES.get(transaction.state, "unknown")


def when(transaction: dedup_pb2.Transaction, field: str) -> str:
    """Return a time of a transaction in the zone of this host, or nothing when it is not set."""
    if not transaction.HasField(field):
        return ""
    time: Timestamp = getattr(transaction, field)
    local: datetime = time.ToDatetime().astimezone()
    return local.isoformat(sep=" ", timespec="milliseconds")
