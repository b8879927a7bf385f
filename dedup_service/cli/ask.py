"""`dedup-service claim` and `dedup-service get`."""

import secrets
from typing import Annotated

import grpc
import typer

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from dedup_service.cli import exit_codes
from dedup_service.cli.channel import fail, open_channel
from dedup_service.cli.options import (
    AsJson,
    Namespace,
    Target,
    Timeout,
    TransactionId,
    duration_option,
    milliseconds_option,
    text_option,
)
from dedup_service.cli.show import as_dict, print_json, print_transaction

_SHADOW = (
    "The namespace runs in shadow mode: go, but in enforce mode this claim would have been refused. The transaction "
    "is that of its holder, and the token does not hold it."
)
_EXITS = {
    dedup_pb2.CLAIM_OUTCOME_CLAIMED: 0,
    dedup_pb2.CLAIM_OUTCOME_DUPLICATE: exit_codes.DUPLICATE,
    dedup_pb2.CLAIM_OUTCOME_PAYLOAD_MISMATCH: exit_codes.PAYLOAD_MISMATCH,
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
    wait: Annotated[
        str,
        typer.Option(
            help="How long a duplicate waits for the end of the work in progress, on top of --timeout: at most 5m.",
            metavar="DURATION",
        ),
    ] = "0s",
    target: Target = None,
    timeout: Timeout = "5s",
    as_json: AsJson = False,
) -> None:
    """Claim a transaction.

    Exit code 0: claimed, go. 3: duplicate. 4: the id is known with another fingerprint. 2: bad usage. 1: any error.
    """
    token = token or secrets.token_urlsafe(16)
    wait_ms = milliseconds_option("wait", wait)
    request = dedup_pb2.ClaimTransactionRequest(
        transaction_id=text_option("ID", transaction_id),
        namespace=text_option("--namespace", namespace),
        ttl=duration_option("ttl", ttl),
        claim_token=text_option("--token", token),
        claimant=text_option("--claimant", claimant),
        payload_fingerprint=fingerprint.encode("utf-8", "surrogateescape"),
        wait=duration_option("wait", wait) if wait_ms else None,
    )
    deadline_ms = milliseconds_option("timeout", timeout) + wait_ms
    advice = f"The claim may have been made. To find out and to hold it, repeat it with --token={token}"
    with open_channel(target) as channel:
        try:
            reply = dedup_pb2_grpc.DedupServiceStub(channel).ClaimTransaction(request, timeout=deadline_ms / 1000)
        except grpc.RpcError as error:
            fail(error, as_json=as_json, advice=advice)
        except KeyboardInterrupt:
            typer.echo(advice, err=True)
            raise typer.Exit(exit_codes.INTERRUPTED) from None
    if as_json:
        print_json(as_dict(reply))
    else:
        _print_reply(reply)
    raise typer.Exit(_EXITS.get(reply.outcome, exit_codes.ERROR))


def _print_reply(reply: dedup_pb2.ClaimTransactionResponse) -> None:
    word = dedup_pb2.ClaimOutcome.Name(reply.outcome).removeprefix("CLAIM_OUTCOME_")
    notes = [
        note for note, said in (("replayed", reply.replayed), ("shadow duplicate", reply.shadow_duplicate)) if said
    ]
    print_transaction(
        f"{word} ({', '.join(notes)})" if notes else word, reply.transaction, {"token": reply.claim_token}
    )
    if reply.shadow_duplicate:
        typer.echo(_SHADOW)


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
        transaction_id=text_option("ID", transaction_id), namespace=text_option("--namespace", namespace)
    )
    timeout_ms = milliseconds_option("timeout", timeout)
    with open_channel(target) as channel:
        try:
            reply = dedup_pb2_grpc.DedupServiceStub(channel).GetTransaction(request, timeout=timeout_ms / 1000)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                fail(error, as_json=as_json)
            if as_json:
                print_json({"transaction": None})
            else:
                typer.echo(f"NOT FOUND: nobody holds {transaction_id}")
            raise typer.Exit(exit_codes.NOT_FOUND) from None
    if as_json:
        print_json(as_dict(reply))
    else:
        print_transaction("FOUND", reply.transaction)
