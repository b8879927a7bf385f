"""A decorator that runs a function once for each key."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

from dedup import aio
from dedup.calls import Span
from dedup.client import Client
from dedup.errors import DuplicateTransaction
from dedup.handles import Handle, ReleaseOn

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
    release_on: ReleaseOn | None = None,
    keep_alive: bool = True,
    max_hold: Span | None = None,
    on_lost: Callable[[Any], None] | None = None,
    cancel_on_lost: bool = False,
    on_duplicate: Callable[[DuplicateTransaction], object] | None = None,
    encode: Callable[[Any], bytes] | None = None,
    decode: Callable[[bytes], object] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Run a function once for each key. Further calls with the same key are duplicates.

    `key` takes the call's arguments and returns its transaction id; `fingerprint` returns a digest of whatever else
    must be equal. Coroutine functions need an `aio.Client`, others a `Client`. The claim lives for `ttl` and is
    extended while the function runs, unless `keep_alive` is False. `retention` is how long it is remembered then.
    `release_on`, `max_hold`, `on_lost` and, for coroutine functions, `cancel_on_lost` are those of `Client.claim`.

    With `encode` and `decode` the first result is stored and returned to every duplicate of completed work. Other
    duplicates return the result of `on_duplicate` (awaited if the function is a coroutine function), or raise
    DuplicateTransaction.

    Raises what `Client.claim` and `Claim.complete` raise. Finished work is never released, even if encoding its result
    fails.
    """
    if (encode is None) is not (decode is None):
        raise ValueError("give both encode and decode, or neither")
    options: dict[str, Any] = {
        "ttl": ttl,
        "namespace": namespace,
        "wait": wait,
        "release_on": release_on,
        "keep_alive": keep_alive,
        "max_hold": max_hold,
        "on_lost": on_lost,
    }
    if isinstance(client, aio.Client):
        options["cancel_on_lost"] = cancel_on_lost
    elif cancel_on_lost:
        raise ValueError("cancel_on_lost needs a dedup.aio.Client: a thread cannot be cancelled")
    guard = _Guard(key, fingerprint, options, retention, on_duplicate, encode, decode)

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        awaits = inspect.iscoroutinefunction(function)
        if awaits and isinstance(client, aio.Client):
            return cast("Callable[P, R]", _awaiting(client, guard, function))
        if not awaits and isinstance(client, Client):
            return cast("Callable[P, R]", _blocking(client, guard, function))
        wanted = "dedup.aio.Client" if awaits else "dedup.Client"
        raise TypeError(f"`once` needs a {wanted} for {function!r}")

    return decorate


@dataclass(frozen=True, slots=True)
class _Guard:
    """The options of `once`."""

    key: Callable[..., str]
    fingerprint: Callable[..., bytes] | None
    options: dict[str, Any]
    retention: Span | None
    on_duplicate: Callable[[DuplicateTransaction], object] | None
    encode: Callable[[Any], bytes] | None
    decode: Callable[[bytes], object] | None

    def claim_options(self, *args: object, **kwargs: object) -> dict[str, Any]:
        """Return the arguments of `Client.claim` for one call."""
        digest = self.fingerprint(*args, **kwargs) if self.fingerprint is not None else b""
        return {"transaction_id": self.key(*args, **kwargs), "fingerprint": digest, **self.options}

    def finish(self, claim: Handle, value: object) -> None:
        """Prepare the completion of finished work. If this raises, the claim is completed without a result."""
        claim.retention = self.retention
        if self.encode is not None:
            claim.result = self.encode(value)

    def answer(self, duplicate: DuplicateTransaction) -> object:
        """Return the answer to a duplicate, or raise it."""
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
