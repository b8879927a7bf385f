"""The service with one protection removed: `python -m tests.stress.chaos.mutants NAME serve …`.

- `any-token-holds`: a claim does not compare tokens. Every claim of work in progress receives CLAIMED.
- `no-token-holds`: the comparison never matches. A retry receives DUPLICATE of its own claim.
- `any-token-ends`: complete and release do not compare tokens. A duplicate can end the holder's claim.
- `any-token-extends`: nor does extend.
- `no-nx`: SET without NX. Redis still returns the previous holder, so later claims are duplicates, but each of them
  replaces the holder's claim.
- `check-then-set`: GET, then SET. The service that this one replaces paid twice this way.
- `client-retries`: a command is resent after a lost connection, which is the Redis client's default. A resent claim
  finds its own token and receives CLAIMED as a replay without an earlier attempt. A resent release finds nothing and
  receives NOT_HELD, although the first one released the claim.
- `extend-revives`: an extension claims again what was released or has expired.
- `extend-shortens`: an extension may shorten without permission.
- `wait-claims-nothing`: a duplicate that waited receives CLAIMED when the work has ended, without a claim.
- `batch-shifted`: each entry of a batch receives the result of the next one.
- `retention-forgotten`: a completed transaction keeps the end of its claim.
- `fingerprint-ignored`: another payload is a duplicate.
- `replay-after-completion`: a completed transaction is CLAIMED again by its own token.
- `release-completed`: a release also deletes a completed transaction.
- `stale-duplicates`: a server repeats for a second what it last answered to a duplicate.
- `no-replicas`: writes do not wait for replicas.
- `file-overwritten`: a claim in the SQLite file replaces the one before it.
"""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from dedup_service import cli
from dedup_service.claims import (
    Applied,
    ClaimAnswer,
    ClaimOutcome,
    ClaimRequest,
    ClaimService,
    Expiry,
    Extension,
    Reason,
    StoreUnavailable,
    Transaction,
    TransactionState,
    service,
    system_clock_ms,
)
from dedup_service.stores import stored_value
from dedup_service.stores.redis import scripts
from dedup_service.stores.redis.scripts import Script
from dedup_service.stores.redis.store import RedisStore
from dedup_service.stores.sqlite import store as sqlite
from dedup_service.stores.sqlite.store import SqliteStore

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
        _without(name, b"fields[2] ~= token")


def _without(name: str, check: bytes, instead: bytes = b"false") -> None:
    """Replace a check in a script."""
    script = getattr(scripts, name)
    assert check in script.text
    # Redis does not know this digest, so the store sends the text.
    setattr(scripts, name, Script(script.text.replace(check, instead), "0" * 40))


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


def _extend_revives() -> None:
    make, extend = RedisStore.claim, RedisStore.extend
    claims: dict[str | None, Transaction] = {}

    async def remember(self: RedisStore, claim: Transaction, expiry: Expiry) -> Transaction | None:
        claims[claim.claim_token] = claim
        return await make(self, claim, expiry)

    async def revive(self: RedisStore, extension: Extension) -> Transaction | None:
        extended, claimed = await extend(self, extension), claims.get(extension.claim_token)
        if extended is None and claimed is not None and await make(self, claimed, extension.expiry) is None:
            return claimed
        return extended

    RedisStore.claim, RedisStore.extend = remember, revive  # type: ignore[method-assign]


def _wait_claims_nothing() -> None:
    async def wait(
        self: ClaimService, request: ClaimRequest, admitted: service._Admitted, answer: ClaimAnswer
    ) -> ClaimAnswer:
        claim, _, token, _ = admitted
        await self._waiters.wait(claim.namespace, claim.transaction_id, request.wait_ms / 1_000)
        if await self._store.get(claim.namespace, claim.transaction_id) is None:
            return ClaimAnswer(ClaimOutcome.CLAIMED, claim, token)
        return answer

    ClaimService._wait_and_claim = wait  # type: ignore[method-assign]


def _batch_shifted() -> None:
    claim_all = RedisStore.claim_all

    async def shifted(
        self: RedisStore, claims: Sequence[tuple[Transaction, Expiry]]
    ) -> Sequence[Transaction | Exception | None]:
        results = await claim_all(self, claims)
        return [*results[1:], *results[:1]]

    RedisStore.claim_all = shifted  # type: ignore[method-assign]


def _fingerprint_ignored() -> None:
    def decide(claim: Transaction, token: str, holder: Transaction | None) -> ClaimAnswer:
        return _decide(claim._replace(payload_fingerprint=b""), token, holder)

    service.decide = decide


def _replay_after_completion() -> None:
    def decide(claim: Transaction, token: str, holder: Transaction | None) -> ClaimAnswer:
        own = holder is not None and holder.claim_token == token
        return _decide(claim, token, holder._replace(state=TransactionState.IN_PROGRESS) if holder and own else holder)

    service.decide = decide


def _stale_duplicates() -> None:
    make = RedisStore.claim
    known: dict[str, tuple[Transaction, float]] = {}

    async def cached(self: RedisStore, claim: Transaction, expiry: Expiry) -> Transaction | None:
        holder, until = known.get(claim.transaction_id, (None, 0.0))
        if holder is not None and time.monotonic() < until and holder.claim_token != claim.claim_token:
            return holder
        holder = await make(self, claim, expiry)
        if holder is not None:
            known[claim.transaction_id] = (holder, time.monotonic() + 1)
        return holder

    RedisStore.claim = cached  # type: ignore[method-assign]


def _no_replicas() -> None:
    def require(_self: RedisStore, acknowledged: object) -> None:
        pass

    RedisStore._require_replicas = require  # type: ignore[method-assign, assignment]


def _file_overwritten() -> None:
    async def claim(self: SqliteStore, claim: Transaction, expiry: Expiry) -> Transaction | None:
        row = (stored_value.encode(claim), sqlite._end(expiry, system_clock_ms()))
        held = await self._ask(claim.namespace, claim.transaction_id, lambda held, _: (held, row))
        return None if held is None else stored_value.decode(held, claim.namespace, claim.transaction_id)

    SqliteStore.claim = claim  # type: ignore[method-assign]


MUTATIONS: dict[str, Callable[[], None]] = {
    "any-token-holds": _any_token_holds,
    "no-token-holds": _no_token_holds,
    "any-token-ends": _any_token_ends,
    "any-token-extends": lambda: _without("EXTEND", b"fields[2] ~= token"),
    "no-nx": _no_nx,
    "check-then-set": _check_then_set,
    "client-retries": _client_retries,
    "extend-revives": _extend_revives,
    "extend-shortens": lambda: _without("EXTEND", b"allow_shortening ~= '1'"),
    "wait-claims-nothing": _wait_claims_nothing,
    "batch-shifted": _batch_shifted,
    "retention-forgotten": lambda: _without("COMPLETE", b"completed, expiry_option, expiry)", b"completed, 'KEEPTTL')"),
    "fingerprint-ignored": _fingerprint_ignored,
    "replay-after-completion": _replay_after_completion,
    "release-completed": lambda: _without("RELEASE", b"fields[6] ~= IN_PROGRESS"),
    "stale-duplicates": _stale_duplicates,
    "no-replicas": _no_replicas,
    "file-overwritten": _file_overwritten,
}


if __name__ == "__main__":
    MUTATIONS[sys.argv.pop(1)]()
    cli.main()
