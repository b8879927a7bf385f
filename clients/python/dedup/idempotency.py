"""`Idempotency-Key` over HTTP: what is claimed, what a duplicate is told, and how a response is kept to be replayed.

Shared by the ASGI and the WSGI middleware; it knows neither.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from http import HTTPStatus

from dedup.errors import DedupError, DuplicateTransaction, InvalidRequest, PayloadMismatch
from dedup.ids import transaction_id
from dedup.requests import Span

HEADER = "idempotency-key"

MAX_KEPT_BYTES = 4_096
"""The most that a kept response may take: the service's default limit of a result."""

TOO_LARGE = b"\x01"
"""The result of work whose response was too large to keep."""

_FORMAT = 2


@dataclass(frozen=True, slots=True)
class Response:
    """A whole response; header names in lower case."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Which requests are guarded, and how.

    `caller` gets the headers (names in lower case) and returns who calls, such as a user id: keys of different callers
    never meet, so give it wherever callers are told apart. `ttl` is how long a request may take, and `retention` how
    long its response is replayed. A guarded body has at most `max_body_bytes`.
    """

    ttl: Span | None = None
    retention: Span | None = None
    namespace: str | None = None
    methods: Collection[str] = ("POST", "PATCH")
    required: bool = False
    caller: Callable[[Mapping[str, str]], str] | None = None
    max_body_bytes: int = 1024 * 1024

    def claim_id(self, method: str, path: str, headers: Mapping[str, str]) -> str | None:
        """Return the transaction id of a request, or None when it goes through unguarded.

        Raises ValueError for a request that must not go through: without a key where one is required, or with one that
        is empty or too long.
        """
        if method not in self.methods:
            return None
        key = headers.get(HEADER)
        if key is None:
            if self.required:
                raise ValueError("This request needs the header Idempotency-Key.")
            return None
        key = key.strip()
        # The standard to be writes keys as quoted strings, and most callers do not.
        if len(key) >= 2 and key[0] == key[-1] == '"':
            key = key[1:-1]
        if not key:
            raise ValueError("The header Idempotency-Key is empty.")
        caller = self.caller(headers) if self.caller is not None else ""
        return transaction_id(caller, method, path, key)


def fingerprint(body: bytes) -> bytes:
    """Return the digest by which the same key with another body is recognised."""
    return hashlib.sha256(body).digest()


def pack(response: Response) -> bytes:
    """Return a response as a result to keep: status, content type and body; TOO_LARGE when that does not fit."""
    content_type = dict(response.headers).get("content-type", "").encode("latin-1")
    packed = bytes([_FORMAT]) + response.status.to_bytes(2, "big") + len(content_type).to_bytes(2, "big")
    packed += content_type + response.body
    return packed if len(packed) <= MAX_KEPT_BYTES else TOO_LARGE


def unpack(result: bytes) -> Response | None:
    """Return the kept response, marked as replayed; None when the result keeps none."""
    if len(result) < 5 or result[0] != _FORMAT:
        return None
    end = 5 + int.from_bytes(result[3:5], "big")
    content_type = result[5:end].decode("latin-1")
    headers = [("idempotency-replayed", "true")]
    if content_type:
        headers.insert(0, ("content-type", content_type))
    return Response(int.from_bytes(result[1:3], "big"), tuple(headers), result[end:])


def problem(status: int, detail: str, *headers: tuple[str, str]) -> Response:
    """Return a problem-details response (RFC 9457)."""
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    return Response(status, (("content-type", "application/problem+json"), *headers), json.dumps(body).encode())


def answer_to(error: DedupError) -> Response:
    """Return what a request is answered whose claim raised `error`.

    Raises the error itself when it shows the middleware to be configured wrongly.
    """
    if isinstance(error, DuplicateTransaction):
        if not error.holder.completed:
            return problem(409, "A request with this Idempotency-Key is in progress.", ("retry-after", "1"))
        kept = unpack(error.holder.result)
        detail = "A request with this Idempotency-Key is completed. Its response was not kept"
        too_large = error.holder.result == TOO_LARGE
        return kept or problem(409, detail + (", since it was too large." if too_large else "."))
    if isinstance(error, PayloadMismatch):
        return problem(422, "This Idempotency-Key was used with another request body.")
    if isinstance(error, InvalidRequest):
        raise error
    return problem(503, "Nobody can tell now whether this request is a duplicate. Try again.", ("retry-after", "1"))


def worth_completing(status: int) -> bool:
    """Whether a response means that the work is done; a server error means that it may be tried again."""
    return status < 500
