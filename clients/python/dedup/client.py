"""The client for blocking code."""

import contextvars
import logging
import threading
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Protocol, Self, cast

import grpc
from google.protobuf.message import Message

from dedup.calls import Calls, Grant, OnUnavailable, Span, claim_request, may_have_claimed
from dedup.channels import ChannelOption, MetadataEntry, channel_options, current_metadata
from dedup.coalescing import Coalescer
from dedup.error_details import failure_of_call, failure_of_closed_client
from dedup.errors import CallFailed, ClientClosed, DedupError
from dedup.handles import BlockOptions, Handle, ReleaseOn
from dedup.ids import logged_id
from dedup.keep_alive import KeepAlive, ThreadKeepAlive
from dedup.retries import Retrier, RetryPolicy, Send, Steps, T, run
from dedup.transactions import Transaction
from dedup.v1 import dedup_pb2_grpc

_LOG = logging.getLogger("dedup")


class Transport(Protocol):
    """Takes the steps of a call: a channel to the service, or a fake."""

    def send(self, step: Send) -> Message:
        """Make one attempt. Raises CallFailed if it fails."""

    def start(
        self, step: Send, metadata: tuple[MetadataEntry, ...], done: Callable[[Message | CallFailed], None]
    ) -> None:
        """Start one attempt without blocking, and later call back with its answer."""

    def pause(self, seconds: float) -> None:
        """Sleep between attempts."""

    def close(self) -> None:
        """Close the channel. In-flight calls fail."""


class GrpcTransport:
    """A channel to the service, with or without coalescing."""

    def __init__(
        self,
        target: str,
        credentials: grpc.ChannelCredentials | None,
        options: Sequence[ChannelOption],
        coalesced_attempt_s: float | None,
    ) -> None:
        every = channel_options(options)
        self._channel = (
            grpc.insecure_channel(target, every)
            if credentials is None
            else grpc.secure_channel(target, credentials, every)
        )
        self._closed = False
        self._stub = dedup_pb2_grpc.DedupServiceStub(self._channel)
        self._coalescer = (
            None if coalesced_attempt_s is None else Coalescer(self._stub, coalesced_attempt_s, self._alone)
        )

    def send(self, step: Send) -> Message:
        """Make one attempt, in a batch with other claims if possible."""
        try:
            return self._alone(step) if self._coalescer is None else self._coalescer.send(step)
        except CallFailed as failure:
            if self._closed and failure.code is grpc.StatusCode.CANCELLED:
                raise failure_of_closed_client() from failure
            raise
        except ValueError as error:
            # gRPC's error for a closed channel.
            if self._closed:
                raise failure_of_closed_client() from error
            raise

    def _alone(self, step: Send) -> Message:
        try:
            return cast(
                "Message",
                getattr(self._stub, step.method)(step.request, timeout=step.timeout_s, metadata=current_metadata()),
            )
        except grpc.RpcError as error:
            raise failure_of_call(error) from error

    def start(
        self, step: Send, metadata: tuple[MetadataEntry, ...], done: Callable[[Message | CallFailed], None]
    ) -> None:
        """Implement Transport."""
        try:
            call = getattr(self._stub, step.method).future(step.request, timeout=step.timeout_s, metadata=metadata)
        except ValueError:
            # The channel was closed.
            done(failure_of_closed_client())
            return
        call.add_done_callback(lambda ended: done(_answer_of(ended)))

    def pause(self, seconds: float) -> None:
        """Sleep between attempts."""
        time.sleep(seconds)

    def close(self) -> None:
        """Implement Transport."""
        self._closed = True
        self._channel.close()


def _answer_of(call: Any) -> Message | CallFailed:
    try:
        return cast("Message", call.result())
    except grpc.RpcError as error:
        return failure_of_call(error)
    except grpc.FutureCancelledError:
        return failure_of_closed_client()


class Claim(Handle):
    """A granted claim: a context manager that completes or releases it.

    Leaving the block normally completes the claim with `result`. An exception keeps it until it expires, unless it is
    listed in `release_on`. A claim completed or released inside the block stays as it is.
    """

    def __init__(self, client: "Client", grant: Grant, options: BlockOptions) -> None:
        super().__init__(client._calls, grant, options)
        self._client = client
        self._watch(client._keep_alive, client._transport.start)

    def complete(
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
        """
        return self._client._run_to_end(lambda: self._complete(result, ttl, expire_time, timeout), self.transaction_id)

    def release(self, *, timeout: float | None = None) -> None:
        """Release the claim: the next caller may claim at once. Raises NotHeld or CallFailed."""
        self._client._run_to_end(lambda: self._release(timeout), self.transaction_id)

    def extend(
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
        return self._client._run(self._extend(ttl, expire_time, timeout, allow_shortening=allow_shortening))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        ended = self._ended
        self._client._run_to_end(lambda: self._leave(error, ended=ended), self.transaction_id)


class Client:
    """A client of a dedup service. It is thread-safe; make one per process.

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
        coalesce: bool = False,
        options: Sequence[ChannelOption] = (),
    ) -> None:
        retrier = Retrier(RetryPolicy(budget_s=timeout, attempt_timeout_s=attempt_timeout))
        transport = GrpcTransport(target, credentials, options, attempt_timeout if coalesce else None)
        calls, keep_alive = Calls(retrier, on_unavailable), ThreadKeepAlive(attempt_timeout)
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
        self._background: set[threading.Thread] = set()

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
    ) -> Claim:
        """Claim a transaction and return the claim: the caller may do the work.

        The claim lives for `ttl` or until `expire_time` (default: the namespace's ttl). A duplicate of work in progress
        waits up to `wait` for its end, in addition to `timeout`, the budget in seconds. Pass `token` only to repeat
        your own claim; two workers must never share one.

        `keep_alive` extends the claim until its end, for at most `max_hold` (1 hour). If it is lost nevertheless,
        `lost` becomes True and `on_lost` receives the claim in the thread that extends all claims: it must not block.

        A claim in doubt, because the call failed or was interrupted, is released in the background, unless you passed
        its token.

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
        options = BlockOptions(self._release_on if release_on is None else release_on, keep_alive, max_hold, on_lost)
        try:
            grant = self._run(self._calls.claim(request, wait=wait, budget_s=timeout))
        except BaseException as error:
            # A caller with its own token may repeat the claim, and must not lose it then.
            if token is None and may_have_claimed(error):
                self._in_background(self._calls.undo(request), request.transaction_id)
            raise
        return Claim(self, grant, options)

    def get(
        self, transaction_id: str, *, namespace: str | None = None, timeout: float | None = None
    ) -> Transaction | None:
        """Return a transaction without changing it, or None if nobody holds it.

        Raises InvalidRequest, Unavailable or another CallFailed.
        """
        space = self._namespace if namespace is None else namespace
        return self._run(self._calls.get(transaction_id, namespace=space, budget_s=timeout))

    def close(self) -> None:
        """Close the client for good: in-flight and later calls raise ClientClosed.

        Waits up to one budget for claims that are being released in the background.
        """
        self._closed = True
        self._keep_alive.close()
        end = time.monotonic() + self._calls.policy.budget_s
        for thread in list(self._background):
            thread.join(max(0.0, end - time.monotonic()))
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, steps: Steps[T]) -> T:
        if self._closed:
            raise ClientClosed
        return run(steps, self._transport.send, self._transport.pause)

    def _run_to_end(self, steps: Callable[[], Steps[T]], transaction_id: str) -> T:
        """Run steps, and repeat them in the background if the caller is interrupted."""
        try:
            return self._run(steps())
        except BaseException as error:
            if not isinstance(error, Exception):
                self._in_background(steps(), transaction_id)
            raise

    def _in_background(self, steps: Steps[object], transaction_id: str) -> None:
        if self._closed:
            return

        def finish() -> None:
            try:
                run(steps, self._transport.send, self._transport.pause)
            except DedupError as error:
                _LOG.info("could not end the claim of transaction %s: %s", logged_id(transaction_id), error)
            finally:
                self._background.discard(thread)

        # Not a daemon: a process that is interrupted waits for it, up to one budget.
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(finish,), name="dedup-release")
        self._background.add(thread)
        thread.start()
