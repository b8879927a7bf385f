"""Claims in one Redis or Valkey server: `SET key value NX GET PX` decides, one script a change compares the token."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import hiredis
import msgpack

from dedup_service.claims import (
    Applied,
    Completion,
    Expiry,
    Extension,
    FieldViolation,
    InvalidRequest,
    Reason,
    Release,
    StoreNotice,
    StoreUnavailable,
    Transaction,
    TransactionState,
    UnreadableValue,
    system_clock_ms,
)
from dedup_service.stores import stored_value
from dedup_service.stores.keys import KeyLayout
from dedup_service.stores.redis.canary import RedisCanary
from dedup_service.stores.redis.channel import RedisChannel
from dedup_service.stores.redis.link import RedisLink
from dedup_service.stores.redis.nodes import RedisNodes
from dedup_service.stores.redis.quorum import Command
from dedup_service.stores.redis.replies import ScriptForgotten, checked, error_of_reply, value_of
from dedup_service.stores.redis.scripts import COMPLETE, CONFIRM, EXTEND, RELEASE, Script

# Followed rather than refused where the nodes know the way. Neither server has carried the command out.
_REDIRECTIONS = ("MOVED", "ASK")
_MAX_REDIRECTIONS = 5


class RedisStore:
    """A ClaimStore on Redis >= 7.0 or Valkey >= 7.2.

    Guarantees: one command a claim, every key with an expiry, no command ever sent twice.
    """

    def __init__(
        self, nodes: RedisNodes, key_layout: KeyLayout, description: str, *, canary: RedisCanary, min_replicas: int = 0
    ) -> None:
        self._nodes = nodes
        self._key = key_layout
        self._description = description
        self._canary = canary
        self._min_replicas = min_replicas
        # Redis' clock minus ours, as of the last check: an expire time must lie ahead by both clocks.
        self._clock_ahead_ms = 0

    @property
    def description(self) -> str:
        """Where the claims are, for people."""
        return self._description

    async def open(self) -> None:
        """Connect; see ClaimStore.open."""
        await self._nodes.open()

    async def close(self) -> None:
        """Disconnect; see ClaimStore.close."""
        await self._nodes.close()

    async def check(self) -> Sequence[StoreNotice]:
        """Ask every server for its time, and for what it should remember; see ClaimStore.check.

        A cluster of which some servers answer is one that serves: the others fail only the claims that they hold.
        """
        results = await asyncio.gather(
            *(self._check(mark, link) for mark, link in self._nodes.places()), return_exceptions=True
        )
        answers = [result for result in results if isinstance(result, int)]
        if not answers:
            raise next(result for result in results if isinstance(result, BaseException))
        # The clock that is furthest ahead: a claim may go to any of the servers.
        self._clock_ahead_ms = max(answers)
        return self._canary.take_notices()

    async def _check(self, mark: bytes, link: RedisLink) -> int:
        channel = link.channel or await link.connected()
        time = channel.send("TIME")
        self._canary.look(mark, link, channel)
        try:
            seconds, microseconds = (int(part) for part in checked(await time, channel))
        except UnreadableValue as error:
            raise StoreUnavailable(error.reason, str(error), Applied.NO) from error
        return seconds * 1000 + microseconds // 1000 - system_clock_ms()

    async def claim(self, claim: Transaction, expiry: Expiry) -> Transaction | None:
        """Store the claim unless its key is held; see ClaimStore.claim."""
        key, command = self._claim_command(claim, expiry)
        reply, acknowledged = await self._write(key, *command)
        if reply is None:
            self._require_replicas(acknowledged)
            return None
        holder = stored_value.decode(value_of(reply), claim.namespace, claim.transaction_id)
        if self._min_replicas and holder.claim_token == claim.claim_token:
            return await self._confirmed(key, claim, expiry, holder)
        return holder

    async def claim_all(self, claims: Sequence[tuple[Transaction, Expiry]]) -> Sequence[Transaction | Exception | None]:
        """Make many claims, which leave in one write; see ClaimStore.claim_all."""
        begun = [self._begin_claim(*one) for one in claims]
        try:
            # In turn: a task for each claim would cost as much as half of everything else about it.
            return [await self._end_claim(claim, one) for (claim, _), one in zip(claims, begun, strict=True)]
        except BaseException:
            for one in begun:
                if not isinstance(one, Exception):
                    _abandon(one.reply if isinstance(one, _Sent) else one)
            raise

    def _begin_claim(self, claim: Transaction, expiry: Expiry) -> "_Begun":
        """Send a claim at once where nothing has to be awaited before it or asked after it, or else make it a task."""
        try:
            key, command = self._claim_command(claim, expiry)
            link = self._nodes.link_of(key)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one claim, the others are made
            return error
        if link.channel is None or link.quorum is not None:
            return asyncio.ensure_future(self.claim(claim, expiry))
        return _Sent(key, command, link, link.channel, link.channel.send(*command))

    async def _end_claim(self, claim: Transaction, begun: "_Begun") -> Transaction | Exception | None:
        if isinstance(begun, Exception):
            return begun
        try:
            if not isinstance(begun, _Sent):
                return await begun
            reply = await begun.reply
            if type(reply) is hiredis.ReplyError:
                reply, _ = await self._follow(begun.key, begun.link, begun.channel, reply, begun.command)
            return reply and stored_value.decode(value_of(reply), claim.namespace, claim.transaction_id)
        except Exception as error:  # noqa: BLE001 - as above
            return error

    def _claim_command(self, claim: Transaction, expiry: Expiry) -> tuple[bytes, Command]:
        key = self._key(claim.namespace, claim.transaction_id)
        value = stored_value.encode(claim)
        return key, ("SET", key, value, "NX", "GET", *self._expiry(expiry))

    async def complete(self, completion: Completion) -> Transaction | None:
        """Complete what the token holds; see ClaimStore.complete."""
        return await self._change(
            COMPLETE,
            completion,
            completion.result,
            _packed(completion.expiry.time_ms),
            _packed(TransactionState.COMPLETED.value),
            _packed(completion.completion_time_ms),
            _packed(completion.result),
            *self._expiry(completion.expiry),
        )

    async def release(self, release: Release) -> bool:
        """Forget what the token holds; see ClaimStore.release."""
        key = self._key(release.namespace, release.transaction_id)
        # Too few replicas are no error here: a release that a failover forgets costs time, and never pays twice.
        released, _ = await self._run(RELEASE, key, release.claim_token)
        return bool(released)

    async def extend(self, extension: Extension) -> Transaction | None:
        """Move the end of what the token holds; see ClaimStore.extend."""
        return await self._change(
            EXTEND,
            extension,
            _packed(extension.expiry.time_ms),
            *self._expiry(extension.expiry),
            int(extension.allow_shortening),
        )

    async def get(self, namespace: str, transaction_id: str) -> Transaction | None:
        """Return the holder; see ClaimStore.get. Only a claim by an unknown holder costs a second command."""
        key = self._key(namespace, transaction_id)
        reply = await self._execute(key, "GET", key)
        if reply is None:
            return None
        transaction = stored_value.decode(value_of(reply), namespace, transaction_id)
        if transaction.claim_token is not None:
            return transaction
        expire_time_ms = await self._execute(key, "PEXPIRETIME", key)
        if expire_time_ms == _NO_SUCH_KEY:
            return None
        return stored_value.unknown_holder(
            namespace, transaction_id, None if expire_time_ms == _NO_EXPIRY else int(expire_time_ms)
        )

    def _expiry(self, expiry: Expiry) -> tuple[str, int]:
        if expiry.ttl_ms is not None:
            return "PX", expiry.ttl_ms
        # Redis stores a key whose PXAT is past, forgets it at once and reports success: a claim that holds nothing.
        if expiry.time_ms <= system_clock_ms() + self._clock_ahead_ms:
            raise InvalidRequest(FieldViolation("expire_time", "is in the past by the clock of Redis: send a ttl"))
        return "PXAT", expiry.time_ms

    async def _change(
        self, script: Script, change: Completion | Extension, *arguments: bytes | str | int
    ) -> Transaction | None:
        key = self._key(change.namespace, change.transaction_id)
        reply, acknowledged = await self._run(script, key, change.claim_token, *arguments)
        if reply is None:
            return None
        self._require_replicas(acknowledged)
        return stored_value.decode(value_of(reply), change.namespace, change.transaction_id)

    async def _confirmed(
        self, key: bytes, claim: Transaction, expiry: Expiry, holder: Transaction
    ) -> Transaction | None:
        """Return the holder, once replicas know it too: this try wrote nothing that a WAIT would answer for."""
        with _doubt_only():
            held, acknowledged = await self._run(CONFIRM, key, holder.claim_token or "")
        if not held:
            # It ended between the two commands.
            return await self.claim(claim, expiry)
        self._require_replicas(acknowledged)
        return holder

    def _require_replicas(self, acknowledged: Any) -> None:  # noqa: ANN401 - a reply of Redis
        if not self._min_replicas:
            return
        if type(acknowledged) is hiredis.ReplyError:
            failure = error_of_reply(str(acknowledged))
            raise StoreUnavailable(failure.reason, f"Redis refused WAIT: {failure}", Applied.UNKNOWN)
        if acknowledged < self._min_replicas:
            raise StoreUnavailable(
                Reason.STORE_NOT_REPLICATED,
                f"{acknowledged} of the {self._min_replicas} replicas that DEDUP_MIN_REPLICAS asks for acknowledged "
                "in time, so that a failover might forget it: try again with the same token",
                Applied.UNKNOWN,
            )

    async def _run(self, script: Script, key: bytes, *arguments: bytes | str | int) -> tuple[Any, Any]:
        try:
            return await self._write(key, "EVALSHA", script.sha, 1, key, *arguments)
        except ScriptForgotten:
            # Redis has certainly not run it, so this repeats nothing; EVAL makes Redis remember it again.
            return await self._write(key, "EVAL", script.text, 1, key, *arguments)

    async def _write(self, key: bytes, *command: bytes | str | int) -> tuple[Any, Any]:
        """Return the reply, and how many replicas acknowledged what was written if any have to (or Redis' refusal)."""
        link = self._nodes.link_of(key)
        channel = link.channel or await link.connected()
        acknowledged = None
        if link.quorum is None:
            reply = await channel.send(*command)
        else:
            reply, acknowledged = await link.quorum.send(*command)
        if type(reply) is not hiredis.ReplyError:
            return reply, acknowledged
        return await self._follow(key, link, channel, reply, command)

    async def _execute(self, key: bytes, *command: bytes | str | int) -> Any:  # noqa: ANN401 - what Redis may answer
        link = self._nodes.link_of(key)
        channel = link.channel or await link.connected()
        reply = await channel.send(*command)
        if type(reply) is not hiredis.ReplyError:
            return reply
        reply, _ = await self._follow(key, link, channel, reply, command)
        return reply

    async def _follow(
        self, key: bytes, link: RedisLink, channel: RedisChannel, reply: object, command: Command
    ) -> tuple[Any, Any]:
        """Send the command where a redirection points, which neither server has carried out; raise any other error."""
        acknowledged = None
        for _ in range(_MAX_REDIRECTIONS):
            if type(reply) is not hiredis.ReplyError:
                return reply, acknowledged
            word = str(reply).partition(" ")[0]
            target = self._nodes.redirected(key, link, str(reply)) if word in _REDIRECTIONS else None
            if target is None:
                break
            link, channel = target, target.channel or await target.connected()
            quorum = link.quorum
            # Without an await between them they arrive one after the other, which is how ASKING knows its command.
            sent = [channel.send("ASKING")] if word == "ASK" else []
            *_, reply = await asyncio.gather(*sent, channel.send(*command))
            if quorum is not None and type(reply) is not hiredis.ReplyError:
                with _doubt_only():
                    _, acknowledged = await quorum.send("TIME")
        return checked(reply, channel), acknowledged


class _Sent(NamedTuple):
    """A claim under way: its command, where that went, and the future of the reply."""

    key: bytes
    command: Command
    link: RedisLink
    channel: RedisChannel
    reply: asyncio.Future[Any]


_Begun = _Sent | asyncio.Task[Transaction | None] | Exception


def _abandon(future: asyncio.Future[Any]) -> None:
    """Let go of a future that nobody will await, without a complaint about what becomes of it."""
    if not future.cancel() and not future.cancelled():
        future.exception()


@contextmanager
def _doubt_only() -> Iterator[None]:
    """Turn "not applied" of what follows a write into doubt: the write itself was, or may have been, carried out."""
    try:
        yield
    except StoreUnavailable as error:
        raise StoreUnavailable(error.reason, str(error), Applied.UNKNOWN) from error


# PEXPIRETIME's answers for a key that is not there, and for one that never expires.
_NO_SUCH_KEY = -2
_NO_EXPIRY = -1


def _packed(value: int | bytes) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed
