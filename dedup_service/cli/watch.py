"""`dedup-service watch`: looks at a transaction again and again until it ends."""

import time
from collections.abc import Iterator
from contextlib import closing
from typing import Annotated

import grpc
import typer

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from dedup_service.cli import exit_codes
from dedup_service.cli.channel import error_fields, fail, open_channel
from dedup_service.cli.options import (
    Namespace,
    Target,
    Timeout,
    TransactionId,
    milliseconds_option,
    positive_milliseconds_option,
    text_option,
)
from dedup_service.cli.watch_views import Look, View, open_view

_MAY_PASS = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)

# How far the clocks of this host and of the service may be apart before "it was released" is a wrong guess.
_CLOCK_MARGIN_MS = 2_000


def watch(
    transaction_id: TransactionId,
    *,
    namespace: Namespace = "default",
    interval: Annotated[
        str, typer.Option(help="How long between two looks, such as 500ms, at least.", metavar="DURATION")
    ] = "500ms",
    target: Target = None,
    timeout: Timeout = "5s",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line for each change, for errors as well.")
    ] = False,
) -> None:
    """Watch a transaction until it ends, and change nothing.

    On a terminal the view is refreshed in place, elsewhere each change is a line. While the server is away it says so
    and goes on. Exit code 0: completed. 5: nobody holds it, or any more. 130: Ctrl-C. 2: bad usage. 1: any other error.
    """
    request = dedup_pb2.GetTransactionRequest(
        transaction_id=text_option("ID", transaction_id), namespace=text_option("--namespace", namespace)
    )
    interval_s = positive_milliseconds_option("interval", interval) / 1000
    timeout_s = milliseconds_option("timeout", timeout) / 1000
    try:
        with open_channel(target) as channel, closing(open_view(transaction_id, as_json=as_json)) as view:
            stub = dedup_pb2_grpc.DedupServiceStub(channel)
            last = _follow(_looks(stub, request, timeout_s=timeout_s, interval_s=interval_s), view)
    except grpc.RpcError as error:
        fail(error, as_json=as_json)
    except KeyboardInterrupt:
        raise typer.Exit(exit_codes.INTERRUPTED) from None
    raise typer.Exit(0 if last.transaction else exit_codes.NOT_FOUND)


def _follow(looks: Iterator[Look], view: View) -> Look:
    held: dedup_pb2.Transaction | None = None
    for look in looks:
        if look.state == "NOT_FOUND":
            last = Look(likely=_likely_end(held))
            view.end(last)
            return last
        if look.transaction is not None and look.transaction.state == dedup_pb2.TRANSACTION_STATE_COMPLETED:
            view.end(look)
            return look
        held = look.transaction or held
        view.show(look)
    raise AssertionError("the looks never end by themselves")


def _likely_end(held: dedup_pb2.Transaction | None) -> str:
    if held is None or not held.HasField("expire_time"):
        return ""
    left_ms = held.expire_time.ToMilliseconds() - time.time() * 1000
    if left_ms <= 0:
        return "expired"
    return "released" if left_ms > _CLOCK_MARGIN_MS else ""


def _looks(
    stub: dedup_pb2_grpc.DedupServiceStub,
    request: dedup_pb2.GetTransactionRequest,
    *,
    timeout_s: float,
    interval_s: float,
) -> Iterator[Look]:
    outage: dict[str, str] | None = None
    while True:
        started = time.monotonic()
        look = _look(stub, request, timeout_s, outage)
        outage = look.outage
        yield look
        time.sleep(max(0.0, started + interval_s - time.monotonic()))


def _look(
    stub: dedup_pb2_grpc.DedupServiceStub,
    request: dedup_pb2.GetTransactionRequest,
    timeout_s: float,
    outage: dict[str, str] | None,
) -> Look:
    try:
        # Calls that fail at once give a channel hardly any time to connect again, so during an outage a call waits.
        reply = stub.GetTransaction(request, timeout=timeout_s, wait_for_ready=outage is not None)
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.NOT_FOUND:
            return Look()
        if outage is not None and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            # That it lasts says less than how it began.
            return Look(outage=outage)
        if error.code() in _MAY_PASS:
            return Look(outage=error_fields(error))
        raise
    return Look(transaction=reply.transaction)
