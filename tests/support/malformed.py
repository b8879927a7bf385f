"""Unusual protobuf encodings: invalid ones, and valid ones that decode to the same message as the usual one."""

import random
from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

_VARINT, _I64, _LENGTH, _GROUP, _END_GROUP, _I32 = range(6)
# A field number that no message of the contract uses.
_NEWER = 15
_HALF_A_MESSAGE = b"\x08\x80"


def tag(number: int, wire_type: int) -> bytes:
    """Return the tag of a field."""
    return varint(number << 3 | wire_type)


def varint(value: int) -> bytes:
    """Return a number as a protobuf varint."""
    chunks = []
    while value > 0x7F:
        chunks.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*chunks, value])


def nested(number: int, content: bytes) -> bytes:
    """Return a length-delimited field: text, bytes or a message."""
    return tag(number, _LENGTH) + varint(len(content)) + content


def broken(good: Message) -> dict[str, bytes]:
    """Return invalid encodings of this message type by their fault; each starts with a valid one."""
    raw = good.SerializeToString()
    group, end = tag(_NEWER, _GROUP), tag(_NEWER, _END_GROUP)
    tails = {
        "half a tag": b"\xff",
        "half a varint": tag(_NEWER, _VARINT) + b"\xff",
        "an unterminated varint": tag(_NEWER, _VARINT) + b"\xff" * 10 + b"\x01",
        "an unterminated tag": b"\xff" * 10 + b"\x01",
        "half a fixed32": tag(_NEWER, _I32) + bytes(3),
        "half a fixed64": tag(_NEWER, _I64) + bytes(7),
        "a length without content": tag(_NEWER, _LENGTH) + varint(1),
        "a length of 2 GiB": tag(_NEWER, _LENGTH) + varint(2**31),
        "a length of 2^64": tag(_NEWER, _LENGTH) + varint(2**64 - 1),
        "field number 0": tag(0, _VARINT) + b"\x00",
        "wire type 6": tag(_NEWER, 6) + b"\x00",
        "wire type 7": tag(_NEWER, 7) + b"\x00",
        "a group without an end": group,
        "an end without a group": end,
        "a group with the end of another": group + tag(_NEWER + 1, _END_GROUP),
        "500 groups deep": group * 500 + end * 500,
    }
    cases = {name: raw + tail for name, tail in tails.items()}
    return cases | dict(_broken_fields(good, raw))


def _broken_fields(good: Message, raw: bytes) -> Iterator[tuple[str, bytes]]:
    descriptor: Any = good.DESCRIPTOR
    for name, text in (("invalid UTF-8", b"\xff"), ("a surrogate", b"\xed\xa0\x80"), ("an overlong NUL", b"\xc0\x80")):
        bad = nested(1, text)
        yield f"{name} for an id", raw + (nested(1, bad) if descriptor.name.startswith("Batch") else bad)
    for field in descriptor.fields:
        if field.message_type is not None:
            yield f"half a message for {field.name}", raw + nested(field.number, _HALF_A_MESSAGE)
    for oneof in descriptor.oneofs:
        ttl, expire_time = (nested(field.number, b"\x08\x05") for field in oneof.fields)
        yield f"both of {oneof.name}", raw + ttl + expire_time
        yield f"both of {oneof.name}, in reverse order", raw + expire_time + ttl
    if descriptor.name.startswith("Batch"):
        entry = nested(1, b"x") + nested(3, b"\x08\x05") + nested(4, b"\x08\x05")
        yield "both of expiry in an entry", raw + nested(1, entry)


def odd(good: Message) -> dict[str, bytes]:
    """Return unusual encodings that decode to the same message, by what is unusual about them."""
    raw = good.SerializeToString()
    newer = {
        "a newer number": tag(_NEWER, _VARINT) + varint(2**64 - 1),
        "newer text": nested(_NEWER, b"\xff\x00 not UTF-8"),
        "newer fixed numbers": tag(_NEWER, _I32) + bytes(4) + tag(_NEWER, _I64) + bytes(8),
        "a newer group": tag(_NEWER, _GROUP) + nested(1, b"in it") + tag(_NEWER, _END_GROUP),
        "the greatest field number": tag(2**29 - 1, _VARINT) + b"\x00",
        "a known field as a number": b"".join(tag(field.number, _I64) + bytes(8) for field in _texts(good)),
        "an overlong tag": b"\xf8\x80\x80\x00\x01",
    }
    cases = {f"{name}, {where}": part for name, tail in newer.items() for where, part in _around(raw, tail)}
    return cases | {"all of it twice": raw + raw} if not good.DESCRIPTOR.name.startswith("Batch") else cases


def heavy(size: int) -> dict[str, tuple[str, bytes]]:
    """Return requests of about this many bytes that are as much work as possible, with their rpc, by their content."""
    claim, complete, batch = "ClaimTransaction", "CompleteTransaction", "BatchClaimTransactions"
    a_field, a_group = tag(_NEWER, _VARINT) + b"\x01", tag(_NEWER, _GROUP) + tag(_NEWER, _END_GROUP)
    an_id, ttl, expire_time = nested(1, b"x"), nested(3, b""), nested(4, b"")
    faults = (
        nested(1, b"\x01") + nested(2, b"A" * 63) + nested(5, b"x") + nested(6, b"\x01" * 300) + nested(7, bytes(65))
    )
    repeated = {
        "newer fields before an id": (claim, a_field, an_id),
        "one long id": (claim, b"", nested(1, b"x" * size)),
        "newer fields before the id of a completion": (complete, a_field, an_id),
        "newer groups": (complete, a_group, an_id),
        "many ids": (complete, an_id, b""),
        "many invalid ids": (complete, nested(1, b"\xff"), b""),
        "many results": (complete, nested(4, b""), an_id),
        "many ttls": (complete, nested(5, b""), an_id),
        "ttl and expire time in turn": (complete, nested(5, b"") + nested(6, b""), an_id),
        "newer fields before an entry": (batch, a_field, nested(1, an_id)),
        "empty entries": (batch, nested(1, b""), b""),
        "empty entries, cut short": (batch, nested(1, b""), b"\x0a"),
    }
    cases = {
        name: (rpc, part * (size // len(part) if part else 0) + end) for name, (rpc, part, end) in repeated.items()
    }
    cases["empty entries after a newer field"] = (batch, a_field + cases["empty entries"][1])
    entries = {
        "1,000 entries with newer fields": a_field * (size // 2_010) + an_id,
        "1,000 entries with ttl and expire time": ttl + expire_time,
        "1,000 invalid ids": nested(1, b"\xff"),
        "1,000 entries with every fault": faults + ttl,
        "1,000 entries in an unusual order": nested(5, b"t" * 20) + an_id,
    }
    return cases | {name: (batch, nested(1, entry) * 1_000) for name, entry in entries.items()}


def _around(raw: bytes, tail: bytes) -> Iterator[tuple[str, bytes]]:
    yield "first", tail + raw
    yield "last", raw + tail


def _texts(good: Message) -> list[Any]:
    descriptor: Any = good.DESCRIPTOR
    return [field for field in descriptor.fields if field.type == FieldDescriptor.TYPE_STRING]


def damaged(good: Message, count: int, seed: int) -> Iterator[bytes]:
    """Yield a message with random changes: bytes replaced, removed, repeated, or the rest cut off."""
    chance = random.Random(seed)
    for _ in range(count):
        raw = bytearray(good.SerializeToString())
        for _ in range(chance.randint(1, 4)):
            position = chance.randrange(len(raw)) if raw else 0
            match chance.randrange(4):
                case 0:
                    raw[position : position + 1] = chance.randbytes(1)
                case 1:
                    del raw[position : position + chance.randint(1, 4)]
                case 2:
                    raw[position:position] = raw[position : position + chance.randint(1, 20)]
                case _:
                    del raw[position:]
        yield bytes(raw)
