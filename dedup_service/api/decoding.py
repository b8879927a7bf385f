"""Requests from the wire, with the faults that a parsed message no longer shows: bad UTF-8, and both of a oneof."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeVar, cast

from google.protobuf import empty_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from dedup_service.claims import FieldViolation, InvalidRequest

RequestT = TypeVar("RequestT", bound=Message)

_LENGTH_DELIMITED = 2


# Its type stubs name two classes for one thing.
Descriptor = Any


class UnknownField(Protocol):
    """What protobuf's unknown field set yields, which its type stubs leave out."""

    field_number: int
    wire_type: int
    data: Any


def decode_request(request_type: type[RequestT], raw: bytes) -> RequestT:
    """Return the message that `raw` encodes.

    Raises InvalidRequest naming each string field that is no UTF-8, and each oneof of which two members were sent: a
    parser keeps the last of them in silence, and which one counts must not be left to chance.
    """
    try:
        message = request_type.FromString(raw)
    except DecodeError:
        violations = list(_faults(request_type.DESCRIPTOR, raw))
        if not violations:
            violations = [FieldViolation("request", f"is no message of the type {request_type.DESCRIPTOR.full_name}")]
        raise InvalidRequest(*violations) from None
    # What comes out as it went in has lost nothing. Sizes would not do: a negative number sent short comes out longer.
    if message.SerializeToString() != raw and (violations := list(_faults(request_type.DESCRIPTOR, raw))):
        raise InvalidRequest(*violations)
    return message


def _faults(descriptor: Descriptor, raw: bytes, path: str = "") -> Iterator[FieldViolation]:
    seen: Counter[int] = Counter()
    for unknown in _fields(raw):
        field = descriptor.fields_by_number.get(unknown.field_number)
        # A known number with another wire type is an unknown field to the parser as well.
        if field is None or unknown.wire_type != _LENGTH_DELIMITED:
            continue
        name = f"{path}{field.name}"
        if field.is_repeated:
            name += f"[{seen[field.number]}]"
        seen[field.number] += 1
        if field.type == FieldDescriptor.TYPE_STRING and not _is_utf8(unknown.data):
            yield FieldViolation(name, "is not valid UTF-8: send text encoded as UTF-8")
        if field.message_type is not None:
            yield from _faults(field.message_type, unknown.data, f"{name}.")
    for oneof in descriptor.oneofs:
        members = [field.name for field in oneof.fields if seen[field.number]]
        if len(members) > 1:
            yield FieldViolation(f"{path}{members[0]}", f"was sent together with {members[1]}: send one of the two")


def _fields(raw: bytes) -> Iterable[UnknownField]:
    try:
        # Read as a message without fields everything is an unknown field, and strings are plain bytes.
        return cast("Iterable[UnknownField]", UnknownFieldSet(empty_pb2.Empty.FromString(raw)))
    except DecodeError:
        return ()


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
