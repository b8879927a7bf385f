"""`dedup-service claim`, `get`, `complete`, `release` and `extend`: one call for one transaction."""

import secrets
from collections.abc import Callable
from typing import Annotated, TypeVar

import grpc
import typer

from dedup.error_details import failure_of_call
from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from dedup_service.cli.connection import Server
from dedup_service.cli.options import (
    AsJson,
    HolderToken,
    Namespace,
    Target,
    Timeout,
    TlsCa,
    TlsCert,
    TlsKey,
    TokenFile,
    TransactionId,
    duration_option,
    milliseconds_option,
    text_option,
)
from dedup_service.cli.output import ExitCode, as_dict, fail, print_json, print_transaction

_Reply = TypeVar("_Reply")
_HolderReply = (
    dedup_pb2.CompleteTransactionResponse | dedup_pb2.ReleaseTransactionResponse | dedup_pb2.ExtendTransactionResponse
)

# The largest gRPC message. The server's limit for results is lower.
_MAX_RESULT_FILE_BYTES = 4 * 1024 * 1024

_CLAIM_EXITS = {
    dedup_pb2.CLAIM_OUTCOME_CLAIMED: 0,
    dedup_pb2.CLAIM_OUTCOME_DUPLICATE: ExitCode.DUPLICATE,
    dedup_pb2.CLAIM_OUTCOME_PAYLOAD_MISMATCH: ExitCode.PAYLOAD_MISMATCH,
}
_SHADOW = (
    "The namespace is in shadow mode: do the work, but enforce mode would have refused this claim. The transaction "
    "shown is that of its holder, and this token does not hold it."
)
_REPEAT = "The change may have been made. Repeat the same command: it is safe."
_REPEAT_RELEASE = (
    "The change may have been made. Repeat the same command: it is safe, and NOT HELD then means that the claim was "
    "released or had already ended."
)
_ENDED = "its claim expired, was released or was taken by another caller"


def claim(
    transaction_id: TransactionId,
    *,
    namespace: Namespace = "default",
    ttl: Annotated[
        str | None, typer.Option(help="Lease of the claim, such as 60s.  [default: the server's]", metavar="DURATION")
    ] = None,
    token: Annotated[
        str | None, typer.Option(help="Token of an earlier attempt, to repeat that attempt.  [default: a new token]")
    ] = None,
    claimant: Annotated[str, typer.Option(help="Name of the claimant, shown to duplicates.")] = "",
    fingerprint: Annotated[
        str, typer.Option(help="Fingerprint of the work: a claim of the same id with another one is a mismatch.")
    ] = "",
    wait: Annotated[
        str,
        typer.Option(
            help="How long a duplicate waits for the work in progress to end, in addition to --timeout; at most 5m.",
            metavar="DURATION",
        ),
    ] = "0s",
    target: Target = None,
    timeout: Timeout = "5s",
    as_json: AsJson = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
) -> None:
    """Claim a transaction.

    Exit code 0: claimed, do the work. 3: duplicate. 4: the id is claimed with another fingerprint. 2: invalid usage.
    1: any other error.
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
    reply = _call(
        Server(target, tls_ca, tls_cert, tls_key, token_file),
        lambda stub, timeout_s: stub.ClaimTransaction(request, timeout=timeout_s),
        milliseconds_option("timeout", timeout) + wait_ms,
        as_json=as_json,
        advice=f"The claim may have been made. To find out and to hold it, repeat it with --token={token}",
    )
    if as_json:
        print_json(as_dict(reply))
    else:
        _print_claim(reply)
    raise typer.Exit(_CLAIM_EXITS.get(reply.outcome, ExitCode.ERROR))


def get(
    transaction_id: TransactionId,
    *,
    namespace: Namespace = "default",
    target: Target = None,
    timeout: Timeout = "5s",
    as_json: AsJson = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
) -> None:
    """Show a transaction without changing it.

    Exit code 0: found. 5: the transaction is not claimed. 2: invalid usage. 1: any other error.
    """
    request = dedup_pb2.GetTransactionRequest(
        transaction_id=text_option("ID", transaction_id), namespace=text_option("--namespace", namespace)
    )
    reply = _call(
        Server(target, tls_ca, tls_cert, tls_key, token_file),
        lambda stub, timeout_s: _found(stub, request, timeout_s),
        milliseconds_option("timeout", timeout),
        as_json=as_json,
    )
    if as_json:
        print_json({"transaction": None} if reply is None else as_dict(reply))
    elif reply is None:
        typer.echo(f"NOT FOUND: {transaction_id} is not claimed")
    else:
        print_transaction("FOUND", reply.transaction)
    raise typer.Exit(ExitCode.NOT_FOUND if reply is None else 0)


def complete(
    transaction_id: TransactionId,
    *,
    token: HolderToken,
    namespace: Namespace = "default",
    result: Annotated[
        str | None, typer.Option(help="Result that later duplicates receive.  [default: none]", show_default=False)
    ] = None,
    result_file: Annotated[
        typer.FileBinaryRead | None,
        typer.Option(
            help="File with the result, sent byte for byte; - is standard input.", metavar="FILE", show_default=False
        ),
    ] = None,
    ttl: Annotated[
        str | None,
        typer.Option(
            help="Retention of the completed transaction, such as 24h.  [default: the server's]", metavar="DURATION"
        ),
    ] = None,
    target: Target = None,
    timeout: Timeout = "5s",
    as_json: AsJson = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
) -> None:
    """Mark a claimed transaction as completed.

    Exit code 0: completed. 6: the token does not hold the transaction. 2: invalid usage. 1: any other error.
    """
    request = dedup_pb2.CompleteTransactionRequest(
        transaction_id=text_option("ID", transaction_id),
        namespace=text_option("--namespace", namespace),
        claim_token=text_option("--token", token),
        result=_result(result, result_file),
        ttl=duration_option("ttl", ttl),
    )
    reply = _call(
        Server(target, tls_ca, tls_cert, tls_key, token_file),
        lambda stub, timeout_s: stub.CompleteTransaction(request, timeout=timeout_s),
        milliseconds_option("timeout", timeout),
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
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
) -> None:
    """Release a claim, so that the next caller can claim the transaction at once.

    Exit code 0: released. 6: the token does not hold the transaction. 2: invalid usage. 1: any other error.
    """
    request = dedup_pb2.ReleaseTransactionRequest(
        transaction_id=text_option("ID", transaction_id),
        namespace=text_option("--namespace", namespace),
        claim_token=text_option("--token", token),
    )
    reply = _call(
        Server(target, tls_ca, tls_cert, tls_key, token_file),
        lambda stub, timeout_s: stub.ReleaseTransaction(request, timeout=timeout_s),
        milliseconds_option("timeout", timeout),
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
        typer.Option(help="New lease from now on, such as 60s.  [default: the server's]", metavar="DURATION"),
    ] = None,
    allow_shortening: Annotated[
        bool,
        typer.Option("--allow-shortening", help="Allow an earlier end; otherwise a shorter lease changes nothing."),
    ] = False,
    target: Target = None,
    timeout: Timeout = "5s",
    as_json: AsJson = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
) -> None:
    """Extend the lease of a claim in progress.

    Exit code 0: the token holds the transaction until the time shown. 6: it does not hold it. 2: invalid usage. 1: any
    other error.
    """
    request = dedup_pb2.ExtendTransactionRequest(
        transaction_id=text_option("ID", transaction_id),
        namespace=text_option("--namespace", namespace),
        claim_token=text_option("--token", token),
        ttl=duration_option("ttl", ttl),
        allow_shortening=allow_shortening,
    )
    reply = _call(
        Server(target, tls_ca, tls_cert, tls_key, token_file),
        lambda stub, timeout_s: stub.ExtendTransaction(request, timeout=timeout_s),
        milliseconds_option("timeout", timeout),
        as_json=as_json,
        advice=_REPEAT,
    )
    word = dedup_pb2.ExtendOutcome.Name(reply.outcome).removeprefix("EXTEND_OUTCOME_")
    why = f"{_ENDED}, or it is completed"
    _answer(word, reply, reply.transaction, transaction_id, why=why, as_json=as_json)


def _call(
    server: Server,
    call: Callable[[dedup_pb2_grpc.DedupServiceStub, float], _Reply],
    timeout_ms: int,
    *,
    as_json: bool,
    advice: str = "",
) -> _Reply:
    """Return the reply, or exit with the error. Prints `advice` if the call may have been applied."""
    with server.connect() as channel:
        try:
            return call(dedup_pb2_grpc.DedupServiceStub(channel), timeout_ms / 1000)
        except grpc.RpcError as error:
            fail(failure_of_call(error), as_json=as_json, advice=advice)
        except KeyboardInterrupt:
            if advice:
                typer.echo(advice, err=True)
            raise typer.Exit(ExitCode.INTERRUPTED) from None


def _found(
    stub: dedup_pb2_grpc.DedupServiceStub, request: dedup_pb2.GetTransactionRequest, timeout_s: float
) -> dedup_pb2.GetTransactionResponse | None:
    """Return the reply, None if the transaction is not claimed."""
    try:
        return stub.GetTransaction(request, timeout=timeout_s)
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.NOT_FOUND:
            return None
        raise


def _print_claim(reply: dedup_pb2.ClaimTransactionResponse) -> None:
    word = dedup_pb2.ClaimOutcome.Name(reply.outcome).removeprefix("CLAIM_OUTCOME_")
    flags = (("replayed", reply.replayed), ("shadow duplicate", reply.shadow_duplicate))
    notes = ", ".join(note for note, is_set in flags if is_set)
    print_transaction(f"{word} ({notes})" if notes else word, reply.transaction, {"token": reply.claim_token})
    if reply.shadow_duplicate:
        typer.echo(_SHADOW)


def _result(text: str | None, file: typer.FileBinaryRead | None) -> bytes:
    if file is None:
        return (text or "").encode("utf-8", "surrogateescape")
    if text is not None:
        raise typer.BadParameter("cannot be combined with --result", param_hint="--result-file")
    try:
        result: bytes = file.read(_MAX_RESULT_FILE_BYTES + 1)
    except OSError as error:
        raise typer.BadParameter(f"cannot be read: {error}", param_hint="--result-file") from None
    if len(result) > _MAX_RESULT_FILE_BYTES:
        raise typer.BadParameter(
            "is larger than 4 MiB: store the result elsewhere and complete with a reference to it",
            param_hint="--result-file",
        )
    return result


def _answer(
    word: str,
    reply: _HolderReply,
    transaction: dedup_pb2.Transaction | None,
    transaction_id: str,
    *,
    why: str,
    as_json: bool,
) -> None:
    """Print the outcome of a change by the holder, and exit. `why` lists what NOT HELD can mean."""
    if as_json:
        print_json(as_dict(reply))
    elif word == "NOT_HELD":
        typer.echo(f"NOT HELD: the token does not hold {transaction_id}: {why}. Nothing was changed.")
    elif transaction is None:
        typer.echo(f"{word}: {transaction_id} may be claimed again")
    else:
        print_transaction(word, transaction)
    raise typer.Exit({"NOT_HELD": ExitCode.NOT_HELD, "UNSPECIFIED": ExitCode.ERROR}.get(word, 0))
