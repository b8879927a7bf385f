"""Server interceptors that handle a call with an idempotency key once and replay its reply to the others.

The key is the metadata entry `idempotency-key`. Each method has its own keys. Only unary calls with a key are guarded;
the interceptors pass on all others unchanged.
"""

# Generic only in gRPC's type stubs.
from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack, cast

import grpc
import grpc.aio
from google.rpc import status_pb2

from dedup import aio
from dedup.calls import Span
from dedup.client import Client
from dedup.errors import DedupError, DuplicateTransaction
from dedup.grpc_profile import (
    KEY_METADATA,
    NOT_KEPT,
    REPLAYED_METADATA,
    decode,
    encode,
    fingerprint,
    identity,
    outcome_of,
    refusal_of,
)
from dedup.http_profile import InvalidKey, Outcome
from dedup.idempotency import end, end_async, handling
from dedup.stored_response import MAX_STORED_BYTES

_CODES = {code.value[0]: code for code in grpc.StatusCode}
_REPLAYED = ((REPLAYED_METADATA, "true"),)


class GrpcOptions(TypedDict, total=False):
    """The options of both interceptors; `GrpcRules` describes them."""

    caller: Callable[[Any], str] | None
    ttl: Span | None
    retention: Span | None
    namespace: str | None
    wait: Span | None
    max_stored_bytes: int
    outcome: Callable[[grpc.StatusCode], Outcome]
    keep_alive: bool
    max_hold: Span | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcRules:
    """How calls are guarded.

    `caller` takes the context of the call and returns who calls; it keeps callers' keys and replies apart. `ttl` is
    the lease, which `keep_alive` extends while the handler runs, up to `max_hold`. `retention` is how long a reply is
    replayed. A duplicate waits up to `wait` for the end of the first call. `outcome` returns what the status of the
    handler does to the claim.
    """

    caller: Callable[[Any], str] | None = None
    ttl: Span | None = None
    retention: Span | None = None
    namespace: str | None = None
    wait: Span | None = None
    max_stored_bytes: int = MAX_STORED_BYTES
    outcome: Callable[[grpc.StatusCode], Outcome] = outcome_of
    keep_alive: bool = True
    max_hold: Span | None = None

    def claim(self, call: _Call, message: object, raw: bytes, context: Any) -> dict[str, Any]:
        """Return the arguments of a call's claim. Raises InvalidKey."""
        caller = self.caller(context) if self.caller is not None else ""
        return {
            "transaction_id": identity(caller, call.method, call.keys),
            "fingerprint": fingerprint(call.method, message, raw),
            "ttl": self.ttl,
            "namespace": self.namespace,
            "wait": self.wait,
            "keep_alive": self.keep_alive,
            "max_hold": self.max_hold,
        }

    def stored(self, code: grpc.StatusCode, reply: object, packed: bytes) -> bytes:
        """Return the stored form of a reply; that of a failed call is not replayed."""
        return encode(reply, packed, limit=self.max_stored_bytes) if code is grpc.StatusCode.OK else NOT_KEPT


class DedupInterceptor(grpc.ServerInterceptor):
    """Interceptor for `grpc.server`. `GrpcRules` describes the options."""

    def __init__(self, client: Client, **options: Unpack[GrpcOptions]) -> None:
        self._client = client
        self._rules = GrpcRules(**options)

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Guard the handler of a call that has a key."""
        handler = continuation(handler_call_details)
        call = _Call.of(handler_call_details, handler)
        if call is None:
            return handler
        return grpc.unary_unary_rpc_method_handler(lambda raw, context: self._handle(call, raw, context))

    def _handle(self, call: _Call, raw: bytes, context: Any) -> bytes:
        message = call.message(raw)
        try:
            claim = self._client.claim(**self._rules.claim(call, message, raw, context))
        except (DedupError, InvalidKey) as error:
            stored = _stored_reply(error)
            if stored is not None:
                context.send_initial_metadata(_REPLAYED)
                return stored
            refusal = refusal_of(error)
            context.set_trailing_metadata(_details(refusal))
            context.abort(_CODES[refusal.code], refusal.message)
            raise  # Not reached: abort raises.

        def end_with(code: grpc.StatusCode, result: Callable[[], bytes] = lambda: NOT_KEPT) -> None:
            end(claim, self._rules.outcome(code), result)

        with handling(claim, self._rules.retention):
            try:
                reply = call.handler.unary_unary(message, _Context(context, end_with))
                packed = call.packed(reply)
            except BaseException:
                end(claim, "keep", bytes)
                raise
        code = _code(context)
        end_with(code, lambda: self._rules.stored(code, reply, packed))
        return packed


class AsyncDedupInterceptor(grpc.aio.ServerInterceptor):
    """Interceptor for `grpc.aio.server` with coroutine handlers. `GrpcRules` describes the options."""

    def __init__(self, client: aio.Client, **options: Unpack[GrpcOptions]) -> None:
        self._client = client
        self._rules = GrpcRules(**options)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Guard the handler of a call that has a key."""
        handler = await continuation(handler_call_details)
        call = _Call.of(handler_call_details, handler)
        if call is None:
            return handler

        async def guarded(raw: bytes, context: Any) -> bytes:
            return await self._handle(call, raw, context)

        return grpc.unary_unary_rpc_method_handler(cast("Any", guarded))

    async def _handle(self, call: _Call, raw: bytes, context: Any) -> bytes:
        message = call.message(raw)
        try:
            claim = await self._client.claim(**self._rules.claim(call, message, raw, context))
        except (DedupError, InvalidKey) as error:
            stored = _stored_reply(error)
            if stored is not None:
                await context.send_initial_metadata(_REPLAYED)
                return stored
            refusal = refusal_of(error)
            await context.abort(_CODES[refusal.code], refusal.message, _details(refusal))
            raise  # Not reached: abort raises.

        async def end_with(code: grpc.StatusCode, result: Callable[[], bytes] = lambda: NOT_KEPT) -> None:
            await end_async(claim, self._rules.outcome(code), result)

        with handling(claim, self._rules.retention):
            try:
                reply = await call.handler.unary_unary(message, _AsyncContext(context, end_with))
                packed = call.packed(reply)
            except BaseException:
                await end_async(claim, "keep", bytes)
                raise
        code = _code(context)
        await end_with(code, lambda: self._rules.stored(code, reply, packed))
        return packed


class _Context:
    """The context of a call, which ends the claim before the handler's status is sent."""

    def __init__(self, context: Any, end_with: Callable[[grpc.StatusCode], Any]) -> None:
        self._context = context
        self._end_with = end_with

    def abort(self, code: grpc.StatusCode, details: str) -> None:
        self._end_with(code)
        self._context.abort(code, details)

    def abort_with_status(self, status: grpc.Status) -> None:
        self._end_with(status.code)
        self._context.abort_with_status(status)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


class _AsyncContext(_Context):
    async def abort(self, code: grpc.StatusCode, *details: Any, **more: Any) -> None:  # type: ignore[override]
        await self._end_with(code)
        await self._context.abort(code, *details, **more)


@dataclass(frozen=True, slots=True)
class _Call:
    """A guarded call: its method, its keys and its handler."""

    method: str
    keys: list[str]
    handler: Any

    @classmethod
    def of(cls, details: grpc.HandlerCallDetails, handler: Any) -> _Call | None:
        """Return the call, or None if it is not guarded."""
        # A sequence of pairs; the type stubs declare one pair.
        pairs = cast("Any", details.invocation_metadata or ())
        keys = [str(value) for name, value in pairs if name == KEY_METADATA]
        if handler is None or handler.unary_unary is None or not keys:
            return None
        return cls(details.method, keys, handler)

    def message(self, raw: bytes) -> object:
        """Return the request."""
        read = self.handler.request_deserializer
        return raw if read is None else read(raw)

    def packed(self, reply: Any) -> bytes:
        """Return the bytes of a reply."""
        write = self.handler.response_serializer
        packed: bytes = reply if write is None else write(reply)
        return packed


def _code(context: Any) -> grpc.StatusCode:
    """Return the status that the handler set without raising."""
    code = context.code()
    return code if isinstance(code, grpc.StatusCode) else _CODES.get(code or 0, grpc.StatusCode.UNKNOWN)


def _stored_reply(error: Exception) -> bytes | None:
    if isinstance(error, DuplicateTransaction) and error.holder.completed:
        return decode(error.holder.result)
    return None


def _details(refusal: status_pb2.Status) -> tuple[tuple[str, bytes]]:
    return (("grpc-status-details-bin", refusal.SerializeToString()),)
