"""Fakes for tests of code that uses this client: no server, no network, and a controlled clock.

`FakeClient` and `AsyncFakeClient` are the real clients over a `FakeService` in memory.
"""

import contextlib
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from dedup import aio
from dedup.calls import Calls, OnUnavailable, Span, seconds
from dedup.channels import MetadataEntry
from dedup.client import Client
from dedup.errors import CallFailed, InvalidRequest, Unavailable
from dedup.handles import ReleaseOn
from dedup.ids import MAX_TRANSACTION_ID_BYTES, new_claim_token
from dedup.keep_alive import KeepAlive
from dedup.retries import Retrier, RetryPolicy, Send, Steps
from dedup.v1 import dedup_pb2

__all__ = ["AsyncFakeClient", "FakeClient", "FakeService", "Policy"]

DEFAULT_TTL_MS = 60_000
DEFAULT_RETENTION_MS = 24 * 3_600_000
MAX_TTL_MS = 7 * 24 * 3_600_000
MAX_RESULT_BYTES = 4_096

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_NAMESPACE = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
_TOKEN = re.compile(r"[\x20-\x7e]{16,64}")

_Holding = (
    dedup_pb2.CompleteTransactionRequest | dedup_pb2.ReleaseTransactionRequest | dedup_pb2.ExtendTransactionRequest
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The rules of a namespace, as in the policy file of the service; None is the service's default.

    `default_ttl` is the lifetime of a claim that asks for none, `max_ttl` the longest a caller may ask for, and
    `retention` how long a completed transaction is kept. `shadow` grants duplicates and marks them.

    Raises ValueError if a lifetime is not positive or longer than `max_ttl`.
    """

    default_ttl: Span | None = None
    max_ttl: Span | None = None
    retention: Span | None = None
    shadow: bool = False

    def __post_init__(self) -> None:
        for name, ms in (
            ("max_ttl", self._max_ttl_ms),
            ("default_ttl", self._ttl_ms),
            ("retention", self._retention_ms),
        ):
            if not 0 < ms <= self._max_ttl_ms:
                raise ValueError(f"{name} is {ms} ms; it must be between 1 ms and max_ttl, {self._max_ttl_ms} ms")

    @property
    def _max_ttl_ms(self) -> int:
        return _ms(self.max_ttl, MAX_TTL_MS)

    @property
    def _ttl_ms(self) -> int:
        return _ms(self.default_ttl, DEFAULT_TTL_MS)

    @property
    def _retention_ms(self) -> int:
        return _ms(self.retention, min(DEFAULT_RETENTION_MS, self._max_ttl_ms))


def _ms(span: Span | None, default_ms: int) -> int:
    return default_ms if span is None else round(seconds(span) * 1000)


_DEFAULT_POLICY = Policy()


@dataclass(slots=True)
class _Held:
    transaction: dedup_pb2.Transaction
    token: str
    fingerprint: bytes
    expire_time_ms: int


class FakeService:
    """The service in memory, for one process. It is thread-safe.

    Its decisions, token checks, expiries and rejections are the service's. `clock` returns Unix time in seconds.
    `unavailable = True` rejects every call, as without a store. A claim with `wait` is answered at once.

    `policies` has the rules of namespaces; the others have the defaults of `Policy`, unless
    `allow_unknown_namespaces = False` rejects them. `max_result_bytes` limits results.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._advanced_s = 0.0
        self._now_ms = 0
        self._lost_replies = 0
        self._held: dict[tuple[str, str], _Held] = {}
        self._lock = threading.Lock()
        self._keep_alives: weakref.WeakSet[KeepAlive] = weakref.WeakSet()
        self.unavailable = False
        self.policies: dict[str, Policy] = {}
        self.allow_unknown_namespaces = True
        self.max_result_bytes = MAX_RESULT_BYTES
        self.calls: list[tuple[str, Message]] = []
        """Method and request of every attempt."""

    def advance(self, seconds: float) -> None:
        """Move the clock forward. Claims are kept alive, and lost, at their times on the way."""
        while seconds > 0:
            delays_s = [found for each in self._keep_alives if (found := each.delay_s(each.clock())) is not None]
            # At least 1 ms, because smaller steps vanish in the sum.
            step_s = min(seconds, max(0.001, min(delays_s, default=seconds)))
            self._advanced_s += step_s
            seconds -= step_s
            for each in list(self._keep_alives):
                each.run_due()

    def lose_replies(self, count: int = 1) -> None:
        """Execute the next `count` attempts and lose their replies."""
        self._lost_replies = count

    def answer(self, method: str, request: Message) -> Message:
        """Execute one attempt. Raises the CallFailed of the service's error."""
        with self._lock:
            copy = type(request)()
            copy.CopyFrom(request)
            self.calls.append((method, copy))
            if self.unavailable:
                raise Unavailable(
                    "the fake service is set to unavailable",
                    code=grpc.StatusCode.UNAVAILABLE,
                    reason="STORE_UNREACHABLE",
                    applied="no",
                    retry_after_s=0.2,
                )
            # Read once: all times of a call count from one moment.
            self._read_clock()
            reply = self._execute(copy)
            if self._lost_replies:
                self._lost_replies -= 1
                raise Unavailable("the reply was lost", code=grpc.StatusCode.UNAVAILABLE)
            return reply

    def _execute(self, request: Message) -> Message:
        match request:
            case dedup_pb2.ClaimTransactionRequest():
                return self._claim(request)
            case dedup_pb2.CompleteTransactionRequest():
                return self._complete(request)
            case dedup_pb2.ReleaseTransactionRequest():
                return self._release(request)
            case dedup_pb2.ExtendTransactionRequest():
                return self._extend(request)
            case dedup_pb2.GetTransactionRequest():
                return self._get(request)
        raise AssertionError(f"the fake service does not support {type(request).__name__}")

    def _claim(self, request: dedup_pb2.ClaimTransactionRequest) -> dedup_pb2.ClaimTransactionResponse:
        policy = self._policy(request)
        expire_time_ms = self._expire_time_ms(request, policy._ttl_ms)
        _refuse([*_identity_faults(request), *self._expiry_faults(request, policy), *_claim_faults(request)])
        token = request.claim_token or new_claim_token()
        held = self._find(request)
        if held is None:
            held = _Held(
                dedup_pb2.Transaction(
                    transaction_id=request.transaction_id,
                    namespace=request.namespace or "default",
                    state=dedup_pb2.TRANSACTION_STATE_IN_PROGRESS,
                    claimant=request.claimant,
                ),
                token,
                request.payload_fingerprint,
                expire_time_ms,
            )
            held.transaction.claim_time.FromMilliseconds(self._now_ms)
            self._keep(held, expire_time_ms)
            return dedup_pb2.ClaimTransactionResponse(
                outcome=dedup_pb2.CLAIM_OUTCOME_CLAIMED, claim_token=token, transaction=held.transaction
            )
        outcome = dedup_pb2.CLAIM_OUTCOME_DUPLICATE
        if request.payload_fingerprint and held.fingerprint and request.payload_fingerprint != held.fingerprint:
            outcome = dedup_pb2.CLAIM_OUTCOME_PAYLOAD_MISMATCH
        elif held.token == token and held.transaction.state == dedup_pb2.TRANSACTION_STATE_IN_PROGRESS:
            return dedup_pb2.ClaimTransactionResponse(
                outcome=dedup_pb2.CLAIM_OUTCOME_CLAIMED,
                claim_token=token,
                replayed=True,
                transaction=held.transaction,
            )
        if policy.shadow:
            return dedup_pb2.ClaimTransactionResponse(
                outcome=dedup_pb2.CLAIM_OUTCOME_CLAIMED,
                claim_token=token,
                shadow_duplicate=True,
                transaction=held.transaction,
            )
        return dedup_pb2.ClaimTransactionResponse(outcome=outcome, transaction=held.transaction)

    def _complete(self, request: dedup_pb2.CompleteTransactionRequest) -> dedup_pb2.CompleteTransactionResponse:
        policy = self._policy(request)
        expire_time_ms = self._expire_time_ms(request, policy._retention_ms)
        faults = [*_identity_faults(request), *self._expiry_faults(request, policy), *_token_faults(request)]
        if len(request.result) > self.max_result_bytes:
            faults.append(("result", f"has {len(request.result)} bytes; it must have at most {self.max_result_bytes}"))
        _refuse(faults)
        held = self._find(request)
        if held is None or held.token != request.claim_token:
            return dedup_pb2.CompleteTransactionResponse(outcome=dedup_pb2.COMPLETE_OUTCOME_NOT_HELD)
        if held.transaction.state == dedup_pb2.TRANSACTION_STATE_COMPLETED:
            if held.transaction.result != request.result:
                return dedup_pb2.CompleteTransactionResponse(outcome=dedup_pb2.COMPLETE_OUTCOME_NOT_HELD)
        else:
            held.transaction.state = dedup_pb2.TRANSACTION_STATE_COMPLETED
            held.transaction.result = request.result
            held.transaction.completion_time.FromMilliseconds(self._now_ms)
            self._keep(held, expire_time_ms)
        return dedup_pb2.CompleteTransactionResponse(
            outcome=dedup_pb2.COMPLETE_OUTCOME_COMPLETED, transaction=held.transaction
        )

    def _release(self, request: dedup_pb2.ReleaseTransactionRequest) -> dedup_pb2.ReleaseTransactionResponse:
        self._policy(request)
        _refuse([*_identity_faults(request), *_token_faults(request)])
        if self._find_in_progress(request) is None:
            return dedup_pb2.ReleaseTransactionResponse(outcome=dedup_pb2.RELEASE_OUTCOME_NOT_HELD)
        del self._held[request.namespace or "default", request.transaction_id]
        return dedup_pb2.ReleaseTransactionResponse(outcome=dedup_pb2.RELEASE_OUTCOME_RELEASED)

    def _extend(self, request: dedup_pb2.ExtendTransactionRequest) -> dedup_pb2.ExtendTransactionResponse:
        policy = self._policy(request)
        expire_time_ms = self._expire_time_ms(request, policy._ttl_ms)
        _refuse([*_identity_faults(request), *self._expiry_faults(request, policy), *_token_faults(request)])
        held = self._find_in_progress(request)
        if held is None:
            return dedup_pb2.ExtendTransactionResponse(outcome=dedup_pb2.EXTEND_OUTCOME_NOT_HELD)
        if request.allow_shortening or expire_time_ms > held.expire_time_ms:
            self._keep(held, expire_time_ms)
        return dedup_pb2.ExtendTransactionResponse(
            outcome=dedup_pb2.EXTEND_OUTCOME_EXTENDED, transaction=held.transaction
        )

    def _get(self, request: dedup_pb2.GetTransactionRequest) -> dedup_pb2.GetTransactionResponse:
        self._policy(request)
        _refuse(list(_identity_faults(request)))
        held = self._find(request)
        if held is None:
            raise CallFailed(
                "nobody holds the transaction",
                code=grpc.StatusCode.NOT_FOUND,
                reason="TRANSACTION_NOT_FOUND",
                applied="no",
            )
        return dedup_pb2.GetTransactionResponse(transaction=held.transaction)

    def _policy(
        self, request: dedup_pb2.ClaimTransactionRequest | dedup_pb2.GetTransactionRequest | _Holding
    ) -> Policy:
        """Return the rules for a request. Raises InvalidRequest for an unknown namespace where those are rejected."""
        policy = self.policies.get(request.namespace or "default")
        if policy is None and not self.allow_unknown_namespaces:
            _refuse([("namespace", "is not known here: add it to the policies of the fake service")])
        return policy or _DEFAULT_POLICY

    def _read_clock(self) -> None:
        self._now_ms = int((self._clock() + self._advanced_s) * 1000)

    def _find(
        self, request: dedup_pb2.ClaimTransactionRequest | dedup_pb2.GetTransactionRequest | _Holding
    ) -> _Held | None:
        key = (request.namespace or "default", request.transaction_id)
        held = self._held.get(key)
        if held is not None and held.expire_time_ms <= self._now_ms:
            del self._held[key]
            return None
        return held

    def _find_in_progress(self, request: _Holding) -> _Held | None:
        held = self._find(request)
        if held is None or held.token != request.claim_token:
            return None
        return held if held.transaction.state == dedup_pb2.TRANSACTION_STATE_IN_PROGRESS else None

    def _keep(self, held: _Held, expire_time_ms: int) -> None:
        held.expire_time_ms = expire_time_ms
        held.transaction.expire_time.FromMilliseconds(expire_time_ms)
        self._held[held.transaction.namespace, held.transaction.transaction_id] = held

    def _expire_time_ms(
        self,
        request: dedup_pb2.ClaimTransactionRequest
        | dedup_pb2.CompleteTransactionRequest
        | dedup_pb2.ExtendTransactionRequest,
        default_ms: int,
    ) -> int:
        if request.HasField("expire_time"):
            return request.expire_time.ToMilliseconds()
        return self._now_ms + (request.ttl.ToMilliseconds() if request.HasField("ttl") else default_ms)

    def _expiry_faults(
        self,
        request: dedup_pb2.ClaimTransactionRequest
        | dedup_pb2.CompleteTransactionRequest
        | dedup_pb2.ExtendTransactionRequest,
        policy: Policy,
    ) -> Iterator[tuple[str, str]]:
        max_ttl_ms = policy._max_ttl_ms
        if request.HasField("ttl"):
            yield from _ttl_faults(request.ttl, max_ttl_ms)
        if request.HasField("expire_time"):
            left_ms = request.expire_time.ToMilliseconds() - self._now_ms
            if left_ms <= 0:
                yield "expire_time", "is in the past"
            elif left_ms > max_ttl_ms:
                yield "expire_time", f"is later than the maximum ttl of {max_ttl_ms} ms allows"


class FakeClient(Client):
    """A `dedup.Client` over a FakeService, in `service`. Several clients may share one."""

    def __init__(
        self,
        service: FakeService | None = None,
        *,
        namespace: str = "",
        claimant: str = "",
        timeout: float = 2.0,
        on_unavailable: OnUnavailable = "deny",
        release_on: ReleaseOn = (),
    ) -> None:
        self.service = service or FakeService()
        transport = _Transport(self.service)
        retrier = Retrier(RetryPolicy(budget_s=timeout), clock=transport.now)
        keep_alive = _FakeKeepAlive(self.service, transport)
        calls = Calls(retrier, on_unavailable)
        self._set_up(transport, keep_alive, calls, namespace=namespace, claimant=claimant, release_on=release_on)

    def _in_background(self, steps: Steps[object], _transaction_id: str) -> None:
        # At once, so that tests know when.
        with contextlib.suppress(CallFailed):
            self._run(steps)


class AsyncFakeClient(aio.Client):
    """A `dedup.aio.Client` over a FakeService, in `service`. It may share one with a FakeClient."""

    def __init__(
        self,
        service: FakeService | None = None,
        *,
        namespace: str = "",
        claimant: str = "",
        timeout: float = 2.0,
        on_unavailable: OnUnavailable = "deny",
        release_on: ReleaseOn = (),
    ) -> None:
        self.service = service or FakeService()
        transport = _Transport(self.service)
        retrier = Retrier(RetryPolicy(budget_s=timeout), clock=transport.now)
        keep_alive = _FakeKeepAlive(self.service, transport)
        calls = Calls(retrier, on_unavailable)
        over = _AsyncTransport(transport)
        self._set_up(over, keep_alive, calls, namespace=namespace, claimant=claimant, release_on=release_on)


class _FakeKeepAlive(KeepAlive):
    """Runs while the fake's clock moves."""

    def __init__(self, service: FakeService, transport: "_Transport") -> None:
        super().__init__(RetryPolicy().attempt_timeout_s, clock=transport.now)
        service._keep_alives.add(self)


class _Transport:
    """Answers from memory. Pauses take no time but count against the budget."""

    def __init__(self, service: FakeService) -> None:
        self._service = service
        self._paused_s = 0.0

    def now(self) -> float:
        return self._service._advanced_s + self._paused_s

    def start(
        self, step: Send, _metadata: tuple[MetadataEntry, ...], done: Callable[[Message | CallFailed], None]
    ) -> None:
        answer: Message | CallFailed
        try:
            answer = self.send(step)
        except CallFailed as failure:
            answer = failure
        done(answer)

    def send(self, step: Send) -> Message:
        return self._service.answer(step.method, step.request)

    def pause(self, seconds: float) -> None:
        self._paused_s += seconds

    def close(self) -> None:
        """Implement Transport."""


class _AsyncTransport:
    def __init__(self, inner: _Transport) -> None:
        self._inner = inner
        self.start = inner.start

    def is_here(self) -> bool:
        return True

    async def send(self, step: Send) -> Message:
        return self._inner.send(step)

    async def pause(self, seconds: float) -> None:
        self._inner.pause(seconds)

    async def close(self) -> None:
        """Implement Transport."""


def _ttl_faults(ttl: Duration, max_ttl_ms: int) -> Iterator[tuple[str, str]]:
    if ttl.ToMilliseconds() <= 0:
        yield "ttl", "must be at least 1 ms"
    elif ttl.ToMilliseconds() > max_ttl_ms:
        yield "ttl", f"is longer than the maximum of {max_ttl_ms} ms"


def _identity_faults(
    request: dedup_pb2.ClaimTransactionRequest | dedup_pb2.GetTransactionRequest | _Holding,
) -> Iterator[tuple[str, str]]:
    size = len(request.transaction_id.encode())
    if not 1 <= size <= MAX_TRANSACTION_ID_BYTES:
        yield "transaction_id", f"has {size} bytes of UTF-8; it must have 1 to {MAX_TRANSACTION_ID_BYTES}"
    elif _CONTROL.search(request.transaction_id):
        yield "transaction_id", "has a control character"
    if request.namespace and not _NAMESPACE.fullmatch(request.namespace):
        yield "namespace", "must match [a-z0-9][a-z0-9_.-]{0,62}"


def _claim_faults(request: dedup_pb2.ClaimTransactionRequest) -> Iterator[tuple[str, str]]:
    if request.claim_token:
        yield from _token_faults(request)
    if len(request.claimant.encode()) > 256 or _CONTROL.search(request.claimant):
        yield "claimant", "must be at most 256 bytes of UTF-8 without control characters"
    if len(request.payload_fingerprint) > 64:
        yield "payload_fingerprint", f"has {len(request.payload_fingerprint)} bytes; it must have at most 64"
    if not 0 <= request.wait.ToMilliseconds() <= 300_000:
        yield "wait", "must be 0 to 5 minutes"


def _token_faults(request: dedup_pb2.ClaimTransactionRequest | _Holding) -> Iterator[tuple[str, str]]:
    if not _TOKEN.fullmatch(request.claim_token):
        yield "claim_token", "must be 16 to 64 printable ASCII characters"


def _refuse(faults: list[tuple[str, str]]) -> None:
    if faults:
        raise InvalidRequest("; ".join(f"{field}: {what}" for field, what in faults), violations=dict(faults))
