"""`dedup-service claim` and `dedup-service get`."""

import json
import secrets
from datetime import datetime
from typing import Annotated

import grpc
import typer
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from rich.table import Table

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from dedup_service.cli.channel import AsJson, Target, Timeout, duration_option, fail, open_channel

EXIT_DUPLICATE = 3
EXIT_PAYLOAD_MISMATCH = 4
EXIT_NOT_FOUND = 5

TransactionId = Annotated[str, typer.Argument(help="The id of the transaction.", show_default=False)]
Namespace = Annotated[str, typer.Option(help="The namespace of the id.")]

_STATES = {
    dedup_pb2.TRANSACTION_STATE_IN_PROGRESS: "in progress",
    dedup_pb2.TRANSACTION_STATE_COMPLETED: "completed",
}


def claim(
    transaction_id: TransactionId,
    *,
    namespace: Namespace = "default",
    ttl: Annotated[
        str | None,
        typer.Option(help="How long the claim lives, such as 60s.  [default: the server's]", metavar="DURATION"),
    ] = None,
    token: Annotated[
        str | None, typer.Option(help="The token of an earlier attempt, to repeat it.  [default: a new one]")
    ] = None,
    claimant: Annotated[str, typer.Option(help="Who claims, shown to duplicates.")] = "",
    fingerprint: Annotated[
        str, typer.Option(help="What the transaction is about: another one for the same id is a mismatch.")
    ] = "",
    target: Target = None,
    timeout: Timeout = "5s",
    as_json: AsJson = False,
) -> None:
    """Claim a transaction.

    Exit code 0: claimed, go. 3: duplicate. 4: the id is known with another fingerprint. 2: bad usage. 1: any error.
    """
    token = token or secrets.token_urlsafe(16)
    request = dedup_pb2.ClaimTransactionRequest(
        transaction_id=_text("ID", transaction_id),
        namespace=_text("--namespace", namespace),
        claim_token=_text("--token", token),
        claimant=_text("--claimant", claimant),
        payload_fingerprint=fingerprint.encode("utf-8", "surrogateescape"),
    )
    if ttl is not None:
        ttl_ms = duration_option("ttl", ttl)
        request.ttl.CopyFrom(Duration(seconds=ttl_ms // 1000, nanos=ttl_ms % 1000 * 1_000_000))
    timeout_ms = duration_option("timeout", timeout)
    with open_channel(target) as channel:
        try:
            reply = dedup_pb2_grpc.DedupServiceStub(channel).ClaimTransaction(request, timeout=timeout_ms / 1000)
        except grpc.RpcError as error:
            advice = f"The claim may have been made. To find out and to hold it, repeat it with --token={token}"
            fail(error, as_json=as_json, advice=advice)
    claimed = reply.outcome == dedup_pb2.CLAIM_OUTCOME_CLAIMED
    if as_json:
        _print_json(reply)
    else:
        word = dedup_pb2.ClaimOutcome.Name(reply.outcome).removeprefix("CLAIM_OUTCOME_")
        rows = {"token": reply.claim_token} if claimed else {}
        _print_transaction(word + (" (replayed)" if reply.replayed else ""), reply.transaction, rows)
    if not claimed:
        codes = {
            dedup_pb2.CLAIM_OUTCOME_DUPLICATE: EXIT_DUPLICATE,
            dedup_pb2.CLAIM_OUTCOME_PAYLOAD_MISMATCH: EXIT_PAYLOAD_MISMATCH,
        }
        raise typer.Exit(codes.get(reply.outcome, 1))


def get(
    transaction_id: TransactionId,
    *,
    namespace: Namespace = "default",
    target: Target = None,
    timeout: Timeout = "5s",
    as_json: AsJson = False,
) -> None:
    """Show a transaction, and change nothing.

    Exit code 0: found. 5: nobody holds it. 2: bad usage. 1: any error.
    """
    request = dedup_pb2.GetTransactionRequest(
        transaction_id=_text("ID", transaction_id), namespace=_text("--namespace", namespace)
    )
    timeout_ms = duration_option("timeout", timeout)
    with open_channel(target) as channel:
        try:
            reply = dedup_pb2_grpc.DedupServiceStub(channel).GetTransaction(request, timeout=timeout_ms / 1000)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                fail(error, as_json=as_json)
            typer.echo(json.dumps({"transaction": None}) if as_json else f"NOT FOUND: nobody holds {transaction_id}")
            raise typer.Exit(EXIT_NOT_FOUND) from None
    if as_json:
        _print_json(reply)
    else:
        _print_transaction("FOUND", reply.transaction, {})


def _text(where: str, text: str) -> str:
    # A terminal hands bytes that are no UTF-8 over as surrogates, which no message can carry.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise typer.BadParameter("is not valid UTF-8", param_hint=where) from None
    return text


def _print_json(reply: Message) -> None:
    typer.echo(json.dumps(MessageToDict(reply, preserving_proto_field_name=True), ensure_ascii=False))


def _print_transaction(headline: str, transaction: dedup_pb2.Transaction, more: dict[str, str]) -> None:
    rows = {
        "transaction": transaction.transaction_id,
        "namespace": transaction.namespace,
        "state": _STATES.get(transaction.state, "unknown"),
        "claimant": transaction.claimant or "not said",
        "claimed": _when(transaction, "claim_time"),
        "expires": _when(transaction, "expire_time"),
        "completed": _when(transaction, "completion_time"),
        "result": repr(transaction.result)[1:] if transaction.result else "",
        **more,
    }
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        if value:
            table.add_row(f"  {name}", value)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(headline)
    console.print(table)


def _when(transaction: dedup_pb2.Transaction, field: str) -> str:
    if not transaction.HasField(field):
        return "unknown" if field != "completion_time" else ""
    time: Timestamp = getattr(transaction, field)
    local: datetime = time.ToDatetime().astimezone()
    return local.isoformat(sep=" ", timespec="milliseconds")
