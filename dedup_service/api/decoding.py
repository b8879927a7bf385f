"""Decodes requests, and finds the faults a parsed message no longer shows: bad UTF-8, and both members of a oneof."""

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


# The type stubs have two classes for one thing.
Descriptor = Any


class UnknownField(Protocol):
    """An item of protobuf's unknown field set; the type stubs lack it."""

    field_number: int
    wire_type: int
    data: Any


def decode_request(request_type: type[RequestT], raw: bytes) -> RequestT:
    """Return the decoded message.

    Raises InvalidRequest for each string field that is not UTF-8, and for each oneof with two members: the parser would
    silently keep the last one.
    """
    try:
        message = request_type.FromString(raw)
    except DecodeError:
        violations = list(_faults(request_type.DESCRIPTOR, raw))
        if not violations:
            violations = [FieldViolation("request", f"is not a {request_type.DESCRIPTOR.full_name} message")]
        raise InvalidRequest(*violations) from None
    # A message that encodes to the same bytes has lost nothing. Comparing sizes would not do: a negative number sent
    # short comes out longer.
    if message.SerializeToString() != raw and (violations := list(_faults(request_type.DESCRIPTOR, raw))):
        raise InvalidRequest(*violations)
    return message


def _faults(descriptor: Descriptor, raw: bytes, path: str = "") -> Iterator[FieldViolation]:
    seen: Counter[int] = Counter()
    for unknown in _fields(raw):
        field = descriptor.fields_by_number.get(unknown.field_number)
        # To the parser, a known number with another wire type is an unknown field, too.
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
        # In a message without fields everything is an unknown field, and strings are plain bytes.
        return cast("Iterable[UnknownField]", UnknownFieldSet(empty_pb2.Empty.FromString(raw)))
    except DecodeError:
        return ()


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
