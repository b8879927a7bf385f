"""An independent reader of the protobuf wire format, to check the service and the protobuf library against."""

from collections.abc import Iterator

_VARINT, _I64, _LENGTH, _I32 = 0, 1, 2, 5
_FIXED = {_I64: 8, _I32: 4}


class NotAMessage(ValueError):
    """The bytes end too early, or contain something unsupported by this reader, such as groups."""


def fields(raw: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of each length-delimited field, in wire order."""
    position = 0
    while position < len(raw):
        tag, position = _varint(raw, position)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            _, position = _varint(raw, position)
            continue
        if kind == _LENGTH:
            length, position = _varint(raw, position)
        elif kind in _FIXED:
            length = _FIXED[kind]
        else:
            raise NotAMessage(f"wire type {kind}")
        end = position + length
        if end > len(raw):
            raise NotAMessage(f"a length of {length} with {len(raw) - position} bytes left")
        if kind == _LENGTH:
            yield number, raw[position:end]
        position = end


def _varint(raw: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(raw):
            raise NotAMessage("truncated varint")
        byte = raw[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, position
    raise NotAMessage("unterminated varint")
