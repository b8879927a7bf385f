"""`dedup-service complete`, `release` and `extend`: what the holder of a claim does with it."""

from collections.abc import Callable
from typing import Annotated, TypeVar

import grpc
import typer

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from dedup_service.cli import exit_codes
from dedup_service.cli.channel import fail, open_channel
from dedup_service.cli.options import (
    AsJson,
    HolderToken,
    Namespace,
    Target,
    Timeout,
    TransactionId,
    duration_option,
    milliseconds_option,
    text_option,
)
from dedup_service.cli.show import as_dict, print_json, print_transaction

Reply = TypeVar(
    "Reply",
    dedup_pb2.CompleteTransactionResponse,
    dedup_pb2.ReleaseTransactionResponse,
    dedup_pb2.ExtendTransactionResponse,
)

# More than one message may carry; how much a result may have is for the server to say.
_MAX_READ = 4 * 1024 * 1024

_ENDED = "its claim expired, was released or was taken by another caller"
_REPEAT = "It may have been done. Repeat the same command: it is safe."
_REPEAT_RELEASE = f"{_REPEAT[:-1]}, and NOT HELD then means that it was done, or that the claim ended otherwise."


def complete(
    transaction_id: TransactionId,
    *,
    token: HolderToken,
    namespace: Namespace = "default",
    result: Annotated[
        str | None, typer.Option(help="What later duplicates are shown.  [default: nothing]", show_default=False)
    ] = None,
    result_file: Annotated[
        typer.FileBinaryRead | None,
        typer.Option(help="A file with that, byte for byte; - is standard input.", metavar="FILE", show_default=False),
    ] = None,
    ttl: Annotated[
        str | None,
        typer.Option(
            help="How long it is remembered as completed, such as 24h.  [default: the server's]", metavar="DURATION"
        ),
    ] = None,
    target: Target = None,
    timeout: Timeout = "5s",
    as_json: AsJson = False,
) -> None:
    """Mark a claimed transaction as completed.

    Exit code 0: completed. 6: the token does not hold it. 2: bad usage. 1: any error.
    """
    request = dedup_pb2.CompleteTransactionRequest(
        transaction_id=text_option("ID", transaction_id),
        namespace=text_option("--namespace", namespace),
        claim_token=text_option("--token", token),
        result=_result(result, result_file),
        ttl=duration_option("ttl", ttl),
    )
    reply = _call(
        lambda stub, timeout_s: stub.CompleteTransaction(request, timeout=timeout_s),
        target,
        timeout,
        as_json=as_json,
        advice=_REPEAT,
    )
    word = dedup_pb2.CompleteOutcome.Name(reply.outcome).removeprefix("COMPLETE_OUTCOME_")
    why = f"{_ENDED}, or it is completed with another result"
    _answer(word, reply, reply.transaction, transaction_id, why=why, as_json=as_json)


def release(
    transaction_id: TransactionId,
    *,
    token: HolderToken,
    namespace: Namespace = "default",
    target: Target = None,
    timeout: Timeout = "5s",
    as_json: AsJson = False,
) -> None:
    """Give a claim back, so that the next caller may claim the transaction at once.

    Exit code 0: released. 6: the token does not hold it. 2: bad usage. 1: any error.
    """
    request = dedup_pb2.ReleaseTransactionRequest(
        transaction_id=text_option("ID", transaction_id),
        namespace=text_option("--namespace", namespace),
        claim_token=text_option("--token", token),
    )
    reply = _call(
        lambda stub, timeout_s: stub.ReleaseTransaction(request, timeout=timeout_s),
        target,
        timeout,
        as_json=as_json,
        advice=_REPEAT_RELEASE,
    )
    word = dedup_pb2.ReleaseOutcome.Name(reply.outcome).removeprefix("RELEASE_OUTCOME_")
    _answer(word, reply, None, transaction_id, why=f"{_ENDED}, or it is completed", as_json=as_json)


def extend(
    transaction_id: TransactionId,
    *,
    token: HolderToken,
    namespace: Namespace = "default",
    ttl: Annotated[
        str | None,
        typer.Option(
            help="How long the claim lives from now on, such as 60s.  [default: the server's]", metavar="DURATION"
        ),
    ] = None,
    allow_shortening: Annotated[
        bool,
        typer.Option(
            "--allow-shortening", help="Let it end earlier than it would now; else a shorter one changes nothing."
        ),
    ] = False,
    target: Target = None,
    timeout: Timeout = "5s",
    as_json: AsJson = False,
) -> None:
    """Move the end of a claim in progress further away.

    Exit code 0: the token still holds it, until the time shown. 6: it does not. 2: bad usage. 1: any error.
    """
    request = dedup_pb2.ExtendTransactionRequest(
        transaction_id=text_option("ID", transaction_id),
        namespace=text_option("--namespace", namespace),
        claim_token=text_option("--token", token),
        ttl=duration_option("ttl", ttl),
        allow_shortening=allow_shortening,
    )
    reply = _call(
        lambda stub, timeout_s: stub.ExtendTransaction(request, timeout=timeout_s),
        target,
        timeout,
        as_json=as_json,
        advice=_REPEAT,
    )
    word = dedup_pb2.ExtendOutcome.Name(reply.outcome).removeprefix("EXTEND_OUTCOME_")
    why = f"{_ENDED}, or it is completed"
    _answer(word, reply, reply.transaction, transaction_id, why=why, as_json=as_json)


def _result(text: str | None, file: typer.FileBinaryRead | None) -> bytes:
    if file is None:
        return (text or "").encode("utf-8", "surrogateescape")
    if text is not None:
        raise typer.BadParameter("say the result with this or with --result", param_hint="--result-file")
    try:
        result: bytes = file.read(_MAX_READ + 1)
    except OSError as error:
        raise typer.BadParameter(f"cannot be read: {error}", param_hint="--result-file") from None
    if len(result) > _MAX_READ:
        raise typer.BadParameter("is larger than 4 MiB: keep it elsewhere and give a key", param_hint="--result-file")
    return result


def _call(
    call: Callable[[dedup_pb2_grpc.DedupServiceStub, float], Reply],
    target: str | None,
    timeout: str,
    *,
    as_json: bool,
    advice: str,
) -> Reply:
    timeout_ms = milliseconds_option("timeout", timeout)
    with open_channel(target) as channel:
        try:
            return call(dedup_pb2_grpc.DedupServiceStub(channel), timeout_ms / 1000)
        except grpc.RpcError as error:
            fail(error, as_json=as_json, advice=advice)


def _answer(
    word: str,
    reply: Reply,
    transaction: dedup_pb2.Transaction | None,
    transaction_id: str,
    *,
    why: str,
    as_json: bool,
) -> None:
    if as_json:
        print_json(as_dict(reply))
    elif word == "NOT_HELD":
        typer.echo(f"NOT HELD: the token does not hold {transaction_id}: {why}. Nothing was changed.")
    elif transaction is None:
        typer.echo(f"{word}: {transaction_id} may be claimed again")
    else:
        print_transaction(word, transaction)
    raise typer.Exit({"NOT_HELD": exit_codes.NOT_HELD, "UNSPECIFIED": exit_codes.ERROR}.get(word, 0))
