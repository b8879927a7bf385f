"""The gRPC profile of the client contract: identities, fingerprints, stored replies, codes and refusals."""

from collections.abc import Sequence

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from dedup.errors import DedupError, DuplicateTransaction, InvalidRequest, PayloadMismatch
from dedup.http_profile import InvalidKey, Outcome, digest, key_of
from dedup.ids import transaction_id
from dedup.stored_response import MAX_STORED_BYTES

KEY_METADATA = "idempotency-key"
REPLAYED_METADATA = "idempotency-replayed"
ERROR_DOMAIN = "dedup.guard"

_REPLY = b"dedup-grpc/1 reply\n"
NOT_KEPT = b"dedup-grpc/1 not-kept\n"
_BARE = b"\x01"
_TYPE_URL = "type.googleapis.com/"

# Nothing took effect, by the meaning of the code.
_RELEASED = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
}


def identity(caller: str, method: str, keys: Sequence[str]) -> str:
    """Return the transaction id of a call. Raises InvalidKey."""
    key = key_of(keys)
    try:
        return transaction_id("grpc", caller, method, key)
    except ValueError:
        raise InvalidKey("the key is too long: with caller and method it may have 512 bytes") from None


def fingerprint(method: str, request: object, raw: bytes) -> bytes:
    """Return the digest that detects another request: of the message, or of its bytes if it is not of protobuf."""
    message = request.SerializeToString(deterministic=True) if isinstance(request, Message) else raw
    return digest(method.encode(), message)


def outcome_of(code: grpc.StatusCode) -> Outcome:
    """Return what a call that ends with `code` does to its claim by default."""
    if code is grpc.StatusCode.OK:
        return "complete"
    return "release" if code in _RELEASED else "keep"


def encode(reply: object, raw: bytes, *, limit: int = MAX_STORED_BYTES) -> bytes:
    """Return the stored form of a reply and its bytes, without the reply if it has more than `limit` bytes."""
    # A reply that is not of protobuf has no type.
    url = _TYPE_URL + reply.DESCRIPTOR.full_name if isinstance(reply, Message) else ""
    stored = _REPLY + AnyMessage(type_url=url, value=raw).SerializeToString(deterministic=True)
    return stored if len(stored) <= limit else NOT_KEPT


def decode(stored: bytes) -> bytes | None:
    """Return the bytes of a stored reply, or None if it is not kept, or stored by other code."""
    if stored.startswith(_BARE):
        return stored.removeprefix(_BARE)
    if not stored.startswith(_REPLY):
        return None
    try:
        return AnyMessage.FromString(stored.removeprefix(_REPLY)).value
    except DecodeError:
        return None


def refusal_of(error: DedupError | InvalidKey) -> status_pb2.Status:
    """Return the status for a claim's `error`. Re-raises InvalidRequest: the guard is misconfigured."""
    match error:
        case DuplicateTransaction(holder=holder) if holder.completed:
            code, reason = grpc.StatusCode.ALREADY_EXISTS, "REPLY_NOT_KEPT"
            text = "the first call with this idempotency key has ended, and is not run again; its reply is not stored"
        case DuplicateTransaction():
            code, reason = grpc.StatusCode.ABORTED, "DUPLICATE"
            text = "the first call with this idempotency key has not ended, or its effect is unknown: repeat it later"
        case PayloadMismatch():
            code, reason = grpc.StatusCode.FAILED_PRECONDITION, "PAYLOAD_MISMATCH"
            text = "this idempotency key was used for another request: send a new key with a new request"
        case InvalidRequest():
            raise error
        case InvalidKey():
            code, reason, text = grpc.StatusCode.INVALID_ARGUMENT, "KEY_INVALID", f"metadata {KEY_METADATA}: {error}"
        case _:
            code, reason = grpc.StatusCode.UNAVAILABLE, "DEDUP_UNAVAILABLE"
            text = "the check for duplicate calls is unavailable, and the call was not run: repeat it with the same key"
    status = status_pb2.Status(code=code.value[0], message=text)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain=ERROR_DOMAIN))
    return status
