"""The real service with one protection taken out: `python -m chaos.mutants NAME serve …`.

What each mutation shows itself by:

- `any-token-holds`: the token compare of a claim is gone, so that whoever meets work in progress is told to go.
- `no-token-holds`: the compare never matches, so that a retry is told that it is a duplicate of itself.
- `any-token-ends`: the token compare of the scripts is gone, so that whoever was refused can end the claim of another.
- `no-nx`: SET without NX. The store still answers with the holder of before, so all but the first are refused, and the
  claim of a refused one replaces that of the holder.
- `check-then-set`: a read, then a write, which is how this service's ancestor paid twice.
- `client-retries`: a command is sent again after a lost connection, as the Redis client does by default. With the token
  in the value a resent claim finds itself and is told CLAIMED, if as a replay of nothing; but a resent release finds
  nothing and says NOT_HELD of a claim that it has just ended.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from dedup_service import cli
from dedup_service.claims import Applied, ClaimAnswer, StoreUnavailable, Transaction, service
from dedup_service.stores.redis.scripts import Script
from dedup_service.stores.redis.store import RedisStore
from dedup_service.stores.registry import redis_store, stored_value

_decide = service.decide


def _any_token_holds() -> None:
    def decide(claim: Transaction, token: str, holder: Transaction | None) -> ClaimAnswer:
        return _decide(claim, token, holder and holder._replace(claim_token=token))

    service.decide = decide


def _no_token_holds() -> None:
    def decide(claim: Transaction, token: str, holder: Transaction | None) -> ClaimAnswer:
        return _decide(claim, token, holder and holder._replace(claim_token="nobody"))

    service.decide = decide


def _any_token_ends() -> None:
    for name in ("COMPLETE", "RELEASE"):
        text = getattr(redis_store, name).text.replace(b"fields[2] ~= token", b"false")
        # A name that Redis does not know makes the store send the text.
        setattr(redis_store, name, Script(text, "0" * 40))


def _no_nx() -> None:
    async def claim(self: RedisStore, claim: Transaction, ttl_ms: int | None) -> Transaction | None:
        key = self._key(claim.namespace, claim.transaction_id)
        expiry = self._expiry(ttl_ms, claim.expire_time_ms)
        reply = await self._execute(key, "SET", key, stored_value.encode(claim), "GET", *expiry)
        return reply and stored_value.decode(reply, claim.namespace, claim.transaction_id)

    RedisStore.claim = claim  # type: ignore[method-assign]


def _check_then_set() -> None:
    async def claim(self: RedisStore, claim: Transaction, ttl_ms: int | None) -> Transaction | None:
        key = self._key(claim.namespace, claim.transaction_id)
        if reply := await self._execute(key, "GET", key):
            return stored_value.decode(reply, claim.namespace, claim.transaction_id)
        await self._execute(key, "SET", key, stored_value.encode(claim), *self._expiry(ttl_ms, claim.expire_time_ms))
        return None

    RedisStore.claim = claim  # type: ignore[method-assign]


def _client_retries() -> None:
    for name in ("_execute", "_write"):
        setattr(RedisStore, name, _resending(getattr(RedisStore, name)))


def _resending(send: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def resend(self: RedisStore, key: bytes, *command: bytes | str | int) -> Any:
        for _ in range(10):
            try:
                return await send(self, key, *command)
            except StoreUnavailable as failure:
                if failure.applied is Applied.NO and failure.reason != "STORE_UNREACHABLE":
                    raise
            await asyncio.sleep(0.05)
        return await send(self, key, *command)

    return resend


MUTATIONS: dict[str, Callable[[], None]] = {
    "any-token-holds": _any_token_holds,
    "no-token-holds": _no_token_holds,
    "any-token-ends": _any_token_ends,
    "no-nx": _no_nx,
    "check-then-set": _check_then_set,
    "client-retries": _client_retries,
}


if __name__ == "__main__":
    MUTATIONS[sys.argv.pop(1)]()
    cli.main()
