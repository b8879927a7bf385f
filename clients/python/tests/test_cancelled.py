"""Calls that end as CANCELLED: a server that shuts down is retried, the caller's own cancellation is not."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from dedup import CallFailed, Client, Unavailable, aio
from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from tests.support.polling import eventually


class StoppingServer(dedup_pb2_grpc.DedupServiceServicer):
    """Cancels the first `cancels` calls like a server during shutdown, then claims. Waits while `held` is not set."""

    def __init__(self) -> None:
        self.cancels = 1
        self.tokens: list[str] = []
        self.held = threading.Event()
        self.held.set()
        self._server = grpc.server(ThreadPoolExecutor(max_workers=4))
        dedup_pb2_grpc.add_DedupServiceServicer_to_server(self, self._server)
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def ClaimTransaction(self, request: Any, context: Any) -> Any:  # noqa: N802 - The name of the rpc.
        """Answer a claim."""
        self.tokens.append(request.claim_token)
        self.held.wait(20)
        if len(self.tokens) <= self.cancels:
            context.abort(grpc.StatusCode.CANCELLED, "")
        return dedup_pb2.ClaimTransactionResponse(
            outcome=dedup_pb2.CLAIM_OUTCOME_CLAIMED, claim_token=request.claim_token
        )

    def BatchClaimTransactions(self, request: Any, context: Any) -> Any:  # noqa: N802 - As above.
        """Answer a batch of one."""
        reply = dedup_pb2.BatchClaimTransactionsResponse()
        reply.entries.add().response.CopyFrom(self.ClaimTransaction(request.requests[0], context))
        return reply

    def stop(self) -> None:
        """Stop the server."""
        self.held.set()
        self._server.stop(None).wait()


@pytest.fixture
def server() -> Iterator[StoppingServer]:
    """A server that cancels one call."""
    server = StoppingServer()  # type: ignore[abstract] # No other rpc is called.
    yield server
    server.stop()


@pytest.mark.parametrize("coalesce", [False, True])
async def test_a_call_cancelled_by_the_server_is_retried_with_its_token(server: StoppingServer, coalesce: bool) -> None:  # noqa: FBT001 - A parameter of pytest.
    """The next attempt of a call that the server cancelled during shutdown is CLAIMED, in both clients."""
    with Client(server.target, timeout=20, coalesce=coalesce) as blocking:
        await asyncio.to_thread(blocking.claim, "x")
    async with aio.Client(server.target, timeout=20, coalesce=coalesce) as client:
        server.cancels = 3
        await client.claim("x")
    first, again, second, anew = server.tokens
    assert (first, second) == (again, anew)
    assert first != second


async def test_endless_cancellation_is_an_outage(server: StoppingServer) -> None:
    """Once the budget is spent the caller gets Unavailable, which may have been applied."""
    server.cancels = 1_000
    async with aio.Client(server.target, timeout=0.3) as client:
        with pytest.raises(Unavailable) as caught:
            await client.claim("x")
    assert (caught.value.code, caught.value.applied) == (grpc.StatusCode.CANCELLED, "unknown")
    assert len(server.tokens) > 1


@pytest.mark.parametrize("coalesce", [False, True])
async def test_a_closed_client_does_not_retry(server: StoppingServer, coalesce: bool) -> None:  # noqa: FBT001 - As above.
    """An in-flight blocking call ends as CANCELLED after one attempt. It is not an outage, so it is never allowed."""
    server.held.clear()
    client = Client(server.target, timeout=20, attempt_timeout=20, coalesce=coalesce, on_unavailable="allow")
    claiming = asyncio.ensure_future(asyncio.to_thread(client.claim, "x"))

    async def asked() -> bool:
        return len(server.tokens) == 1

    await eventually(asked)
    client.close()
    with pytest.raises(CallFailed, match="the client was closed") as caught:
        await claiming
    assert not isinstance(caught.value, Unavailable)
    assert len(server.tokens) == 1


async def test_a_cancelled_task_does_not_retry(server: StoppingServer) -> None:
    """The caller gets its own CancelledError."""
    server.held.clear()
    async with aio.Client(server.target, timeout=20, attempt_timeout=20) as client:
        claiming = asyncio.ensure_future(client.claim("x")._claiming)

        async def asked() -> bool:
            return len(server.tokens) == 1

        await eventually(asked)
        claiming.cancel()
        with pytest.raises(asyncio.CancelledError):
            await claiming
        assert len(server.tokens) == 1
