"""The rpcs of the contract over the claim service."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, TypeVar

import grpc

from dedup.v1 import dedup_pb2
from dedup_service.api.authorization import Authorization
from dedup_service.api.decoding import batch_violation
from dedup_service.api.endpoint import MAX_REQUEST_BYTES, Admission, Endpoint, Handler
from dedup_service.api.errors import error_reply
from dedup_service.api.messages import (
    batched_claim_request,
    claim_request,
    claim_response,
    complete_request,
    extend_request,
    fill_claim_response,
    release_request,
    transaction_message,
)
from dedup_service.claims import (
    DEFAULT_NAMESPACE,
    ClaimAnswer,
    ClaimRequest,
    ClaimService,
    InvalidRequest,
)
from dedup_service.observability.calls import Call, CallObserver, Failure

# 1,000 claims with every field at its limit have 988 kB.
_MAX_BATCH_BYTES = 1024 * 1024 + MAX_REQUEST_BYTES

# Part of the caller's time that is kept for the claim at the end of a wait: a tenth of it, at most a second.
_LAST_CLAIM_SHARE = 0.1
_LAST_CLAIM_MAX_S = 1.0

# ... and for the answers to the claims of a batch that have reached the store: a quarter of it, at most a second.
_ANSWERS_SHARE = 0.25
_ANSWERS_MAX_S = 1.0

# A rejected claim of a batch takes about 50 µs.
_ITEMS_A_TURN = 100

T = TypeVar("T")

_SERVICE = dedup_pb2.DESCRIPTOR.services_by_name["DedupService"]
SERVICE_NAME = _SERVICE.full_name
METHODS = tuple(method.name for method in _SERVICE.methods)
# The field to blame for a request over its limit, where one field can be that large.
_LARGE_FIELDS = {"CompleteTransaction": "result", "BatchClaimTransactions": "requests"}
_HOLDER_METHODS = ("CompleteTransaction", "ReleaseTransaction", "ExtendTransaction")


class DedupServicer:
    """Answers the rpcs, and notes in `call` what observers should know; the endpoint turns exceptions into statuses."""

    def __init__(self, claims: ClaimService) -> None:
        self._claims = claims
        self.max_bytes = {
            "BatchClaimTransactions": _MAX_BATCH_BYTES,
            "CompleteTransaction": claims.max_result_bytes + MAX_REQUEST_BYTES,
        }
        """The limit on a request, by method; MAX_REQUEST_BYTES for the others."""

    async def claim_transaction(
        self, request: dedup_pb2.ClaimTransactionRequest, call: Call, budget_s: float | None
    ) -> dedup_pb2.ClaimTransactionResponse:
        """Serve ClaimTransaction."""
        namespace = _note_subject(call, request)
        claim = claim_request(request)
        call.claims = ((namespace, None),)
        if claim.wait_ms > 0 and budget_s is not None:
            last_claim_s = min(budget_s * _LAST_CLAIM_SHARE, _LAST_CLAIM_MAX_S)
            claim = claim._replace(wait_ms=min(claim.wait_ms, int((budget_s - last_claim_s) * 1_000)))
        answer = await self._claims.claim(claim, call.caller)
        call.claims = ((namespace, answer),)
        call.outcome = _outcome(answer)
        return claim_response(answer)

    async def complete_transaction(
        self, request: dedup_pb2.CompleteTransactionRequest, call: Call, _: float | None
    ) -> dedup_pb2.CompleteTransactionResponse:
        """Serve CompleteTransaction."""
        _note_subject(call, request)
        completed = await self._claims.complete(complete_request(request), call.caller)
        if completed is None:
            call.outcome = "NOT_HELD"
            return dedup_pb2.CompleteTransactionResponse(outcome=dedup_pb2.COMPLETE_OUTCOME_NOT_HELD)
        call.outcome = "COMPLETED"
        return dedup_pb2.CompleteTransactionResponse(
            outcome=dedup_pb2.COMPLETE_OUTCOME_COMPLETED, transaction=transaction_message(completed)
        )

    async def release_transaction(
        self, request: dedup_pb2.ReleaseTransactionRequest, call: Call, _: float | None
    ) -> dedup_pb2.ReleaseTransactionResponse:
        """Serve ReleaseTransaction."""
        _note_subject(call, request)
        if await self._claims.release(release_request(request), call.caller):
            call.outcome = "RELEASED"
            return dedup_pb2.ReleaseTransactionResponse(outcome=dedup_pb2.RELEASE_OUTCOME_RELEASED)
        call.outcome = "NOT_HELD"
        return dedup_pb2.ReleaseTransactionResponse(outcome=dedup_pb2.RELEASE_OUTCOME_NOT_HELD)

    async def extend_transaction(
        self, request: dedup_pb2.ExtendTransactionRequest, call: Call, _: float | None
    ) -> dedup_pb2.ExtendTransactionResponse:
        """Serve ExtendTransaction."""
        _note_subject(call, request)
        extended = await self._claims.extend(extend_request(request), call.caller)
        if extended is None:
            call.outcome = "NOT_HELD"
            return dedup_pb2.ExtendTransactionResponse(outcome=dedup_pb2.EXTEND_OUTCOME_NOT_HELD)
        call.outcome = "EXTENDED"
        return dedup_pb2.ExtendTransactionResponse(
            outcome=dedup_pb2.EXTEND_OUTCOME_EXTENDED, transaction=transaction_message(extended)
        )

    async def get_transaction(
        self, request: dedup_pb2.GetTransactionRequest, call: Call, _: float | None
    ) -> dedup_pb2.GetTransactionResponse:
        """Serve GetTransaction."""
        namespace = _note_subject(call, request)
        transaction = await self._claims.get(namespace, request.transaction_id, call.caller)
        return dedup_pb2.GetTransactionResponse(transaction=transaction_message(transaction))

    async def batch_claim_transactions(
        self, request: dedup_pb2.BatchClaimTransactionsRequest, call: Call, budget_s: float | None
    ) -> dedup_pb2.BatchClaimTransactionsResponse:
        """Serve BatchClaimTransactions: the entries reach the store in their order."""
        if not request.requests:
            raise InvalidRequest(batch_violation("requests", 0))
        read = [_read(entry) async for entry in _in_turns(request.requests)]
        asked = [one for one in read if isinstance(one, ClaimRequest)]
        call.claims = [(claim.namespace, None) for claim in asked]
        wait_s = None if budget_s is None else budget_s - min(budget_s * _ANSWERS_SHARE, _ANSWERS_MAX_S)
        answers = await self._claims.claim_all(asked, call.caller, wait_s)
        call.claims = [
            (claim.namespace, answer if isinstance(answer, ClaimAnswer) else None)
            for claim, answer in zip(asked, answers, strict=True)
        ]
        in_order = iter(answers)
        entries = [next(in_order) if isinstance(one, ClaimRequest) else one for one in read]
        call.outcome = _outcomes(entries)
        reply = dedup_pb2.BatchClaimTransactionsResponse()
        failures: list[Failure] = []
        async for answer in _in_turns(entries):
            entry = reply.entries.add()
            if isinstance(answer, ClaimAnswer):
                fill_claim_response(entry.response, answer)
            else:
                error = error_reply(answer)
                failures.append(error.failure)
                entry.error.CopyFrom(error.status())
        call.failed_entries = failures
        return reply


_SingleRequest = (
    dedup_pb2.ClaimTransactionRequest
    | dedup_pb2.CompleteTransactionRequest
    | dedup_pb2.ReleaseTransactionRequest
    | dedup_pb2.ExtendTransactionRequest
    | dedup_pb2.GetTransactionRequest
)


def _note_subject(call: Call, request: _SingleRequest) -> str:
    call.transaction_id = request.transaction_id
    call.namespace = namespace = request.namespace or DEFAULT_NAMESPACE
    return namespace


def _outcome(answer: ClaimAnswer) -> str:
    return "SHADOW_DUPLICATE" if answer.shadow_duplicate else answer.outcome.value


def _outcomes(entries: Sequence[ClaimAnswer | Exception]) -> str:
    counts = Counter(_outcome(entry) if isinstance(entry, ClaimAnswer) else "ERROR" for entry in entries)
    return " ".join(f"{outcome}={count}" for outcome, count in sorted(counts.items()))


def _read(entry: dedup_pb2.ClaimTransactionRequest) -> ClaimRequest | Exception:
    try:
        return batched_claim_request(entry)
    except Exception as error:  # noqa: BLE001 - a fault of one entry must not fail the others
        return error


def add_to_server(
    server: grpc.aio.Server,
    servicer: DedupServicer,
    observe: Callable[[str], CallObserver],
    admission: Admission,
    authorization: Authorization | None = None,
) -> None:
    """Register the service with a server, each rpc inside its endpoint; `observe` returns the observer of an rpc.

    The endpoints take and return bytes, so that decoding happens inside the guard: gRPC would answer an undecodable
    message with the text of the exception.
    """
    handlers: dict[str, Handler[Any]] = {
        "ClaimTransaction": servicer.claim_transaction,
        "CompleteTransaction": servicer.complete_transaction,
        "ReleaseTransaction": servicer.release_transaction,
        "ExtendTransaction": servicer.extend_transaction,
        "GetTransaction": servicer.get_transaction,
        "BatchClaimTransactions": servicer.batch_claim_transactions,
    }
    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
    for method in _SERVICE.methods:
        endpoint = Endpoint(
            method=method.name,
            request_type=getattr(dedup_pb2, method.input_type.name),
            handler=handlers[method.name],
            observer=observe(method.name),
            admission=admission,
            authorization=authorization,
            may_change=method.name != "GetTransaction",
            holder=method.name in _HOLDER_METHODS,
            max_bytes=servicer.max_bytes.get(method.name, MAX_REQUEST_BYTES),
            large_field=_LARGE_FIELDS.get(method.name, "request"),
        )
        methods[method.name] = grpc.unary_unary_rpc_method_handler(endpoint.serve)
    # In both ways, as generated code does: grpcio serves the first, and the native engine is fast with the second.
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, methods),))
    server.add_registered_method_handlers(SERVICE_NAME, methods)


async def _in_turns(items: Iterable[T]) -> AsyncIterator[T]:
    """Yield the items, and let the event loop serve others after every hundredth."""
    for number, item in enumerate(items, 1):
        yield item
        if number % _ITEMS_A_TURN == 0:
            await asyncio.sleep(0)
