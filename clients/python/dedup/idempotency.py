"""`Idempotency-Key` over HTTP for ASGI and WSGI: request ids, answers to duplicates, stored responses."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from http import HTTPStatus

from dedup.calls import Span
from dedup.errors import DedupError, DuplicateTransaction, InvalidRequest, PayloadMismatch
from dedup.ids import transaction_id

HEADER = "idempotency-key"

MAX_KEPT_BYTES = 4_096
"""The largest stored response: the service's default limit for a result."""

TOO_LARGE = b"\x01"
"""Stored in place of a response that is too large."""

_FORMAT = 2


@dataclass(frozen=True, slots=True)
class Response:
    """A complete response. Header names are in lower case."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Which requests are guarded, and how.

    `caller` takes the headers (names in lower case) and returns who calls, such as a user id. It keeps callers' keys
    apart, so set it if there are several. `ttl` limits a request's duration. `retention` is how long its response is
    replayed. `max_body_bytes` limits a guarded request body.
    """

    ttl: Span | None = None
    retention: Span | None = None
    namespace: str | None = None
    methods: Collection[str] = ("POST", "PATCH")
    required: bool = False
    caller: Callable[[Mapping[str, str]], str] | None = None
    max_body_bytes: int = 1024 * 1024

    def claim_id(self, method: str, path: str, headers: Mapping[str, str]) -> str | None:
        """Return a request's transaction id, or None if it is not guarded.

        Raises ValueError for a missing required key, and for one that is empty or too long.
        """
        if method not in self.methods:
            return None
        key = headers.get(HEADER)
        if key is None:
            if self.required:
                raise ValueError("The header Idempotency-Key is required.")
            return None
        key = key.strip()
        # The draft standard quotes keys; most callers do not.
        if len(key) >= 2 and key[0] == key[-1] == '"':
            key = key[1:-1]
        if not key:
            raise ValueError("The header Idempotency-Key is empty.")
        caller = self.caller(headers) if self.caller is not None else ""
        return transaction_id(caller, method, path, key)


def fingerprint(body: bytes) -> bytes:
    """Return the digest that detects another body under a key."""
    return hashlib.sha256(body).digest()


def pack(response: Response) -> bytes:
    """Encode status, content type and body for storage. Returns TOO_LARGE if they do not fit."""
    content_type = dict(response.headers).get("content-type", "").encode("latin-1")
    packed = bytes([_FORMAT]) + response.status.to_bytes(2, "big") + len(content_type).to_bytes(2, "big")
    packed += content_type + response.body
    return packed if len(packed) <= MAX_KEPT_BYTES else TOO_LARGE


def unpack(result: bytes) -> Response | None:
    """Decode a stored response and mark it as replayed. Returns None for any other result."""
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
    """Return the response for a claim's `error`.

    Re-raises InvalidRequest: the middleware is misconfigured.
    """
    if isinstance(error, DuplicateTransaction):
        if not error.holder.completed:
            return problem(409, "A request with this Idempotency-Key is in progress.", ("retry-after", "1"))
        stored = unpack(error.holder.result)
        detail = "A request with this Idempotency-Key is completed. Its response was not stored"
        is_too_large = error.holder.result == TOO_LARGE
        return stored or problem(409, detail + (", because it is too large." if is_too_large else "."))
    if isinstance(error, PayloadMismatch):
        return problem(422, "This Idempotency-Key was used with another request body.")
    if isinstance(error, InvalidRequest):
        raise error
    return problem(503, "The check for duplicate requests is unavailable. Try again.", ("retry-after", "1"))


def worth_completing(status: int) -> bool:
    """Return whether a response completes the work; after a server error it may be retried."""
    return status < 500
