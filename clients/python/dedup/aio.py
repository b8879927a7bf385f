"""The client for asyncio: `dedup.Client` with coroutines."""

import asyncio
from collections.abc import Coroutine, Generator, Sequence
from datetime import datetime
from typing import Protocol, Self, cast

import grpc
import grpc.aio
from google.protobuf.message import Message

from dedup.calls import Calls, Grant, OnUnavailable, Span, claim_request
from dedup.channels import ChannelOption, channel_options, current_metadata
from dedup.coalescing import AsyncCoalescer, may_coalesce
from dedup.error_details import failure_of_call
from dedup.handles import Handle, OnError
from dedup.retries import Retrier, RetryPolicy, Send, Steps, T, run_async
from dedup.transactions import Transaction
from dedup.v1 import dedup_pb2_grpc


class Transport(Protocol):
    """Takes the steps of a call: a channel to the service, or a fake."""

    async def send(self, step: Send) -> Message:
        """Make one attempt. Raises CallFailed if it fails."""

    async def pause(self, seconds: float) -> None:
        """Sleep between attempts."""

    async def close(self) -> None:
        """Close the channel. In-flight calls fail."""


class GrpcTransport:
    """A channel to the service, opened by the first call, with or without coalescing."""

    def __init__(
        self,
        target: str,
        credentials: grpc.ChannelCredentials | None,
        options: Sequence[ChannelOption],
        coalesce_delay_s: float | None,
    ) -> None:
        self._target = target
        self._credentials = credentials
        self._options = channel_options(options)
        self._coalesce_delay_s = coalesce_delay_s
        self._channel: grpc.aio.Channel | None = None
        self._coalescer: AsyncCoalescer | None = None

    async def send(self, step: Send) -> Message:
        """Make one attempt, in a batch with other claims if possible."""
        if self._channel is None:
            self._open()
        if self._coalescer is not None and may_coalesce(step.request):
            return await self._coalescer.claim(step.request, step.timeout_s)
        try:
            return cast(
                "Message",
                await getattr(self._stub, step.method)(
                    step.request, timeout=step.timeout_s, metadata=current_metadata()
                ),
            )
        except grpc.RpcError as error:
            raise failure_of_call(error) from error

    def _open(self) -> None:
        # A channel belongs to the running event loop, which may not exist when the client is made.
        self._channel = (
            grpc.aio.insecure_channel(self._target, self._options)
            if self._credentials is None
            else grpc.aio.secure_channel(self._target, self._credentials, self._options)
        )
        self._stub = dedup_pb2_grpc.DedupServiceStub(self._channel)
        if self._coalesce_delay_s is not None:
            self._coalescer = AsyncCoalescer(self._stub, self._coalesce_delay_s)

    async def pause(self, seconds: float) -> None:
        """Sleep between attempts."""
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        """Implement Transport."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = None


class Claim(Handle):
    """A granted claim: an asynchronous context manager that completes or releases it.

    Leaving the block normally completes the claim with `result`. An exception releases or keeps it, depending on
    `on_error`. A claim completed or released inside the block stays as it is.
    """

    def __init__(self, client: "Client", grant: Grant, on_error: OnError) -> None:
        super().__init__(client._calls, grant, on_error)
        self._client = client

    async def complete(
        self,
        result: bytes | None = None,
        *,
        ttl: Span | None = None,
        expire_time: datetime | None = None,
        timeout: float | None = None,
    ) -> Transaction | None:
        """Complete the claim and return the completed transaction, or None if there is no claim.

        Later duplicates receive `result` (default: the attribute `result`) for `ttl` or until `expire_time`.

        Raises NotHeld, Unavailable, another CallFailed, or InvalidRequest if the result is too large; the transaction
        is then completed without it.
        """
        return await self._client._run(self._complete(result, ttl, expire_time, timeout))

    async def release(self, *, timeout: float | None = None) -> None:
        """Release the claim: the next caller may claim at once. Raises NotHeld or CallFailed."""
        await self._client._run(self._release(timeout))

    async def extend(
        self,
        ttl: Span | None = None,
        *,
        expire_time: datetime | None = None,
        allow_shortening: bool = False,
        timeout: float | None = None,
    ) -> Transaction | None:
        """Extend the claim and return the transaction, or None if there is no claim.

        An earlier end has no effect unless `allow_shortening` is True.

        Raises NotHeld, InvalidRequest, Unavailable or another CallFailed.
        """
        return await self._client._run(self._extend(ttl, expire_time, timeout, allow_shortening=allow_shortening))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        await self._client._run(self._leave(error))


class PendingClaim:
    """A claim that is made once this is awaited (`claim = await …`) or entered (`async with …`).

    It works once. Never used, it claims nothing and Python emits a RuntimeWarning.
    """

    def __init__(self, claiming: Coroutine[object, object, Claim]) -> None:
        self._claiming = claiming

    def __await__(self) -> Generator[object, object, Claim]:
        return self._claiming.__await__()

    async def __aenter__(self) -> Claim:
        self._entered = await self._claiming
        return self._entered

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        await self._entered.__aexit__(kind, error, traceback)


class Client:
    """A client of a dedup service. Make one per process and use it in one event loop.

    `target` is `host:port` or `unix:///path`. `credentials` enable TLS. `namespace`, `claimant` and `on_error` are
    defaults of every claim. In seconds, `timeout` is the budget of a call with all attempts, `attempt_timeout` limits
    one attempt. `on_unavailable="allow"` lets work run without a claim while the service is unavailable. With
    `coalesce` concurrent claims travel in one call, delayed by at most `coalesce_delay`.
    """

    def __init__(
        self,
        target: str = "127.0.0.1:50051",
        *,
        credentials: grpc.ChannelCredentials | None = None,
        namespace: str = "",
        claimant: str = "",
        timeout: float = 2.0,
        attempt_timeout: float = 1.0,
        on_unavailable: OnUnavailable = "deny",
        on_error: OnError = "release",
        coalesce: bool = False,
        coalesce_delay: float = 0.001,
        options: Sequence[ChannelOption] = (),
    ) -> None:
        retrier = Retrier(RetryPolicy(budget_s=timeout, attempt_timeout_s=attempt_timeout))
        transport = GrpcTransport(target, credentials, options, coalesce_delay if coalesce else None)
        self._set_up(transport, Calls(retrier, on_unavailable), namespace, claimant, on_error)

    def _set_up(self, transport: Transport, calls: Calls, namespace: str, claimant: str, on_error: OnError) -> None:
        self._transport = transport
        self._calls = calls
        self._namespace = namespace
        self._claimant = claimant
        self._on_error = on_error

    def claim(
        self,
        transaction_id: str,
        *,
        ttl: Span | None = None,
        expire_time: datetime | None = None,
        namespace: str | None = None,
        claimant: str | None = None,
        fingerprint: bytes = b"",
        wait: Span | None = None,
        token: str | None = None,
        timeout: float | None = None,
        on_error: OnError | None = None,
    ) -> PendingClaim:
        """Claim a transaction once the result is awaited or entered: the caller may then do the work.

        The claim lives for `ttl` or until `expire_time` (default: the namespace's ttl). A duplicate of work in progress
        waits up to `wait` for its end, in addition to `timeout`, the budget in seconds. Pass `token` only to repeat
        your own claim; two workers must never share one.

        Raises DuplicateTransaction, PayloadMismatch, InvalidRequest, Unavailable or another CallFailed.
        """
        request = claim_request(
            transaction_id,
            ttl=ttl,
            expire_time=expire_time,
            namespace=self._namespace if namespace is None else namespace,
            claimant=self._claimant if claimant is None else claimant,
            fingerprint=fingerprint,
            token=token,
        )
        steps = self._calls.claim(request, wait=wait, budget_s=timeout)
        return PendingClaim(self._claim(steps, on_error or self._on_error))

    async def get(
        self, transaction_id: str, *, namespace: str | None = None, timeout: float | None = None
    ) -> Transaction | None:
        """Return a transaction without changing it, or None if nobody holds it.

        Raises InvalidRequest, Unavailable or another CallFailed.
        """
        space = self._namespace if namespace is None else namespace
        return await self._run(self._calls.get(transaction_id, namespace=space, budget_s=timeout))

    async def close(self) -> None:
        """Close the channel. In-flight calls fail."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _claim(self, steps: Steps[Grant], on_error: OnError) -> Claim:
        return Claim(self, await self._run(steps), on_error)

    async def _run(self, steps: Steps[T]) -> T:
        return await run_async(steps, self._transport.send, self._transport.pause)
