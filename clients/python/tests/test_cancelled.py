"""Calls that end as CANCELLED: by a server that ends, which is worth a retry, or by the caller itself, which is not."""

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


class EndingServer(dedup_pb2_grpc.DedupServiceServicer):
    """Cancels the first `cancels` calls, as a server does that ends, then claims; while `held` is not set it waits."""

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
        """End."""
        self.held.set()
        self._server.stop(None).wait()


@pytest.fixture
def server() -> Iterator[EndingServer]:
    """A server that cancels one call."""
    server = EndingServer()  # type: ignore[abstract] # No other rpc is called.
    yield server
    server.stop()


@pytest.mark.parametrize("coalesce", [False, True])
async def test_what_a_server_cancels_is_tried_again_with_its_token(server: EndingServer, coalesce: bool) -> None:  # noqa: FBT001 - A parameter of pytest.
    """A call that a server cut off as it ended is CLAIMED by the next attempt, in both clients."""
    with Client(server.target, timeout=20, coalesce=coalesce) as blocking:
        await asyncio.to_thread(blocking.claim, "x")
    async with aio.Client(server.target, timeout=20, coalesce=coalesce) as client:
        server.cancels = 3
        await client.claim("x")
    first, again, second, anew = server.tokens
    assert (first, second) == (again, anew)
    assert first != second


async def test_cancels_without_end_are_an_outage(server: EndingServer) -> None:
    """Once the budget is spent the caller hears Unavailable, which may have been applied."""
    server.cancels = 1_000
    async with aio.Client(server.target, timeout=0.3) as client:
        with pytest.raises(Unavailable) as caught:
            await client.claim("x")
    assert (caught.value.code, caught.value.applied) == (grpc.StatusCode.CANCELLED, "unknown")
    assert len(server.tokens) > 1


@pytest.mark.parametrize("coalesce", [False, True])
async def test_a_client_that_is_closed_tries_nothing_again(server: EndingServer, coalesce: bool) -> None:  # noqa: FBT001 - As above.
    """A blocking call under way ends as CANCELLED after its one attempt, is no outage, and so is never let through."""
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


async def test_a_task_that_is_cancelled_tries_nothing_again(server: EndingServer) -> None:
    """The caller's own cancel reaches it as such."""
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
