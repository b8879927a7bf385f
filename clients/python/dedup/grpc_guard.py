"""Server interceptors: a call with an idempotency key is handled once, and its reply is replayed to the others.

The key is the metadata entry `idempotency-key`, and a key of one method never meets that of another. Only calls with
one request and one reply are guarded; those without a key go through untouched. A duplicate of work in progress ends
with ABORTED, another request under the same key with FAILED_PRECONDITION, and a dedup service that is away with
UNAVAILABLE. A call that ends with an error releases its claim.
"""

# gRPC's classes have type parameters in their stubs alone.
from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast

import grpc
import grpc.aio

from dedup import aio
from dedup.client import Client
from dedup.errors import DedupError, DuplicateTransaction, InvalidRequest, PayloadMismatch
from dedup.handles import Handle, log_failed_ending
from dedup.idempotency import MAX_KEPT_BYTES
from dedup.ids import transaction_id
from dedup.requests import Span

KEY = "idempotency-key"

# Before a kept reply, so that an empty reply is not taken for none.
_KEPT = b"\x01"


@dataclass(frozen=True, slots=True)
class _Rules:
    ttl: Span | None
    retention: Span | None
    namespace: str | None


class DedupInterceptor(grpc.ServerInterceptor):
    """The interceptor of a `grpc.server`. `ttl` is how long a call may take, `retention` how long it is replayed."""

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
        """Put the guard around the handler of a call that has a key."""
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
                kept = _kept_reply(error)
                if kept is None:
                    context.abort(*_status_of(error))
                return kept
            with claim:
                _prepare(claim, self._rules)
                reply = _bytes(handler, work(_message(handler, raw), context))
                failed = _failed(context)
                if not failed:
                    _keep(claim, reply)
                try:
                    claim.release() if failed else claim.complete()
                except DedupError as error:
                    log_failed_ending(claim, error)
            return reply

        return grpc.unary_unary_rpc_method_handler(guarded)


class AsyncDedupInterceptor(grpc.aio.ServerInterceptor):
    """The interceptor of a `grpc.aio.server`, whose handlers are coroutine functions; otherwise the same."""

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
        """Put the guard around the handler of a call that has a key."""
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
                kept = _kept_reply(error)
                if kept is None:
                    await context.abort(*_status_of(error))
                return kept
            async with claim:
                _prepare(claim, self._rules)
                reply = _bytes(handler, await work(_message(handler, raw), context))
                failed = _failed(context)
                if not failed:
                    _keep(claim, reply)
                try:
                    await (claim.release() if failed else claim.complete())
                except DedupError as error:
                    log_failed_ending(claim, error)
            return reply

        return grpc.unary_unary_rpc_method_handler(cast("Any", guarded))


def _key_of(details: grpc.HandlerCallDetails) -> str | None:
    # A sequence of pairs, which the type stubs take for a single one.
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
    }


def _prepare(claim: Handle, rules: _Rules) -> None:
    claim.retention = rules.retention


def _keep(claim: Handle, reply: bytes) -> None:
    if len(reply) < MAX_KEPT_BYTES:
        claim.result = _KEPT + reply


def _message(handler: grpc.RpcMethodHandler[Any, Any], raw: bytes) -> object:
    return handler.request_deserializer(raw) if handler.request_deserializer is not None else raw


def _bytes(handler: grpc.RpcMethodHandler[Any, Any], reply: Any) -> bytes:
    packed: bytes = handler.response_serializer(reply) if handler.response_serializer is not None else reply
    return packed


def _failed(context: Any) -> bool:
    """Whether the handler set a status that is not OK, which it may do without raising."""
    return context.code() not in (None, grpc.StatusCode.OK, grpc.StatusCode.OK.value[0])


def _kept_reply(error: Exception) -> bytes | None:
    """Return the reply of completed work, or None when there is none to replay."""
    if isinstance(error, DuplicateTransaction) and error.holder.result.startswith(_KEPT):
        return error.holder.result.removeprefix(_KEPT)
    return None


def _status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """Return the status of a call whose claim raised `error`; one that shows a wrong set-up is raised."""
    match error:
        case DuplicateTransaction(holder=holder) if holder.completed:
            return grpc.StatusCode.ALREADY_EXISTS, "a call with this idempotency key is completed, its reply not kept"
        case DuplicateTransaction():
            return grpc.StatusCode.ABORTED, "a call with this idempotency key is in progress"
        case PayloadMismatch():
            return grpc.StatusCode.FAILED_PRECONDITION, "this idempotency key was used with another request"
        case InvalidRequest():
            raise error
        case DedupError():
            return grpc.StatusCode.UNAVAILABLE, "nobody can tell now whether this call is a duplicate"
    return grpc.StatusCode.INVALID_ARGUMENT, str(error)
