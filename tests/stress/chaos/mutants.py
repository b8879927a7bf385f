"""The service with one protection removed: `python -m tests.stress.chaos.mutants NAME serve …`.

- `any-token-holds`: a claim does not compare tokens. Every claim of work in progress receives CLAIMED.
- `no-token-holds`: the comparison never matches. A retry receives DUPLICATE of its own claim.
- `any-token-ends`: the scripts do not compare tokens. A duplicate can end the holder's claim.
- `no-nx`: SET without NX. Redis still returns the previous holder, so later claims are duplicates, but each of them
  replaces the holder's claim.
- `check-then-set`: GET, then SET. The service that this one replaces paid twice this way.
- `client-retries`: a command is resent after a lost connection, which is the Redis client's default. A resent claim
  finds its own token and receives CLAIMED as a replay without an earlier attempt. A resent release finds nothing and
  receives NOT_HELD, although the first one released the claim.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from dedup_service import cli
from dedup_service.claims import Applied, ClaimAnswer, Expiry, Reason, StoreUnavailable, Transaction, service
from dedup_service.stores import stored_value
from dedup_service.stores.redis import scripts
from dedup_service.stores.redis.scripts import Script
from dedup_service.stores.redis.store import RedisStore

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
        text = getattr(scripts, name).text.replace(b"fields[2] ~= token", b"false")
        # Redis does not know this digest, so the store sends the text.
        setattr(scripts, name, Script(text, "0" * 40))


def _no_nx() -> None:
    async def claim(self: RedisStore, claim: Transaction, expiry: Expiry) -> Transaction | None:
        key = self._key(claim.namespace, claim.transaction_id)
        reply = await self._execute(
            key, "SET", key, stored_value.encode(claim), "GET", *scripts.expiry_arguments(expiry)
        )
        return reply and stored_value.decode(reply, claim.namespace, claim.transaction_id)

    RedisStore.claim = claim  # type: ignore[method-assign]


def _check_then_set() -> None:
    async def claim(self: RedisStore, claim: Transaction, expiry: Expiry) -> Transaction | None:
        key = self._key(claim.namespace, claim.transaction_id)
        if reply := await self._execute(key, "GET", key):
            return stored_value.decode(reply, claim.namespace, claim.transaction_id)
        await self._execute(key, "SET", key, stored_value.encode(claim), *scripts.expiry_arguments(expiry))
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
                if failure.applied is Applied.NO and failure.reason is not Reason.STORE_UNREACHABLE:
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
