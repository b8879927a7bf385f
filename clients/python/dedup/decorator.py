"""A decorator: of all calls with the same key, one runs."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

from dedup import aio
from dedup.client import Client
from dedup.errors import DuplicateTransaction
from dedup.handles import Handle, OnError
from dedup.requests import Span

P = ParamSpec("P")
R = TypeVar("R")


def once(
    client: Client | aio.Client,
    *,
    key: Callable[..., str],
    ttl: Span | None = None,
    retention: Span | None = None,
    namespace: str | None = None,
    fingerprint: Callable[..., bytes] | None = None,
    wait: Span | None = None,
    on_error: OnError | None = None,
    on_duplicate: Callable[[DuplicateTransaction], object] | None = None,
    encode: Callable[[Any], bytes] | None = None,
    decode: Callable[[bytes], object] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let one of all calls with the same key run, and tell the others that they are duplicates.

    `key` gets the arguments of the call and returns its transaction id, `fingerprint` likewise a digest of what else
    must be the same. A coroutine function wants an `aio.Client`, any other function a `Client`. `ttl` is how long the
    work may take, `retention` how long it is remembered once done.

    With `encode` and `decode` the first result is kept, and returned to every duplicate of completed work. Any other
    duplicate is answered by what `on_duplicate` returns (for a coroutine function it may be awaitable), or raises
    DuplicateTransaction. Also raises what `Client.claim` and `Claim.complete` raise; work that is done is never
    released, even if its result cannot be encoded.
    """
    if (encode is None) is not (decode is None):
        raise ValueError("give both encode and decode, or neither")
    options = {"ttl": ttl, "namespace": namespace, "wait": wait, "on_error": on_error}
    guard = _Guard(key, fingerprint, options, retention, on_duplicate, encode, decode)

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        awaits = inspect.iscoroutinefunction(function)
        if awaits and isinstance(client, aio.Client):
            return cast("Callable[P, R]", _awaiting(client, guard, function))
        if not awaits and isinstance(client, Client):
            return cast("Callable[P, R]", _blocking(client, guard, function))
        wanted = "dedup.aio.Client" if awaits else "dedup.Client"
        raise TypeError(f"`once` wants a {wanted} for {function!r}")

    return decorate


@dataclass(frozen=True, slots=True)
class _Guard:
    """What is the same for functions that block and for those that await."""

    key: Callable[..., str]
    fingerprint: Callable[..., bytes] | None
    options: dict[str, Any]
    retention: Span | None
    on_duplicate: Callable[[DuplicateTransaction], object] | None
    encode: Callable[[Any], bytes] | None
    decode: Callable[[bytes], object] | None

    def claim_options(self, *args: object, **kwargs: object) -> dict[str, Any]:
        """Return the arguments of `claim` for one call of the function."""
        digest = self.fingerprint(*args, **kwargs) if self.fingerprint is not None else b""
        return {"transaction_id": self.key(*args, **kwargs), "fingerprint": digest, **self.options}

    def finish(self, claim: Handle, value: object) -> None:
        """Prepare the completion of work that is done; when that fails, the caller completes it without a result."""
        claim.retention = self.retention
        if self.encode is not None:
            claim.result = self.encode(value)

    def answer(self, duplicate: DuplicateTransaction) -> object:
        """Return what a duplicate is told, or raise."""
        if self.decode is not None and duplicate.holder.completed:
            return self.decode(duplicate.holder.result)
        if self.on_duplicate is not None:
            return self.on_duplicate(duplicate)
        raise duplicate


def _blocking(client: Client, guard: _Guard, function: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(function)
    def run(*args: object, **kwargs: object) -> object:
        try:
            claim = client.claim(**guard.claim_options(*args, **kwargs))
        except DuplicateTransaction as duplicate:
            return guard.answer(duplicate)
        with claim:
            value = function(*args, **kwargs)
            try:
                guard.finish(claim, value)
            except Exception:
                claim.complete()
                raise
        return value

    return run


def _awaiting(client: aio.Client, guard: _Guard, function: Callable[..., Any]) -> Callable[..., object]:
    @functools.wraps(function)
    async def run(*args: object, **kwargs: object) -> object:
        try:
            claim = await client.claim(**guard.claim_options(*args, **kwargs))
        except DuplicateTransaction as duplicate:
            found = guard.answer(duplicate)
            return await found if inspect.isawaitable(found) else found
        async with claim:
            value = await function(*args, **kwargs)
            try:
                guard.finish(claim, value)
            except Exception:
                await claim.complete()
                raise
        return value

    return run
