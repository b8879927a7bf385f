"""How a response is stored as the result of a transaction, and read again, also from the two older formats."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from dedup.http_profile import Response

MAX_STORED_BYTES = 4_096
STORED_HEADERS = frozenset(
    {"content-encoding", "content-language", "content-type", "etag", "link", "location", "retry-after"}
)

_CURRENT = re.compile(rb"dedup-http/2 ([1-9]\d\d) (replay|no-body)")
_TEXT = re.compile(rb"dedup-http/1 (replay|too-large) ([1-9]\d\d) ([^\n]*)\n(.*)", re.DOTALL)
_BINARY = 2
_BINARY_TOO_LARGE = b"\x01"


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A stored response. `body` is None if it was too large or streamed; `status` is None if unknown."""

    status: int | None
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | None = None

    @property
    def location(self) -> str:
        """The stored Location, or an empty string."""
        return dict(self.headers).get("location", "")


def encode(
    response: Response, *, extra_headers: Collection[str] = (), limit: int = MAX_STORED_BYTES, streamed: bool = False
) -> bytes:
    """Return the stored form, of at most `limit` bytes if a status line fits: without the body if it does not fit."""
    names = (STORED_HEADERS | {name.lower() for name in extra_headers}) - {"set-cookie"}
    lower = ((name.lower(), value) for name, value in response.headers if "\n" not in value)
    # Sorted by name alone: the values of one name keep their order.
    headers = sorted((header for header in lower if header[0] in names), key=lambda header: header[0])
    stored = _head(response.status, "replay", headers) + response.body
    if not streamed and len(stored) <= limit:
        return stored
    stored = _head(response.status, "no-body", [header for header in headers if header[0] == "location"])
    return stored if len(stored) <= limit else _head(response.status, "no-body", ())


def decode(stored: bytes) -> StoredResponse | None:
    """Return the stored response, or None if other code stored these bytes."""
    if stored == _BINARY_TOO_LARGE:
        return StoredResponse(None)
    if stored[:1] == bytes([_BINARY]):
        return _decode_binary(stored)
    text = _TEXT.fullmatch(stored)
    if text is not None:
        kind, status, content_type, body = text.groups()
        return (
            StoredResponse(int(status), _content_type(content_type), body)
            if kind == b"replay"
            else StoredResponse(int(status))
        )
    head, empty_line, body = stored.partition(b"\n\n")
    first, *lines = head.split(b"\n")
    current = _CURRENT.fullmatch(first)
    if not empty_line or current is None or not all(b": " in line for line in lines):
        return None
    pairs = (line.decode("latin-1").split(": ", 1) for line in lines)
    headers = tuple((name, value) for name, value in pairs)
    return StoredResponse(int(current[1]), headers, body if current[2] == b"replay" else None)


def _head(status: int, kind: str, headers: Iterable[tuple[str, str]]) -> bytes:
    lines = [f"dedup-http/2 {status} {kind}", *(f"{name}: {value}" for name, value in headers)]
    return "".join(f"{line}\n" for line in lines).encode("latin-1", "replace") + b"\n"


def _decode_binary(stored: bytes) -> StoredResponse | None:
    """Decode the byte 2, the status and the length of the content type in 2 bytes each, content type, and body."""
    body_at = 5 + int.from_bytes(stored[3:5], "big")
    status = int.from_bytes(stored[1:3], "big")
    if len(stored) < max(5, body_at) or not 100 <= status <= 999:
        return None
    return StoredResponse(status, _content_type(stored[5:body_at]), stored[body_at:])


def _content_type(value: bytes) -> tuple[tuple[str, str], ...]:
    return (("content-type", value.decode("latin-1")),) if value else ()
