"""Claims in one Redis or Valkey server: `SET key value NX GET PX` decides, one script a change compares the token."""

from typing import Any

import hiredis
import msgpack

from dedup_service.claims import (
    Applied,
    Completion,
    Extension,
    FieldViolation,
    InvalidRequest,
    Release,
    StoreUnavailable,
    Transaction,
    TransactionState,
    UnreadableValue,
    system_clock_ms,
)
from dedup_service.stores import stored_value
from dedup_service.stores.keys import KeyLayout
from dedup_service.stores.redis_link import RedisLink
from dedup_service.stores.redis_scripts import COMPLETE, EXTEND, RELEASE, Script

# What an error reply that begins with this word means; in each case Redis did not carry the command out.
_REFUSALS = {
    "OOM": ("STORE_OUT_OF_MEMORY", "Redis is out of memory: raise maxmemory or free some"),
    "READONLY": ("STORE_READ_ONLY", "Redis is a read-only replica: name the primary, or wait for the failover to end"),
    "LOADING": ("STORE_LOADING", "Redis is loading its data: wait"),
    "MASTERDOWN": ("STORE_MASTER_DOWN", "Redis is a replica that lost its primary"),
    "CLUSTERDOWN": ("STORE_CLUSTER_DOWN", "the Redis cluster does not serve this key now"),
    "NOAUTH": ("STORE_NOT_AUTHENTICATED", "Redis wants a password: put it into the store URL"),
    "NOPERM": ("STORE_NOT_PERMITTED", "the Redis user of the store URL lacks the right to this command or key"),
    "BUSY": ("STORE_BUSY", "Redis is busy with a script"),
    "MISCONF": ("STORE_MISCONFIGURED", "Redis refuses writes because it cannot save its data: see its log"),
    "NOREPLICAS": ("STORE_TOO_FEW_REPLICAS", "Redis has fewer replicas in order than min-replicas-to-write asks for"),
    "MOVED": ("STORE_MOVED", "Redis is a cluster, and this server does not hold the key"),
}

# After these a connection can stay wrong while a new one is right: the server behind the address has changed.
_STALE_AFTER = ("READONLY", "NOAUTH", "MASTERDOWN")


class RedisStore:
    """A ClaimStore on Redis >= 7.0 or Valkey >= 7.2.

    Guarantees: one command a claim, every key with an expiry, no command ever sent twice.
    """

    def __init__(self, link: RedisLink, key_layout: KeyLayout, description: str) -> None:
        self._link = link
        self._key = key_layout
        self._description = description
        # Redis' clock minus ours, as of the last check: an expire time must lie ahead by both clocks.
        self._clock_ahead_ms = 0

    @property
    def description(self) -> str:
        """Where the claims are, for people."""
        return self._description

    async def open(self) -> None:
        """Connect; see ClaimStore.open."""
        await self._link.open()

    async def close(self) -> None:
        """Disconnect; see ClaimStore.close."""
        await self._link.close()

    async def check(self) -> None:
        """Ask Redis for its time; see ClaimStore.check."""
        try:
            reply = await self._execute("TIME")
        except UnreadableValue as error:
            raise StoreUnavailable(error.reason, str(error), Applied.NO) from error
        seconds, microseconds = (int(part) for part in reply)
        self._clock_ahead_ms = seconds * 1000 + microseconds // 1000 - system_clock_ms()

    async def claim(self, claim: Transaction, ttl_ms: int | None) -> Transaction | None:
        """Store the claim unless its key is held; see ClaimStore.claim."""
        key = self._key(claim.namespace, claim.transaction_id)
        value = stored_value.encode(claim)
        reply = await self._execute("SET", key, value, "NX", "GET", *self._expiry(ttl_ms, claim.expire_time_ms))
        if reply is None:
            return None
        return stored_value.decode(_value(reply), claim.namespace, claim.transaction_id)

    async def complete(self, completion: Completion) -> Transaction | None:
        """Complete what the token holds; see ClaimStore.complete."""
        return await self._change(
            COMPLETE,
            completion,
            completion.result,
            _packed(completion.expire_time_ms),
            _packed(TransactionState.COMPLETED.value),
            _packed(completion.completion_time_ms),
            _packed(completion.result),
            *self._expiry(completion.ttl_ms, completion.expire_time_ms),
        )

    async def release(self, release: Release) -> bool:
        """Forget what the token holds; see ClaimStore.release."""
        key = self._key(release.namespace, release.transaction_id)
        return bool(await self._run(RELEASE, key, release.claim_token))

    async def extend(self, extension: Extension) -> Transaction | None:
        """Move the end of what the token holds; see ClaimStore.extend."""
        return await self._change(
            EXTEND,
            extension,
            _packed(extension.expire_time_ms),
            *self._expiry(extension.ttl_ms, extension.expire_time_ms),
            int(extension.allow_shortening),
        )

    async def get(self, namespace: str, transaction_id: str) -> Transaction | None:
        """Return the holder; see ClaimStore.get. Only a claim by an unknown holder costs a second command."""
        key = self._key(namespace, transaction_id)
        reply = await self._execute("GET", key)
        if reply is None:
            return None
        transaction = stored_value.decode(_value(reply), namespace, transaction_id)
        if transaction.claim_token is not None:
            return transaction
        expire_time_ms = await self._execute("PEXPIRETIME", key)
        if expire_time_ms == _NO_SUCH_KEY:
            return None
        return stored_value.unknown_holder(
            namespace, transaction_id, None if expire_time_ms == _NO_EXPIRY else int(expire_time_ms)
        )

    def _expiry(self, ttl_ms: int | None, expire_time_ms: int | None) -> tuple[str, int]:
        if ttl_ms is not None:
            return "PX", ttl_ms
        # Redis stores a key whose PXAT is past, forgets it at once and reports success: a claim that holds nothing.
        if expire_time_ms is None or expire_time_ms <= system_clock_ms() + self._clock_ahead_ms:
            raise InvalidRequest(FieldViolation("expire_time", "is in the past by the clock of Redis: send a ttl"))
        return "PXAT", expire_time_ms

    async def _change(
        self, script: Script, change: Completion | Extension, *arguments: bytes | str | int
    ) -> Transaction | None:
        key = self._key(change.namespace, change.transaction_id)
        reply = await self._run(script, key, change.claim_token, *arguments)
        if reply is None:
            return None
        return stored_value.decode(_value(reply), change.namespace, change.transaction_id)

    async def _run(self, script: Script, key: bytes, *arguments: bytes | str | int) -> Any:  # noqa: ANN401 - as _execute
        try:
            return await self._execute("EVALSHA", script.sha, 1, key, *arguments)
        except _ScriptForgotten:
            # Redis has certainly not run it, so this repeats nothing; EVAL makes Redis remember it again.
            return await self._execute("EVAL", script.text, 1, key, *arguments)

    async def _execute(self, *command: bytes | str | int) -> Any:  # noqa: ANN401 - what Redis may answer
        channel = self._link.channel or await self._link.connected()
        reply = await channel.send(*command)
        if type(reply) is hiredis.ReplyError:
            if str(reply).startswith("NOSCRIPT"):
                raise _ScriptForgotten
            failure = _error_of_reply(str(reply))
            if str(reply).startswith(_STALE_AFTER) and isinstance(failure, StoreUnavailable):
                channel.retire(failure)
            raise failure
        return reply


class _ScriptForgotten(Exception):
    """Redis does not know the script by its name: it restarted, or its scripts were flushed."""


# PEXPIRETIME's answers for a key that is not there, and for one that never expires.
_NO_SUCH_KEY = -2
_NO_EXPIRY = -1


def _value(reply: object) -> bytes:
    if isinstance(reply, bytes):
        return reply
    raise StoreUnavailable(
        "STORE_PROTOCOL_ERROR", "Redis answered with something else than a value: is a proxy between?", Applied.UNKNOWN
    )


def _packed(value: int | bytes) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed


def _error_of_reply(text: str) -> StoreUnavailable | UnreadableValue:
    word = text.partition(" ")[0]
    if word == "WRONGTYPE":
        return UnreadableValue(
            "KEY_OF_ANOTHER_TYPE",
            "the key of this transaction holds another type of Redis value: choose another key prefix or id",
        )
    if word in stored_value.UNREADABLE:
        return UnreadableValue(word, stored_value.UNREADABLE[word])
    if word in _REFUSALS:
        reason, sentence = _REFUSALS[word]
        return StoreUnavailable(reason, f"{sentence} ({word})", Applied.NO)
    # Not a word of Redis itself that we know, so a proxy may have said it after passing the command on. The rest of the
    # text may quote the command, and with it the token.
    return StoreUnavailable("STORE_ERROR", f"Redis answered with the error {word}", Applied.UNKNOWN)
