"""The shared part of the HTTP and gRPC guards: options, claims, answers to duplicates."""

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypedDict

from dedup.calls import Span
from dedup.errors import DedupError, DuplicateTransaction, InvalidRequest, PayloadMismatch
from dedup.handles import Handle, log_failed_ending
from dedup.http_profile import (
    MAX_BODY_BYTES,
    METHODS,
    REPLAYED_HEADER,
    Outcome,
    Response,
    fingerprint,
    identity,
    in_progress,
    key_of,
    key_reused,
    not_stored,
    outcome_of,
    unavailable,
)
from dedup.stored_response import MAX_STORED_BYTES, decode, encode

_CURRENT: ContextVar[Handle | None] = ContextVar("dedup_claim", default=None)
_ENDINGS: set[asyncio.Future[None]] = set()


def current_claim() -> Handle | None:
    """Return the claim of the guarded request or call that is being handled, or None."""
    return _CURRENT.get()


@dataclass(frozen=True, slots=True)
class Request:
    """A guarded request, as the options `caller` and `fingerprint` receive it.

    Names of `headers` are in lower case. `native` is the ASGI scope, the WSGI environ or Django's HttpRequest.
    """

    method: str
    path: str
    query: bytes
    headers: Mapping[str, str]
    native: Any = field(repr=False)


class Options(TypedDict, total=False):
    """The options of each HTTP middleware; `Rules` describes them."""

    caller: Callable[[Request], str] | None
    methods: Collection[str]
    required: bool
    ttl: Span | None
    retention: Span | None
    namespace: str | None
    wait: Span | None
    max_body_bytes: int
    max_stored_bytes: int
    outcome: Callable[[int], Outcome]
    fingerprint: Callable[[Request, bytes], bytes] | None
    stored_headers: Collection[str]
    replayed_header: str | None
    keep_alive: bool
    max_hold: Span | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Which requests are guarded, and how.

    `caller` returns who calls, such as a verified user id; it keeps callers' keys and responses apart. `required`
    refuses requests without a key. `ttl` is the lease, which `keep_alive` extends while the work runs, up to
    `max_hold`. `retention` is how long a response is replayed. A duplicate waits up to `wait` for the end of the first
    request. `outcome` returns what a response's status does to the claim. `fingerprint` returns what is compared
    instead of the body. `stored_headers` are replayed in addition to the standard ones. `replayed_header` None marks
    no replays.
    """

    caller: Callable[[Request], str] | None = None
    methods: Collection[str] = METHODS
    required: bool = False
    ttl: Span | None = None
    retention: Span | None = None
    namespace: str | None = None
    wait: Span | None = None
    max_body_bytes: int = MAX_BODY_BYTES
    max_stored_bytes: int = MAX_STORED_BYTES
    outcome: Callable[[int], Outcome] = outcome_of
    fingerprint: Callable[[Request, bytes], bytes] | None = None
    stored_headers: Collection[str] = ()
    replayed_header: str | None = REPLAYED_HEADER
    keep_alive: bool = True
    max_hold: Span | None = None

    def guarded(self, method: str, keys: Sequence[str], request: Callable[[], Request]) -> tuple[Request, str] | None:
        """Return a request with its transaction id, or None if it is not guarded. Raises InvalidKey."""
        if method not in self.methods or not (keys or self.required):
            return None
        key = key_of(keys)
        made = request()
        return made, identity(self.caller(made) if self.caller is not None else "", method, made.path, key)

    def claim_options(self, request: Request, body: bytes) -> dict[str, Any]:
        """Return the options of a request's claim."""
        compared = body if self.fingerprint is None else self.fingerprint(request, body)
        return {
            "fingerprint": fingerprint(request.method, request.path, request.query, compared),
            "ttl": self.ttl,
            "namespace": self.namespace,
            "wait": self.wait,
            "keep_alive": self.keep_alive,
            "max_hold": self.max_hold,
        }

    def stored(self, response: Response, *, streamed: bool) -> bytes:
        """Return the form in which a response is stored."""
        return encode(response, extra_headers=self.stored_headers, limit=self.max_stored_bytes, streamed=streamed)

    def answer_to(self, error: DedupError) -> Response:
        """Return the response for a claim's `error`. Re-raises InvalidRequest: the middleware is misconfigured."""
        match error:
            case DuplicateTransaction(holder=holder) if holder.completed:
                return self._replay(holder.result)
            case DuplicateTransaction():
                return in_progress()
            case PayloadMismatch():
                return key_reused()
            case InvalidRequest():
                raise error
        return unavailable()

    def _replay(self, result: bytes) -> Response:
        replayed = () if self.replayed_header is None else ((self.replayed_header, "true"),)
        stored = decode(result)
        if stored is not None and stored.status is not None and stored.body is not None:
            return Response(stored.status, (*stored.headers, *replayed), stored.body)
        if stored is not None and stored.location:
            return Response(303, (("location", stored.location), *replayed), b"")
        refusal = not_stored()
        return Response(refusal.status, (*refusal.headers, *replayed), refusal.body)


@contextmanager
def handling(claim: Handle, retention: Span | None) -> Iterator[None]:
    """Make `claim` the current one while its request is handled."""
    claim.retention = retention
    token = _CURRENT.set(claim)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def end(claim: Any, outcome: Outcome, result: Callable[[], bytes]) -> None:
    """Complete, release or keep a blocking claim. A failure is only logged: the response is sent anyway."""
    try:
        match outcome:
            case "complete":
                claim.complete(result())
            case "release":
                claim.release()
            case _:
                claim.keep()
    except DedupError as error:
        log_failed_ending(claim, error)


async def end_async(claim: Any, outcome: Outcome, result: Callable[[], bytes]) -> None:
    """Do the same for an asynchronous claim, to the end even if the caller is cancelled."""

    async def ending() -> None:
        try:
            match outcome:
                case "complete":
                    await claim.complete(result())
                case "release":
                    await claim.release()
                case _:
                    claim.keep()
        except DedupError as error:
            log_failed_ending(claim, error)

    task = asyncio.ensure_future(ending())
    _ENDINGS.add(task)
    task.add_done_callback(_ENDINGS.discard)
    await asyncio.shield(task)
