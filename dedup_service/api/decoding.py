"""Decodes requests, and finds the faults a parsed message no longer shows: bad UTF-8, and both members of a oneof.

The fields of the contract bound the work in Python, not the fields a caller sends: parsing is left to protobuf.
"""

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from itertools import islice
from typing import Any, TypeVar

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from dedup_service.claims import FieldViolation, InvalidRequest

RequestT = TypeVar("RequestT", bound=Message)

MAX_BATCH = 1_000
# A batch can have thousands of faults, and they travel in the metadata of the reply.
_MAX_VIOLATIONS = 10

# The type stubs have two classes for one thing.
Descriptor = Any


async def decode_request(request_type: type[RequestT], raw: bytes) -> RequestT:
    """Return the decoded message. Each pass over a large one has a turn of the event loop to itself.

    Raises InvalidRequest for string fields that are not UTF-8, for a oneof with two members, of which the parser would
    silently keep the last one, and for too many entries.
    """
    lenient = _lenient(request_type.DESCRIPTOR)
    # Entries are counted before they are parsed: an empty one, of two bytes, becomes 100.
    as_sent = None
    if lenient.entries:
        as_sent = lenient.parse(raw)
        await asyncio.sleep(0)
    try:
        message = request_type.FromString(raw)
    except DecodeError:
        message = None
    # A message that encodes to the same bytes has lost nothing. Comparing sizes would not do: a negative number sent
    # short comes out longer.
    if message is not None and message.SerializeToString() == raw:
        return message
    await asyncio.sleep(0)
    if as_sent is None:
        as_sent = lenient.parse(raw)
    if violations := list(islice(lenient.faults(as_sent), _MAX_VIOLATIONS)):
        raise InvalidRequest(*violations)
    if message is None:
        raise lenient.malformed()
    return message


class _Lenient:
    """A message type as the wire has it: strings and messages are bytes, and the members of a oneof are independent."""

    def __init__(self, descriptor: Descriptor) -> None:
        self._name = descriptor.full_name
        self._type = _lenient_type(descriptor)
        self._texts = [field.name for field in descriptor.fields if field.type == FieldDescriptor.TYPE_STRING]
        self._oneofs = [[field.name for field in oneof.fields] for oneof in descriptor.oneofs]
        self.entries = {
            field.name: _Lenient(field.message_type)
            for field in descriptor.fields
            if field.message_type is not None and field.is_repeated
        }

    def parse(self, raw: bytes) -> Any:  # noqa: ANN401 - of a type made at run time
        """Return the message with its entries unparsed. Raises InvalidRequest if it is malformed or has too many."""
        try:
            message = self._type.FromString(raw)
        except DecodeError:
            raise self.malformed() from None
        for name in self.entries:
            if (count := len(getattr(message, name))) > MAX_BATCH:
                raise InvalidRequest(batch_violation(name, count))
        return message

    def faults(self, message: Any, path: str = "") -> Iterator[FieldViolation]:  # noqa: ANN401 - as above
        """Yield the faults of a parsed message."""
        for name in self._texts:
            if not _is_utf8(getattr(message, name)):
                yield FieldViolation(f"{path}{name}", "is not valid UTF-8: send text encoded as UTF-8")
        for members in self._oneofs:
            sent = [name for name in members if message.HasField(name)]
            if len(sent) > 1:
                yield FieldViolation(f"{path}{sent[0]}", f"was sent together with {sent[1]}: send one of the two")
        for name, entry in self.entries.items():
            for number, content in enumerate(getattr(message, name)):
                with suppress(InvalidRequest):
                    yield from entry.faults(entry.parse(content), f"{path}{name}[{number}].")

    def malformed(self) -> InvalidRequest:
        """Return the error for bytes that are not such a message."""
        return InvalidRequest(FieldViolation("request", f"is not a {self._name} message"))


_lenient = cache(_Lenient)


def batch_violation(field: str, count: int) -> FieldViolation:
    """Return the violation of a batch that is empty or too long."""
    return FieldViolation(field, f"has {count} claims: send 1 to {MAX_BATCH} in one batch")


def _lenient_type(descriptor: Descriptor) -> type[Message]:
    # In proto2, so that fields have presence.
    file = descriptor_pb2.FileDescriptorProto(name=f"lenient/{descriptor.full_name}", package="lenient")
    message = file.message_type.add(name=descriptor.name)
    for field in descriptor.fields:
        if field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_MESSAGE):
            label = FieldDescriptor.LABEL_REPEATED if field.is_repeated else FieldDescriptor.LABEL_OPTIONAL
            message.field.add(name=field.name, number=field.number, label=label, type=FieldDescriptor.TYPE_BYTES)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"lenient.{descriptor.name}"))


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
