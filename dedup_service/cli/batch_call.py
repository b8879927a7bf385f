"""How `dedup-service batch` asks the server: a chunk at a time, repeated with the same tokens while that may help."""

import secrets
import time

import grpc

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from dedup_service.cli.batch_lines import Line
from dedup_service.cli.channel import error_fields, failure, status_fields

RETRIES = 3
_BACKOFF_S = 0.3
_MAY_PASS = ("UNAVAILABLE", "DEADLINE_EXCEEDED")
_INTERRUPTED = failure("CANCELLED", "", "unknown", "interrupted before the answer came")


def claim_lines(stub: dedup_pb2_grpc.DedupServiceStub, lines: list[Line], timeout_s: float) -> None:
    """Claim the lines of one chunk, and leave each with a response or an error.

    What fails in a way that may pass, the whole call or single entries, is repeated up to `RETRIES` times, always with
    the same tokens, so that a claim whose answer was lost is told CLAIMED again and is no duplicate of itself. When
    KeyboardInterrupt is raised, the lines without an answer are left as failed, and perhaps applied.
    """
    pending = [line for line in lines if line.request is not None]
    try:
        for attempt in range(1 + RETRIES):
            if attempt:
                time.sleep(_jittered(_BACKOFF_S * 2 ** (attempt - 1)))
            pending = _attempt(stub, pending, timeout_s, again=attempt > 0)
            if not pending:
                return
    except KeyboardInterrupt:
        for line in pending:
            if line.response is None:
                line.fail(_INTERRUPTED)
        raise


def _attempt(stub: dedup_pb2_grpc.DedupServiceStub, lines: list[Line], timeout_s: float, *, again: bool) -> list[Line]:
    """Call once, and return the lines for which another attempt may help."""
    if not lines:
        return []
    request = dedup_pb2.BatchClaimTransactionsRequest(requests=[line.request for line in lines if line.request])
    try:
        # A call that fails at once gives a channel hardly any time to connect again, so a repeated one waits.
        reply = stub.BatchClaimTransactions(request, timeout=timeout_s, wait_for_ready=again)
    except grpc.RpcError as error:
        fields = error_fields(error)
        for line in lines:
            if line.error is not None and fields["code"] == "DEADLINE_EXCEEDED":
                # That an outage lasted says less than what it was.
                line.fail(line.error | {"applied": fields["applied"]})
            else:
                line.fail(fields)
        return lines if fields["code"] in _MAY_PASS else []
    if len(reply.entries) != len(lines):
        words = f"the server answered {len(reply.entries)} of {len(lines)} claims, and nobody knows which"
        for line in lines:
            line.fail(failure("INTERNAL", "", "unknown", words))
        return []
    return [line for line, entry in zip(lines, reply.entries, strict=True) if _may_pass(line, entry)]


def _may_pass(line: Line, entry: dedup_pb2.BatchClaimEntry) -> bool:
    """Give a line its answer, and return whether that is an error that may pass."""
    if entry.WhichOneof("result") == "error":
        fields = status_fields(entry.error)
        line.fail(fields)
        return fields["code"] in _MAY_PASS
    if entry.response.outcome == dedup_pb2.CLAIM_OUTCOME_UNSPECIFIED:
        line.fail(failure("UNKNOWN", "", "unknown", "the server did not say how the claim ended"))
        return False
    line.response, line.error = entry.response, None
    return False


def _jittered(seconds: float) -> float:
    # Clients that were cut off together must not come back together.
    return seconds * secrets.SystemRandom().uniform(0.5, 1.0)
