"""The HTTP profile of the client contract: keys, identities, fingerprints, statuses and refusals. Pure functions."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote_to_bytes

from dedup.ids import MAX_TRANSACTION_ID_BYTES, transaction_id

KEY_HEADER = "idempotency-key"
REPLAYED_HEADER = "Idempotency-Replayed"
METHODS = ("POST", "PATCH")
MAX_BODY_BYTES = 1024 * 1024

Outcome = Literal["complete", "release", "keep"]
"""The effect of a response on the claim of its request."""

_CONTRACT = "https://github.com/dedup-service/dedup-service/blob/main/docs/client-contract.md"
_STRING = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])+)"')
_BARE = re.compile(r"[!#-+\--~]+")
_ABSOLUTE = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://[^/?]*")
_INVALID_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_EVENT_STREAM = "text/event-stream"


class InvalidKey(ValueError):
    """The request has no valid key or identity. Its text is the detail of the refusal."""


@dataclass(frozen=True, slots=True)
class Response:
    """A complete response."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    @property
    def sent_headers(self) -> tuple[tuple[str, str], ...]:
        """The headers with the length of the body, where the status allows one."""
        return self.headers if self.status in (204, 304) else (*self.headers, ("content-length", str(len(self.body))))


def key_of(values: Sequence[str]) -> str:
    """Return the key in the values of a key header: an RFC 8941 string, or bare text. Raises InvalidKey."""
    text = values[0].strip(" \t") if len(values) == 1 else ""
    quoted = _STRING.fullmatch(text)
    if quoted:
        return re.sub(r"\\(.)", r"\1", quoted[1])
    if not _BARE.fullmatch(text):
        raise InvalidKey("Send one header Idempotency-Key with 1 or more visible ASCII characters, such as a UUID.")
    return text


def path_of(target: bytes) -> str:
    """Return the decoded path of a request target, without scheme, authority and query. Raises InvalidKey."""
    path = _ABSOLUTE.sub(b"", target, count=1).partition(b"?")[0]
    if _INVALID_ESCAPE.search(path):
        # Servers and frameworks read it in different ways.
        raise _invalid_path()
    return decoded_path(unquote_to_bytes(path))


def decoded_path(path: bytes) -> str:
    """Return a path that the server has percent-decoded. Raises InvalidKey if it is not UTF-8."""
    try:
        return path.decode()
    except UnicodeDecodeError:
        raise _invalid_path() from None


def _invalid_path() -> InvalidKey:
    return InvalidKey("The path of the request is not UTF-8 after percent-decoding, or has an invalid percent escape.")


def identity(caller: str, method: str, path: str, key: str) -> str:
    """Return the transaction id of a request. Raises InvalidKey if it is too long."""
    try:
        return transaction_id("http", caller, method, path, key)
    except ValueError:
        limit = MAX_TRANSACTION_ID_BYTES
        raise InvalidKey(
            f"The Idempotency-Key is too long: with caller, method and path it may have {limit} bytes."
        ) from None


def fingerprint(method: str, path: str, query: bytes, body: bytes) -> bytes:
    """Return the digest that detects another request under the same key."""
    return digest(method.encode(), path.encode(), query, body)


def digest(*parts: bytes) -> bytes:
    """Return the SHA-256 of the netstrings of `parts`."""
    return hashlib.sha256(b"".join(b"%d:%b," % (len(part), part) for part in parts)).digest()


def content_length(headers: Iterable[tuple[str, str]]) -> int | None:
    """Return the Content-Length in `headers`, or None without a valid one."""
    length = next((value for name, value in headers if name.lower() == "content-length"), "")
    return int(length) if length.isdecimal() else None


def is_event_stream(headers: Iterable[tuple[str, str]]) -> bool:
    """Return whether `headers` are those of an event stream, whose parts must not wait for each other."""
    content_type = next((value for name, value in headers if name.lower() == "content-type"), "")
    return content_type.partition(";")[0].strip().lower() == _EVENT_STREAM


def outcome_of(status: int) -> Outcome:
    """Return what a response with `status` does to the claim by default."""
    if 200 <= status < 400:
        return "complete"
    return "release" if 400 <= status < 500 else "keep"


def in_progress() -> Response:
    """Return the response to a duplicate of work without an end."""
    detail = (
        "The first request with this key has not ended, or its effect is unknown. Send the same request again later."
    )
    return _problem(
        409, "in-progress", "A request with this Idempotency-Key is in progress", detail, ("retry-after", "1")
    )


def not_stored() -> Response:
    """Return the response to a duplicate whose first response is not stored."""
    detail = "The first request with this key has ended, and is not run again. Its response is not stored."
    return _problem(410, "response-not-stored", "The response is not stored", detail)


def key_reused() -> Response:
    """Return the response to another request under a used key."""
    detail = "Send a new key with a new request."
    return _problem(422, "key-reused", "The Idempotency-Key was used for another request", detail)


def key_invalid(error: InvalidKey) -> Response:
    """Return the response to a request without a valid key."""
    return _problem(400, "key-invalid", "The Idempotency-Key is missing or invalid", str(error))


def body_too_large(limit: int) -> Response:
    """Return the response to a request whose body has more than `limit` bytes."""
    detail = f"A request with an Idempotency-Key may have a body of up to {limit} bytes."
    return _problem(413, "body-too-large", "The request body is too large", detail)


def unavailable() -> Response:
    """Return the response while the service does not answer."""
    title = "The check for duplicate requests is unavailable"
    detail = "The request was not run. Send it again with the same key."
    return _problem(503, "unavailable", title, detail, ("retry-after", "1"))


def _problem(status: int, heading: str, title: str, detail: str, *headers: tuple[str, str]) -> Response:
    body = {"type": f"{_CONTRACT}#{heading}", "title": title, "status": status, "detail": detail}
    return Response(status, (("content-type", "application/problem+json"), *headers), json.dumps(body).encode())
