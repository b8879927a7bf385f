"""The rpcs of the contract over the claim service."""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import Message

from dedup.v1 import dedup_pb2
from dedup_service.claims import ClaimService, FieldViolation, InvalidRequest
from dedup_service.servicer.admission import Admission
from dedup_service.servicer.endpoint import Endpoint
from dedup_service.servicer.error_table import NotServed
from dedup_service.servicer.messages import claim_request, claim_response, milliseconds, transaction_message
from dedup_service.telemetry.call_log import CallLog

SERVICE_NAME = dedup_pb2.DESCRIPTOR.services_by_name["DedupService"].full_name


class DedupServicer:
    """Answers the rpcs; whatever it raises is turned into a status by the endpoint around it."""

    def __init__(self, claims: ClaimService) -> None:
        self._claims = claims

    async def claim_transaction(self, request: dedup_pb2.ClaimTransactionRequest) -> dedup_pb2.ClaimTransactionResponse:
        """Serve ClaimTransaction."""
        if wait_ms := milliseconds("wait", request.wait):
            if wait_ms < 0:
                raise InvalidRequest(FieldViolation("wait", "is negative: leave it out in order not to wait"))
            raise NotServed("this version cannot wait for the end of a duplicate's work: send the claim without `wait`")
        return claim_response(await self._claims.claim(claim_request(request)))

    async def get_transaction(self, request: dedup_pb2.GetTransactionRequest) -> dedup_pb2.GetTransactionResponse:
        """Serve GetTransaction."""
        transaction = await self._claims.get(request.namespace, request.transaction_id)
        return dedup_pb2.GetTransactionResponse(transaction=transaction_message(transaction))


def generic_handler(servicer: DedupServicer, call_log: CallLog, admission: Admission) -> grpc.GenericRpcHandler:
    """Return the whole service as gRPC wants it, each rpc inside its endpoint.

    The endpoints take and give bytes, so that decoding happens inside the guard and not in gRPC, which would answer a
    message that it cannot decode with the text of the exception.
    """
    handlers: dict[str, Callable[[Any], Awaitable[Message]]] = {
        "ClaimTransaction": servicer.claim_transaction,
        "GetTransaction": servicer.get_transaction,
    }
    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
    for method in dedup_pb2.DESCRIPTOR.services_by_name["DedupService"].methods:
        endpoint = Endpoint(
            method=method.name,
            request_type=getattr(dedup_pb2, method.input_type.name),
            handler=handlers.get(method.name) or _not_served(method.name),
            outcome_of=_outcome_reader(method.output_type),
            call_log=call_log,
            admission=admission,
        )
        methods[method.name] = grpc.unary_unary_rpc_method_handler(endpoint.serve)
    return grpc.method_handlers_generic_handler(SERVICE_NAME, methods)


def _not_served(method: str) -> Callable[[Message], Awaitable[Message]]:
    async def refuse(_: Message) -> Message:
        raise NotServed(f"{method} is part of the contract, and this version of the server does not serve it yet")

    return refuse


def _outcome_reader(response: Any) -> Callable[[Any], str]:  # noqa: ANN401 - a descriptor, whose stubs lack a type
    field = response.fields_by_name.get("outcome")
    if field is None:
        return lambda _: ""
    names = {number: value.name.partition("_OUTCOME_")[2] for number, value in field.enum_type.values_by_number.items()}
    return lambda reply: names[reply.outcome]
