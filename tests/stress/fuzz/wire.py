"""A reader of protobuf's wire format that shares nothing with the service or its library, to hold them against."""

from collections.abc import Iterator

_VARINT, _I64, _LENGTH, _I32 = 0, 1, 2, 5
_FIXED = {_I64: 8, _I32: 4}


class NoMessage(ValueError):
    """The bytes end too early, or have what this reader does not follow, as groups."""


def fields(raw: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the content of each length-delimited field, in the order of the wire."""
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
            raise NoMessage(f"the wire type {kind}")
        end = position + length
        if end > len(raw):
            raise NoMessage(f"{length} bytes of {len(raw) - position}")
        if kind == _LENGTH:
            yield number, raw[position:end]
        position = end


def _varint(raw: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(raw):
            raise NoMessage("half a varint")
        byte = raw[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, position
    raise NoMessage("a varint that does not end")
