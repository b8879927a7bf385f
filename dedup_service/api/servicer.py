"""The rpcs of the contract over the claim service."""

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc
from google.rpc import status_pb2

from dedup.v1 import dedup_pb2
from dedup_service.claims import Applied, ClaimAnswer, ClaimRequest, ClaimService, FieldViolation, InvalidRequest
from dedup_service.api.admission import Admission
from dedup_service.api.authorization import CallerGate
from dedup_service.api.endpoint import Endpoint, Handler
from dedup_service.api.errors import failure_of, new_incident
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
from dedup_service.observability.call_log import CallLog
from dedup_service.observability.logs import logger

if TYPE_CHECKING:
    # Who does not ask for metrics or traces does not load their library.
    from dedup_service.observability.metrics import Metrics
    from dedup_service.observability.traces import CallTraces

MAX_BATCH = 1_000

# What of the caller's time the claim at the end of a wait may take: a tenth of it, at most a second.
_LAST_CLAIM_SHARE = 0.1
_LAST_CLAIM_MAX_S = 1.0

_SERVICE = dedup_pb2.DESCRIPTOR.services_by_name["DedupService"]
SERVICE_NAME = _SERVICE.full_name
METHODS = tuple(method.name for method in _SERVICE.methods)


class DedupServicer:
    """Answers the rpcs; whatever it raises is turned into a status by the endpoint around it."""

    def __init__(self, claims: ClaimService, metrics: "Metrics | None" = None) -> None:
        self._claims = claims
        self._metrics = metrics

    async def claim_transaction(
        self, request: dedup_pb2.ClaimTransactionRequest, budget_s: float | None
    ) -> dedup_pb2.ClaimTransactionResponse:
        """Serve ClaimTransaction."""
        claim = claim_request(request)
        if claim.wait_ms > 0 and budget_s is not None:
            last_claim_s = min(budget_s * _LAST_CLAIM_SHARE, _LAST_CLAIM_MAX_S)
            claim = claim._replace(wait_ms=min(claim.wait_ms, int((budget_s - last_claim_s) * 1_000)))
        return claim_response(await self._claims.claim(claim))

    async def complete_transaction(
        self, request: dedup_pb2.CompleteTransactionRequest, _: float | None
    ) -> dedup_pb2.CompleteTransactionResponse:
        """Serve CompleteTransaction."""
        completed = await self._claims.complete(complete_request(request))
        if completed is None:
            return dedup_pb2.CompleteTransactionResponse(outcome=dedup_pb2.COMPLETE_OUTCOME_NOT_HELD)
        return dedup_pb2.CompleteTransactionResponse(
            outcome=dedup_pb2.COMPLETE_OUTCOME_COMPLETED, transaction=transaction_message(completed)
        )

    async def release_transaction(
        self, request: dedup_pb2.ReleaseTransactionRequest, _: float | None
    ) -> dedup_pb2.ReleaseTransactionResponse:
        """Serve ReleaseTransaction."""
        released = await self._claims.release(release_request(request))
        outcome = dedup_pb2.RELEASE_OUTCOME_RELEASED if released else dedup_pb2.RELEASE_OUTCOME_NOT_HELD
        return dedup_pb2.ReleaseTransactionResponse(outcome=outcome)

    async def extend_transaction(
        self, request: dedup_pb2.ExtendTransactionRequest, _: float | None
    ) -> dedup_pb2.ExtendTransactionResponse:
        """Serve ExtendTransaction."""
        extended = await self._claims.extend(extend_request(request))
        if extended is None:
            return dedup_pb2.ExtendTransactionResponse(outcome=dedup_pb2.EXTEND_OUTCOME_NOT_HELD)
        return dedup_pb2.ExtendTransactionResponse(
            outcome=dedup_pb2.EXTEND_OUTCOME_EXTENDED, transaction=transaction_message(extended)
        )

    async def get_transaction(
        self, request: dedup_pb2.GetTransactionRequest, _: float | None
    ) -> dedup_pb2.GetTransactionResponse:
        """Serve GetTransaction."""
        transaction = await self._claims.get(request.namespace, request.transaction_id)
        return dedup_pb2.GetTransactionResponse(transaction=transaction_message(transaction))

    async def batch_claim_transactions(
        self, request: dedup_pb2.BatchClaimTransactionsRequest, _: float | None
    ) -> dedup_pb2.BatchClaimTransactionsResponse:
        """Serve BatchClaimTransactions: all entries reach the store in one turn of the loop, in their order."""
        if not 1 <= len(request.requests) <= MAX_BATCH:
            raise InvalidRequest(
                FieldViolation("requests", f"has {len(request.requests)} claims: send 1 to {MAX_BATCH} in one batch")
            )
        read = [_read(entry) for entry in request.requests]
        answers = iter(await self._claims.claim_all([one for one in read if isinstance(one, ClaimRequest)]))
        reply = dedup_pb2.BatchClaimTransactionsResponse()
        for one in read:
            answer = next(answers) if isinstance(one, ClaimRequest) else one
            entry = reply.entries.add()
            if isinstance(answer, ClaimAnswer):
                fill_claim_response(entry.response, answer)
            else:
                entry.error.CopyFrom(self._status_of(answer))
        return reply

    def _status_of(self, error: Exception) -> status_pb2.Status:
        incident = new_incident()
        failure = failure_of(error, incident)
        if self._metrics is not None and failure.applied is Applied.UNKNOWN:
            self._metrics.doubted(failure.reason)
        if failure.code is grpc.StatusCode.INTERNAL:
            logger().error("batch_entry_failed", incident=incident, exc_info=error)
        return failure.status()


def _read(entry: dedup_pb2.ClaimTransactionRequest) -> ClaimRequest | Exception:
    try:
        return batched_claim_request(entry)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with one entry, the others have their answers
        return error


def add_to_server(
    server: grpc.aio.Server,
    servicer: DedupServicer,
    call_log: CallLog,
    admission: Admission,
    metrics: "Metrics | None" = None,
    *,
    gate: CallerGate | None = None,
    traces: "Callable[[str], CallTraces] | None" = None,
) -> None:
    """Register the whole service with a server, each rpc inside its endpoint and behind the gate where there is one.

    `traces` makes the spans of an rpc by its name.

    The endpoints take and give bytes, so that decoding happens inside the guard and not in gRPC, which would answer a
    message that it cannot decode with the text of the exception.
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
            outcome_of=_outcome_reader(method.output_type),
            call_log=call_log,
            admission=admission,
            metrics=metrics.call(method.name) if metrics else None,
            gate=gate,
            traces=traces(method.name) if traces else None,
            may_change=method.name != "GetTransaction",
        )
        methods[method.name] = grpc.unary_unary_rpc_method_handler(endpoint.serve)
    # In both ways, as generated code does it: grpcio serves the first, and the native engine is fast with the second.
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, methods),))
    server.add_registered_method_handlers(SERVICE_NAME, methods)


def _outcome_reader(response: Any) -> Callable[[Any], str]:  # noqa: ANN401 - a descriptor, whose stubs lack a type
    if "entries" in response.fields_by_name:
        return _outcomes_of_batch
    field = response.fields_by_name.get("outcome")
    if field is None:
        return lambda _: ""
    names = {number: value.name.partition("_OUTCOME_")[2] for number, value in field.enum_type.values_by_number.items()}
    if "shadow_duplicate" in response.fields_by_name:
        return lambda reply: "SHADOW_DUPLICATE" if reply.shadow_duplicate else names[reply.outcome]
    return lambda reply: names[reply.outcome]


_outcome_of_claim = _outcome_reader(dedup_pb2.ClaimTransactionResponse.DESCRIPTOR)


def _outcomes_of_batch(reply: dedup_pb2.BatchClaimTransactionsResponse) -> str:
    outcomes = Counter(
        _outcome_of_claim(entry.response) if entry.HasField("response") else "ERROR" for entry in reply.entries
    )
    return " ".join(f"{outcome}={count}" for outcome, count in sorted(outcomes.items()))
