"""Server interceptors that handle a call with an idempotency key once and replay its reply to the others.

The key is the metadata entry `idempotency-key`. Each method has its own keys. Only unary calls with a key are guarded;
the interceptors pass on all others unchanged. A call that fails releases its claim.

| a duplicate | ends with |
|---|---|
| of a completed call | the first reply, or ALREADY_EXISTS if that was too large to store |
| of a call in progress | ABORTED |
| with another request under the same key | FAILED_PRECONDITION |
| while the dedup service is unavailable | UNAVAILABLE |
"""

# Generic only in gRPC's type stubs.
from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast

import grpc
import grpc.aio

from dedup import aio
from dedup.calls import Span
from dedup.client import Client
from dedup.errors import DedupError, DuplicateTransaction, InvalidRequest, PayloadMismatch
from dedup.handles import Handle, log_failed_ending
from dedup.idempotency import MAX_KEPT_BYTES
from dedup.ids import transaction_id

KEY = "idempotency-key"

# Tells an empty reply from no reply.
_STORED = b"\x01"


@dataclass(frozen=True, slots=True)
class _Rules:
    ttl: Span | None
    retention: Span | None
    namespace: str | None


class DedupInterceptor(grpc.ServerInterceptor):
    """Interceptor for `grpc.server`. `ttl` limits a call's duration; `retention` is how long it is replayed."""

    def __init__(
        self,
        client: Client,
        *,
        ttl: Span | None = None,
        retention: Span | None = None,
        namespace: str | None = None,
    ) -> None:
        self._client = client
        self._rules = _Rules(ttl, retention, namespace)

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Guard the handler of a call that has a key."""
        handler = continuation(handler_call_details)
        key = _key_of(handler_call_details)
        if handler is None or key is None or handler.unary_unary is None:
            return handler
        parts = (handler_call_details.method, key)

        work = handler.unary_unary

        def guarded(raw: bytes, context: grpc.ServicerContext) -> bytes:
            try:
                claim = self._client.claim(**_claim_options(self._rules, parts, raw))
            except (DedupError, ValueError) as error:
                stored = _stored_reply(error)
                if stored is None:
                    context.abort(*_status_of(error))
                return stored
            with claim:
                claim.retention = self._rules.retention
                reply = _bytes(handler, work(_message(handler, raw), context))
                failed = _failed(context)
                if not failed:
                    _keep(claim, reply)
                # Only logged: the work is done, so its reply is sent.
                try:
                    claim.release() if failed else claim.complete()
                except DedupError as error:
                    log_failed_ending(claim, error)
            return reply

        return grpc.unary_unary_rpc_method_handler(guarded)


class AsyncDedupInterceptor(grpc.aio.ServerInterceptor):
    """Interceptor for `grpc.aio.server` with coroutine handlers."""

    def __init__(
        self,
        client: aio.Client,
        *,
        ttl: Span | None = None,
        retention: Span | None = None,
        namespace: str | None = None,
    ) -> None:
        self._client = client
        self._rules = _Rules(ttl, retention, namespace)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Guard the handler of a call that has a key."""
        handler = await continuation(handler_call_details)
        key = _key_of(handler_call_details)
        if handler is None or key is None or handler.unary_unary is None:
            return handler
        parts = (handler_call_details.method, key)
        work = cast("Callable[..., Awaitable[Any]]", handler.unary_unary)

        async def guarded(raw: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
            try:
                claim = await self._client.claim(**_claim_options(self._rules, parts, raw))
            except (DedupError, ValueError) as error:
                stored = _stored_reply(error)
                if stored is None:
                    await context.abort(*_status_of(error))
                return stored
            async with claim:
                claim.retention = self._rules.retention
                reply = _bytes(handler, await work(_message(handler, raw), context))
                failed = _failed(context)
                if not failed:
                    _keep(claim, reply)
                # Only logged: the work is done, so its reply is sent.
                try:
                    await (claim.release() if failed else claim.complete())
                except DedupError as error:
                    log_failed_ending(claim, error)
            return reply

        return grpc.unary_unary_rpc_method_handler(cast("Any", guarded))


def _key_of(details: grpc.HandlerCallDetails) -> str | None:
    # A sequence of pairs; the type stubs declare one pair.
    for name, value in cast("Any", details.invocation_metadata or ()):
        if name == KEY:
            return str(value)
    return None


def _claim_options(rules: _Rules, parts: tuple[str, str], raw: bytes) -> dict[str, Any]:
    if not parts[1]:
        raise ValueError(f"the metadata entry {KEY} is empty")
    return {
        "transaction_id": transaction_id(*parts),
        "ttl": rules.ttl,
        "namespace": rules.namespace,
        "fingerprint": hashlib.sha256(raw).digest(),
        "release_on": (Exception,),
    }


def _keep(claim: Handle, reply: bytes) -> None:
    if len(reply) < MAX_KEPT_BYTES:
        claim.result = _STORED + reply


def _message(handler: grpc.RpcMethodHandler[Any, Any], raw: bytes) -> object:
    return handler.request_deserializer(raw) if handler.request_deserializer is not None else raw


def _bytes(handler: grpc.RpcMethodHandler[Any, Any], reply: Any) -> bytes:
    packed: bytes = handler.response_serializer(reply) if handler.response_serializer is not None else reply
    return packed


def _failed(context: Any) -> bool:
    """Return whether the handler set a status other than OK without raising."""
    return context.code() not in (None, grpc.StatusCode.OK, grpc.StatusCode.OK.value[0])


def _stored_reply(error: Exception) -> bytes | None:
    if isinstance(error, DuplicateTransaction) and error.holder.result.startswith(_STORED):
        return error.holder.result.removeprefix(_STORED)
    return None


def _status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """Return the status for a claim's `error`. Re-raises InvalidRequest: the guard is misconfigured."""
    match error:
        case DuplicateTransaction(holder=holder) if holder.completed:
            return grpc.StatusCode.ALREADY_EXISTS, "a call with this idempotency key is completed, its reply not stored"
        case DuplicateTransaction():
            return grpc.StatusCode.ABORTED, "a call with this idempotency key is in progress"
        case PayloadMismatch():
            return grpc.StatusCode.FAILED_PRECONDITION, "this idempotency key was used with another request"
        case InvalidRequest():
            raise error
        case DedupError():
            return grpc.StatusCode.UNAVAILABLE, "the check for duplicate calls is unavailable"
    return grpc.StatusCode.INVALID_ARGUMENT, str(error)
