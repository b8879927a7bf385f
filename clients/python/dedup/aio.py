"""The client for asyncio: `dedup.Client` with coroutines."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Generator, Sequence
from datetime import datetime
from typing import Any, Protocol, Self, cast

import grpc
import grpc.aio
from google.protobuf.message import Message

from dedup.calls import Calls, Grant, OnUnavailable, Span, claim_request, may_have_claimed
from dedup.channels import ChannelOption, MetadataEntry, channel_options, current_metadata
from dedup.coalescing import AsyncCoalescer
from dedup.error_details import failure_of_call, failure_of_closed_client
from dedup.errors import CallFailed, ClaimLost, ClientClosed, DedupError, WrongEventLoop
from dedup.handles import BlockOptions, Handle, ReleaseOn, log_failed_ending
from dedup.ids import logged_id
from dedup.keep_alive import KeepAlive, LoopKeepAlive
from dedup.retries import Retrier, RetryPolicy, Send, Steps, T, run_async
from dedup.transactions import Transaction
from dedup.v1 import dedup_pb2, dedup_pb2_grpc

_LOG = logging.getLogger("dedup")


class Transport(Protocol):
    """Takes the steps of a call: a channel to the service, or a fake."""

    async def send(self, step: Send) -> Message:
        """Make one attempt. Raises CallFailed if it fails."""

    def start(
        self, step: Send, metadata: tuple[MetadataEntry, ...], done: Callable[[Message | CallFailed], None]
    ) -> None:
        """Start one attempt without blocking, and later call back with its answer."""

    def is_here(self) -> bool:
        """Return whether calls can be made in the running event loop."""

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
        coalesced_attempt_s: float | None,
    ) -> None:
        self._target = target
        self._credentials = credentials
        self._options = channel_options(options)
        self._coalesced_attempt_s = coalesced_attempt_s
        self._channel: grpc.aio.Channel | None = None
        self._coalescer: AsyncCoalescer | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._attempts: set[asyncio.Task[None]] = set()

    async def send(self, step: Send) -> Message:
        """Make one attempt, in a batch with other claims if possible. Raises WrongEventLoop."""
        if not self.is_here():
            # gRPC would wait for the other loop for ever.
            raise WrongEventLoop
        if self._closed:
            raise failure_of_closed_client()
        if self._channel is None:
            self._open()
        try:
            return await (self._alone(step) if self._coalescer is None else self._coalescer.send(step))
        except asyncio.CancelledError as error:
            # gRPC cancels its calls when their channel is closed.
            if self._was_closed():
                raise failure_of_closed_client() from error
            raise

    def _was_closed(self) -> bool:
        task = asyncio.current_task()
        return self._closed and not (task is not None and task.cancelling())

    async def _alone(self, step: Send) -> Message:
        return await self._send(step, current_metadata())

    async def _send(self, step: Send, metadata: tuple[MetadataEntry, ...]) -> Message:
        try:
            call = getattr(self._stub, step.method)(step.request, timeout=step.timeout_s, metadata=metadata)
            return cast("Message", await call)
        except grpc.RpcError as error:
            raise failure_of_call(error) from error
        except grpc.aio.UsageError as error:
            # gRPC's error for a closed channel.
            raise failure_of_closed_client() from error

    def start(
        self, step: Send, metadata: tuple[MetadataEntry, ...], done: Callable[[Message | CallFailed], None]
    ) -> None:
        """Implement Transport."""

        async def attempt() -> None:
            try:
                done(await self._send(step, metadata))
            except CallFailed as failure:
                done(failure)

        task = asyncio.get_running_loop().create_task(attempt())
        self._attempts.add(task)
        task.add_done_callback(self._attempts.discard)

    def is_here(self) -> bool:
        """Implement Transport."""
        return self._loop is None or self._loop is asyncio.get_running_loop()

    def _open(self) -> None:
        self._loop = asyncio.get_running_loop()
        # A channel belongs to the running event loop, which may not exist when the client is made.
        self._channel = (
            grpc.aio.insecure_channel(self._target, self._options)
            if self._credentials is None
            else grpc.aio.secure_channel(self._target, self._credentials, self._options)
        )
        self._stub = dedup_pb2_grpc.DedupServiceStub(self._channel)
        if self._coalesced_attempt_s is not None:
            self._coalescer = AsyncCoalescer(self._stub, self._coalesced_attempt_s, self._alone)

    async def pause(self, seconds: float) -> None:
        """Sleep between attempts."""
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        """Implement Transport."""
        self._closed = True
        if self._channel is not None and self.is_here():
            await self._channel.close()


def _log_failure(claim: Handle, ended: asyncio.Task[Any]) -> None:
    error = None if ended.cancelled() else ended.exception()
    if isinstance(error, DedupError):
        log_failed_ending(claim, error)


class Claim(Handle):
    """A granted claim: an asynchronous context manager that completes or releases it.

    Leaving the block normally completes the claim with `result`. An exception keeps it until it expires, unless it is
    listed in `release_on`. A claim completed or released inside the block stays as it is.
    """

    def __init__(self, client: "Client", grant: Grant, options: BlockOptions) -> None:
        super().__init__(client._calls, grant, options)
        self._client = client
        self._task: asyncio.Task[Any] | None = None
        self._earlier_cancellations = 0
        self._cancelled = False
        self._watch(client._keep_alive, client._transport.start)

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

        Raises NotHeld, Unavailable or another CallFailed. For a result that is not bytes or too large it raises
        TypeError, ValueError or InvalidRequest once the transaction is completed without it.

        A cancelled caller does not cancel the completion.
        """
        self._end_keep_alive()
        return await self._client._run_to_end(self, self._complete(result, ttl, expire_time, timeout))

    async def release(self, *, timeout: float | None = None) -> None:
        """Release the claim: the next caller may claim at once. Raises NotHeld or CallFailed."""
        self._end_keep_alive()
        await self._client._run_to_end(self, self._release(timeout))

    async def extend(
        self,
        ttl: Span | None = None,
        *,
        expire_time: datetime | None = None,
        allow_shortening: bool = False,
        timeout: float | None = None,
    ) -> Transaction | None:
        """Extend the claim and return the transaction, or None if there is no claim.

        An earlier end has no effect unless `allow_shortening` is True, which ends keep-alive.

        Raises NotHeld, InvalidRequest, Unavailable or another CallFailed.
        """
        return await self._client._run(self._extend(ttl, expire_time, timeout, allow_shortening=allow_shortening))

    async def __aenter__(self) -> Self:
        if self._options.cancel_on_lost:
            if self.lost:
                raise ClaimLost(self.transaction_id)
            self._task = asyncio.current_task()
            assert self._task is not None  # noqa: S101 - Coroutines run in tasks.
            self._earlier_cancellations = self._task.cancelling()
        return self

    async def __aexit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        self._end_keep_alive()
        task, self._task = self._task, None
        if self._cancelled and task is not None and task.uncancel() <= self._earlier_cancellations:
            if isinstance(error, asyncio.CancelledError):
                raise ClaimLost(self.transaction_id) from error
            # The cancellation may not have arrived in the block. It must not reach the code after it.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
        if not self._ended:
            await self._client._run_to_end(self, self._leave(error, ended=False))

    def _tell_loss(self) -> None:
        super()._tell_loss()
        if self._task is not None and not self._task.done():
            self._cancelled = True
            self._task.cancel()


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
        return await self._entered.__aenter__()

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        await self._entered.__aexit__(kind, error, traceback)


class Client:
    """A client of a dedup service. Make one per process and use it in one event loop.

    `target` is `host:port` or `unix:///path`. `credentials` enable TLS. `namespace`, `claimant` and `release_on` are
    defaults of every claim. In seconds, `timeout` is the budget of a call with all attempts, `attempt_timeout` limits
    one attempt. `on_unavailable="allow"` lets work run without a claim while the service is unavailable. With
    `coalesce` claims that find others in flight are sent together in one call.
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
        release_on: ReleaseOn = (),
        coalesce: bool = True,
        options: Sequence[ChannelOption] = (),
    ) -> None:
        retrier = Retrier(RetryPolicy(budget_s=timeout, attempt_timeout_s=attempt_timeout))
        transport = GrpcTransport(target, credentials, options, attempt_timeout if coalesce else None)
        keep_alive = LoopKeepAlive(attempt_timeout)
        calls = Calls(retrier, on_unavailable)
        self._set_up(transport, keep_alive, calls, namespace=namespace, claimant=claimant, release_on=release_on)

    def _set_up(
        self,
        transport: Transport,
        keep_alive: KeepAlive,
        calls: Calls,
        *,
        namespace: str,
        claimant: str,
        release_on: ReleaseOn,
    ) -> None:
        self._transport = transport
        self._keep_alive = keep_alive
        self._calls = calls
        self._namespace = namespace
        self._claimant = claimant
        self._release_on = release_on
        self._closed = False
        self._background: set[asyncio.Task[Any]] = set()

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
        release_on: ReleaseOn | None = None,
        keep_alive: bool = False,
        max_hold: Span | None = None,
        on_lost: Callable[[Claim], None] | None = None,
        cancel_on_lost: bool = False,
    ) -> PendingClaim:
        """Claim a transaction once the result is awaited or entered: the caller may then do the work.

        The claim lives for `ttl` or until `expire_time` (default: the namespace's ttl). A duplicate of work in progress
        waits up to `wait` for its end, in addition to `timeout`, the budget in seconds. Pass `token` only to repeat
        your own claim; two workers must never share one.

        `keep_alive` extends the claim until its end, for at most `max_hold` (1 hour). If it is lost nevertheless,
        `lost` becomes True and `on_lost` receives the claim in the event loop. With `cancel_on_lost` the task in the
        block is cancelled, and the block raises ClaimLost.

        A claim in doubt, because the call failed or was cancelled, is released in the background, unless you passed its
        token.

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
        options = BlockOptions(
            self._release_on if release_on is None else release_on, keep_alive, max_hold, on_lost, cancel_on_lost
        )
        steps = self._calls.claim(request, wait=wait, budget_s=timeout)
        # A caller with its own token may repeat the claim, and must not lose it then.
        return PendingClaim(self._claim(request if token is None else None, steps, options))

    async def get(
        self, transaction_id: str, *, namespace: str | None = None, timeout: float | None = None
    ) -> Transaction | None:
        """Return a transaction without changing it, or None if nobody holds it.

        Raises InvalidRequest, Unavailable or another CallFailed.
        """
        space = self._namespace if namespace is None else namespace
        return await self._run(self._calls.get(transaction_id, namespace=space, budget_s=timeout))

    async def close(self) -> None:
        """Close the client for good: in-flight and later calls raise ClientClosed.

        Waits up to one budget for claims that are being completed or released in the background.
        """
        self._closed = True
        self._keep_alive.close()
        if self._background and self._transport.is_here():
            _, late = await asyncio.wait(self._background, timeout=self._calls.policy.budget_s)
            for task in late:
                task.cancel()
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _claim(
        self, own: dedup_pb2.ClaimTransactionRequest | None, steps: Steps[Grant], options: BlockOptions
    ) -> Claim:
        try:
            grant = await self._run(steps)
        except (asyncio.CancelledError, CallFailed) as error:
            if own is not None and not self._closed and may_have_claimed(error):
                self._in_background(self._undo(own))
            raise
        return Claim(self, grant, options)

    async def _undo(self, request: dedup_pb2.ClaimTransactionRequest) -> None:
        try:
            await self._run(self._calls.undo(request), closing=True)
        except DedupError as error:
            _LOG.info("could not release the claim of transaction %s: %s", logged_id(request.transaction_id), error)

    def _in_background(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def _run_to_end(self, claim: Claim, steps: Steps[T]) -> T:
        """Run steps in a task of their own, which goes on if the caller is cancelled."""
        if self._closed:
            raise ClientClosed
        task = self._in_background(self._run(steps, closing=True))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(lambda ended: _log_failure(claim, ended))
            raise

    async def _run(self, steps: Steps[T], *, closing: bool = False) -> T:
        if self._closed and not closing:
            raise ClientClosed
        return await run_async(steps, self._transport.send, self._transport.pause)
