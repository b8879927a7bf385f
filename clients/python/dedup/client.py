"""The client for blocking code."""

import time
from collections.abc import Sequence
from datetime import datetime
from typing import Protocol, Self, cast

import grpc
from google.protobuf.message import Message

from dedup.calls import Calls, Grant, OnUnavailable, Span, claim_request
from dedup.channels import ChannelOption, channel_options, current_metadata
from dedup.coalescing import Coalescer, may_coalesce
from dedup.error_details import failure_of_call, failure_of_closed_client
from dedup.errors import CallFailed
from dedup.handles import Handle, OnError
from dedup.retries import Retrier, RetryPolicy, Send, Steps, T, run
from dedup.transactions import Transaction
from dedup.v1 import dedup_pb2_grpc


class Transport(Protocol):
    """Takes the steps of a call: a channel to the service, or a fake."""

    def send(self, step: Send) -> Message:
        """Make one attempt. Raises CallFailed if it fails."""

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
        coalesce_delay_s: float | None,
    ) -> None:
        every = channel_options(options)
        self._channel = (
            grpc.insecure_channel(target, every)
            if credentials is None
            else grpc.secure_channel(target, credentials, every)
        )
        self._closed = False
        self._stub = dedup_pb2_grpc.DedupServiceStub(self._channel)
        self._coalescer = None if coalesce_delay_s is None else Coalescer(self._stub, coalesce_delay_s)

    def send(self, step: Send) -> Message:
        """Make one attempt, in a batch with other claims if possible."""
        try:
            return self._send(step)
        except CallFailed as failure:
            if self._closed and failure.code is grpc.StatusCode.CANCELLED:
                raise failure_of_closed_client() from failure
            raise

    def _send(self, step: Send) -> Message:
        if self._coalescer is not None and may_coalesce(step.request):
            return self._coalescer.claim(step.request, step.timeout_s)
        try:
            return cast(
                "Message",
                getattr(self._stub, step.method)(step.request, timeout=step.timeout_s, metadata=current_metadata()),
            )
        except grpc.RpcError as error:
            raise failure_of_call(error) from error

    def pause(self, seconds: float) -> None:
        """Sleep between attempts."""
        time.sleep(seconds)

    def close(self) -> None:
        """Implement Transport."""
        self._closed = True
        self._channel.close()


class Claim(Handle):
    """A granted claim: a context manager that completes or releases it.

    Leaving the block normally completes the claim with `result`. An exception releases or keeps it, depending on
    `on_error`. A claim completed or released inside the block stays as it is.
    """

    def __init__(self, client: "Client", grant: Grant, on_error: OnError) -> None:
        super().__init__(client._calls, grant, on_error)
        self._client = client

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

        Raises NotHeld, Unavailable, another CallFailed, or InvalidRequest if the result is too large; the transaction
        is then completed without it.
        """
        return self._client._run(self._complete(result, ttl, expire_time, timeout))

    def release(self, *, timeout: float | None = None) -> None:
        """Release the claim: the next caller may claim at once. Raises NotHeld or CallFailed."""
        self._client._run(self._release(timeout))

    def extend(
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
        return self._client._run(self._extend(ttl, expire_time, timeout, allow_shortening=allow_shortening))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        self._client._run(self._leave(error))


class Client:
    """A client of a dedup service. It is thread-safe; make one per process.

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
    ) -> Claim:
        """Claim a transaction and return the claim: the caller may do the work.

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
        grant = self._run(self._calls.claim(request, wait=wait, budget_s=timeout))
        return Claim(self, grant, on_error or self._on_error)

    def get(
        self, transaction_id: str, *, namespace: str | None = None, timeout: float | None = None
    ) -> Transaction | None:
        """Return a transaction without changing it, or None if nobody holds it.

        Raises InvalidRequest, Unavailable or another CallFailed.
        """
        space = self._namespace if namespace is None else namespace
        return self._run(self._calls.get(transaction_id, namespace=space, budget_s=timeout))

    def close(self) -> None:
        """Close the channel. In-flight calls fail."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, steps: Steps[T]) -> T:
        return run(steps, self._transport.send, self._transport.pause)
