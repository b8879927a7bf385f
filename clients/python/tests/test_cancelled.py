"""Calls that end as CANCELLED: a server that shuts down is retried, the caller's own cancellation is not."""

import asyncio
import contextlib
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
        self.not_held = 0
        self.tokens: list[str] = []
        self.released: list[str] = []
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

    def ReleaseTransaction(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802 - As above.
        """Release, after `not_held` calls that find no claim."""
        self.released.append(request.claim_token)
        self.not_held -= 1
        held = self.not_held < 0
        return dedup_pb2.ReleaseTransactionResponse(
            outcome=dedup_pb2.RELEASE_OUTCOME_RELEASED if held else dedup_pb2.RELEASE_OUTCOME_NOT_HELD
        )

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


@pytest.mark.parametrize("coalesce", [False, True])
async def test_a_cancelled_claim_is_released(target: str, unique: str, coalesce: bool) -> None:  # noqa: FBT001 - As above.
    """Its id is free again soon, not after the ttl, wherever the cancellation met the call."""
    async with aio.Client(target, timeout=20) as other, aio.Client(target, timeout=20, coalesce=coalesce) as client:
        await client.get(unique)
        for number in range(25):
            claiming = asyncio.ensure_future(client.claim(f"{unique}-{number}", ttl=600)._claiming)
            for _ in range(number):
                await asyncio.sleep(0)
            claiming.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await (await claiming).release()

        async def free(number: int) -> bool:
            return await other.get(f"{unique}-{number}") is None

        for number in range(25):
            await eventually(lambda number=number: free(number), 30, "the release")  # type: ignore[misc]


async def test_closing_waits_for_the_release(server: StoppingServer) -> None:
    """A process that ends at once leaves no claim behind."""
    server.cancels = 0
    server.held.clear()
    client = aio.Client(server.target, timeout=20, attempt_timeout=20)
    claiming = asyncio.ensure_future(client.claim("x")._claiming)
    await eventually(lambda: _true(len(server.tokens) == 1))
    claiming.cancel()
    with pytest.raises(asyncio.CancelledError):
        await claiming
    await client.close()
    assert server.released == server.tokens


async def test_a_claim_in_doubt_is_released(server: StoppingServer) -> None:
    """A call whose attempts were all unanswered may have claimed. Both clients release it under its token."""
    server.cancels = 1_000
    with pytest.raises(Unavailable):
        async with aio.Client(server.target, timeout=0.3) as waiting:
            await waiting.claim("x")
    assert server.released == [server.tokens[0]]
    with pytest.raises(Unavailable), Client(server.target, timeout=0.3) as blocking:
        await asyncio.to_thread(blocking.claim, "x")
    assert server.released == [server.tokens[0], server.tokens[-1]]


async def test_a_release_is_repeated_until_the_claim_arrives(server: StoppingServer) -> None:
    """The cancelled claim may reach the store after its release."""
    server.cancels = 1_000
    server.not_held = 2
    with pytest.raises(Unavailable):
        async with aio.Client(server.target, timeout=5, attempt_timeout=5) as waiting:
            await waiting.claim("x", timeout=0.1)
    assert server.released == [server.tokens[0]] * 3


async def test_a_callers_own_token_is_not_released(server: StoppingServer) -> None:
    """The caller may repeat the claim, and the release would take it away."""
    server.cancels = 1_000
    for token in ("t" * 16, None):
        with pytest.raises(Unavailable):
            async with aio.Client(server.target, timeout=0.3) as waiting:
                await waiting.claim("x", token=token)
    assert server.released == [server.tokens[-1]]


def test_an_interrupted_claim_is_released(server: StoppingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """KeyboardInterrupt ends the call, and a thread releases the claim. Closing waits for it."""
    server.cancels = 0
    with Client(server.target, timeout=20) as client:
        transport: Any = client._transport
        send = transport.send

        def interrupted(step: Any) -> Any:
            send(step)
            monkeypatch.setattr(transport, "send", send)
            raise KeyboardInterrupt

        monkeypatch.setattr(transport, "send", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.claim("x")
    assert server.released == server.tokens


def test_an_interrupted_completion_is_repeated(monkeypatch: pytest.MonkeyPatch, target: str, unique: str) -> None:
    """The work is done, so the transaction is completed in the background."""
    with Client(target, timeout=20) as other, Client(target, timeout=20) as client:
        transport: Any = client._transport
        send = transport.send

        def interrupted(_step: Any) -> Any:
            monkeypatch.setattr(transport, "send", send)
            raise KeyboardInterrupt

        claim = client.claim(unique)
        monkeypatch.setattr(transport, "send", interrupted)
        with pytest.raises(KeyboardInterrupt), claim:
            claim.result = b"paid 5"
        client.close()
        found = other.get(unique)
    assert found is not None
    assert found.result == b"paid 5"


async def test_a_cancelled_caller_does_not_cancel_the_completion(target: str, unique: str) -> None:
    """The caller gets its CancelledError at once, and closing waits for the completion."""
    async with aio.Client(target, timeout=20) as other:
        async with aio.Client(target, timeout=20) as client:
            finished = asyncio.Event()

            async def work() -> None:
                async with client.claim(unique) as claim:
                    claim.result = b"paid 5"
                    finished.set()

            working = asyncio.ensure_future(work())
            await finished.wait()
            working.cancel()
            with pytest.raises(asyncio.CancelledError):
                await working
        found = await other.get(unique)
    assert found is not None
    assert found.result == b"paid 5"


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


async def _true(value: bool) -> bool:  # noqa: FBT001 - An awaitable condition.
    return value
